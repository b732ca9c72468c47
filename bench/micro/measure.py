"""One case of the convolution: results checked against float64 in two norms, then times. Wrong results get no time."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.micro.contenders import BASELINE, DTYPES, Case, make
from bench.micro.timing import (
    Clock,
    interleaved,
    peak_bytes,
    quartiles,
    seconds_per_byte,
    summary,
    within,
    worst_errors,
)
from seqconv import reference
from seqconv.backends.cuda.plan import OPERAND_ERROR


def call(case: Case, function, tensors, dy):
    """Returns the contender's results: y, or y and the gradients of every input."""
    if case.op == "forward":
        with torch.no_grad():
            return [function(tensors)]
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(leaves)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def checked(case: Case, tensors, dy):
    """Returns the case, tensors and dy of the first channels, and what cuts results to these channels.

    There are as many channels as fit beside each other in float64. Channels never meet, so these suffice.
    """
    channels = max(1, min(case.channels, (1 << 24) // (case.batch * case.length)))
    rows = -1 if case.layout == "blh" else -2
    axes = (rows, -2, -1, -2, rows, rows)  # of u, k, skip, k_rev, pre_gate, post_gate

    def cut(values, axes):
        pairs = zip(values, axes, strict=True)
        return [None if v is None else v.narrow(a, 0, channels) for v, a in pairs]

    def of_results(results):
        given = [a for a, t in zip(axes, tensors, strict=True) if t is not None]
        return cut(results, (rows, *given)[: len(results)])

    return replace(case, channels=channels), cut(tensors, axes), *cut([dy], [rows]), of_results


def oracle(case: Case, tensors, dy):
    """Returns the results in float64."""

    def definition(leaves):
        u, k, skip, k_rev, pre_gate, post_gate = leaves
        gates = {"pre_gate": pre_gate, "post_gate": post_gate}
        return reference.fftconv_fft(u, k, skip, k_rev=k_rev, layout=case.layout, **gates)

    leaves, dy = ([None if t is None else t.double() for t in ts] for ts in (tensors, [dy]))
    return call(case, definition, leaves, *dy)


def errors(case: Case, results, exact) -> tuple[float, float]:
    """Returns the worst relative L2 error of the results, and the worst element over the root mean square."""
    # The gradient of skip is a sum of both signs. Its scale is what random signs leave of such a sum.
    return worst_errors(results, exact, {3: (case.batch * case.heads * case.length) ** 0.5})


def tolerance(
    case: Case, baseline: tuple[float, float], exact, tensor_cores: bool = False
) -> tuple[float, float]:
    """Returns the limits of seqconv's errors.

    The relative L2 error may be 3e-7 up to 65,536 steps and 4.5e-7 beyond in float32, and twice that of torch.fft at
    other dtypes. The worst element may be off by twice that of torch.fft and two units in the last place of the
    largest. In float64 the limit is 64 units in the last place, since the oracle is no better.
    """
    if case.dtype == "float64":
        baseline = (2.0**-47, 2.0**-44)
    if tensor_cores and case.dtype in ("bfloat16", "float16"):
        stated = 2 * OPERAND_ERROR  # fp16 operands, twice in gradients
        baseline = (baseline[0] + stated / 2, baseline[1] + 4 * stated)
    l2 = {"float32": 3e-7 if case.length <= 65536 else 4.5e-7}.get(case.dtype, 2 * baseline[0])
    crest = max((x.abs().max() / x.square().mean().sqrt()).item() for x in exact)
    return l2, 2 * baseline[1] + 2 * torch.finfo(DTYPES[case.dtype]).eps * crest


@dataclass
class Entrants:
    """What contenders computed: calls to time, by name, errors, and whether these are within the limits."""

    calls: dict[str, Callable]
    errors: dict[str, tuple[float, float]]
    green: dict[str, bool]
    allowed: tuple[float, float]  # errors of seqconv; others may have 1000 times as much

    @property
    def right(self) -> dict[str, Callable]:
        return {name: run for name, run in self.calls.items() if self.green[name]}


def enter(
    case: Case, names, tensors, dy, device: str, failed, around=nullcontext, tensor_cores=False
) -> Entrants:
    """Makes the contenders and checks their results, each within the context `around()`.

    failed(name, error) is called for one that cannot be imported or run, with None for one that does not do the case.
    tensor_cores: seqconv computes 16-bit tensors by a GPU's kernels, if only in the emulator.
    """
    part = checked(case, tensors, dy)
    exact = oracle(*part[:3])
    calls, found = {}, {}
    for name in names:
        try:
            function = make(name, case, device)
            if function is None:
                failed(name, None)
                continue
            run = partial(call, case, function, tensors, dy)
            with around():
                found[name] = errors(case, part[3](run()), exact)
        except (ImportError, OSError, RuntimeError) as error:
            failed(name, error)
            continue
        calls[name] = run
    allowed = tolerance(case, found.get(BASELINE, (1e-3, 1e-2)), exact, tensor_cores)
    green = {n: within(e, allowed, 1.0 if n == "seqconv" else 1e3) for n, e in found.items()}
    return Entrants(calls, found, green, allowed)


def measure(case: Case, names, budget: float, clock: Clock, peak_flops: float, beside=()):
    """Yields a row of results for each contender, without times where the result is wrong. For a contender that does
    not compete the row is {"contender", "absent": the reason}.

    `beside` are other cases of seqconv that go through the same rounds, (case, threads, weight) each.
    They are checked in rows of their own. The row of seqconv says how its time per element compares
    with the product of theirs to the power of their weights.
    """
    tensors, dy = case.tensors("cpu")
    absent = {}

    def failed(name, error):
        if isinstance(error, RuntimeError):
            raise error
        absent[name] = f"cannot be imported: {error}" if error else "does not do this case"

    entrants = enter(case, dict.fromkeys((BASELINE, *names)), tensors, dy, "cpu", failed)
    functions = entrants.right
    counts: dict[str, int] = {}
    if "seqconv" in functions:
        for i, (other, threads, _) in enumerate(beside):
            own = other.tensors("cpu")
            functions[f"beside {i}"] = partial(call, other, make("seqconv", other, "cpu"), *own)
            counts[f"beside {i}"] = threads
    usual, before = torch.get_num_threads(), {}

    def switch(name):
        torch.set_num_threads(counts.get(name, usual))
        functions[name]()  # wakes the threads, or sends them to sleep

    if set(counts.values()) - {usual}:
        before = {name: partial(switch, name) for name in functions}
    times = interleaved(functions, budget, clock, before)
    torch.set_num_threads(usual)
    floor_copy = seconds_per_byte("cpu", clock, min(case.bytes() // 2, 1 << 27)) * case.bytes()
    yield from ({"contender": n, "absent": why} for n, why in absent.items() if n in names)
    for name, error in entrants.errors.items():
        if name not in names:
            continue
        green = entrants.green[name]
        row = {"contender": name, "error_l2": error[0], "error_max": error[1], "gate": green}
        if name == "seqconv":
            row |= dict(zip(("tolerance_l2", "tolerance_max"), entrants.allowed, strict=True))
        row |= {"median": None}
        if green:
            row |= summary(times[name], times.get(BASELINE))
        if name == "seqconv" and beside and green:
            seconds = [t / case.elements for t in times[name]]
            for i, (other, _, weight) in enumerate(beside):
                pairs = zip(seconds, times[f"beside {i}"], strict=True)
                seconds = [t / (o / other.elements) ** weight for t, o in pairs]
            row |= {"beside": quartiles(seconds)}
        yield row | {"floor_copy": floor_copy, "floor_flops": case.flops() / peak_flops}


def memory(case: Case, names):
    """Yields a row with the peak memory of one call for each contender."""
    tensors, dy = case.tensors("cpu")
    for name in names:
        function = make(name, case, "cpu")
        if function is not None:
            peak = peak_bytes(partial(call, case, function, tensors, dy), "cpu")
            yield {"contender": name, "median": None, "gate": True, "peak_bytes": peak}
