"""Packs that are divided among processes, against one process; the functions run in every rank."""

import copy
import warnings
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from context_cases import made
from layer_table import D
from parallel_cases import part, relative

from seqconv import fftconv, parallel
from seqconv.parallel.shards import Shards

SIGNALS = ("u", "pre_gate", "post_gate")


def rows(sizes, order="contiguous"):
    """Lengths of rows that meet the cuts between ranks in every way, by name."""
    shards = Shards(tuple(sizes), order)
    total = shards.length
    starts = {start for r in range(shards.ranks) for start, _ in shards.segments(r)}
    cuts = sorted(starts - {0, total})

    def between(places):
        ends = [0, *sorted(p for p in places if 0 < p < total), total]
        return [b - a for a, b in pairwise(ends)]

    tiny = [(1, 0, 2, 1, 0, 0)[i % 6] for i in range(total)]
    while sum(tiny) > total:
        tiny.pop()
    return {
        "rows end at the cuts": between(cuts),
        "rows end a step before": between([c - 1 for c in cuts]),
        "rows end a step after": between([c + 1 for c in cuts]),
        "empty rows at the cuts": [0, *[n for row in between(cuts) for n in (row, 0, 0)]],
        "a row of one step at each side": between([c + i for c in cuts for i in (-1, 0, 1)]),
        "one row": [total],
        "two long rows and some short": between([2, 3, total // 2 - 1, total - 2]),
        "tiny rows": [*tiny, *[1] * (total - sum(tiny))],
    }


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def draw(*shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def compared(errors, bound, *what) -> float:
    for name, error in errors.items():
        assert error < bound, f"{what}: {name} is {error:.1e} off"
    return max(errors.values())


def packed_layer_errors(
    name, sizes, lengths, order="contiguous", max_seqlen=None, bound=1e-12, **options
):
    """The worst relative error of the output and of every gradient."""
    shards, rank = Shards(tuple(sizes), order), dist.get_rank()
    x, weight = draw(shards.length, D), draw(shards.length, D, seed=2)
    pack = {"cu_seqlens": offsets(lengths), "max_seqlen": max_seqlen}
    plain = made(name)
    warnings.filterwarnings("ignore", message=".*taps .l_max.*")
    ours = parallel.context_parallel(copy.deepcopy(plain), order=order, **options)

    whole = x.clone().requires_grad_()
    y = plain(whole, **pack)
    (y * weight).sum().backward()
    own = part(x, shards, rank, 0).clone().requires_grad_()
    z = ours(own, **pack)
    (z * part(weight, shards, rank, 0)).sum().backward()

    errors = {"y": relative(z.detach(), part(y.detach(), shards, rank, 0))}
    errors["x"] = relative(own.grad, part(whole.grad, shards, rank, 0))
    for (path, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert q.grad is not None, path
        errors[path] = relative(q.grad, p.grad)
    return compared(errors, bound, name, sizes, lengths, order, options)


def run_packed_layers(calls):
    return max(packed_layer_errors(*args, **options) for args, options in calls)


def packed_case(sizes, lengths, *, order, channels, taps, heads, per_row, future, gates, **options):
    """Random tensors of a whole pack, and a weight for each output."""
    total, more = sum(sizes), [heads] * bool(heads)
    leading = (*[len(lengths)] * per_row, *more, channels)
    last = options.get("layout") == "blh"
    signal = (total, channels) if last else (channels, total)
    output = (total, *more, channels) if last else (*more, channels, total)
    tensors = {"u": draw(*signal), "k": draw(*leading, taps, seed=3)}
    tensors["skip"] = draw(*more, channels, seed=4)
    if future:
        tensors["k_rev"] = draw(*leading, future, seed=5)
    if "pre" in gates:
        tensors["pre_gate"] = draw(*signal, seed=6)
    if "post" in gates:
        tensors["post_gate"] = draw(*output, seed=7)
    return tensors, draw(*output, seed=8)


def packed_errors(sizes, lengths, method, bound=1e-12, **options):
    """The worst relative error of parallel.fftconv's output and of every gradient."""
    given = {"order": "contiguous", "channels": 5, "taps": 7, "heads": 0, "per_row": False}
    given |= {"future": 0, "gates": ()} | options
    tensors, weight = packed_case(sizes, lengths, **given)
    shards, rank = Shards(tuple(sizes), given["order"]), dist.get_rank()
    kept = {n: v for n, v in options.items() if n in ("activation", "layout")}
    kept["cu_seqlens"] = offsets(lengths, torch.int32)
    step = 0 if options.get("layout") == "blh" else -1

    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    whole = fftconv(**leaves, **kept)
    (whole * weight).sum().backward()
    own = {n: part(t, shards, rank, step) if n in SIGNALS else t for n, t in tensors.items()}
    own = {n: t.clone().requires_grad_() for n, t in own.items()}
    y = parallel.fftconv(**own, **kept, method=method, order=given["order"])
    (y * part(weight, shards, rank, step)).sum().backward()

    errors = {"y": relative(y.detach(), part(whole.detach(), shards, rank, step))}
    for name, t in leaves.items():
        wanted = part(t.grad, shards, rank, step) if name in SIGNALS else t.grad
        assert own[name].grad.shape == wanted.shape
        errors[name] = relative(own[name].grad, wanted)
    return compared(errors, bound, sizes, lengths, method, options)


def run_packed(calls):
    return max(packed_errors(*args, **options) for args, options in calls)
