"""One step of a causal convolution whose inputs come one at a time, by relaxed tiling: the operator beneath streams.

A row, of one sample and one channel, keeps its last inputs and the sums of its outputs to come, each in a ring of one
period, in blocks of BLOCK steps. After step t, where BLOCK divides t, the last n inputs are convolved into the next n
sums, with n the largest power of two that divides t, at most the period. Every pair of an input and an output meets in
one such tile, or when the input comes, if both are in the same block. So L steps cost O(L log^2 L), and none looks at
the whole past.

With `spread` every row has a clock of its own. Rows with large tiles are then few at any step, and all steps cost
about the same. Sources: arXiv 2410.12982 and 2410.03766.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv import backends
from seqconv.backends import cpu
from seqconv.backends.protocol import BLOCK
from seqconv.backends.tiles import clocks
from seqconv.ops.register import library, transforms_active, unwatched


class Rings(NamedTuple):
    """What a step changes. inputs (batch, blocks, channels, BLOCK) and sums (batch, blocks, heads, channels, BLOCK)
    in float32 or float64, clock (batch,) in int64: steps modulo the period, blocks * BLOCK."""

    inputs: Tensor
    sums: Tensor
    clock: Tensor


def zero_rings(k: Tensor, batch: int, period: int, clock: Tensor) -> Rings:
    """Those before any input, for taps k (heads, channels, count)."""
    heads, channels, _ = k.shape
    blocks = period // BLOCK
    shapes = (batch, blocks, channels, BLOCK), (batch, blocks, heads, channels, BLOCK)
    return Rings(*[cpu.empty_in_huge_pages(k, shape).zero_() for shape in shapes], clock)


class Taps(NamedTuple):
    """What a kernel becomes. taps (heads, channels, 2 BLOCK): BLOCK zeros, then the first BLOCK of them, the skip
    in tap 0; spectra: of the tiles, as the backend `made_by` has them."""

    taps: Tensor
    spectra: Tensor
    made_by: str


def period_of(count: int) -> int:
    """The period of streams with kernels of so many taps: a power of two that covers all lags."""
    return max(BLOCK, 1 << max(count - 2, 0).bit_length())


def taps_of(k: Tensor, skip: Tensor | None) -> Taps:
    """k (heads, channels, count) and skip (heads, channels), in float32 or float64."""
    heads, channels, count = k.shape
    taps = k.new_zeros(heads, channels, 2 * BLOCK)
    taps[..., BLOCK : BLOCK + count] = k[..., :BLOCK]
    if skip is not None:
        taps[..., BLOCK] += skip
    backend = backends.stream(k)
    return Taps(
        taps, backend.stream_spectra(k.contiguous(), period_of(count)), backend.stream_name()
    )


def step(
    u: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    rings: Rings,
    taps: Taps,
    activation: str,
    spread: bool,
) -> Tensor:
    """y (batch, heads, channels) in u's dtype, of u and pre_gate (batch, channels) and post_gate, as y is. Changes
    the rings."""
    found = (u, pre_gate, post_gate, *rings, *taps[:2])
    if not torch.compiler.is_compiling():
        if transforms_active() and any(map(_wrapped, found)):
            text = "changes its state in place, which torch.func's transforms cannot follow"
            raise RuntimeError(f"step: a step {text}: take prefill")
        if unwatched(found):
            return _step(u, pre_gate, post_gate, *rings, *taps, activation, spread)
    return torch.ops.seqconv.stream_step(u, pre_gate, post_gate, *rings, *taps, activation, spread)


def portable_step(
    x: Tensor, rings: Rings, k: Tensor, skip: Tensor | None, spread: bool
) -> tuple[Tensor, Rings]:
    """v (batch, heads, channels) of x (batch, channels), and the rings after the step, new ones, for programs that run
    where no operator of this package is: by additions and indices, O(taps) a step. Every product goes into the sums at
    once, so that no input waits for a tile. Rings that `step` has changed hold inputs that wait: v is NaN then."""
    inputs, sums, clock = rings
    period = sums.shape[1] * BLOCK
    whole = sums.movedim(1, -2).flatten(-2)  # (batch, heads, channels, period)
    place = torch.arange(period, device=x.device)
    now = clocks(clock.to(x.device), x.shape[1], period, spread).unsqueeze(
        -1
    )  # (batch, channels, 1)
    due = (place == now).unsqueeze(1)
    v = torch.where(due, whole, 0.0).sum(-1) + k[..., 0] * x.unsqueeze(1)
    waits = inputs.abs().amax((1, 3)) != 0  # (batch, channels)
    v = torch.where(waits.unsqueeze(1), torch.nan, v)
    if skip is not None:
        v = v + skip * x.unsqueeze(1)
    later = F.pad(
        k[..., 1:], (0, period + 1 - k.shape[-1])
    )  # of lags 1 to period, the last of which is due again
    lag = ((place - now - 1) % period).unsqueeze(1)
    shape = x.shape[0], *k.shape[:2], period
    later = later.unsqueeze(0).expand(shape).gather(-1, lag.expand(shape))
    whole = torch.where(due, 0.0, whole) + later * x[:, None, :, None]
    sums = whole.unflatten(-1, (-1, BLOCK)).movedim(-2, 1).contiguous()
    return v, Rings(inputs, sums, (clock + 1) % period)


def _wrapped(t: Tensor | None) -> bool:
    return t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t)  # pyright: ignore


def _empty(u: Tensor, pre_gate, post_gate, inputs, sums: Tensor, *rest) -> Tensor:
    return u.new_empty(u.shape[0], sums.shape[2], u.shape[1])


def _step(u, pre_gate, post_gate, inputs, sums, clock, taps, spectra, made_by, activation, spread):
    y = _empty(u, pre_gate, post_gate, inputs, sums)
    if y.numel():
        backend = backends.stream_by(made_by, spectra)
        backend.stream_step(
            y, u, pre_gate, post_gate, Rings(inputs, sums, clock), taps, spectra, activation, spread
        )
    return y


library.define(
    "stream_step(Tensor u, Tensor? pre_gate, Tensor? post_gate, Tensor(a!) inputs, Tensor(b!) sums, "
    "Tensor(c!) clock, Tensor taps, Tensor spectra, str made_by, str activation, bool spread) -> Tensor"
)
library.impl("stream_step", _step, "CompositeExplicitAutograd")
torch.library.register_fake("seqconv::stream_step", _empty, lib=library)
