"""How each layer convolves a sequence that is divided among processes."""

from functools import partial

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from seqconv.layers.base import ConvLayer, sized, warn_of_missing_taps
from seqconv.layers.butterfly_conv import ButterflyConv
from seqconv.layers.hyena import Hyena
from seqconv.layers.recurrence import Recurrent, discrete, exponential
from seqconv.ops.fftconv import fftconv
from seqconv.ops.ssm import mode_sum, moments, multiply
from seqconv.parallel import exchange
from seqconv.parallel.call import Call, hooked, most_taps, random, random_numbers, reach_of
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


def problem_of(layer: ConvLayer | Hyena, shards: Shards, batch: int, dtype: torch.dtype) -> Problem:
    """The layer's long convolution: of a Hyena one of them, with a gate before it and one after it."""
    size = dtype.itemsize
    two_sided = getattr(layer, "bidirectional", False)
    generator = layer.filter if isinstance(layer, Hyena) else layer.kernel
    taps = most_taps(generator, shards.length)
    sent, heads = size, 1 if isinstance(layer, Hyena) else layer.heads
    if isinstance(layer, Hyena):
        sent = size = torch.promote_types(dtype, torch.float32).itemsize
    reach = reach_of(taps, taps if two_sided else 0, shards)
    modes = generator.modes if has_state(layer) else 0  # pyright: ignore
    whole = isinstance(layer, ButterflyConv)
    options = {"modes": modes, "directions": 1 + two_sided, "whole": whole}
    return Problem(shards, batch, layer.d_model, heads, reach, False, sent, size, **options)


def call_of(layer, shards: Shards, x: Tensor, method: str, group) -> Call:
    problem = problem_of(layer, shards, x.shape[0], x.dtype)
    if method != "auto" and method not in problem.ways():
        wanted = ", ".join(repr(way) for way in ("auto", *problem.ways()))
        name = type(layer).__name__
        raise ValueError(
            f"ContextParallel: method must be one of {wanted} for this {name}, got {method!r}"
        )
    return Call(group, dist.get_rank(group), problem, problem.choose(method))


def convolve(layer: ConvLayer, x: Tensor, rate: float, call: Call) -> Tensor:
    """What ConvLayer._convolve returns, for this rank's steps: (batch, steps, heads, d_model)."""
    x, _ = sized(x)
    if isinstance(layer, ButterflyConv):
        return _butterfly(layer, x, rate, call)
    if call.method == "state":
        return _by_state(layer, x, rate, call)
    k, parted = call.kernel(layer.kernel, rate=rate)
    if k.shape[-1] < call.problem.shards.length:
        warn_of_missing_taps(layer, k, call.problem.shards.length)
    k_rev = None
    if layer.bidirectional:
        k, k_rev = k[: layer.heads], k[layer.heads :]
    options = {"activation": layer.activation, "layout": "blh", "parted": parted}
    return call.convolve(x, k, layer.skip, k_rev=k_rev, **options)


def hyena(layer: Hyena, x: Tensor, call: Call):
    """The length of the whole sequence, the short convolution, the long ones, and what makes their kernels."""
    shards, old = call.problem.shards, call.problem
    taps = layer.short.shape[-1]
    wide = layer.short.shape[0]
    reach = reach_of(taps, 0, shards)
    size = x.element_size()
    problem = Problem(shards, old.batch, wide, 1, reach, False, size, size)
    short = Call(call.group, call.rank, problem, problem.choose("auto"))
    parted = []

    def make(length: int) -> Tensor:
        k, divided = call.kernel(layer.filter)
        parted.append(divided)
        return k

    def long(v, k, skip, **options) -> Tensor:
        return call.convolve(v, k, skip, parted=parted[-1], **options)

    return shards.length, lambda u, k, **o: short.convolve(u, k, None, **o), long, make


def _butterfly(layer: ButterflyConv, x: Tensor, rate: float, call: Call) -> Tensor:
    length = call.problem.shards.length
    if length > layer.l_max:
        text = f"must have length <= l_max={layer.l_max} on all ranks together, got length={length}"
        raise ValueError(f"ButterflyConv: x {text}")
    k, parted = call.kernel(layer.kernel, rate=rate, length=layer.l_max)
    k = k if parted else k[:, call.channels]
    u = rearrange(call.to_channels(x, "blh"), "b l h -> b h l")
    with random_numbers(layer, call.group, alike=True):
        y = layer._transformed(u, lambda: k, length, call.channels)
    return call.to_shards(rearrange(y, "b c h l -> b l c h"), "blh")


def _by_state(layer, x: Tensor, rate: float, call: Call) -> Tensor:
    """Each segment convolved by itself, and the responses to the states in which the segments before it (and, if
    two-sided, after it) leave the system. The states of all ranks are gathered while the segments are convolved."""
    problem, heads = call.problem, layer.heads
    shards, single = problem.shards, x.dtype != torch.float64
    wide = torch.float32 if single else torch.float64
    segments = shards.segments(call.rank)
    longest = max(size for _, size in segments)
    k, (a, b, c) = layer.kernel(longest, rate=rate, also=partial(discrete, rate=rate))
    us = [u.movedim(1, 2).to(wide) for u in x.split([size for _, size in segments], 1)]  # (b h l)
    ends = [[multiply(b, moments(a, u.flip(-1))) for u in us]]
    if layer.bidirectional:
        ends.append([multiply(b, moments(a, u)) for u in us])
    own = torch.stack([torch.stack(side) for side in ends])  # (sides, segments, b, h, n, 2)
    gathered = exchange.gather(own, call.group)
    k_rev = k[heads:] if layer.bidirectional else None
    local = [fftconv(u, k[:heads], layer.skip.to(wide), k_rev=k_rev) for u in us]
    # (sides, segments of all ranks, ...) and where each begins and ends.
    # By way of a row, because torch 2.10 takes contiguous gradients of a gathered tensor only.
    states = gathered.flatten().view(gathered.shape).movedim(0, 1).flatten(1, 2)
    places = [place for r in range(shards.ranks) for place in shards.segments(r)]
    out = []
    for v, (start, size) in zip(local, segments, strict=True):
        end = start + size
        before = [(i, start - p - n) for i, (p, n) in enumerate(places) if n and p + n <= start]
        v = v + _response(
            a, multiply(exponential(a), _arrived(a, states[0], before)), c[:heads], size, single
        )
        if layer.bidirectional:
            after = [(i, p - end) for i, (p, n) in enumerate(places) if n and p >= end]
            rest = _response(a, _arrived(a, states[1], after), c[heads:], size, single)
            v = v + rest.flip(-1)
        out.append(v)
    y = activate(torch.cat(out, -1), layer.activation).to(x.dtype)
    return rearrange(y, "b c h l -> b l c h")


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
