"""Mistakes in the exchange of steps, one at a time: the comparison with one process must catch each of them."""

import inspect
import sys

import pytest
from context_cases import run_layers
from packed_parallel import rows, run_packed, run_packed_layers
from parallel_cases import run_cases, zigzag
from processes import run_fresh

from seqconv.parallel import call, context, exchange, layers, packs, shards

CASES = [
    ([6, 5, 4], {"heads": 2, "future": 2}),
    ([3, 0, 8], {"gates": ("pre", "post")}),
    (zigzag(17, 3), {"order": "zigzag"}),
]
CALLS = [
    (("s4d", [13, 13, 11]), {"method": "state"}),
    (("s4d, two-sided", [9, 21, 7]), {"method": "state"}),
    (("hyena", [5, 9, 2]), {}),
]
PACKED = [
    (([6, 5, 4], lengths, "halo"), {"future": 3, "heads": 2}) for lengths in ([15], [5, 1, 0, 6, 3])
]
PACKED_LAYERS = [
    (("s4d", [13, 13, 11], [12, 1, 24]), {"method": "state"}),
    (("s4d, two-sided", [9, 21, 7], [4, 20, 13]), {"method": "state"}),
    (("s4d, dss_softmax", [13, 13, 11], [12, 1, 24]), {}),
    (("butterfly", [13, 13, 11], [12, 1, 24]), {}),
    *[(("s4d, two-sided", [9, 9, 5], n), {"method": "state"}) for n in rows([9, 9, 5]).values()],
]
MUTATIONS = {
    "a wrong split size": (
        exchange,
        "shape[channel], shape[step] = count, shards.sizes[rank]",
        "shape[channel], shape[step] = count, max(shards.sizes[rank] - 1, 0)",
    ),
    "zigzag undone twice": (exchange, "runs.sort(key=lambda pair: pair[0])", "runs.reverse()"),
    "parts sent in another order": (
        exchange,
        "        parts.append(runs[0] if",
        "        parts.insert(0, runs[0] if",
    ),
    "dk is not summed": (
        exchange,
        "[summed(g, ctx.group) if wanted",
        "[g if wanted",
    ),
    "parameters' gradients are not summed": (
        context,
        "exchange.summed(grad, self.group, self.number)",
        "grad",
    ),
    "a halo that is a step short": (shards, "(start - left, start)", "(start - left + 1, start)"),
    "a halo of the wrong side": (
        call,
        "out.append(y.narrow(step % y.dim(), before",
        "out.append(y.narrow(step % y.dim(), 0",
    ),
    "channels of another rank": (
        call,
        "first = sum(sizes[: self.rank])",
        "first = sum(sizes[: (self.rank + 1) % 3])",
    ),
    "a state that is a step late": (layers, "(i, start - p - n)", "(i, start - p - n + 1)"),
    "no state of the future": (
        layers,
        "v = v + F.pad(rest.flip(-1),",
        "v = v + 0 * F.pad(rest.flip(-1),",
    ),
    "the skip term dropped": (
        call,
        "y = fftconv(x, k, skip, k_rev",
        "y = fftconv(x, k, None, k_rev",
    ),
    "rows of another place around a halo": (
        call,
        "self._rows(start - before, part.shape[step])",
        "self._rows(start, part.shape[step])",
    ),
    "a halo that is a step short of the longest row": (
        call,
        "else self.pack.longest_row",
        "else self.pack.longest_row - 1",
    ),
    "a kernel for all steps of a pack": (
        call,
        "else self.pack.longest\n",
        "else self.problem.shards.length\n",
    ),
    "states of rows that have ended": (layers, "cut.begin < p + n <= start", "p + n <= start"),
    "states of rows that come later": (layers, "end <= p < cut.end", "end <= p"),
    "a state that reaches the next row": (layers, "min(until, end) - start,", "size,"),
    "a state that begins before its row": (layers, "end - max(since, start))", "size)"),
    "rows in the place of the next ones": (
        packs,
        "self.offsets.clamp(first, first + size) - first",
        "self.offsets.clamp(max(first - 1, 0), max(first - 1, 0) + size) - max(first - 1, 0)",
    ),
    "the gate dropped": (call, "u.to(wide) * pre_gate.to(wide)", "u.to(wide)"),
}


def mutated(name: str):
    module, right, wrong = MUTATIONS[name]
    source = inspect.getsource(module)
    assert source.count(right) == 1, name
    before = dict(vars(module))
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), vars(module))
    for path, other in list(sys.modules.items()):  # those that have imported a name of it
        if path.startswith("seqconv.parallel") and other is not module:
            for key, value in list(vars(other).items()):
                if key in before and value is before[key]:
                    setattr(other, key, vars(module)[key])
    unmutated()


@pytest.mark.slow
@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mistakes_are_caught(name):
    outcomes = run_fresh(3, mutated, name, timeout=40, collective=3)
    assert any(outcome.failed for outcome in outcomes)
    assert not any("assert source.count" in (outcome.error or "") for outcome in outcomes)


@pytest.mark.slow
def test_nothing_is_caught_without_a_mistake():
    outcomes = run_fresh(3, unmutated, timeout=60)
    assert not any(outcome.failed for outcome in outcomes), outcomes


def unmutated():
    run_cases(CASES, ["a2a", "halo"])
    run_layers(CALLS)
    run_packed(PACKED)
    run_packed_layers(PACKED_LAYERS)
