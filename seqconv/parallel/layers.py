"""How each layer convolves a sequence that is divided among processes."""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqconv.layers.base import ConvLayer, sized, warn_of_missing_taps
from seqconv.layers.butterfly_conv import ButterflyConv
from seqconv.layers.hyena import Hyena
from seqconv.layers.packing import pad, unpadded
from seqconv.layers.recurrence import Recurrent, discrete, exponential
from seqconv.ops.fftconv import fftconv
from seqconv.ops.ssm import mode_sum, moments, multiply
from seqconv.parallel import exchange
from seqconv.parallel.call import Call, hooked, most_taps, random, random_numbers, reach_of
from seqconv.parallel.packs import DividedPack
from seqconv.parallel.shards import Shards
from seqconv.parallel.traffic import Problem
from seqconv.reference import activate


def has_state(layer: nn.Module) -> bool:
    """Whether the kernel is certainly that of a diagonal system, whose state can be passed on."""
    if not isinstance(layer, Recurrent):
        return False
    kernel = layer.kernel
    if layer.other_kernel() or getattr(kernel, "discretization", "dss_softmax") == "dss_softmax":
        return False
    if (
        vars(kernel).keys() & {"forward", "generate"}
        or type(kernel.kernel_dropout) is not nn.Dropout
    ):
        return False
    return not (hooked(kernel) or random(kernel))


def problem_of(
    layer: ConvLayer | Hyena, shards: Shards, x: Tensor, pack: DividedPack | None
) -> Problem:
    """The layer's long convolution: of a Hyena one of them, with a gate before it and one after it."""
    dtype, batch = x.dtype, x.shape[0] if pack is None else 1
    size = dtype.itemsize
    two_sided = getattr(layer, "bidirectional", False)
    generator = layer.filter if isinstance(layer, Hyena) else layer.kernel
    length = shards.length if pack is None else pack.longest_row
    taps = most_taps(generator, length)
    sent, heads = size, 1 if isinstance(layer, Hyena) else layer.heads
    if isinstance(layer, Hyena):
        sent = size = torch.promote_types(dtype, torch.float32).itemsize
    reach = reach_of(taps, taps if two_sided else 0, length)
    modes = generator.modes if has_state(layer) else 0  # pyright: ignore
    whole = isinstance(layer, ButterflyConv)
    options = {"modes": modes, "directions": 1 + two_sided, "whole": whole}
    return Problem(shards, batch, layer.d_model, heads, reach, False, sent, size, **options)


def call_of(layer, shards: Shards, x: Tensor, method: str, group, pack: DividedPack | None) -> Call:
    problem = problem_of(layer, shards, x, pack)
    if method != "auto" and method not in problem.ways():
        wanted = ", ".join(repr(way) for way in ("auto", *problem.ways()))
        name = type(layer).__name__
        raise ValueError(
            f"ContextParallel: method must be one of {wanted} for this {name}, got {method!r}"
        )
    return Call(group, dist.get_rank(group), problem, problem.choose(method), pack)


def convolve(layer: ConvLayer, x: Tensor, rate: float, call: Call) -> Tensor:
    """What ConvLayer._convolve returns, for this rank's steps: (batch, steps, heads, d_model), or, of packed rows,
    (steps, heads, d_model)."""
    x = x if call.pack is not None else sized(x)[0]
    if isinstance(layer, ButterflyConv):
        return _butterfly(layer, x, rate, call)
    if call.method == "state":
        y = _by_state(layer, x if call.pack is None else x.unsqueeze(0), rate, call)
        return y if call.pack is None else y.squeeze(0)
    k, parted = call.kernel(layer.kernel, rate=rate)
    if k.shape[-1] < call.length:
        warn_of_missing_taps(layer, k, call.length)
    k_rev = None
    if layer.bidirectional:
        k, k_rev = k[: layer.heads], k[layer.heads :]
    options = {"activation": layer.activation, "layout": "blh", "parted": parted}
    return call.convolve(x, k, layer.skip, k_rev=k_rev, **options)


def hyena(layer: Hyena, x: Tensor, call: Call):
    """The length of the whole sequence, or of the longest row, the short convolution, the long ones, and what makes
    their kernels."""
    shards, old = call.problem.shards, call.problem
    wide, taps = layer.short.shape
    reach = reach_of(taps, 0, shards.length if call.pack is None else call.pack.longest_row)
    size = x.element_size()
    problem = Problem(shards, old.batch, wide, 1, reach, False, size, size)
    short = Call(call.group, call.rank, problem, problem.choose("auto"), call.pack)
    parted = []

    def make(length: int) -> Tensor:
        k, divided = call.kernel(layer.filter)
        parted.append(divided)
        return k

    def long(v, k, skip, **options) -> Tensor:
        return call.convolve(v, k, skip, parted=parted[-1], **options)

    return call.length, lambda u, k, **o: short.convolve(u, k, None, **o), long, make


def _butterfly(layer: ButterflyConv, x: Tensor, rate: float, call: Call) -> Tensor:
    length, pack = call.length, call.pack
    if length > layer.l_max:
        where = " on all ranks together" if pack is None else " in every row"
        text = f"must have length <= l_max={layer.l_max}{where}, got length={length}"
        raise ValueError(f"ButterflyConv: x {text}")
    k, parted = call.kernel(layer.kernel, rate=rate, length=layer.l_max)
    k = k if parted else k[:, call.channels]
    x, lengths = call.to_channels(x, "blh"), None
    if pack is not None:
        x, lengths = pad(x, pack.offsets, length)
    with random_numbers(layer, call.group, alike=True):
        y = layer._transformed(rearrange(x, "b l h -> b h l"), lambda: k, length, call.channels)
    y = rearrange(y, "b c h l -> b l c h")
    return call.to_shards(y if lengths is None else unpadded(y, lengths), "blh")


