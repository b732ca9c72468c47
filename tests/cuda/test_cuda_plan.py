"""The planner is a pure function. So it is tested with thousands of problems on several devices."""

import math
import random
from dataclasses import replace

import pytest

from seqconv.backends.cuda import kernels
from seqconv.backends.cuda.cost import LAUNCH
from seqconv.backends.cuda.lengths import MAX_PASSES, RADICES, factor, sizes
from seqconv.backends.cuda.plan import MAX_PARTS, MAX_THREADS, PIECE, longest, make_plan
from seqconv.backends.cuda.problem import H100, Limits, Problem

DEVICES = {
    "h100": H100,
    "a100": Limits(166912, 167936, 108, 1.41e9, 1.55e12),
    "rtx3090": Limits(101376, 102400, 82, 1.7e9, 9.3e11),
    "t4": Limits(65536, 65536, 40, 1.59e9, 3.2e11, tensor_cores=False),
}


def problems(count: int):
    generator = random.Random(0)
    lengths = list(range(1, 300)) + [1000, 4096, 5000, 14113, 16384, 32768, 65537, 1 << 20, 1 << 22]
    for i in range(count):
        length = lengths[i] if i < len(lengths) else int(2 ** generator.uniform(0, 22))
        taps = generator.choice([length, length, 1, min(64, length), generator.randint(0, length)])
        rev = generator.choice([0, 0, length - 1, min(5, length - 1)])
        yield Problem(
            batch=generator.choice([1, 2, 8, 64]),
            heads=generator.choice([1, 1, 1, 2, 5]),
            channels=generator.choice([1, 3, 64, 768]),
            length=length,
            taps=taps,
            taps_rev=rev,
            per_sample=generator.random() < 0.2,
            element=generator.choice([2, 4]),
            fast=generator.random() < 0.7,
        )


