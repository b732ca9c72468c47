"""The convolution of packed rows: sequences of any lengths one after another, without padding between them.

Row i has the steps [cu_seqlens[i], cu_seqlens[i + 1]) of u, and is convolved as if it stood alone. The operator takes
the offsets as a tensor, so that a compiled graph serves packs of all kinds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from seqconv.backends.inputs import CHANNEL_AXIS, Inputs
from seqconv.backends.offsets import offsets_of, on_one
from seqconv.ops.checks import FLOATS, casts, check_length, check_offsets, check_shape, check_tensor
from seqconv.ops.register import Operator, given
from seqconv.ops.sharding import SUM, on_all
from seqconv.ops.transforms import bwd_vmap, composed, fwd_vmap


class PackedInputs(NamedTuple):
    """As Inputs, without the axis of samples: u, pre_gate (channels, total); k, k_rev (channels, K), (heads, channels,
    K) or (rows, heads, channels, K); skip, bias (channels,) or (heads, channels); post_gate as the output, (channels,
    total), or (heads, channels, total) where k has heads. cu_seqlens (rows + 1,) in int32 or int64, anywhere."""

    u: Tensor
    k: Tensor
    k_rev: Tensor | None
    skip: Tensor | None
    pre_gate: Tensor | None
    post_gate: Tensor | None
    bias: Tensor | None
    cu_seqlens: Tensor


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


def _offsets_for(backend, inputs: PackedInputs, max_seqlen: int, checked: bool) -> tuple:
    """The offsets as the backend takes them; and behind them the steps of the longest row, if nobody checks it."""
    cu_seqlens, total = on_one(inputs.cu_seqlens), inputs.u.shape[-1]
    if max_seqlen >= 0 and backend.reads_offsets(cu_seqlens):
        return cu_seqlens.contiguous(), min(max_seqlen, total)
    return (offsets_of(cu_seqlens, total, None if checked or max_seqlen < 0 else max_seqlen),)


def _forward(backend, inputs: PackedInputs, activation, channels_last: bool, max_seqlen) -> Tensor:
    *dense, _ = inputs
    offsets, *longest = _offsets_for(backend, inputs, max_seqlen, checked=False)
    y = _empty_output(inputs, channels_last)
    if y.numel():
        backend.fftconv_packed(y, Inputs(*dense), offsets, activation, *longest)
    return y


def _gradients(backend, dy, inputs: PackedInputs, activation, channels_last, max_seqlen, wanted):
    *dense, _ = inputs
    offsets, *longest = _offsets_for(backend, inputs, max_seqlen, checked=True)
    grads = _empty_gradients(inputs, activation, channels_last, max_seqlen, wanted)
    if dy.numel():
        backend.fftconv_packed_gradients(
            Inputs(*grads[:-1]), dy, Inputs(*dense), offsets, activation, *longest
        )
        return grads
    return PackedInputs._make(grad if grad is None else grad.zero_() for grad in grads)


def _vmap(info, in_dims, *args):
    tensors, cu_seqlens, (_, *options) = args[:7], args[7], args[8:]
    _check_alike(in_dims[7])
    call = lambda *t: operator.fwd(*t, cu_seqlens, given((*t, cu_seqlens)), *options)  # noqa: E731
    return fwd_vmap(info, in_dims[:7], call, *tensors, packed=True)


def _gradients_vmap(info, in_dims, dy, *args):
    tensors, cu_seqlens, (_, *options) = args[:7], args[7], args[8:]
    _check_alike(in_dims[8])
    present = [want and t is not None for want, t in zip(options[-1], tensors, strict=False)]
    call = lambda dy, *t: operator.bwd(dy, *t, cu_seqlens, given((*t, cu_seqlens)), *options)[:7]  # noqa: E731
    grads, dims = bwd_vmap(info, in_dims[:8], call, present, dy, *tensors)
    return (*grads, dy.new_empty(info.batch_size, 0)), (*dims, 0)


def _check_alike(dim: int | None) -> None:
    if dim is not None:
        raise ValueError("fftconv: cu_seqlens must be the same for all calls of a vmap")


def ways_to_share(inputs, activation: str, batch: int) -> list[tuple]:
    """Those of dense calls too, but for samples; `batch` is the number of axes before those of heads and channels."""
    heads = len(inputs.k.shape) > 2
    rows = [(batch + heads, CHANNEL_AXIS._asdict()), (SUM, {"post_gate": SUM})]
    if heads:
        several = {"k": -3, "k_rev": -3, "post_gate": batch}
        for name in ("skip", "bias"):
            t = getattr(inputs, name)
            if t is not None and len(t.shape) == 2:
                several[name] = 0
        rows.append((batch, several))
    if activation == "none":
        kinds = [("u",), ("k", "k_rev", "skip")]
        if inputs.pre_gate is not None:
            kinds.append(("pre_gate",))
        rows += [(SUM, dict.fromkeys((*kind, "bias"), SUM)) for kind in kinds]
    return rows


operator = Operator(
    "fftconv_packed",
    PackedInputs,
    "str activation, bool channels_last, SymInt max_seqlen",
    _plain,
    forward=_forward,
    gradients=_gradients,
    empty=lambda inputs, activation, channels_last, *rest: _empty_output(inputs, channels_last),
    empty_gradients=_empty_gradients,
    vmap=_vmap,
    gradients_vmap=_gradients_vmap,
    shardings=lambda inputs, activation, *rest, ranks: ways_to_share(inputs, activation, 0),
)


def prepare(
    inputs: Inputs, cu_seqlens: Tensor, max_seqlen: int | None, layout: str
) -> PackedInputs:
    """Checks the shapes, and returns what the operator takes: blh as a view, gates in u's dtype."""
    u, k, k_rev, skip, pre_gate, post_gate, bias = inputs
    check_offsets("fftconv", cu_seqlens, u.device)
    if max_seqlen is not None:
        check_length("fftconv", max_seqlen, name="max_seqlen")
    elif torch.compiler.is_compiling() and cu_seqlens.device.type != "cpu":
        text = f"must be given inside of torch.compile for offsets on {cu_seqlens.device}"
        raise ValueError(f"fftconv: max_seqlen {text}, which it cannot read")
    axes = [("channels", None), ("total", None)]
    check_shape("fftconv", "u", u, tuple(axes if layout == "bhl" else axes[::-1]))
    channels, total = u.shape if layout == "bhl" else reversed(u.shape)
    c, t, rows = ("channels", channels), ("total", total), ("rows", cu_seqlens.shape[0] - 1)
    double = u.dtype == torch.float64
    dtypes = FLOATS if double else tuple(d for d in FLOATS if d != torch.float64)
    why = "" if double else " (no wider than float32 unless u is float64)"
    taps = ("K", None)
    check_tensor("fftconv", "k", k, dtypes=dtypes, device=u.device, why=why)
    check_shape(
        "fftconv", "k", k, (c, taps), (("heads", None), c, taps), (rows, ("heads", None), c, taps)
    )
    heads = (("heads", k.shape[-3]),) if k.dim() > 2 else ()
    for name, value in (("skip", skip), ("bias", bias)):
        if value is not None:
            check_tensor("fftconv", name, value, dtypes=dtypes, device=u.device)
            check_shape("fftconv", name, value, *([(c,), (*heads, c)] if heads else [(c,)]))
    if k_rev is not None:
        check_tensor("fftconv", "k_rev", k_rev, dtypes=dtypes, device=u.device)
        check_shape(
            "fftconv", "k_rev", k_rev, ([rows, *heads, c][-(k.dim() - 1) :] + [("K_rev", None)])
        )
    signals = [u]
    for name, gate, several in (("pre_gate", pre_gate, ()), ("post_gate", post_gate, heads)):
        if gate is not None:
            known = FLOATS if casts(u.device) else (u.dtype,)
            check_tensor("fftconv", name, gate, dtypes=known, device=u.device)
            check_shape(
                "fftconv", name, gate, (*several, c, t) if layout == "bhl" else (t, *several, c)
            )
            gate = gate.to(u.dtype)
        signals.append(gate)
    if layout == "blh":
        signals = [x if x is None else x.movedim(0, -1) for x in signals]
    u, pre_gate, post_gate = signals
    return PackedInputs(u, k, k_rev, skip, pre_gate, post_gate, bias, on_all(cu_seqlens, u))
