"""The causal convolution without any trace of the future, for backends that have no kernel of their own for it.

Time is cut into blocks of n = FIRST, 2 FIRST, 4 FIRST, ... steps. On every level the inputs of block 2j act on the
outputs of block 2j + 1, by the lags 1 to 2n - 1: that is one two-sided convolution of length n, whose inputs all lie
before its outputs. So a transform never holds an output together with a later input. Every pair of an input and a
later output meets on exactly one level, or in a block of FIRST, whose taps k[0:FIRST] are summed over the whole row;
the levels take the other taps. Above the length of the kernel all boundaries of blocks are crossed alike, on one
last level. The CPU kernels do it with larger groups of blocks, see csrc/cpu/exact.h.

Source: relaxed multiplication, J. van der Hoeven, "Relax, but don't be too lazy", 2002.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv import reference
from seqconv.backends.protocol import Explanation, Request

FIRST = 8  # taps that are summed by slices, which cannot touch the future


class Level(NamedTuple):
    """Tiles of n inputs, the first of which starts at 0 and each other one `step` later, and the n outputs behind."""

    n: int
    step: int
    count: int

    @property
    def end(self) -> int:
        """Of the last outputs, which may lie beyond the row."""
        return (self.count - 1) * self.step + 2 * self.n


def levels(length: int, taps: int) -> list[Level]:
    found, n = [], FIRST
    while taps > FIRST and n < length:
        last = taps <= n + 1  # no tap reaches beyond the next block
        step = n if last else 2 * n
        found.append(Level(n, step, (length - n + step - 1) // step))
        if last:
            break
        n *= 2
    return found


class _Linear:
    """v = k * x + skip x, of x (batch, channels, length) and k (..., channels, K)."""

    def __init__(self, backend, x: Tensor, k: Tensor, skip: Tensor | None, empty):
        self.backend, self.x, self.k, self.skip, self.empty = backend, x, k, skip, empty
        self.length, taps = x.shape[-1], k.shape[-1]
        self.levels = levels(self.length, taps)
        if self.levels:
            reach = 2 * self.levels[-1].n
            self.taps = k.new_zeros(*k.shape[:-1], reach)
            self.taps[..., FIRST:taps] = k[..., FIRST:reach]
            self.taps[..., self.length :] = 0

    def _near(self):
        """Of each of the first lags its weight, (..., channels, 1), and of lag 0 also the skip connection's."""
        for j in range(min(self.k.shape[-1], self.length, FIRST)):
            yield j, self.k[..., j : j + 1]

    def _tiles(self):
        """Of every level, what the operator is called with."""
        for level in self.levels:
            n, x = level.n, _rows(_windows(self.x, 0, level))
            k, k_rev = self.taps[..., n : 2 * n], self.taps[..., 1:n].flip(-1)
            yield level, self.empty._replace(u=x, k=k, k_rev=k_rev)

    def forward(self) -> Tensor:
        x = _beside_heads(self.x, self.k)
        v = x.new_zeros(len(x), *self.k.shape[:-1], self.length)
        if self.skip is not None:
            v += self.skip.unsqueeze(-1) * x
        for j, tap in self._near():
            v[..., j:] += tap * x[..., : self.length - j]
        for level, tile in self._tiles():
            y = v.new_empty(len(tile.u), *self.k.shape[:-1], level.n)
            self.backend.fftconv(y, tile, "none")
            _add(v, level.n, level, y)
        return v

    def gradients(self, dv: Tensor, dx: Tensor | None, dk: Tensor | None, dskip: Tensor | None):
        """Adds to what is wanted, of dv (batch, ..., channels, length)."""
        x, skip = _beside_heads(self.x, self.k), self.skip
        along = None if dx is None else _beside_heads(dx, self.k)
        if dskip is not None:
            dskip += (dv * x).sum((0, -1)).sum_to_size(dskip.shape)
        if dx is not None and skip is not None:
            along += (skip.unsqueeze(-1) * dv).sum_to_size(along.shape)
        for j, tap in self._near():
            end = self.length - j
            if dk is not None:
                dk[..., j] += (dv[..., j:] * x[..., :end]).sum((0, -1))
            if dx is not None:
                along[..., :end] += (tap * dv[..., j:]).sum_to_size(along[..., j:].shape)
        dv = F.pad(dv, (0, max([0, *[level.end - self.length for level in self.levels]])))
        for level, tile in self._tiles():
            pairs = zip(tile, (dx, dk, dk, *[None] * 4), strict=True)
            grads = tile._make(None if want is None else torch.empty_like(t) for t, want in pairs)
            dy = _rows(_windows(dv, level.n, level))
            self.backend.fftconv_gradients(grads, dy, tile, "none")
            if dx is not None:
                _add(dx, 0, level, grads.u)
            if dk is not None:
                lags = torch.cat([grads.k_rev.flip(-1), grads.k], -1)  # from 1 on
                stop = min(self.length, dk.shape[-1], lags.shape[-1] + 1)
                dk[..., FIRST:stop] += lags[..., FIRST - 1 : stop - 1]


def _windows(t: Tensor, start: int, level: Level) -> Tensor:
    """The tiles' blocks, the first of which begins at `start`: (..., length) -> (..., count, n), a view."""
    return t[..., start:].unfold(-1, level.n, level.step)[..., : level.count, :]


