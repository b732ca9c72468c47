"""The gradient of the operators, and the choice of the road a call takes to them.

Each single way of attaching a gradient is silently wrong somewhere, so there are four (`apply`
chooses):

1. torch.compile, export and jit.trace record the raw operators, which have an Autograd kernel of their own (at
the end);
2. functorch transforms (grad, vmap, jacrev, jvp, ...) and forward-mode go through `_Linear`, an
autograd.Function of the
   new style, around which gates and activation are plain torch;
3. without gradients the kernel is called directly;
4. otherwise `_Fused`, an autograd.Function of the old style, which has a fraction of the overhead
of 2.

Every backward is itself differentiable. The core y = k * u + skip u is linear in u and in (k,
k_rev, skip), hence its derivatives of every order are again such convolutions: `_Linear` and
`_LinearBackward` are closed under differentiation.
"""

from types import SimpleNamespace

import torch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_map_only

from seqconv.ops import operators
from seqconv.reference import activate

_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def apply(u, k, k_rev, skip, pre_gate, post_gate, activation: str, channels_last: bool):
    args = (u, k, k_rev, skip, pre_gate, post_gate, activation, channels_last)
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "fftconv: forward-mode differentiation does not work inside torch.compile"
            )
        return operators.fwd(*args)
    if torch.jit.is_tracing():
        return operators.fwd(*args)
    if _transforms_active() or forward_ad._current_level >= 0:
        return _composed(*args)
    if _needs_gradient(args):
        return _Fused.apply(*args)
    return operators.forward(*args)


def _needs_gradient(args) -> bool:
    if torch.is_grad_enabled():
        for t in args:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                return True
    return False


