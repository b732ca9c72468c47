"""Mistakes in the exchange of steps, one at a time: the comparison with one process must catch each of them."""

import inspect
import sys

import pytest
from context_cases import run_layers
from parallel_cases import run_cases, zigzag
from processes import run_fresh

from seqconv.parallel import call, context, exchange, layers, shards

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
    "a state that is a step late": (layers, "start - p - n) for", "start - p - n + 1) for"),
    "no state of the future": (layers, "v = v + rest.flip(-1)", "v = v + 0 * rest.flip(-1)"),
    "the skip term dropped": (
        call,
        "y = fftconv(x, k, skip, k_rev",
        "y = fftconv(x, k, None, k_rev",
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
    run_cases(CASES, ["a2a", "halo"])
    run_layers(CALLS)


@pytest.mark.slow
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