def _rows(blocks: Tensor) -> Tensor:
    """(batch, ..., count, n) -> (batch count, ..., n), a view where that is possible."""
    return blocks.movedim(-2, 1).flatten(0, 1)


def _add(v: Tensor, start: int, level: Level, rows: Tensor) -> None:
    """Adds rows to the blocks of v from `start` on; the last block may reach beyond v."""
    n, step, count = level
    blocks = rows.unflatten(0, (-1, count)).movedim(1, -2)
    last = start + (count - 1) * step
    if last + n > v.shape[-1]:
        v[..., last:] += blocks[..., -1, : v.shape[-1] - last]
        count -= 1
    if count:
        _windows(v, start, level)[..., :count, :] += blocks[..., :count, :]


def _beside_heads(t: Tensor, k: Tensor) -> Tensor:
    return t.unsqueeze(1) if k.dim() > 2 else t


def _chained(g: Tensor, factor: Tensor | None) -> Tensor:
    """g factor, and 0 where g is 0: an output that no gradient comes from may be NaN and have the slope NaN."""
    return g if factor is None else (g * factor).masked_fill_(g == 0, 0)


def _samples(inputs, *more):
    """The parts of a problem whose kernel is one for all of their samples, with the same part of the signals `more`."""
    if inputs.k.dim() < 4:
        yield inputs, *more
        return
    for b in range(len(inputs.k)):
        cut = [
            t if t is None else t[b : b + 1]
            for t in (inputs.u, inputs.pre_gate, inputs.post_gate, *more)
        ]
        yield (
            inputs._make((cut[0], inputs.k[b], None, inputs.skip, *cut[1:3], inputs.bias)),
            *cut[3:],
        )


def _linear(backend, part) -> _Linear:
    wide = torch.promote_types(part.u.dtype, torch.float32)
    x, skip = part.u.to(wide), part.skip
    x = x if part.pre_gate is None else x * part.pre_gate
    empty = part._make([None] * len(part))
    return _Linear(backend, x, part.k.to(wide), skip if skip is None else skip.to(wide), empty)


def _biased(v: Tensor, bias: Tensor | None) -> Tensor:
    return v if bias is None else v + bias.to(v.dtype).unsqueeze(-1)


def forward(backend, y: Tensor, inputs, activation: str) -> None:
    """Backend.fftconv_exact by way of Backend.fftconv."""
    for part, out in _samples(inputs, y):
        v = reference.activate(_biased(_linear(backend, part).forward(), part.bias), activation)
        out.copy_(v if part.post_gate is None else v * part.post_gate)


def gradients(backend, grads, dy: Tensor, inputs, activation: str) -> None:
    """Backend.fftconv_exact_gradients by way of Backend.fftconv_gradients."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    dskip, dbias = (
        None if g is None else torch.zeros_like(g, dtype=wide) for g in (grads.skip, grads.bias)
    )
    parts = _samples(inputs, dy, grads.u, grads.pre_gate, grads.post_gate)
    for b, (part, g, du, dpre, dpost) in enumerate(parts):
        row, g = _linear(backend, part), g.to(wide)
        if part.post_gate is not None or activation != "none":
            v = _biased(row.forward(), part.bias)
            if dpost is not None:
                dpost.copy_(_chained(g, reference.activate(v, activation)))
            g = _chained(g, part.post_gate)
            g = _chained(g, None if activation == "none" else reference.slope(v, activation))
        dx = None if du is None and dpre is None else torch.zeros_like(row.x)
        dk = None if grads.k is None else torch.zeros_like(row.k)
        if dbias is not None:
            dbias += g.sum((0, -1)).sum_to_size(dbias.shape)
        row.gradients(g, dx, dk, dskip)
        if du is not None:
            du.copy_(_chained(dx, part.pre_gate))
        if dpre is not None:
            dpre.copy_(_chained(dx, part.u))
        if dk is not None:
            (grads.k if inputs.k.dim() < 4 else grads.k[b]).copy_(dk)
    for total, grad in ((dskip, grads.skip), (dbias, grads.bias)):
        if total is not None:
            grad.copy_(total)


def explain(backend, request: Request) -> Explanation:
    """What that does, with the size of the longest tiles, which take most of the time."""
    u, k = request.inputs[:2]
    found = levels(u.shape[-1], k.shape[-1])
    plain = request._replace(options=(*request.options[:2], False))
    if not found:
        how = backend.explain(plain)
        return replace(how, algorithm="sum of shifted rows", fft_size=None, blocks=1, plan=None)
    n, _, count = found[-1]
    nothing = u.new_zeros((), dtype=torch.promote_types(u.dtype, torch.float32))
    x = nothing.expand(u.shape[0] * count, u.shape[1], n)
    kernel = nothing.expand(*k.shape[-3:-1], n)
    empty = request.inputs._make([None] * len(request.inputs))
    tile = empty._replace(u=x, k=kernel, k_rev=kernel[..., 1:])
    how = backend.explain(plain._replace(inputs=tile))
    what = f"{len(found)} levels of exactly causal tiles, the longest by {how.algorithm}"
    return replace(how, algorithm=what)
