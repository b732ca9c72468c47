"""The convolution of packed rows: sequences of any lengths one after another, without padding between them.

Row i has the steps [cu_seqlens[i], cu_seqlens[i + 1]) of u, and is convolved as if it stood alone. The operator takes
the offsets as a tensor, so that a compiled graph serves packs of all kinds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from seqconv.ops.checks import FLOATS, check_length, check_shape, check_tensor
from seqconv.ops.inputs import CHANNEL_AXIS, Inputs
from seqconv.ops.register import Operator, given
from seqconv.ops.sharding import SUM
from seqconv.ops.transforms import bwd_vmap, composed, fwd_vmap

OFFSETS = (torch.int32, torch.int64)


class PackedInputs(NamedTuple):
    """As Inputs, without the axis of samples: u, pre_gate (channels, total); k, k_rev (channels, K), (heads, channels,
    K) or (rows, heads, channels, K); skip (channels,) or (heads, channels); post_gate as the output, (channels,
    total), or (heads, channels, total) where k has heads. cu_seqlens (rows + 1,) in int32 or int64, anywhere."""

    u: Tensor
    k: Tensor
    k_rev: Tensor | None
    skip: Tensor | None
    pre_gate: Tensor | None
    post_gate: Tensor | None
    cu_seqlens: Tensor


def on_one(cu_seqlens) -> Tensor:
    """As a plain tensor: of a DTensor every process has all."""
    return cu_seqlens.to_local() if hasattr(cu_seqlens, "to_local") else cu_seqlens


def offsets_of(cu_seqlens: Tensor, total: int | None, max_seqlen: int | None = None) -> Tensor:
    """The offsets in int64 on the host, checked, but for their end if total is None. Waits for a GPU that has them."""
    offsets = on_one(cu_seqlens).to("cpu", torch.int64).contiguous()
    steps = offsets.diff()
    first, last = offsets[0].item(), offsets[-1].item()
    if first != 0:
        raise ValueError(f"fftconv: cu_seqlens[0] must be 0, got {first}")
    if len(steps) and steps.min() < 0:
        i = 1 + int((steps < 0).nonzero()[0])
        before, after = offsets[i - 1].item(), offsets[i].item()
        raise ValueError(
            f"fftconv: cu_seqlens[{i}] must be >= cu_seqlens[{i - 1}]={before}, got {after}"
        )
    if total is not None and last != total:
        text = f"must be the number of steps, {total}, got {last}"
        raise ValueError(f"fftconv: cu_seqlens[{len(offsets) - 1}] {text}")
    if max_seqlen is not None and len(steps) and steps.max() > max_seqlen:
        i = int((steps > max_seqlen).nonzero()[0])
        text = f"must be at least the length of every row, got {max_seqlen} and {steps[i]} steps in row {i}"
        raise ValueError(f"fftconv: max_seqlen {text}")
    return offsets


def _plain(inputs: PackedInputs, activation: str, channels_last: bool, max_seqlen: int) -> Tensor:
    *dense, cu_seqlens = inputs
    return composed(Inputs(*dense), activation, channels_last, max_seqlen, cu_seqlens)


def _empty(like: Tensor, shape, channels_last: bool) -> Tensor:
    """(channels, total) or (heads, channels, total); channels_last puts time outermost in memory."""
    if not channels_last:
        return like.new_empty(shape)
    return like.new_empty(shape[-1], *shape[:-1]).movedim(0, -1)


def _empty_output(inputs: PackedInputs, channels_last: bool) -> Tensor:
    heads = inputs.k.shape[-3:-2]
    return _empty(inputs.u, (*heads, *inputs.u.shape), channels_last)


def _empty_gradients(inputs: PackedInputs, activation, channels_last: bool, max_seqlen, wanted):
    grads = []
    for name, like, want in zip(inputs._fields, inputs, wanted, strict=True):
        if like is None or not want or name == "cu_seqlens":
            grads.append(None)
        elif name in ("u", "pre_gate", "post_gate"):
            grads.append(_empty(like, like.shape, channels_last))
        else:
            grads.append(torch.empty_like(like, memory_format=torch.contiguous_format))
    return PackedInputs(*grads)


def _forward(backend, inputs: PackedInputs, activation, channels_last: bool, max_seqlen) -> Tensor:
    *dense, cu_seqlens = inputs
    offsets = offsets_of(cu_seqlens, inputs.u.shape[-1], None if max_seqlen < 0 else max_seqlen)
    y = _empty_output(inputs, channels_last)
    if y.numel():
        backend.fftconv_packed(y, Inputs(*dense), offsets, activation)
    return y


def _gradients(backend, dy, inputs: PackedInputs, activation, channels_last, max_seqlen, wanted):
    *dense, cu_seqlens = inputs
    offsets = offsets_of(cu_seqlens, inputs.u.shape[-1])
    grads = _empty_gradients(inputs, activation, channels_last, max_seqlen, wanted)
    if dy.numel():
        backend.fftconv_packed_gradients(
            Inputs(*grads[:-1]), dy, Inputs(*dense), offsets, activation
        )
        return grads
    return PackedInputs._make(grad if grad is None else grad.zero_() for grad in grads)


def _vmap(info, in_dims, *args):
    tensors, cu_seqlens, (_, *options) = args[:6], args[6], args[7:]
    _check_alike(in_dims[6])
    call = lambda *t: operator.fwd(*t, cu_seqlens, given((*t, cu_seqlens)), *options)  # noqa: E731
    return fwd_vmap(info, in_dims[:6], call, *tensors, packed=True)


def _gradients_vmap(info, in_dims, dy, *args):
    tensors, cu_seqlens, (_, *options) = args[:6], args[6], args[7:]
    _check_alike(in_dims[7])
    present = [want and t is not None for want, t in zip(options[-1], tensors, strict=False)]
    call = lambda dy, *t: operator.bwd(dy, *t, cu_seqlens, given((*t, cu_seqlens)), *options)[:6]  # noqa: E731
    grads, dims = bwd_vmap(info, in_dims[:7], call, present, dy, *tensors)
    return (*grads, dy.new_empty(info.batch_size, 0)), (*dims, 0)


def _check_alike(dim: int | None) -> None:
    if dim is not None:
        raise ValueError("fftconv: cu_seqlens must be the same for all calls of a vmap")


def _shardings(inputs: PackedInputs, activation: str, *rest, ranks: int) -> list[tuple]:
    heads = len(inputs.k.shape) > 2
    rows = [(int(heads), CHANNEL_AXIS._asdict()), (SUM, {"post_gate": SUM})]
    if heads:
        several = {"k": -3, "k_rev": -3, "post_gate": 0}
        if inputs.skip is not None and len(inputs.skip.shape) == 2:
            several["skip"] = 0
        rows.append((0, several))
    if activation == "none":
        rows += [(SUM, {"u": SUM}), (SUM, {"pre_gate": SUM})]
        rows.append((SUM, {"k": SUM, "k_rev": SUM, "skip": SUM}))
    return rows


operator = Operator(
    "fftconv_packed",
    PackedInputs,
    "str activation, bool channels_last, int max_seqlen",
    _plain,
    forward=_forward,
    gradients=_gradients,
    empty=lambda inputs, activation, channels_last, *rest: _empty_output(inputs, channels_last),
    empty_gradients=_empty_gradients,
    vmap=_vmap,
    gradients_vmap=_gradients_vmap,
    shardings=_shardings,
)


def check_offsets(function: str, cu_seqlens, device: torch.device | None) -> None:
    """Requires offsets by their kind, on the CPU or on u's device; their values are checked where they are read."""
    check_tensor(function, "cu_seqlens", cu_seqlens, dtypes=OFFSETS)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        text = f"must be (rows + 1,), got {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{function}: cu_seqlens {text}")
    if device is not None and cu_seqlens.device.type != "cpu" and cu_seqlens.device != device:
        text = f"must be on the CPU or on the input's device {device}, got {cu_seqlens.device}"
        raise ValueError(f"{function}: cu_seqlens {text}")


