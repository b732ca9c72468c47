"""Convolutions over several processes against one process; the functions run in every rank."""

import torch
import torch.distributed as dist

from seqconv import fftconv, parallel
from seqconv.parallel.shards import Shards, chunk_sizes

SIGNALS = ("u", "pre_gate", "post_gate")


def case(
    sizes,
    *,
    order="contiguous",
    batch=2,
    channels=5,
    taps=7,
    heads=0,
    per_sample=False,
    future=0,
    gates=(),
    skip=True,
    bias=False,
    dtype=torch.float64,
    seed=0,
    **options,
):
    """Random tensors of a whole problem, the options of fftconv, and its shards."""
    shards = Shards(tuple(sizes), order)
    length = shards.length
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    blh = options.get("layout") == "blh"
    signal = (batch, length, channels) if blh else (batch, channels, length)
    output = (batch, length, *[heads] * bool(heads), channels)
    output = output if blh else (batch, *[heads] * bool(heads), channels, length)
    leading = (*[batch] * per_sample, *[heads] * bool(heads), channels)
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {"u": draw(*signal), "k": draw(*leading, taps, dtype=wide)}
    if skip:
        tensors["skip"] = draw(*[heads] * bool(heads), channels, dtype=wide)
    if future:
        tensors["k_rev"] = draw(*leading, future, dtype=wide)
    if "pre" in gates:
        tensors["pre_gate"] = draw(*signal)
    if "post" in gates:
        tensors["post_gate"] = draw(*output)
    if bias:
        tensors["bias"] = draw(*[heads] * bool(heads), channels, dtype=wide)
    return tensors, options, shards, draw(*output)


def part(t, shards, rank, step):
    """A rank's steps of a whole signal."""
    return torch.cat([t.narrow(step, *segment) for segment in shards.segments(rank)], step)


def relative(ours, wanted) -> float:
    norm = wanted.double().norm().item()
    return (ours.double() - wanted.double()).norm().item() / (norm or 1.0)


def compare(given, function=parallel.fftconv, group=None, bound=1e-12, **more):
    """The worst relative error of y and of every gradient on this rank; they have the right shapes and dtypes."""
    tensors, options, shards, weight = given
    rank = dist.get_rank(group)
    step = 1 if options.get("layout") == "blh" else -1

    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    whole = fftconv(**leaves, **options)
    (whole * weight).sum().backward()
    wanted = {"y": whole.detach()} | {n: t.grad for n, t in leaves.items()}

    own = {n: part(t, shards, rank, step) if n in SIGNALS else t for n, t in tensors.items()}
    own = {n: t.clone().requires_grad_() for n, t in own.items()}
    y = function(**own, **options, **more, group=group, order=shards.order)
    (y * part(weight, shards, rank, step)).sum().backward()
    found = {"y": y.detach()} | {n: t.grad for n, t in own.items()}
    errors = {}
    for name, t in wanted.items():
        t = part(t, shards, rank, step) if name in SIGNALS + ("y",) else t
        ours = found[name]
        assert ours is not None, f"{name} has no gradient"
        assert ours.shape == t.shape and ours.dtype == t.dtype, (name, ours.shape, t.shape)
        errors[name] = relative(ours, t)
        assert errors[name] < bound, f"{name} is {errors[name]:.1e} off"
    return errors


def zigzag(length, ranks):
    parts = chunk_sizes(length, 2 * ranks)
    return [a + b for a, b in zip(parts, reversed(parts), strict=True)][:ranks]


def run_cases(cases, methods):
    """Every case by every method; the worst errors."""
    worst = 0.0
    for sizes, options in cases:
        for method in methods:
            try:
                errors = compare(case(sizes, **options), method=method)
            except Exception as error:
                raise AssertionError(f"{sizes}, {options}, {method}: {error}") from error
            worst = max(worst, *errors.values())
    return worst
