"""Everything that computes a long convolution here, behind one signature.

`make` returns a contender as a function of the tensors [u, k, skip, k_rev, pre_gate, post_gate], or None where the
contender does not do the case. It raises ImportError or OSError where the contender cannot be imported.
"""

import importlib.util
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import seqconv

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


SHORTEST = 32  # row of a pack


@dataclass(frozen=True)
class Case:
    """One call to measure."""

    mode: str = "causal"  # or two_sided, gated, heads; or packed, packed_equal: bench.micro.packed
    dtype: str = "float32"
    layout: str = "bhl"
    batch: int = 8
    channels: int = 1
    length: int = 1024
    taps: int = 0  # 0: as many as the length
    op: str = "forward"  # or forward+backward

    @classmethod
    def of(cls, row: dict) -> "Case":
        """Returns the case of a row of results."""
        return cls(**{f.name: row[f.name] for f in fields(cls)})

    @property
    def kernel_taps(self) -> int:
        return self.taps or self.length

    @property
    def heads(self) -> int:
        return 4 if self.mode == "heads" else 1

    @property
    def lengths(self) -> list[int]:
        """The steps of each row. Those of a pack are spread evenly in logarithms, from SHORTEST to the length."""
        if self.mode != "packed":
            return [self.length] * self.batch
        draw = random.Random(0)
        least = min(SHORTEST, self.length)
        shares = [(i + draw.random()) / self.batch for i in range(self.batch - 1)]
        lengths = [int(least * (self.length / least) ** share) for share in shares]
        lengths.append(self.length)
        draw.shuffle(lengths)
        return lengths

    @property
    def elements(self) -> int:
        return self.channels * sum(self.lengths)

    def __str__(self) -> str:
        words = [self.mode] if self.mode != "causal" else []
        words += [self.dtype] if self.dtype != "float32" else []
        words += [self.layout] if self.layout != "bhl" else []
        words += [f"K={self.taps}"] if self.taps else []
        shape = f"B={self.batch} H={self.channels} L={self.length}"
        return " ".join([shape, *words, "f+b" if self.op != "forward" else "forward"])

    def tensors(self, device: str) -> tuple[list[Tensor | None], Tensor | None]:
        """Returns [u, k, skip, k_rev, pre_gate, post_gate] and, if it is needed, the gradient of y. All are seeded."""
        # A GPU makes its own numbers: one thread of a CPU would take seconds.
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[self.dtype]

        def normal(*shape, scale=1.0, rows=False):
            x = (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)
            if rows and self.layout == "blh":
                return x.transpose(1, 2).contiguous()
            return x

        b, h, n, taps = self.batch, self.channels, self.length, self.kernel_taps
        scale = taps**-0.5
        heads = (self.heads,) if self.heads > 1 else ()
        gated = self.mode == "gated"
        u = normal(b, h, n, rows=True)
        k = normal(*heads, h, taps, scale=scale)
        skip = normal(h)
        k_rev = normal(h, taps, scale=scale) if self.mode == "two_sided" else None
        pre, post = (normal(b, h, n, rows=True) if gated else None for _ in range(2))
        inputs = [u, k, skip, k_rev, pre, post]
        if self.op == "forward":
            return inputs, None
        return inputs, normal(b, *heads, h, n) if heads else normal(b, h, n, rows=True)

    def flops(self) -> float:
        """Counts the operations of complex transforms, 5 n log2 n each, and of the products between them.

        A row is transformed once there and once back for each head, and the kernel once. Gradients have both again.
        """
        if self.mode == "packed":
            one = replace(self, mode="causal", batch=1)
            return sum(replace(one, length=length).flops() for length in self.lengths)
        n, taps = self.length, self.kernel_taps
        # A short kernel is convolved block by block.
        transform = 5 * n * math.log2(max(2, min(n, taps)))
        rows, kernels = self.batch * self.channels, self.heads * self.channels
        forward = rows * ((1 + self.heads) * transform + 8 * self.heads * n) + kernels * transform
        if self.op == "forward":
            return forward
        backward = rows * ((2 + self.heads) * transform + 16 * self.heads * n)
        return forward + backward + 2 * kernels * transform

    def bytes(self) -> int:
        """Counts the bytes that must be read or written at least once."""
        size = DTYPES[self.dtype].itemsize
        row = self.elements
        signals = row * (1 + self.heads + (2 if self.mode == "gated" else 0))
        kernels = self.heads * self.channels * self.kernel_taps
        kernels *= 2 if self.mode == "two_sided" else 1
        if self.op == "forward":
            return size * (signals + kernels)
        # The inputs are read again, with dy, and each input has a gradient.
        backward = signals + row * (1 + (2 if self.mode == "gated" else 0)) + 2 * kernels
        return size * (signals + kernels + backward)