def prepare(
    inputs: Inputs, cu_seqlens: Tensor, max_seqlen: int | None, layout: str
) -> PackedInputs:
    """Checks the shapes, and returns what the operator takes: blh as a view, gates in u's dtype."""
    u, k, k_rev, skip, pre_gate, post_gate = inputs
    check_offsets("fftconv", cu_seqlens, u.device)
    if max_seqlen is not None:
        check_length("fftconv", max_seqlen, name="max_seqlen")
    axes = [("channels", None), ("total", None)]
    check_shape("fftconv", "u", u, tuple(axes if layout == "bhl" else axes[::-1]))
    channels, total = u.shape if layout == "bhl" else reversed(u.shape)
    c, t, rows = ("channels", channels), ("total", total), ("rows", len(cu_seqlens) - 1)
    double = u.dtype == torch.float64
    dtypes = FLOATS if double else tuple(d for d in FLOATS if d != torch.float64)
    why = "" if double else " (no wider than float32 unless u is float64)"
    taps = ("K", None)
    check_tensor("fftconv", "k", k, dtypes=dtypes, device=u.device, why=why)
    check_shape(
        "fftconv", "k", k, (c, taps), (("heads", None), c, taps), (rows, ("heads", None), c, taps)
    )
    heads = (("heads", k.shape[-3]),) if k.dim() > 2 else ()
    if skip is not None:
        check_tensor("fftconv", "skip", skip, dtypes=dtypes, device=u.device)
        check_shape("fftconv", "skip", skip, *([(c,), (*heads, c)] if heads else [(c,)]))
    if k_rev is not None:
        check_tensor("fftconv", "k_rev", k_rev, dtypes=dtypes, device=u.device)
        check_shape(
            "fftconv", "k_rev", k_rev, ([rows, *heads, c][-(k.dim() - 1) :] + [("K_rev", None)])
        )
    signals = [u]
    for name, gate, several in (("pre_gate", pre_gate, ()), ("post_gate", post_gate, heads)):
        if gate is not None:
            cast = torch.is_autocast_enabled(u.device.type)
            check_tensor(
                "fftconv", name, gate, dtypes=FLOATS if cast else (u.dtype,), device=u.device
            )
            check_shape(
                "fftconv", name, gate, (*several, c, t) if layout == "bhl" else (t, *several, c)
            )
            gate = gate.to(u.dtype)
        signals.append(gate)
    if layout == "blh":
        signals = [x if x is None else x.movedim(0, -1) for x in signals]
    u, pre_gate, post_gate = signals
    return PackedInputs(u, k, k_rev, skip, pre_gate, post_gate, cu_seqlens)
