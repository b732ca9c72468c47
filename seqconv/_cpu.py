"""The CPU kernels: packs tensors into plain integers for seqconv._C and lends it torch's threads."""

import ctypes
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

try:
    from seqconv import _C
except ImportError as error:
    _C = None
    missing = f"the compiled extension seqconv._C is not installed ({error})"
    text = f"seqconv: {missing}; fftconv takes torch.fft, slower: see python -m seqconv"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
else:
    missing = ""

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2, "relu": 3}
_ABSENT = (0, 0, 0, 0, 0, 0)


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


def _pack(t: Tensor | None, axes: tuple[int | None, ...]) -> tuple[int, ...]:
    """Address, dtype and the strides of (batch, head, channel, time); axes[i] is the tensor's axis or None."""
    if t is None:
        return _ABSENT
    stride = t.stride()
    return (t.data_ptr(), DTYPES[t.dtype], *[0 if axis is None else stride[axis] for axis in axes])


_SIGNAL = {3: (0, None, 1, 2), 4: (0, 1, 2, 3)}
_KERNEL = {2: (None, None, 0, 1), 3: (None, 0, 1, 2), 4: (0, 1, 2, 3)}
_SKIP = {1: (None, None, 0, None), 2: (None, 0, 1, None)}


def _pack_as(t: Tensor | None, table: dict) -> tuple[int, ...]:
    return _ABSENT if t is None else _pack(t, table[t.dim()])


def _materialise(t: Tensor | None) -> Tensor | None:
    """Real memory behind the pointer: lazily negated and lazily zero tensors have none of their own."""
    if t is None:
        return None
    if t.is_neg():
        t = t.resolve_neg()
    return t.clone() if t.data_ptr() == 0 and t.numel() else t


def _problem(u, k, k_rev, skip, pre_gate, post_gate, activation):
    batch, channels, length = u.shape
    flags = (k.dim() == 4) + 2 * (skip is not None and skip.dim() == 2)
    return (
        batch,
        1 if k.dim() == 2 else k.shape[-3],
        channels,
        length,
        min(k.shape[-1], length),
        0 if k_rev is None else min(k_rev.shape[-1], length - 1),
        flags,
        u.dtype == torch.float64,
        ACTIVATIONS[activation],
        torch.get_num_threads() if threaded else 1,  # a forked child takes one
        *_pack_as(u, _SIGNAL),
        *_pack_as(k, _KERNEL),
        *_pack_as(k_rev, _KERNEL),
        *_pack_as(skip, _SKIP),
        *_pack_as(pre_gate, _SIGNAL),
        *_pack_as(post_gate, _SIGNAL),
    )


def forward(y, u, k, k_rev, skip, pre_gate, post_gate, activation) -> None:
    """Writes y; see seqconv._ops for the shapes."""
    if y.numel() == 0:
        return
    tensors = [_materialise(t) for t in (u, k, k_rev, skip, pre_gate, post_gate)]
    _C.forward(*_problem(*tensors, activation), *_pack_as(y, _SIGNAL))


def backward(grads, dy, u, k, k_rev, skip, pre_gate, post_gate, activation) -> None:
    """Writes the gradients that are not None, in the order of the inputs."""
    du, dk, dk_rev, dskip, dpre_gate, dpost_gate = grads
    length = u.shape[-1]
    if dy.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    for grad, reach in ((dk, length), (dk_rev, length - 1)):
        if grad is not None:
            grad[..., reach:] = 0  # taps that reach no output
    dy, *tensors = [_materialise(t) for t in (dy, u, k, k_rev, skip, pre_gate, post_gate)]
    _C.backward(
        *_problem(*tensors, activation),
        *_pack_as(dy, _SIGNAL),
        *_pack_as(du, _SIGNAL),
        *_pack_as(dk, _KERNEL),
        *_pack_as(dk_rev, _KERNEL),
        *_pack_as(dskip, _SKIP),
        *_pack_as(dpre_gate, _SIGNAL),
        *_pack_as(dpost_gate, _SIGNAL),
    )