def fft(u, k, skip, k_rev, pre_gate, post_gate, layout="bhl") -> Tensor:
    """The formulation of the S4 and Hyena code: transforms of 2 L points, a product, a crop."""
    dtype = u.dtype
    if layout == "blh":
        u, pre_gate, post_gate = (
            None if t is None else t.transpose(1, 2) for t in (u, pre_gate, post_gate)
        )
    if dtype in (torch.bfloat16, torch.float16):
        u, k, skip, k_rev, pre_gate, post_gate = (
            None if t is None else t.float() for t in (u, k, skip, k_rev, pre_gate, post_gate)
        )
    length = u.shape[-1]
    x = u if pre_gate is None else u * pre_gate
    if k_rev is not None:
        k = F.pad(k, (0, 2 * length - k.shape[-1])) + F.pad(
            k_rev.flip(-1), (2 * length - k_rev.shape[-1], 0)
        )
    k_f = torch.fft.rfft(k, n=2 * length)
    u_f = torch.fft.rfft(x, n=2 * length)
    if k.dim() == 3:
        u_f, x = u_f.unsqueeze(1), x.unsqueeze(1)
    y = torch.fft.irfft(u_f * k_f, n=2 * length)[..., :length] + x * skip[:, None]
    if post_gate is not None:
        y = y * post_gate
    y = y.to(dtype)
    return y.transpose(1, 2) if layout == "blh" else y


def _torch_compile(case: Case, device: str) -> Callable | None:
    if case.mode != "causal" or case.layout != "bhl":
        return None
    torch._dynamo.reset()  # after 8 lengths it would give up and run the plain function
    return torch.compile(fft, dynamic=False)


def _torch_compile_complex(case: Case, device: str) -> Callable | None:
    """The compiler with its complex wrapper, which makes real tensors of complex ones before it fuses."""
    if case.mode != "causal" or case.layout != "bhl":
        return None
    config = importlib.import_module("torch._functorch.config")
    if not hasattr(config, "enable_complex_wrapper"):
        raise ImportError(f"torch {torch.__version__} has no complex wrapper")
    torch._dynamo.reset()

    def in_parts(*tensors):  # code of its own: that of `fft` may be compiled without the wrapper
        return fft(*tensors)

    compiled = torch.compile(in_parts, dynamic=False)

    def run(*tensors):
        # At every call, for 16 microseconds: another contender's reset makes the next call compile again.
        with config.patch(enable_complex_wrapper=True):
            return compiled(*tensors)

    short, dy = replace(case, batch=1, channels=1, length=16, taps=0).tensors(device)
    try:
        run(*(t if t is None else t.requires_grad_(dy is not None) for t in short))
    except torch._dynamo.exc.TorchDynamoException as error:
        why = str(error).strip().splitlines()[:2][-1].split(";")[0]
        raise ImportError(f"torch {torch.__version__}'s complex wrapper: {why}") from error
    return run


def _seqconv(case: Case, device: str) -> Callable:
    def run(u, k, skip, k_rev, pre_gate, post_gate):
        gates = {"pre_gate": pre_gate, "post_gate": post_gate}
        return seqconv.fftconv(u, k, skip, k_rev=k_rev, layout=case.layout, **gates)

    return run