@pytest.mark.parametrize("limits", DEVICES.values(), ids=DEVICES)
def test_every_problem_has_a_valid_plan(limits):
    for problem in problems(1500):
        for backward in (False, True):
            plan = make_plan(problem, limits, backward)
            assert math.prod(plan.radices) == plan.n and set(plan.radices) <= set(RADICES)
            assert plan.outer * plan.lower == plan.n
            reach = max(problem.taps, 1) - 1, problem.taps_rev
            past, future = reversed(reach) if backward else reach
            if plan.windows == 1:
                assert plan.n >= problem.length and plan.lead == 0
            else:
                assert (
                    plan.lead % PIECE == plan.step % PIECE == 0 and past <= plan.lead < past + PIECE
                )
                assert plan.windows * plan.step >= problem.length
                assert plan.lead + plan.step + future <= plan.n
                assert (plan.windows - 1) * plan.step < problem.length
            assert 1 <= plan.threads <= MAX_THREADS
            assert plan.taps_threads * plan.taps_slots <= MAX_THREADS
            assert max(plan.shared, plan.taps_shared) <= limits.shared
            if plan.outer > 1:
                assert plan.columns_shared <= limits.shared and plan.lower % plan.columns == 0
            rows = (1 if problem.per_sample else problem.batch) * plan.windows
            assert plan.groups >= 1 and -(-rows // plan.groups) * (plan.groups - 1) < rows
            if backward:
                across = problem.sets * problem.channels * (plan.outer if plan.long else 1)
                few = across * MAX_PARTS < limits.processors
                assert plan.parts <= (max(MAX_PARTS, rows // 2) if few else MAX_PARTS)
            if plan.engine == "tensor":
                assert problem.element == 2 and limits.tensor_cores and plan.row_threads % 32 == 0
                assert plan.radices[-2:] == (16, 16) and not (backward and problem.heads > 1)
            assert plan.seconds > 0 and str(plan)


def torch_fft_seconds(problem: Problem, limits: Limits = H100, backward: bool = False) -> float:
    """The time of the torch.fft formulation by the same model.

    It computes in float32 and moves about 84 bytes for every input sample (padding, rfft, product, irfft, crop), three
    times that in backward, in ten launches, or thirteen to put the taps of the future in place.
    """
    samples = problem.batch * problem.channels * problem.length
    launches = 13 if problem.taps_rev else 10
    traffic = 84 * samples * (1 + problem.heads) / 2 + 48 * problem.taps_rows * problem.length
    return (3 if backward else 1) * (traffic / limits.bandwidth + launches * LAUNCH)


@pytest.mark.parametrize("limits", DEVICES.values(), ids=DEVICES)
def test_no_plan_is_slower_than_torch_fft_by_the_model(limits):
    for problem in problems(1500):
        if problem.length < 32:
            continue  # 32 points are the least
        for backward in (False, True):
            plan = make_plan(problem, limits, backward)
            assert plan.seconds <= torch_fft_seconds(problem, limits, backward), (problem, plan)


@pytest.mark.parametrize("limits", DEVICES.values(), ids=DEVICES)
def test_the_longest_rows(limits):
    """Up to `longest` every kind of call has a plan, whose passes fit where the kernels read them."""
    for length in (longest(limits), 3**9 * 2048, 200_000_000):
        if length > longest(limits):
            continue
        for heads in (1, 3):
            for backward in (False, True):
                problem = Problem(1, heads, 1, length, length, length - 1, False, 4)
                plan = make_plan(problem, limits, backward)
                assert plan.n >= length and max(plan.shared, plan.columns_shared) <= limits.shared
                assert max(len(plan.outer_radices), len(plan.lower_radices)) <= MAX_PASSES


def test_lengths_do_not_pay_for_the_next_power_of_two():
    base = Problem(8, 1, 768, 0, 0, 0, False, 2)
    for length, most in ((1000, 1.1), (5000, 1.1), (14113, 1.2), (65537, 1.3), (100000, 1.1)):
        problem = replace(base, length=length, taps=length)
        plan = make_plan(problem)
        assert plan.n * plan.windows <= most * length + 256, plan


def test_one_pass_up_to_32768_points():
    for length in (256, 1024, 4096, 8192, 16384, 32768):
        for rev in (0, length - 1):
            problem = Problem(64, 1, 768, length, length, rev, False, 2)
            plan = make_plan(problem)
            assert (plan.engine, plan.n, plan.windows, plan.long) == ("tensor", length, 1, False)
            for batch in (8, 64):  # backward too, beyond two planes with one
                plan = make_plan(replace(problem, batch=batch), backward=True)
                assert (plan.engine, plan.n, plan.windows) == ("tensor", length, 1), plan
                assert (plan.planes, plan.aside) == ((1, True) if length == 32768 else (2, False))
    for length in (1024, 4096, 16384):
        plan = make_plan(Problem(64, 1, 768, length, length, length - 1, False, 4))
        assert (plan.engine, plan.n, plan.long) == ("radix", length, False)


def test_warps_of_a_row():
    """Few warps share what each has to set up where rows keep the device busy. Otherwise there are more."""
    for length, most in ((256, 1), (1024, 1), (2048, 2), (4096, 4), (8192, 8), (32768, 16)):
        many = make_plan(Problem(64, 1, 768, length, length, 0, False, 2))
        assert many.row_threads == 32 * most and many.threads >= 256
    for length in (1024, 2048, 4096):
        few = make_plan(Problem(1, 1, 8, length, length, 0, False, 2))
        assert few.row_threads >= min(256, 32 * length // 256), few


def test_two_sided_takes_the_same_transform():
    for length in (1000, 5000, 16384, 1 << 20):
        causal = Problem(8, 1, 64, length, length, 0, False, 2)
        assert make_plan(replace(causal, taps_rev=length - 1)).n == make_plan(causal).n


def test_kernels_that_know_their_length_have_the_plans_radices():
    assert all(factor(n) == radices for n, radices in kernels.FIXED.items())


def test_the_model_knows_that_they_are_cheaper():
    issue_bound = replace(H100, bandwidth=1e14)
    for n in kernels.FIXED:
        fast = Problem(64, 1, 768, n, n, 0, False, 2)
        other = replace(
            fast, length=n + n // 4, taps=n + n // 4
        )  # 5/4 of it, by a kernel for any length
        plans = make_plan(fast, issue_bound), make_plan(other, issue_bound)
        assert [plan.n for plan in plans] == [n, n + n // 4]
        assert plans[1].seconds > 1.5 * plans[0].seconds


def test_factor_and_sizes():
    for n in sizes(1 << 16):
        assert math.prod(factor(n)) == n and factor(n)[-1] == 16 and len(factor(n)) >= 2
    assert factor(16 * 7) is None and factor(16) is None and factor(100) is None
    gaps = [b / a for a, b in zip(sizes(1 << 16), sizes(1 << 16)[1:], strict=False)]
    assert max(gaps[8:]) <= 1.25


def test_the_predicted_time_is_no_less_than_its_bytes_and_its_instructions_take():
    for problem in problems(300):
        for backward in (False, True):
            plan = make_plan(problem, H100, backward)
            least = max(plan.moved / H100.bandwidth, plan.work / H100.issue)
            assert 0 < plan.moved and 0 < plan.work and least <= plan.seconds
    # u is read and y written, of 16 bits each; about 9,000 instructions for a row of 4096 points
    plan = make_plan(Problem(64, 1, 768, 4096, 4096, 0, False, 2))
    assert 1.0 < plan.moved / (2 * 2 * 64 * 768 * 4096) < 1.2
    assert 7000 < plan.work / (64 * 768) < 11000
