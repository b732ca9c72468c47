"""The learned butterfly as torch operators, seqconv::butterfly_fwd and seqconv::butterfly_bwd.

x (batch, channels, length); matrices (heads, sum of the squares of the sizes, 2), the matrices of
every size that occurs, in the order in which `radices` names them, flattened; z (batch, channels,
n, 2). CUDA's kernels where they run and a block holds a row, reference.butterfly elsewhere.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

from seqconv import _autograd, _cuda, _ops, reference

_ops.library.define("butterfly_fwd(Tensor x, Tensor matrices, int[] radices) -> Tensor")
_ops.library.define(
    "butterfly_bwd(Tensor dz, Tensor x, Tensor matrices, int[] radices) -> (Tensor, Tensor)"
)
fwd = torch.ops.seqconv.butterfly_fwd.default
bwd = torch.ops.seqconv.butterfly_bwd.default


def sizes(radices) -> list[int]:
    """The sizes that occur, each once."""
    return list(dict.fromkeys(radices))


def split(matrices: Tensor, radices) -> dict[int, Tensor]:
    """(heads, size, size, 2) of every size."""
    parts = matrices.split([size * size for size in sizes(radices)], 1)
    return {s: p.unflatten(1, (s, s)) for s, p in zip(sizes(radices), parts, strict=True)}


def _kernels_run(x: Tensor, n: int) -> bool:
    if x.device.type != "cuda" or not x.numel() or _ops.fallback_reason(x.device, x.dtype, n):
        return False
    return _cuda.holds(x.device, n)


def _fwd(x, matrices, radices):
    place = (
        _cuda.butterfly_transform if _kernels_run(x, math.prod(radices)) else reference.butterfly
    )
    return place(x, split(matrices, radices), tuple(radices))


def _bwd(dz, x, matrices, radices):
    fused = _kernels_run(x, math.prod(radices))
    place = _cuda.butterfly_gradients if fused else reference.butterfly_backward
    dx, grads = place(dz, x, split(matrices, radices), tuple(radices))
    return dx, torch.cat([grads[s].flatten(1, 2) for s in sizes(radices)], 1)


def _fwd_fake(x, matrices, radices):
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(*x.shape[:2], math.prod(radices), 2, dtype=wide)


def _bwd_fake(dz, x, matrices, radices):
    return x.new_empty(x.shape), matrices.new_empty(matrices.shape)


for _name, _run, _fake in (("butterfly_fwd", _fwd, _fwd_fake), ("butterfly_bwd", _bwd, _bwd_fake)):
    _ops.library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"seqconv::{_name}", _fake, lib=_ops.library)


class _Forward(Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.radices = args
        ctx.save_for_backward(*tensors)
        with _autograd.below_autograd():
            return fwd(*args)

    @staticmethod
    def backward(ctx, dz):
        return (*bwd(dz, *ctx.saved_tensors, ctx.radices), None)


class _Backward(Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.radices = args
        ctx.save_for_backward(*tensors)
        with _autograd.below_autograd():
            return bwd(*args)

    @staticmethod
    def backward(ctx, ddx, dmatrices):
        """Second derivatives, in plain torch: through the gradients of dz . butterfly(x, matrices)."""
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            dz, x, matrices = map(_autograd.as_node, ctx.saved_tensors)
            z = reference.butterfly(x, split(matrices, ctx.radices), tuple(ctx.radices))
            grads = torch.autograd.grad(z, (x, matrices), dz, create_graph=True)
            inputs = (dz, x, matrices)
            found = torch.autograd.grad(grads, inputs, (ddx, dmatrices), create_graph=create)
        return (*found, None)


_ops.library.impl("butterfly_fwd", _autograd.kernel(fwd, _Forward), "Autograd")
_ops.library.impl("butterfly_bwd", _autograd.kernel(bwd, _Backward), "Autograd")


def transform(
    x: Tensor, matrices: Tensor, radices: tuple[int, ...], activation: str | None = None
) -> Tensor:
    """reference.butterfly by the operator; what it lacks, torch.func, forward-mode and activations, in plain torch."""
    plain = not torch.compiler.is_compiling() and _autograd.transformed((x, matrices))
    if plain or activation is not None:
        with torch.autocast(x.device.type, enabled=False):
            return reference.butterfly(x, split(matrices, radices), radices, activation)
    return fwd(x, matrices, radices)
