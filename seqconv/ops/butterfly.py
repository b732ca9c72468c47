"""The learned butterfly as torch operators, seqconv::butterfly_fwd and seqconv::butterfly_bwd.

x (batch, channels, length); matrices (heads, sum of the squares of the sizes, 2), the matrices of
every size that occurs, in the order in which `radices` names them, flattened; z (batch, channels,
n, 2). The compiled kernels on a CPU, CUDA's where a block holds a row, reference.butterfly elsewhere.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

from seqconv import reference
from seqconv.backends import cpu, cuda
from seqconv.backends.pack import DTYPES
from seqconv.ops import operators, transforms

operators.library.define("butterfly_fwd(Tensor x, Tensor matrices, int[] radices) -> Tensor")
operators.library.define(
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


def _check(x: Tensor, matrices: Tensor, radices) -> None:
    """Kernels trust what they are given."""
    elements, n = sum(size * size for size in sizes(radices)), math.prod(radices)
    for name, t in (("x", x), ("matrices", matrices)):
        if t.dtype not in DTYPES:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"Butterfly: {name} must be one of {wanted}, got {t.dtype}")
    if matrices.dim() != 3 or matrices.shape[1:] != (elements, 2) or not matrices.shape[0]:
        text = f"(heads >= 1, {elements}, 2) for passes of {tuple(radices)}"
        raise ValueError(f"Butterfly: matrices must be {text}, got {tuple(matrices.shape)}")
    heads = matrices.shape[0]
    if x.dim() != 3 or x.shape[2] > n or x.shape[1] % heads:
        text = f"(batch, multiple of {heads}, length <= {n})"
        raise ValueError(f"Butterfly: x must be {text}, got {tuple(x.shape)}")
    if x.device != matrices.device:
        raise ValueError(f"Butterfly: x must be on {matrices.device}, got {x.device}")


def _kernels_of(x: Tensor, radices) -> str | None:
    """The device type whose kernels do this, None if none do."""
    n = math.prod(radices)
    if not x.numel() or operators.fallback_reason(x.device, x.dtype, n):
        return None
    if x.device.type == "cuda":
        return "cuda" if cuda.holds(x.device, n) else None
    return "cpu" if cpu.holds_butterfly(tuple(radices)) else None


def _empty(x: Tensor, radices) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(*x.shape[:2], math.prod(radices), 2, dtype=wide)


def _fwd(x, matrices, radices):
    _check(x, matrices, radices)
    radices, place = tuple(radices), _kernels_of(x, radices)
    if place == "cpu":
        z = _empty(x, radices)
        cpu.butterfly_forward(z, x, matrices.to(z.dtype).contiguous(), radices)
        return z
    transform = cuda.butterfly_transform if place == "cuda" else reference.butterfly
    return transform(x, split(matrices, radices), radices)


def _bwd(dz, x, matrices, radices):
    _check(x, matrices, radices)
    if dz.shape != (*x.shape[:2], math.prod(radices), 2) or dz.device != x.device:
        text = f"got {tuple(dz.shape)} on {dz.device}"
        raise ValueError(f"Butterfly: dz must be like the output, {text}")
    radices, place = tuple(radices), _kernels_of(x, radices)
    if place == "cpu":
        wide = torch.promote_types(x.dtype, torch.float32)
        dz, factors = (t.to(wide).contiguous() for t in (dz, matrices))
        dx, grads = x.new_empty(x.shape), torch.empty_like(factors)
        cpu.butterfly_backward(dx, grads, dz, x, factors, radices)
        return dx, grads.to(matrices.dtype)
    gradients = cuda.butterfly_gradients if place == "cuda" else reference.butterfly_backward
    dx, grads = gradients(dz, x, split(matrices, radices), radices)
    return dx, torch.cat([grads[s].flatten(1, 2) for s in sizes(radices)], 1)


def _fwd_fake(x, matrices, radices):
    return _empty(x, radices)


def _bwd_fake(dz, x, matrices, radices):
    return x.new_empty(x.shape), matrices.new_empty(matrices.shape)


for _name, _run, _fake in (("butterfly_fwd", _fwd, _fwd_fake), ("butterfly_bwd", _bwd, _bwd_fake)):
    operators.library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"seqconv::{_name}", _fake, lib=operators.library)


class _Forward(Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.radices = args
        ctx.save_for_backward(*tensors)
        with operators.below_autograd():
            return fwd(*args)

    @staticmethod
    def backward(ctx, dz):
        return (*bwd(dz, *ctx.saved_tensors, ctx.radices), None)


class _Backward(Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.radices = args
        ctx.save_for_backward(*tensors)
        with operators.below_autograd():
            return bwd(*args)

    @staticmethod
    def backward(ctx, ddx, dmatrices):
        """Second derivatives, in plain torch: through the gradients of dz . butterfly(x, matrices)."""
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            dz, x, matrices = map(transforms.as_node, ctx.saved_tensors)
            z = reference.butterfly(x, split(matrices, ctx.radices), tuple(ctx.radices))
            grads = torch.autograd.grad(z, (x, matrices), dz, create_graph=True)
            inputs = (dz, x, matrices)
            found = torch.autograd.grad(grads, inputs, (ddx, dmatrices), create_graph=create)
        return (*found, None)


operators.library.impl("butterfly_fwd", transforms.kernel(fwd, _Forward), "Autograd")
operators.library.impl("butterfly_bwd", transforms.kernel(bwd, _Backward), "Autograd")


def transform(
    x: Tensor, matrices: Tensor, radices: tuple[int, ...], activation: str | None = None
) -> Tensor:
    """reference.butterfly by the operator; what it lacks, torch.func, forward-mode and activations, in plain torch."""
    _check(x, matrices, radices)
    plain = not torch.compiler.is_compiling() and transforms.transformed((x, matrices))
    if plain or activation is not None:
        return reference.butterfly(x, split(matrices, radices), radices, activation)
    return fwd(x, matrices, radices)
