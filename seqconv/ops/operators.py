"""The operators torch knows: seqconv::fftconv_fwd and seqconv::fftconv_bwd, their fakes and batching rules.

Shapes, on every device: u, pre_gate (batch, channels, length); k, k_rev (channels, K), (heads,
channels, K) or (batch, heads, channels, K); skip (channels,) or (heads, channels); post_gate, y
(batch, channels, length), or (batch, heads, channels, length) where k has heads. `channels_last`
lays y out in memory as (batch, length, ..., channels). Arguments arrive validated. No tensor is
complex, and no gradient is defined here (see transforms.py).
"""

import os

import torch
from torch import Tensor

from seqconv import reference
from seqconv.backends import cpu, cuda

library = torch.library.Library("seqconv", "DEF")
library.define(
    "fftconv_fwd(Tensor u, Tensor k, Tensor? k_rev, Tensor? skip, Tensor? pre_gate, Tensor? post_gate, "
    "str activation, bool channels_last) -> Tensor"
)
library.define(
    "fftconv_bwd(Tensor dy, Tensor u, Tensor k, Tensor? k_rev, Tensor? skip, Tensor? pre_gate, Tensor? post_gate, "
    "str activation, bool channels_last, bool[6] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
fwd = torch.ops.seqconv.fftconv_fwd.default
bwd = torch.ops.seqconv.fftconv_bwd.default

_asked = os.environ.get("SEQCONV_BACKEND", "")
if _asked not in ("", "reference"):
    raise ValueError(f"SEQCONV_BACKEND must be 'reference' or unset, got {_asked!r}")
forced_reference = _asked == "reference"


def fallback_reason(
    device: torch.device, dtype: torch.dtype = torch.float32, length: int = 1
) -> str | None:
    """Why a call on this device takes torch.fft instead of a fused kernel; None if it does not."""
    if forced_reference:
        return "SEQCONV_BACKEND=reference asks for it"
    kind = device.type
    if kind == "cpu":
        return cpu.missing or None
    if kind == "cuda":
        return cuda.reason(device, dtype, length)
    return f"there is no fused kernel for device type {kind!r}"


def _empty(like: Tensor, shape, channels_last: bool) -> Tensor:
    """(batch, ..., channels, length); channels_last puts the channels innermost in memory."""
    if not channels_last:
        return like.new_empty(shape)
    strides, step = [1], 1
    for size in (*shape[-2:0:-1], shape[-1]):  # of channels, any heads, length; then batch
        step = step * max(size, 1)
        strides.append(step)
    channels_and_heads, length, batch = strides[:-2], strides[-2], strides[-1]
    return like.new_empty_strided(shape, (batch, *reversed(channels_and_heads), length))


def _empty_like(like: Tensor, channels_last: bool) -> Tensor:
    if channels_last:
        return _empty(like, like.shape, True)
    # in half of new_empty's time
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _empty_output(u: Tensor, k: Tensor, channels_last: bool) -> Tensor:
    if k.dim() == 2:
        return _empty_like(u, channels_last)
    batch, channels, length = u.shape
    return _empty(u, (batch, k.shape[-3], channels, length), channels_last)


_SIGNALS = (0, 4, 5)  # u, pre_gate and post_gate among the six inputs; the others are kernels


def _empty_gradients(inputs, channels_last: bool, wanted) -> list[Tensor | None]:
    """One tensor per input; None where none is wanted."""
    grads = []
    for i, (like, want) in enumerate(zip(inputs, wanted, strict=True)):
        if like is None or not want:
            grads.append(None)
        else:
            grads.append(_empty_like(like, channels_last and i in _SIGNALS))
    return grads


def _all_tensors(grads: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """As the schema has it: an empty tensor for a gradient that nobody wants."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


def _fwd_fused(u, k, k_rev, skip, pre_gate, post_gate, activation, channels_last):
    if fallback_reason(u.device, u.dtype, u.shape[-1]):
        return _fwd_reference(u, k, k_rev, skip, pre_gate, post_gate, activation, channels_last)
    y = _empty_output(u, k, channels_last)
    backend = cpu if u.is_cpu else cuda
    backend.forward(y, u, k, k_rev, skip, pre_gate, post_gate, activation)
    return y


def _gradients_fused(dy, u, k, k_rev, skip, pre_gate, post_gate, activation, channels_last, wanted):
    inputs = (u, k, k_rev, skip, pre_gate, post_gate)
    if fallback_reason(u.device, u.dtype, u.shape[-1]):
        return _gradients_reference(dy, *inputs, activation, channels_last, wanted)
    grads = _empty_gradients(inputs, channels_last, wanted)
    backend = cpu if u.is_cpu else cuda
    backend.backward(grads, dy, *inputs, activation)
    return grads


def _bwd_fused(dy, *rest):
    return _all_tensors(_gradients_fused(dy, *rest), dy)


def _fwd_reference(u, k, k_rev, skip, pre_gate, post_gate, activation, channels_last):
    y = _empty_output(u, k, channels_last)
    options = {
        "k_rev": k_rev,
        "pre_gate": pre_gate,
        "post_gate": post_gate,
        "activation": activation,
    }
    return y.copy_(reference.fftconv_fft(u, k, skip, **options))


def _gradients_reference(
    dy, u, k, k_rev, skip, pre_gate, post_gate, activation, channels_last, wanted
):
    inputs = (u, k, k_rev, skip, pre_gate, post_gate)
    grads = _empty_gradients(inputs, channels_last, wanted)
    if dy.numel() == 0:
        return [grad if grad is None else grad.zero_() for grad in grads]
    values = reference.backward(dy, *inputs, activation)
    for grad, value in zip(grads, values, strict=True):
        if grad is not None:
            grad.copy_(value)
    return grads


def _bwd_reference(dy, *rest):
    return _all_tensors(_gradients_reference(dy, *rest), dy)


def _fwd_fake(u, k, k_rev, skip, pre_gate, post_gate, activation, channels_last):
    return _empty_output(u, k, channels_last)


def _bwd_fake(dy, u, k, k_rev, skip, pre_gate, post_gate, activation, channels_last, wanted):
    inputs = (u, k, k_rev, skip, pre_gate, post_gate)
    return _all_tensors(_empty_gradients(inputs, channels_last, wanted), dy)


for _device in ("CPU", "CUDA"):
    library.impl("fftconv_fwd", _fwd_fused, _device)
    library.impl("fftconv_bwd", _bwd_fused, _device)
library.impl("fftconv_fwd", _fwd_reference, "CompositeExplicitAutograd")
library.impl("fftconv_bwd", _bwd_reference, "CompositeExplicitAutograd")
torch.library.register_fake("seqconv::fftconv_fwd", _fwd_fake, lib=library)
torch.library.register_fake("seqconv::fftconv_bwd", _bwd_fake, lib=library)


# Torch's dispatcher takes longer than all else around a kernel, twice so for operators in Python. Where nobody
# watches it, eager calls go past it.

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
below_autograd = torch._C._AutoDispatchBelowAutograd
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def _unwatched(tensors) -> bool:
    """Plain tensors of a device with kernels, and no mode, profiler or trace that must see the operator."""
    if not _PLAIN.issuperset(map(type, tensors)):
        return False
    if not (tensors[0].is_cpu or tensors[0].is_cuda):  # device.type takes five times as long
        return False
    return not (_modes() or torch.autograd._profiler_enabled() or torch.jit.is_tracing())


def forward(*args) -> Tensor:
    """fftconv_fwd of its arguments, whose derivative nobody asks the operator for."""
    if _unwatched(args[:6]):
        return _fwd_fused(*args)
    with below_autograd():
        return fwd(*args)


def gradients(*args) -> list[Tensor | None]:
    """fftconv_bwd of its arguments, None for what is not wanted; nobody asks for its own derivative."""
    if _unwatched(args[:7]):
        return _gradients_fused(*args)
    with below_autograd():
        grads = bwd(*args)
    return [g if want else None for g, want in zip(grads, args[-1], strict=True)]


# Batching. Convolutions of different channels never meet, so any mapped axis folds into the
# channels.


def _leading(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _fold(t: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """Moves the mapped dimension in front of `axis` (counted from the end) and merges the two."""
    if t is None:
        return None
    t = _leading(t, dim, size)
    axis += t.dim()
    return t.movedim(0, axis - 1).flatten(axis - 1, axis)


def _unfold(t: Tensor, size: int, axis: int) -> Tensor:
    axis += t.dim()
    return t.unflatten(axis, (size, t.shape[axis] // size)).movedim(axis, 0)


_CHANNEL_AXIS = (-2, -2, -2, -1, -2, -2)  # of u, k, k_rev, skip, pre_gate, post_gate


def _fold_all(tensors, in_dims, size):
    return [
        _fold(t, d, size, axis) for t, d, axis in zip(tensors, in_dims, _CHANNEL_AXIS, strict=False)
    ]


def _map_size(info) -> int:
    if info.batch_size == 0:
        raise ValueError("fftconv: vmap over an axis of size 0")
    return info.batch_size


def fwd_vmap(info, in_dims, call, *tensors):
    """call(u, k, k_rev, skip, pre_gate, post_gate) over one more axis; returns (y, axis) as torch's vmap rules do."""
    size = _map_size(info)
    if tensors[1].dim() == 4 or any(
        d is not None for i, d in enumerate(in_dims) if i not in _SIGNALS
    ):
        return _unfold(call(*_fold_all(tensors, in_dims, size)), size, -2), 0
    # Only the signals are mapped: they fold into the batch, and the kernel is transformed once.
    folded = list(tensors)
    for i in _SIGNALS:
        if i < len(folded) and folded[i] is not None:
            folded[i] = _leading(folded[i], in_dims[i], size).flatten(0, 1)
    y = call(*folded)
    return y.unflatten(0, (size, y.shape[0] // size)), 0


def bwd_vmap(info, in_dims, call, wanted, dy, *tensors):
    """The same for call(dy, u, k, ...), whose outputs are gradients or, where not wanted, empty."""
    size = _map_size(info)
    folded = _fold_all(tensors, in_dims[1:], size)
    grads = call(_fold(dy, in_dims[0], size, -2), *folded)
    out = [
        _unfold(g, size, axis) if want else g.new_empty(size, 0)
        for g, want, axis in zip(grads, wanted, _CHANNEL_AXIS, strict=False)
    ]
    return tuple(out), (0,) * len(out)


def _fwd_op_vmap(info, in_dims, *args):
    *tensors, activation, channels_last = args
    return fwd_vmap(info, in_dims[:6], lambda *t: fwd(*t, activation, channels_last), *tensors)


def _bwd_op_vmap(info, in_dims, *args):
    *tensors, activation, channels_last, wanted = args
    present = [want and t is not None for want, t in zip(wanted, tensors[1:], strict=True)]
    call = lambda *t: bwd(*t, activation, channels_last, wanted)  # noqa: E731
    return bwd_vmap(info, in_dims[:7], call, present, *tensors)


torch.library.register_vmap("seqconv::fftconv_fwd", _fwd_op_vmap, lib=library)
torch.library.register_vmap("seqconv::fftconv_bwd", _bwd_op_vmap, lib=library)