def _torch_fft(case: Case, device: str) -> Callable:
    return lambda *tensors: fft(*tensors, layout=case.layout)


def _conv1d(case: Case, device: str) -> Callable | None:
    plain = case.mode == "causal" and case.layout == "bhl" and case.op == "forward"
    if not plain or case.dtype in ("bfloat16", "float16") or case.kernel_taps > 256:
        return None  # takes minutes where it has no fast path

    def run(u, k, skip, *_):
        taps = k.shape[-1]
        padded = F.pad(u, (taps - 1, 0))
        return F.conv1d(padded, k.flip(-1)[:, None], groups=len(k)) + skip[:, None] * u

    return run


def _numpy_case(case: Case, device: str) -> bool:
    plain = case.mode == "causal" and case.layout == "bhl" and case.op == "forward"
    return plain and device == "cpu" and case.dtype in ("float32", "float64")


def _as_numpy(function) -> Callable:
    def run(u, k, skip, *_):
        u, k, skip = u.numpy(), k.numpy(), skip.numpy()
        return torch.from_numpy(function(u, k) + u * skip[:, None])

    return run


def _scipy_oaconvolve(case: Case, device: str) -> Callable | None:
    if not _numpy_case(case, device) or torch.get_num_threads() > 1:
        return None
    from scipy.signal import oaconvolve

    length = case.length
    return _as_numpy(lambda u, k: oaconvolve(u, k[None], axes=-1)[..., :length])


def _scipy_fft(case: Case, device: str) -> Callable | None:
    if not _numpy_case(case, device):
        return None
    from scipy import fft as sp

    length, workers = case.length, torch.get_num_threads()
    n = sp.next_fast_len(length + case.kernel_taps - 1, real=True)

    def run(u, k):
        product = sp.rfft(u, n, workers=workers) * sp.rfft(k, n, workers=workers)
        return sp.irfft(product, n, workers=workers)[..., :length]

    return _as_numpy(run)


def _ducc0(case: Case, device: str) -> Callable | None:
    if not _numpy_case(case, device):
        return None
    import ducc0
    import numpy as np

    length, threads = case.length, torch.get_num_threads()
    n = ducc0.fft.good_size(length + case.kernel_taps - 1, True)

    def spectrum(x):
        padded = np.zeros((*x.shape[:-1], n), x.dtype)
        padded[..., : x.shape[-1]] = x
        return ducc0.fft.r2c(padded, axes=(-1,), nthreads=threads)

    def run(u, k):
        product = spectrum(u)
        product *= spectrum(k)
        y = ducc0.fft.c2r(product, axes=(-1,), lastsize=n, forward=False, inorm=2, nthreads=threads)
        return y[..., :length]

    return _as_numpy(run)


def _pyfftw(case: Case, device: str) -> Callable | None:
    if not _numpy_case(case, device):
        return None
    import pyfftw

    length, n, threads = case.length, 2 * case.length, torch.get_num_threads()
    real, half = case.dtype, "complex128" if case.dtype == "float64" else "complex64"
    rows = (case.batch * case.channels, n)
    x, x_f = (pyfftw.empty_aligned(rows, real), pyfftw.empty_aligned((rows[0], length + 1), half))
    h, h_f = (
        pyfftw.empty_aligned((case.channels, n), real),
        pyfftw.empty_aligned((case.channels, length + 1), half),
    )
    options = {"axes": (1,), "threads": threads, "planning_timelimit": 5}
    measure = ("FFTW_MEASURE", "FFTW_DESTROY_INPUT")
    to_x = pyfftw.FFTW(x, x_f, flags=measure, **options)
    to_h = pyfftw.FFTW(h, h_f, flags=measure, **options)
    back = pyfftw.FFTW(x_f, x, direction="FFTW_BACKWARD", flags=measure, **options)

    def run(u, k):
        x[:, length:] = 0
        x[:, :length] = u.reshape(len(x), length)
        h[:, k.shape[-1] :] = 0
        h[:, : k.shape[-1]] = k
        to_x()
        to_h()
        x_f.reshape(case.batch, case.channels, -1)[...] *= h_f
        back()
        return x[:, :length].reshape(u.shape)

    return _as_numpy(run)


