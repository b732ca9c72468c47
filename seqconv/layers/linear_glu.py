"""GLU(x W^T + b) on a CPU, some rows at a time: what the product has written is still in the caches when the gate
reads it, and its gradient when the two products of the backward pass do."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from seqconv.backends import choose, cpu
from seqconv.ops.register import (
    as_node,
    batched,
    needs_gradient,
    transforms_active,
    unwatched,
)

TILE = (
    1 << 19
)  # numbers of x W^T in one tile of rows: smaller ones cost two threads more than the caches save
LEAST = 1 << 15  # numbers of x: below, torch's two calls take less time


def takes(linear: nn.Linear, x: Tensor, wide: int) -> bool:
    """Whether `linear_glu` computes this, for x W^T of that width: plain tensors on a CPU, which nothing watches."""
    weight, bias = linear.weight, linear.bias
    return (
        x.numel() >= LEAST
        and weight.shape == (wide, x.shape[-1])
        and (bias is None or bias.shape == (wide,))
        and _plain(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and not transforms_active()
        and choose("glu", (x,), ())[0] is cpu
    )


def _plain(*tensors: Tensor | None) -> bool:
    """Whether the tensors that are there are contiguous float32 on the CPU, as the kernels take them."""
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype == torch.float32 and t.is_contiguous()):
            return False
    return unwatched(tensors)


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
        for t in ctx.saved_tensors:
            if t is not None and t.dtype != torch.float32:
                text = f"a hook on saved tensors must return torch.float32, got {t.dtype}"
                raise RuntimeError(f"linear_glu: {text}")
        # In another layout they are torch's.
        plain = _plain(x, weight, bias, z) and unwatched((dy,)) and dy.is_cpu
        derived = torch.is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0
        if derived or batched() or not plain:
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
    """By torch's own operators, for derivatives of other kinds."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        pairs = zip((x, weight, bias), wanted, strict=True)
        own: Any = [as_node(t) if want else t for t, want in pairs]
        y = F.glu(F.linear(*own), dim=-1)
        asked: Any = [t for t, want in zip(own, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(y, asked, dy, create_graph=create))
    return tuple(next(found) if want else None for want in wanted)