def _by_state(layer, x: Tensor, rate: float, call: Call) -> Tensor:
    """Each segment convolved by itself, and the responses to the states in which the segments before it (and, if
    two-sided, after it) leave the system. The states of all ranks are gathered while the segments are convolved.

    Of packed rows, x is (1, steps, d_model), and a state is that of the one row which goes on in the next segment: it
    begins with that row, and only the row's steps respond to it.
    """
    problem, heads, pack = call.problem, layer.heads, call.pack
    shards, single = problem.shards, x.dtype != torch.float64
    wide = torch.float32 if single else torch.float64
    segments = shards.segments(call.rank)
    longest = max(size for _, size in segments)
    longest = longest if pack is None else min(longest, pack.longest_row)
    k, (a, b, c) = layer.kernel(longest, rate=rate, also=partial(discrete, rate=rate))
    us = [u.movedim(1, 2).to(wide) for u in x.split([size for _, size in segments], 1)]  # (b h l)
    cuts = [_cuts_of(call, start, size) for start, size in segments]
    own = _states(a, b, us, cuts, layer.bidirectional)
    gathered = exchange.gather(own, call.group)
    k_rev = k[heads:] if layer.bidirectional else None
    taps = k[:heads], layer.skip.to(wide)
    local = [
        _local(call, start, u, *taps, k_rev) for u, (start, _) in zip(us, segments, strict=True)
    ]
    # (sides, segments of all ranks, ...) and where each begins and ends.
    # By way of a row, because torch 2.10 takes contiguous gradients of a gathered tensor only.
    states = gathered.flatten().view(gathered.shape).movedim(0, 1).flatten(1, 2)
    places = [place for r in range(shards.ranks) for place in shards.segments(r)]
    out = []
    for v, (start, size), cut in zip(local, segments, cuts, strict=True):
        end = start + size
        before = [
            (i, start - p - n)
            for i, (p, n) in enumerate(places)
            if n and cut.begin < p + n <= start
        ]
        arrived = multiply(exponential(a), _arrived(a, states[0], before))
        rest = _response(a, arrived, c[:heads], cut.first, single)
        v = v + F.pad(rest, (0, size - cut.first))
        if layer.bidirectional:
            after = [(i, p - end) for i, (p, n) in enumerate(places) if n and end <= p < cut.end]
            rest = _response(a, _arrived(a, states[1], after), c[heads:], cut.last, single)
            v = v + F.pad(rest.flip(-1), (size - cut.last, 0))
        out.append(v)
    y = activate(torch.cat(out, -1), layer.activation).to(x.dtype)
    return rearrange(y, "b c h l -> b l c h")


class _Cuts(NamedTuple):
    """The rows that both ends of a segment cut: the first step of the row that has come from the segment before, and
    how many steps it has here; the end of the row that goes on in the next segment, and how many it has here."""

    begin: int
    first: int
    end: int
    last: int


def _cuts_of(call: Call, start: int, size: int) -> _Cuts:
    if call.pack is None:
        return _Cuts(-1, size, call.length, size)
    end = start + size
    begin, until = call.pack.across(start)
    since, stop = call.pack.across(end)
    return _Cuts(begin, min(until, end) - start, stop, end - max(since, start))


def _states(a, b, us, cuts: list[_Cuts], two_sided: bool) -> Tensor:
    """What segments leave to the next ones, and to those before them: (sides, segments, batch, channels, modes, 2)."""
    pairs = list(zip(us, cuts, strict=True))
    ends = [
        [multiply(b, moments(a, u[..., u.shape[-1] - cut.last :].flip(-1))) for u, cut in pairs]
    ]
    if two_sided:
        ends.append([multiply(b, moments(a, u[..., : cut.first])) for u, cut in pairs])
    return torch.stack([torch.stack(side) for side in ends])


def _local(call: Call, start: int, u: Tensor, k, skip, k_rev) -> Tensor:
    """fftconv of a segment (batch, channels, size) that begins at a step, by itself: (batch, heads, channels, size)."""
    if call.pack is None:
        return fftconv(u, k, skip, k_rev=k_rev)
    rows = call.pack.within(start, u.shape[-1])
    return fftconv(u.squeeze(0), k, skip, k_rev=k_rev, cu_seqlens=rows).unsqueeze(0)


def _arrived(a: Tensor, states: Tensor, which: list[tuple[int, int]]) -> Tensor:
    """sum exp(a distance) state over pairs (index of the state, distance): (batch, channels, modes, 2)."""
    index = [i for i, _ in which]
    distance = a.new_tensor([d for _, d in which])
    weight = exponential(distance.view(-1, 1, 1, 1, 1) * a)
    # A sum over no state still takes part in the backward pass.
    return multiply(weight, states[index]).sum(0)


def _response(a: Tensor, state: Tensor, c: Tensor, length: int, single: bool) -> Tensor:
    """sum_n Re(c exp(a l) state), l < length: (batch, heads, channels, length)."""
    weight = multiply(c, state.unsqueeze(1)).flatten(0, 1)
    return mode_sum(a, weight, length, single).unflatten(0, (state.shape[0], c.shape[0]))