class _Fused(Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, activation, channels_last = args
        ctx.save_for_backward(*tensors)
        ctx.options = (activation, channels_last)
        return operators.forward(*args)

    @staticmethod
    def backward(ctx, dy):
        wanted = ctx.needs_input_grad[:6]
        args = (dy, *ctx.saved_tensors, *ctx.options, wanted)
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if not recorded and not transformed(args):
            return (*operators.gradients(*args), None, None)
        # With create_graph=True the operator records its own gradient, _FusedBackward; compiled autograd, the operator.
        grads = operators.bwd(*args)
        return (*[g if want else None for g, want in zip(grads, wanted, strict=True)], None, None)


class _FusedBackward(Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, activation, channels_last, wanted = args
        ctx.save_for_backward(*tensors)
        ctx.options = (activation, channels_last)
        ctx.wanted = [want and t is not None for want, t in zip(wanted, tensors[1:], strict=True)]
        with operators.below_autograd():
            return operators.bwd(*args)

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[:7]
        with torch.enable_grad():
            own = [as_node(t) for t in ctx.saved_tensors]
            y = _composed(*own[1:], *ctx.options)
            inputs = [t for t, want in zip(own[1:], ctx.wanted, strict=True) if want]
            outputs = torch.autograd.grad(y, inputs, own[0], create_graph=True)
        grads = [g for g, want in zip(grads, ctx.wanted, strict=True) if want]
        asked = [t for t, need in zip(own, needed, strict=True) if need]
        options = {"create_graph": torch.is_grad_enabled(), "allow_unused": True}
        found = iter(torch.autograd.grad(outputs, asked, grads, **options))
        return (*[next(found) if need else None for need in needed], None, None, None)


def as_node(t):
    """t as a node of its own: one tensor may be passed as two arguments, whose gradients differ."""
    if t is None or not t.requires_grad:
        return t if t is None else t.detach().requires_grad_()
    return t.view_as(t)


def _composed(u, k, k_rev, skip, pre_gate, post_gate, activation, channels_last):
    """The operator as torch elementwise operations around its linear core, at least in float32 as in the kernel."""
    x, gate = u, post_gate
    if pre_gate is not None or post_gate is not None or activation != "none":
        wide = torch.promote_types(u.dtype, torch.float32)
        x = u.to(wide) if pre_gate is None else u.to(wide) * pre_gate.to(wide)
        gate = post_gate if post_gate is None else post_gate.to(wide)
    y = activate(_Linear.apply(x, k, k_rev, skip, channels_last), activation)
    return (y if gate is None else y * gate).to(u.dtype)


def _nestable(rule):
    """A jvp rule whose result can be differentiated forward once more.

    torch calls the rules with forward-mode off at every level, so that an outer jvp would take the
    tangent for a constant. Here the rule runs one level down, with forward-mode on.
    """

    def jvp(ctx, *tangents):
        if not _transforms_active():
            return rule(ctx, *tangents)
        interpreter = retrieve_current_functorch_interpreter()
        level, functorch = interpreter.level(), torch._C._functorch

        def lower(values):
            return tree_map_only(
                torch.Tensor, lambda t: functorch._unwrap_for_grad(t, level), values
            )

        low = SimpleNamespace(saved_tensors=lower(tuple(ctx.saved_tensors)), options=ctx.options)
        with forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
            out = rule(low, *lower(tangents))
        return tree_map_only(torch.Tensor, lambda t: functorch._wrap_for_grad(t, level), out)

    return staticmethod(jvp)


class _Linear(Function):
    """y = k * u (+ k_rev) + skip u."""

    @staticmethod
    def forward(u, k, k_rev, skip, channels_last):
        return operators.fwd(u, k, k_rev, skip, None, None, "none", channels_last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, channels_last = inputs
        ctx.options = (channels_last,)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        wanted = tuple(ctx.needs_input_grad[:4])
        grads = _LinearBackward.apply(dy, *ctx.saved_tensors, *ctx.options, wanted)
        return (*[g if want else None for g, want in zip(grads, wanted, strict=True)], None)

    @_nestable
    def jvp(ctx, du, dk, dk_rev, dskip, _):
        u, k, k_rev, skip = ctx.saved_tensors
        y = _Linear.apply(du, k, k_rev, skip, *ctx.options)
        return y + _Linear.apply(u, dk, dk_rev, dskip, *ctx.options)

    @staticmethod
    def vmap(info, in_dims, u, k, k_rev, skip, channels_last):
        call = lambda u, k, k_rev, skip: _Linear.apply(u, k, k_rev, skip, channels_last)  # noqa: E731
        return operators.fwd_vmap(info, in_dims[:4], call, u, k, k_rev, skip)


class _LinearBackward(Function):
    """Gradients of _Linear: du is linear in (dy, k), dk in (dy, u); the unwanted ones are empty tensors."""

    @staticmethod
    def forward(dy, u, k, k_rev, skip, channels_last, wanted):
        grads = operators.bwd(
            dy, u, k, k_rev, skip, None, None, "none", channels_last, (*wanted, False, False)
        )
        return grads[:4]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, channels_last, wanted = inputs
        ctx.options = (channels_last, wanted)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(
            *[g for g, want in zip(output, wanted, strict=True) if not want]
        )

    @staticmethod
    def backward(ctx, *grads):
        dy, u, *kernel = ctx.saved_tensors
        channels_last, given = ctx.options
        pairs = zip(grads, (u, *kernel), given, strict=True)
        gu, *gkernel = [
            g if want else t if t is None else torch.zeros_like(t) for g, t, want in pairs
        ]
        options, wanted = (channels_last,), tuple(ctx.needs_input_grad[1:5])
        ddy = None
        if ctx.needs_input_grad[0]:
            ddy = _Linear.apply(gu, *kernel, *options) + _Linear.apply(u, *gkernel, *options)
        rest = _LinearBackward.apply(dy, gu, *gkernel, *options, wanted)
        return (
            ddy,
            *[g if want else None for g, want in zip(rest, wanted, strict=True)],
            None,
            None,
        )

    @_nestable
    def jvp(ctx, dy_t, *tangents):
        dy, *tensors = ctx.saved_tensors
        wanted = ctx.options[1]
        one = _LinearBackward.apply(dy_t, *tensors, *ctx.options)
        two = _LinearBackward.apply(dy, *tangents[:4], *ctx.options)
        return tuple(a + b if want else None for a, b, want in zip(one, two, wanted, strict=True))

    @staticmethod
    def vmap(info, in_dims, dy, u, k, k_rev, skip, channels_last, wanted):
        call = lambda *t: _LinearBackward.apply(*t, channels_last, wanted)  # noqa: E731
        return operators.bwd_vmap(info, in_dims[:5], call, wanted, dy, u, k, k_rev, skip)


# Road 1: what the raw operators do when called from outside this file.


def kernel(op, function):
    def run(*args):
        if transformed(args):
            raise RuntimeError(
                f"{op.name()}: torch.func transforms and forward-mode differentiation work through seqconv.fftconv "
                "and the layers in eager mode only, not inside torch.compile and not on the raw operator"
            )
        if _needs_gradient(args):
            return function.apply(*args)
        with operators.below_autograd():
            return op(*args)

    return run


def transformed(args) -> bool:
    """Whether a functorch transform or forward-mode differentiation watches the call."""
    return _transforms_active() or _has_tangent(args)


def _has_tangent(args) -> bool:
    if forward_ad._current_level < 0:
        return False
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


operators.library.impl("fftconv_fwd", kernel(operators.fwd, _Fused), "Autograd")
operators.library.impl("fftconv_bwd", kernel(operators.bwd, _FusedBackward), "Autograd")
