"""The CPU kernels: packs tensors into plain integers for seqconv._C and lends it torch's threads."""

import ctypes
import math
import os
import sys
import warnings
from array import array
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from seqconv.backends.pack import (
    ABSENT,
    ACTIVATIONS,
    KERNEL,
    SIGNAL,
    SKIP,
    laid_out,
    pack,
    reach,
    reached,
    zero_unreached,
)
from seqconv.backends.protocol import Explanation, Request

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

name = "cpu"
always = frozenset() if missing else frozenset(("fftconv", "ssm"))


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


def why_not(request: Request) -> str | None:
    if missing or request.operator in always:
        return missing or None
    if request.operator != "butterfly":
        return f"there is no CPU kernel for {request.operator}"
    radices = tuple(request.options[0])
    return None if holds_butterfly(radices) else f"there are no CPU kernels for passes of {radices}"


def explain(request: Request) -> Explanation:
    if request.operator != "fftconv":
        return Explanation("cpu", "matrix product", None, 1, isa(), threads(), None)
    u, k, k_rev, *_ = request.inputs
    length = u.shape[-1]
    size, blocks = method(max(length, 1), *reach(length, k, k_rev), u.dtype == torch.float64)
    algorithm = "direct sum" if size == 0 else "right-angle fft"
    return Explanation("cpu", algorithm, size or None, blocks, isa(), threads(), None)


# ---- fftconv ----

_INPUTS = (SIGNAL, KERNEL, KERNEL, SKIP, SIGNAL, SIGNAL)  # u, k, k_rev, skip, pre_gate, post_gate
_TENSORS = (*_INPUTS, SIGNAL, *_INPUTS)  # and y or dy, and the gradients


@lru_cache(4096)
def _layout(activation: str, *known) -> bytes:
    """The first argument of _C.forward or _C.backward. `known` has everything of each tensor but where it lies."""
    (dtype, (batch, channels, length), _), (_, k, _), k_rev, skip, *_ = known
    flags = (len(k) == 4) + 2 * (skip is not None and len(skip[1]) == 2)
    taps = reached(length, k[-1], 0 if k_rev is None else k_rev[1][-1])
    numbers = [batch, 1 if len(k) == 2 else k[-3], channels, length, *taps]
    numbers += [flags, dtype == torch.float64, ACTIVATIONS[activation]]
    for one, table in zip(known, _TENSORS, strict=False):
        numbers += ABSENT[1:] if one is None else laid_out(one[0], one[2], table)
    return array("q", numbers).tobytes()


def _call(function, tensors: tuple, activation: str) -> None:
    """One loop over the tensors: around a short row Python's work takes longer than the kernel."""
    known, addresses = [], []
    for t in tensors:
        if t is None:
            known.append(None)
            addresses.append(0)
        else:
            known.append((t.dtype, t.shape, t.stride()))
            addresses.append(t.data_ptr())
    threads = torch.get_num_threads() if threaded else 1  # a forked child takes one
    function(_layout(activation, *known), threads, *addresses)


def fftconv(y: Tensor, inputs, activation: str) -> None:
    _call(_C.forward, (*inputs, y), activation)


def fftconv_gradients(grads, dy: Tensor, inputs, activation: str) -> None:
    length = dy.shape[-1]
    if inputs.k.shape[-1] > length or inputs.k_rev is not None:
        zero_unreached(grads.k, grads.k_rev, length)
    _call(_C.backward, (*inputs, dy, *grads), activation)


# ---- the learned butterfly ----


def holds_butterfly(radices: tuple[int, ...]) -> bool:
    """Whether the kernels have such passes: of 16 points, and at most one, the last, of fewer."""
    last = radices[-1]
    return set(radices[:-1]) <= {16} and (last == 16 or (len(radices) > 1 and last in (2, 4, 8)))


@lru_cache(16)
def _twiddles(radices: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of every pass but the last exp(-2 pi i p j / (r s)), real parts (s, r), then imaginary ones."""
    s, parts = math.prod(radices), []
    for radix in radices[:-1]:
        s //= radix
        p, j = (torch.arange(m, dtype=torch.float64) for m in (radix, s))
        turn = j[:, None] * p * (-2 * math.pi / (radix * s))
        parts += [turn.cos().flatten(), turn.sin().flatten()]
    return torch.cat(parts or [torch.zeros(2 * s)]).to(dtype)  # of a single pass none is read


def _butterfly(x: Tensor, matrices: Tensor, radices, *rest) -> None:
    asked = torch.get_num_threads() if threaded else 1
    sizes = (*x.shape, matrices.shape[0], math.prod(radices), x.dtype == torch.float64, asked)
    twiddles = _twiddles(radices, matrices.dtype)  # alive until the call is over
    _C.butterfly(*sizes, *pack(x, SIGNAL), matrices.data_ptr(), twiddles.data_ptr(), *rest)


def butterfly(z: Tensor, inputs, radices: tuple[int, ...]) -> None:
    matrices = inputs.matrices.to(z.dtype).contiguous()
    _butterfly(inputs.x, matrices, radices, z.data_ptr())


def butterfly_gradients(grads, dz: Tensor, inputs, radices: tuple[int, ...]) -> None:
    x, matrices = inputs.x, inputs.matrices
    dx, dmatrices = grads
    wide = torch.promote_types(x.dtype, torch.float32)
    dz, factors = (t.to(wide).contiguous() for t in (dz, matrices))
    sums = torch.empty_like(factors)
    _butterfly(x, factors, radices, dz.data_ptr(), *pack(dx, SIGNAL), sums.data_ptr())
    dmatrices.copy_(sums)


# ---- sums of exponentials ----


def _ssm(function_of: Tensor, inputs, *rest) -> None:
    a, w = inputs.a.contiguous(), inputs.w.contiguous()
    heads, channels, modes, _ = w.shape
    asked = torch.get_num_threads() if threaded else 1
    single = function_of.dtype == torch.float32
    sizes = (heads, channels, modes, function_of.shape[-1], single, asked)
    _C.ssm(*sizes, a.data_ptr(), w.data_ptr(), function_of.data_ptr(), *rest)


def ssm(k: Tensor, inputs) -> None:
    _ssm(k, inputs)


def ssm_gradients(grads, dk: Tensor, inputs) -> None:
    _ssm(dk, inputs, *dk.stride(), *[grad.data_ptr() for grad in grads])
