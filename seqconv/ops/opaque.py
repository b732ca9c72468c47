"""Functions of a few small tensors as operators that torch.compile does not look into.

A kernel's parameters pass through dozens of elementwise operations, on too few numbers for fusing them to
gain anything; to the compiler they are most of a layer's work.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from seqconv.ops import operators, transforms


def opaque(name: str, options: str, function):
    """The operator seqconv::`name`(Tensor?[] tensors, `options`) -> Tensor, which is function(tensors, *options).
    Its gradient computes the function anew."""
    operators.library.define(f"{name}(Tensor?[] tensors, {options}) -> Tensor")
    gradient = f"{name}_bwd(Tensor grad, Tensor?[] tensors, {options}, bool[] wanted) -> Tensor[]"
    operators.library.define(gradient)
    fwd = getattr(torch.ops.seqconv, name).default
    bwd = getattr(torch.ops.seqconv, f"{name}_bwd").default

    def run(tensors, *rest):
        with torch.no_grad():
            return function(tensors, *rest)

    def run_bwd(grad, tensors, *rest):
        *rest, wanted = rest
        with torch.enable_grad():
            pairs = _pairs(tensors, wanted)
            own = [t if t is None else t.detach().requires_grad_(w) for t, w in pairs]
            asked = [t for t, w in _pairs(own, wanted) if w]
            y = function(own, *rest)
            return list(torch.autograd.grad(y, asked, grad, materialize_grads=True))

    def fake_bwd(grad, tensors, *rest):
        return [torch.empty_like(t) for t, w in _pairs(tensors, rest[-1]) if w]

    class Opaque(Function):
        @staticmethod
        def forward(ctx, rest, *tensors):
            ctx.save_for_backward(*tensors)
            ctx.rest = rest
            with operators.below_autograd():
                return fwd(tensors, *rest)

        @staticmethod
        def backward(ctx, grad):
            wanted = list(ctx.needs_input_grad[1:])
            found = iter(bwd(grad, ctx.saved_tensors, *ctx.rest, wanted))
            return (None, *[next(found) if w else None for w in wanted])

    def autograd(tensors, *rest):
        if transforms.transformed(tensors):
            raise RuntimeError(f"seqconv::{name} is for torch.compile only")
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return Opaque.apply(rest, *tensors)
        with operators.below_autograd():
            return fwd(tensors, *rest)

    operators.library.impl(name, run, "CompositeExplicitAutograd")
    operators.library.impl(f"{name}_bwd", run_bwd, "CompositeExplicitAutograd")
    operators.library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"seqconv::{name}", function, lib=operators.library)
    torch.library.register_fake(f"seqconv::{name}_bwd", fake_bwd, lib=operators.library)
    return fwd


def _pairs(tensors: list[Tensor | None], wanted: list[bool]):
    return zip(tensors, wanted, strict=True)
