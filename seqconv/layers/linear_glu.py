"""GLU(x W^T + b) on a CPU, some rows at a time: what the product has written is still in the caches when the gate
reads it, and its gradient when the two products of the backward pass do."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from seqconv.backends import choose, cpu
from seqconv.ops.register import batched, needs_gradient, transforms_active, unwatched

TILE = 1 << 17  # numbers of x W^T in one tile of rows
LEAST = 1 << 15  # numbers of x: below, torch's two calls take less time


def takes(linear: nn.Linear, x: Tensor) -> bool:
    """Whether `linear_glu` computes this: plain tensors in float32 on a CPU, which nothing watches."""
    weight, bias = linear.weight, linear.bias
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.is_cpu
        and x.numel() >= LEAST
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        and x.shape[-1] == weight.shape[1]
        and weight.shape[0] % 2 == 0
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and not transforms_active()
        and unwatched(tensors)
        and choose("glu", tensors, ())[0] is cpu
    )


def linear_glu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GLU(x W^T + b), (..., features) -> (..., channels), for a weight (2 channels, features), with gradients."""
    if needs_gradient((x, weight, bias)):
        return _LinearGLU.apply(x, weight, bias)  # pyright: ignore
    return _forward(x, weight, bias, keep=False)[0]


def _tiles(rows: int, wide: int):
    step = max(TILE // wide, 1)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """y, and x W^T if it is to be kept."""
    wide, features = weight.shape
    flat, across = x.view(-1, features), weight.t()
    tiles = _tiles(len(flat), wide)
    y = x.new_empty(*x.shape[:-1], wide // 2)
    z, out = x.new_empty(len(flat) if keep else tiles[0].stop, wide), y.view(-1, wide // 2)
    for rows in tiles:
        some = z[rows] if keep else z[: rows.stop - rows.start]
        torch.mm(flat[rows], across, out=some)
        cpu.glu(out[rows], some, bias)
    return y, z


class _LinearGLU(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        y, z = _forward(x, weight, bias, keep=True)
        ctx.save_for_backward(x, weight, bias, z)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, z = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        plain = unwatched((dy, x, weight, bias)) and not (transforms_active() or batched())
        if torch.is_grad_enabled() or not plain:
            return _gradients_by_torch(dy, x, weight, bias, wanted)
        wide, features = weight.shape
        flat, dy = x.view(-1, features), dy.reshape(-1, wide // 2)
        if dy.stride(-1) != 1 or dy.dtype != torch.float32:
            dy = dy.float().contiguous()
        tiles = _tiles(len(flat), wide)
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = torch.zeros_like(weight) if wanted[1] else None
        dbias = weight.new_zeros(wide, dtype=torch.float64) if wanted[2] else None
        dz = x.new_empty(tiles[0].stop, wide)
        for rows in tiles:
            some = dz[: rows.stop - rows.start]
            cpu.glu_gradients(some, dbias, dy[rows], z[rows], bias)
            if dx is not None:
                torch.mm(some, weight, out=dx.view(-1, features)[rows])
            if dweight is not None:
                dweight.addmm_(some.t(), flat[rows])
        return dx, dweight, None if dbias is None else dbias.float()


def _gradients_by_torch(dy, x, weight, bias, wanted):
    """By torch's own operators, for derivatives of higher order."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        own: Any = [
            t if t is None else t.view_as(t) if t.requires_grad else t for t in (x, weight, bias)
        ]
        y = F.glu(F.linear(*own), dim=-1)
        asked: Any = [t for t, want in zip(own, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=create))
    return tuple(next(found) if want else None for want in wanted)
