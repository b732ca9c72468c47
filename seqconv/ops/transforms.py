"""The road of functorch and forward mode to fftconv, and its batching rules.

The core y = k * u + skip u is linear in u and in (k, k_rev, skip), hence its derivatives of every
order are again such convolutions: `_Linear` and `_LinearBackward` are closed under differentiation.
Gates and activation around them are plain torch.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_map_only

from seqconv.backends.inputs import CHANNEL_AXIS, IS_SIGNAL, Inputs
from seqconv.ops.register import given, transforms_active
from seqconv.reference import activate


# The raw operators are looked up when they are called: they are registered later, by fftconv.py and packed.py, which
# import this file. Their options are channels_last, exact_causal and None; or, of packed rows, channels_last,
# max_seqlen and cu_seqlens.
def _fwd(tensors, activation: str, channels_last: bool, number: int, cu_seqlens: Tensor | None):
    if cu_seqlens is None:
        operator = torch.ops.seqconv.fftconv_fwd.default
    else:
        operator, tensors = torch.ops.seqconv.fftconv_packed_fwd.default, (*tensors, cu_seqlens)
    return operator(*tensors, given(tensors), activation, channels_last, number)


def _bwd(dy, tensors, activation: str, channels_last, number, cu_seqlens: Tensor | None, wanted):
    if cu_seqlens is None:
        operator = torch.ops.seqconv.fftconv_bwd.default
    else:
        operator, tensors = torch.ops.seqconv.fftconv_packed_bwd.default, (*tensors, cu_seqlens)
        wanted = (*wanted, False)
    return operator(dy, *tensors, given(tensors), activation, channels_last, number, wanted)


def composed(
    inputs: Inputs,
    activation: str,
    channels_last: bool,
    number: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The operator as torch elementwise operations around its linear core, at least in float32 as in the kernel."""
    u, k, k_rev, skip, pre_gate, post_gate, bias = inputs
    x, gate = u, post_gate
    if any(t is not None for t in (pre_gate, post_gate, bias)) or activation != "none":
        wide = torch.promote_types(u.dtype, torch.float32)
        x = u.to(wide) if pre_gate is None else u.to(wide) * pre_gate.to(wide)
        gate = post_gate if post_gate is None else post_gate.to(wide)
    v = _Linear.apply(x, k, k_rev, skip, channels_last, number, cu_seqlens)
    if bias is not None:
        v = v + bias.to(v.dtype).unsqueeze(-1)
    y = activate(v, activation)
    return (y if gate is None else y * gate).to(u.dtype)


def _nestable(rule):
    """A jvp rule whose result can be differentiated forward once more.

    torch calls the rules with forward-mode off at every level, so that an outer jvp would take the
    tangent for a constant. Here the rule runs one level down, with forward-mode on.
    """

    def jvp(ctx, *tangents):
        if not transforms_active():
            return rule(ctx, *tangents)
        interpreter = retrieve_current_functorch_interpreter()
        level, functorch = interpreter.level(), torch._C._functorch

        def lower(values):
            return tree_map_only(
                torch.Tensor, lambda t: functorch._unwrap_for_grad(t, level), values
            )

        saved, options = lower(tuple(ctx.saved_tensors)), lower(tuple(ctx.options))
        low = SimpleNamespace(saved_tensors=saved, options=options)
        with forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            out = rule(low, *lower(tangents))
        return tree_map_only(torch.Tensor, lambda t: functorch._wrap_for_grad(t, level), out)

    return staticmethod(jvp)