def _flashfftconv(case: Case, device: str) -> Callable | None:
    if device == "cpu" or case.mode not in ("causal", "gated") or case.layout != "bhl":
        return None
    if case.dtype not in ("bfloat16", "float16") or case.length & (case.length - 1):
        return None
    from flashfftconv import FlashFFTConv

    conv = FlashFFTConv(2 * case.length, dtype=DTYPES[case.dtype]).to(device)

    def run(u, k, skip, k_rev, pre_gate, post_gate):
        y = conv(u, k.float(), *(() if pre_gate is None else (pre_gate, post_gate)))
        x = u if pre_gate is None else u * pre_gate
        return y + (x * skip[:, None] if post_gate is None else x * skip[:, None] * post_gate)

    return run


def _subquadratic_ops(case: Case, device: str) -> Callable | None:
    if device == "cpu" or case.mode != "causal" or case.layout != "bhl":
        return None
    from subquadratic_ops_torch.fft_causal_conv1d import fft_causal_conv1d

    return lambda u, k, skip, *_: fft_causal_conv1d(u, k) + u * skip[:, None]


def _nvsubquadratic(case: Case, device: str) -> Callable | None:
    if case.mode != "causal" or case.layout != "bhl":
        return None
    from nvsubquadratic.ops.fftconv import fftconv1d_bhl

    return lambda u, k, skip, *_: fftconv1d_bhl(u, k[None], skip)


def _nvmath_tile(case: Case, device: str) -> Callable | None:
    plain = case.mode == "causal" and case.layout == "bhl" and case.op == "forward"
    power = case.length > 0 and not case.length & (case.length - 1)
    if device == "cpu" or not plain or not power or case.kernel_taps > case.length:
        return None
    from bench.micro import nvmath_tile

    if case.dtype == "float64" or case.length > nvmath_tile.LONGEST:
        return None
    return lambda u, k, skip, *_: nvmath_tile.causal(u, k) + u * skip[:, None]


# name -> (package that must be there, maker)
CONTENDERS: dict[str, tuple[str, Callable[[Case, str], Callable | None]]] = {
    "seqconv": ("seqconv", _seqconv),
    "torch.fft": ("torch", _torch_fft),
    "torch.compile": ("torch", _torch_compile),
    "torch.compile+complex": ("torch", _torch_compile_complex),
    "conv1d": ("torch", _conv1d),
    "scipy.fft": ("scipy", _scipy_fft),
    "oaconvolve": ("scipy", _scipy_oaconvolve),
    "ducc0": ("ducc0", _ducc0),
    "pyfftw": ("pyfftw", _pyfftw),
    "flashfftconv": ("flashfftconv", _flashfftconv),
    "subquadratic_ops": ("subquadratic_ops_torch", _subquadratic_ops),
    "nvsubquadratic": ("nvsubquadratic", _nvsubquadratic),
    "nvmath.tile": ("nvmath", _nvmath_tile),
}
BASELINE = "torch.fft"
COMPILED = ("torch.compile", "torch.compile+complex")
# where they are compared
ON_GPU = ("flashfftconv", "subquadratic_ops", "nvsubquadratic", "nvmath.tile")
FAST = ("scipy.fft", "oaconvolve", "ducc0", "pyfftw")  # the other fast ones on a CPU


def missing() -> list[str]:
    """Returns the contenders whose package is not installed."""
    return [
        n for n, (package, _) in CONTENDERS.items() if importlib.util.find_spec(package) is None
    ]


def make(name: str, case: Case, device: str) -> Callable[[list], Tensor] | None:
    """Returns the contender's function of `case.tensors(device)[0]`, or None if it does not do the case."""
    function = CONTENDERS[name][1](case, device)
    return None if function is None else (lambda tensors: function(*tensors))
