"""The CPU kernels: packs tensors into plain integers for seqconv._C and lends it torch's threads."""

import ctypes
import math
import os
import sys
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from seqconv.backends.pack import (
    ACTIVATIONS,
    KERNEL,
    SIGNAL,
    SKIP,
    materialise,
    pack,
    reach,
    zero_unreached,
)

try:
    from seqconv import _C
except ImportError as error:
    _C = None
    _folder = Path(__file__).resolve().parents[2]
    _why = f"does not load ({error})" if find_spec("seqconv._C") else "is not installed"
    missing = f"the compiled extension seqconv._C {_why}"
    if (_folder / "setup.py").exists():
        missing = (
            f"the compiled extension seqconv._C {_why} in the source folder {_folder}, which Python took for the "
            f"package: pip install --editable '{_folder}' builds it there; or start Python in another folder"
        )
    text = f"seqconv: {missing}; fftconv takes torch.fft, slower: see python -m seqconv"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
else:
    missing = ""


def _lend_threads() -> bool:
    """Hands torch's stable C function torch_parallel_for to the extension; without it, it runs serially."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        function = ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return False
    _C.set_parallel_for(function)
    return True


threaded = _C is not None and _lend_threads()
if (
    _C is not None
    and os.environ.get("SEQCONV_CPU_ISA")
    and not _C.set_isa(os.environ["SEQCONV_CPU_ISA"])
):
    raise ValueError(
        f"SEQCONV_CPU_ISA={os.environ['SEQCONV_CPU_ISA']} does not run on this processor or is unknown"
    )


def compiler() -> str:
    return _C.compiler()


def set_isa(name: str) -> bool:
    """False if the processor cannot run it."""
    return _C.set_isa(name)


def isa() -> str:
    return _C.isa()


def method(length: int, taps: int, taps_rev: int, double: bool) -> tuple[int, int]:
    """Points of one transform (0: a direct sum) and how many of them cover a row."""
    return _C.method(length, taps, taps_rev, double)


def threads() -> int:
    return torch.get_num_threads() if threaded and not _C.forked() else 1


def _problem(u, k, k_rev, skip, pre_gate, post_gate, activation):
    batch, channels, length = u.shape
    flags = (k.dim() == 4) + 2 * (skip is not None and skip.dim() == 2)
    return (
        batch,
        1 if k.dim() == 2 else k.shape[-3],
        channels,
        length,
        *reach(length, k, k_rev),
        flags,
        u.dtype == torch.float64,
        ACTIVATIONS[activation],
        torch.get_num_threads() if threaded else 1,  # a forked child takes one
        *pack(u, SIGNAL),
        *pack(k, KERNEL),
        *pack(k_rev, KERNEL),
        *pack(skip, SKIP),
        *pack(pre_gate, SIGNAL),
        *pack(post_gate, SIGNAL),
    )


def forward(y, u, k, k_rev, skip, pre_gate, post_gate, activation) -> None:
    """Writes y; see seqconv.ops.operators for the shapes."""
    if y.numel() == 0:
        return
    tensors = [materialise(t) for t in (u, k, k_rev, skip, pre_gate, post_gate)]
    _C.forward(*_problem(*tensors, activation), *pack(y, SIGNAL))


def backward(grads, dy, u, k, k_rev, skip, pre_gate, post_gate, activation) -> None:
    """Writes the gradients that are not None, in the order of the inputs."""
    du, dk, dk_rev, dskip, dpre_gate, dpost_gate = grads
    if dy.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    zero_unreached(dk, dk_rev, u.shape[-1])
    dy, *tensors = [materialise(t) for t in (dy, u, k, k_rev, skip, pre_gate, post_gate)]
    _C.backward(
        *_problem(*tensors, activation),
        *pack(dy, SIGNAL),
        *pack(du, SIGNAL),
        *pack(dk, KERNEL),
        *pack(dk_rev, KERNEL),
        *pack(dskip, SKIP),
        *pack(dpre_gate, SIGNAL),
        *pack(dpost_gate, SIGNAL),
    )


def holds_butterfly(radices: tuple[int, ...]) -> bool:
    """Whether the kernels have such passes: of 16 points, and at most one, the last, of fewer."""
    last = radices[-1]
    return set(radices[:-1]) <= {16} and (last == 16 or (len(radices) > 1 and last in (2, 4, 8)))


@lru_cache(16)
def _twiddles(radices: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Of every pass but the last exp(-2 pi i p j / (r s)), real parts (s, r), then imaginary ones."""
    s, parts = math.prod(radices), []
    for radix in radices[:-1]:
        s //= radix
        p, j = (torch.arange(m, dtype=torch.float64) for m in (radix, s))
        turn = j[:, None] * p * (-2 * math.pi / (radix * s))
        parts += [turn.cos().flatten(), turn.sin().flatten()]
    return torch.cat(parts or [torch.zeros(2 * s)]).to(dtype)  # of a single pass none is read


def _butterfly(x, matrices, radices, *rest) -> None:
    asked = torch.get_num_threads() if threaded else 1
    sizes = (*x.shape, matrices.shape[0], math.prod(radices), x.dtype == torch.float64, asked)
    twiddles = _twiddles(radices, matrices.dtype)  # alive until the call is over
    _C.butterfly(*sizes, *pack(x, SIGNAL), matrices.data_ptr(), twiddles.data_ptr(), *rest)


def butterfly_forward(z, x, matrices, radices) -> None:
    """Writes z, contiguous; matrices contiguous, in z's dtype; see seqconv.ops.butterfly for the shapes."""
    _butterfly(x, matrices, radices, z.data_ptr())


def butterfly_backward(dx, dmatrices, dz, x, matrices, radices) -> None:
    """Writes dx and dmatrices; all but x and dx contiguous and in dz's dtype."""
    _butterfly(x, matrices, radices, dz.data_ptr(), *pack(dx, SIGNAL), dmatrices.data_ptr())


def _ssm_problem(k, a, w):
    heads, channels, modes, _ = w.shape
    asked = torch.get_num_threads() if threaded else 1
    sizes = (heads, channels, modes, k.shape[-1], k.dtype == torch.float32, asked)
    return (*sizes, a.data_ptr(), w.data_ptr())


def ssm_forward(k, a, w) -> None:
    """Writes k, contiguous; see seqconv.ops.modes for the shapes."""
    _C.ssm(*_ssm_problem(k, a, w), k.data_ptr())


def ssm_backward(da, dw, dk, a, w) -> None:
    """Writes da and dw, contiguous; dk may have any strides."""
    dk = materialise(dk)
    addresses = (da.data_ptr(), dw.data_ptr())
    _C.ssm(*_ssm_problem(dk, a, w), dk.data_ptr(), *dk.stride(), *addresses)