class _Linear(Function):
    """y = k * u (+ k_rev) + skip u."""

    @staticmethod
    def forward(u, k, k_rev, skip, channels_last, number, cu_seqlens):
        tensors = u, k, k_rev, skip, None, None, None
        return _fwd(tensors, "none", channels_last, number, cu_seqlens)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options = inputs[:4], inputs[4:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        wanted = tuple(ctx.needs_input_grad[:4])
        grads = _LinearBackward.apply(dy, *ctx.saved_tensors, *ctx.options, wanted)
        found = [g if want else None for g, want in zip(grads, wanted, strict=True)]
        return (*found, *[None] * len(ctx.options))

    @_nestable
    def jvp(ctx, du, dk, dk_rev, dskip, *_):
        u, k, k_rev, skip = ctx.saved_tensors
        y = _Linear.apply(du, k, k_rev, skip, *ctx.options)
        return y + _Linear.apply(u, dk, dk_rev, dskip, *ctx.options)

    @staticmethod
    def vmap(info, in_dims, u, k, k_rev, skip, *options):
        call = lambda u, k, k_rev, skip: _Linear.apply(u, k, k_rev, skip, *options)  # noqa: E731
        return fwd_vmap(info, in_dims[:4], call, u, k, k_rev, skip, packed=options[-1] is not None)


class _LinearBackward(Function):
    """Gradients of _Linear: du is linear in (dy, k), dk in (dy, u); the unwanted ones are empty tensors."""

    @staticmethod
    def forward(dy, u, k, k_rev, skip, channels_last, number, cu_seqlens, wanted):
        tensors, wanted = (u, k, k_rev, skip, None, None, None), (*wanted, *[False] * 3)
        return _bwd(dy, tensors, "none", channels_last, number, cu_seqlens, wanted)[:4]

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options = inputs[:5], inputs[5:]
        wanted = ctx.options[-1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(
            *[g for g, want in zip(output, wanted, strict=True) if not want]
        )

    @staticmethod
    def backward(ctx, *grads):
        dy, u, *kernel = ctx.saved_tensors
        *options, given = ctx.options
        pairs = zip(grads, (u, *kernel), given, strict=True)
        gu, *gkernel = [
            g if want else t if t is None else torch.zeros_like(t) for g, t, want in pairs
        ]
        wanted = tuple(ctx.needs_input_grad[1:5])
        ddy = None
        if ctx.needs_input_grad[0]:
            ddy = _Linear.apply(gu, *kernel, *options) + _Linear.apply(u, *gkernel, *options)
        rest = _LinearBackward.apply(dy, gu, *gkernel, *options, wanted)
        return (
            ddy,
            *[g if want else None for g, want in zip(rest, wanted, strict=True)],
            *[None] * len(ctx.options),
        )

    @_nestable
    def jvp(ctx, dy_t, *tangents):
        dy, *tensors = ctx.saved_tensors
        wanted = ctx.options[-1]
        one = _LinearBackward.apply(dy_t, *tensors, *ctx.options)
        two = _LinearBackward.apply(dy, *tangents[:4], *ctx.options)
        return tuple(a + b if want else None for a, b, want in zip(one, two, wanted, strict=True))

    @staticmethod
    def vmap(info, in_dims, dy, u, k, k_rev, skip, *options):
        call = lambda *t: _LinearBackward.apply(*t, *options)  # noqa: E731
        return bwd_vmap(info, in_dims[:5], call, options[-1], dy, u, k, k_rev, skip)


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


def _fold_all(tensors, in_dims, size):
    return [
        _fold(t, d, size, axis) for t, d, axis in zip(tensors, in_dims, CHANNEL_AXIS, strict=False)
    ]


def _map_size(info) -> int:
    if info.batch_size == 0:
        raise ValueError("fftconv: vmap over an axis of size 0")
    return info.batch_size


def fwd_vmap(info, in_dims, call, *tensors, packed=False):
    """call(u, k, k_rev, skip, pre_gate, post_gate, bias) over one more axis; returns (y, axis), as torch's rules
    do."""
    size = _map_size(info)
    known = list(zip(tensors, in_dims, IS_SIGNAL, strict=False))
    if (
        packed
        or tensors[1].dim() == 4
        or any(d is not None for _, d, signal in known if not signal)
    ):
        return _unfold(call(*_fold_all(tensors, in_dims, size)), size, -2), 0
    # Only the signals are mapped: they fold into the batch, and the kernel is transformed once.
    y = call(
        *[
            _leading(t, d, size).flatten(0, 1) if signal and t is not None else t
            for t, d, signal in known
        ]
    )
    return y.unflatten(0, (size, y.shape[0] // size)), 0


def bwd_vmap(info, in_dims, call, wanted, dy, *tensors):
    """The same for call(dy, u, k, ...), whose outputs are gradients or, where not wanted, empty."""
    size = _map_size(info)
    folded = _fold_all(tensors, in_dims[1:], size)
    grads = call(_fold(dy, in_dims[0], size, -2), *folded)
    out = [
        _unfold(g, size, axis) if want else g.new_empty(size, 0)
        for g, want, axis in zip(grads, wanted, CHANNEL_AXIS, strict=False)
    ]
    return tuple(out), (0,) * len(out)


def raw_fwd_vmap(info, in_dims, *args):
    tensors, (_, *options) = args[:7], args[7:]
    return fwd_vmap(info, in_dims[:7], lambda *t: _fwd(t, *options, None), *tensors)


def raw_bwd_vmap(info, in_dims, *args):
    (dy, *tensors), (_, *options) = args[:8], args[8:]
    present = [want and t is not None for want, t in zip(options[-1], tensors, strict=True)]
    call = lambda dy, *t: _bwd(dy, t, *options[:-1], None, options[-1])  # noqa: E731
    return bwd_vmap(info, in_dims[:8], call, present, dy, *tensors)
