"""Packed rows, of many lengths or all of one, beside the same rows one by one and in a padded batch.

The calls to compare get their inputs in the form that they want, so that neither packing nor padding is timed.
Row by row, each call has the taps that it needs, and the kernel's gradients are not added up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import seqconv
from bench.micro.contenders import BASELINE, Case, fft
from bench.micro.measure import call, tolerance
from bench.micro.timing import (
    Clock,
    interleaved,
    ratios,
    seconds_per_byte,
    summary,
    within,
    worst_errors,
)
from seqconv import reference
from seqconv.nested import pad

PACKED, ONE_BY_ONE, PADDED = "seqconv", "seqconv, row by row", "seqconv, padded"


@dataclass
class Way:
    """A way to compute the rows: a call to time, and what gives its results the form of the pack."""

    run: Callable[[], list]
    packed: Callable[[list], list] = lambda results: results


class Pack:
    """The tensors of a case: u and dy (total, channels), k and skip, and the offsets of the rows."""

    def __init__(self, case: Case, tensors, dy):
        self.case, self.longest = case, max(case.lengths)
        self.u, self.k, self.skip = tensors
        self.dy = dy
        lengths = torch.tensor(case.lengths)
        self.offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def rows(self, t: Tensor | None) -> list:
        """The rows of u or dy as batches of one, in the layout of the case."""
        if t is None:
            return [None] * len(self.case.lengths)
        return [laid(row[None], self.case.layout) for row in t.split(self.case.lengths)]

    def padded(self, t: Tensor | None, layout: str) -> Tensor | None:
        return None if t is None else laid(pad(t, self.offsets)[0], layout)

    def unpadded(self, t: Tensor, layout: str) -> Tensor:
        kept = torch.arange(self.longest) < self.offsets.diff()[:, None]
        return plain(t, layout)[kept]


def laid(t: Tensor, layout: str) -> Tensor:
    """(..., steps, channels) in a layout of fftconv."""
    return t.contiguous() if layout == "blh" else t.transpose(-1, -2).contiguous()


def plain(t: Tensor, layout: str) -> Tensor:
    """The inverse."""
    return t if layout == "blh" else t.transpose(-1, -2)


def make_pack(case: Case) -> Pack:
    """All numbers are seeded."""
    generator = torch.Generator().manual_seed(0)
    total, h = sum(case.lengths), case.channels

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    k = normal(h, max(case.lengths), scale=max(case.lengths) ** -0.5)
    tensors = normal(total, h), k, normal(h)
    return Pack(case, tensors, None if case.op == "forward" else normal(total, h))


def ways(pack: Pack) -> dict[str, Way]:
    """What is compared. Rows of one length are not computed one by one: in a batch they have no padding."""
    case, layout = pack.case, pack.case.layout

    def in_pack(t):
        return seqconv.fftconv(*t, layout=layout, cu_seqlens=pack.offsets)

    def on_torch(t):
        return fft(*t, None, None, None)

    def batch(function, layout) -> Way:
        signals = [pack.padded(t, layout) for t in (pack.u, pack.dy)]
        tensors = [signals[0], pack.k, pack.skip]

        def packed(results):
            return [pack.unpadded(t, layout) for t in results[:2]] + results[2:]

        return Way(partial(call, case, function, tensors, signals[1]), packed)

    dense = partial(_dense, layout=layout)
    dy = None if pack.dy is None else laid(pack.dy, layout)
    own = [laid(pack.u, layout), pack.k, pack.skip]
    found = {
        PACKED: Way(
            partial(call, case, in_pack, own, dy),
            lambda results: [plain(t, layout) for t in results[:2]] + results[2:],
        )
    }
    if case.mode == "packed":
        found[ONE_BY_ONE] = one_by_one(pack, dense)
    # Rows of its baseline are contiguous, which torch.fft prefers.
    return found | {PADDED: batch(dense, layout), BASELINE: batch(on_torch, "bhl")}


def _dense(t, layout: str) -> Tensor:
    return seqconv.fftconv(*t, layout=layout)


def one_by_one(pack: Pack, dense: Callable) -> Way:
    case = pack.case
    taps = [pack.k[:, :n].contiguous() for n in case.lengths]
    signals = zip(pack.rows(pack.u), taps, pack.rows(pack.dy), strict=True)
    calls = [partial(call, case, dense, [u, k, pack.skip], dy) for u, k, dy in signals]

    def packed(results):
        parts = list(zip(*results, strict=True))
        found = [torch.cat([plain(t[0], case.layout) for t in part]) for part in parts[:2]]
        if len(parts) > 2:
            dk = torch.zeros_like(pack.k)
            for part in parts[2]:
                dk[:, : part.shape[-1]] += part
            found += [dk, torch.stack(parts[3]).sum(0)]
        return found

    return Way(lambda: [run() for run in calls], packed)


def oracle(pack: Pack) -> list[Tensor]:
    """The results in float64, row by row."""
    tensors = [t.double() for t in (pack.u, pack.k, pack.skip)]

    def definition(leaves):
        u, k, skip = leaves
        rows = [
            reference.fftconv_fft(row[None], k, skip, layout="blh")[0]
            for row in u.split(pack.case.lengths)
        ]
        return torch.cat(rows)

    return call(pack.case, definition, tensors, None if pack.dy is None else pack.dy.double())


def measure(case: Case, names, budget: float, clock: Clock, peak_flops: float):
    """Yields a row of results for each of the ways that `names` names, without times where the result is wrong.

    The row of the pack says in "against" how many times as long the others take, in quartiles of the rounds' ratios.
    """
    pack = make_pack(case)
    entrants, exact = ways(pack), oracle(pack)
    # The gradient of skip is a sum of both signs. Its scale is what random signs leave of such a sum.
    least = {3: math.sqrt(sum(case.lengths))}
    found = {n: worst_errors(way.packed(way.run()), exact, least) for n, way in entrants.items()}
    allowed = tolerance(replace(case, length=pack.longest), found[BASELINE], exact)
    # The gradient of the kernel is a sum over all rows, and the error grows with their number: also that of torch.fft.
    allowed = max(allowed[0], 2 * found[BASELINE][0]), allowed[1]
    slack = {name: 1e3 if name == BASELINE else 1.0 for name in found}
    green = {name: within(error, allowed, slack[name]) for name, error in found.items()}
    calls = {n: way.run for n, way in entrants.items() if green[n] and n in {*names, BASELINE}}
    times = interleaved(calls, budget, clock)
    size = case.bytes()
    floor = seconds_per_byte("cpu", clock, min(size // 2, 1 << 27)) * size
    for name in (name for name in entrants if name in names):
        error = found[name]
        row = {"contender": name, "error_l2": error[0], "error_max": error[1]}
        row |= {"gate": green[name], "median": None}
        if name == PACKED:
            row |= dict(zip(("tolerance_l2", "tolerance_max"), allowed, strict=True))
        if green[name]:
            row |= summary(times[name], times.get(BASELINE))
        if name == PACKED and green[name]:
            others = {n: t for n, t in times.items() if n != PACKED}
            row |= {"against": {n: ratios(t, times[PACKED]) for n, t in others.items()}}
        yield row | {"floor_copy": floor, "floor_flops": case.flops() / peak_flops}
