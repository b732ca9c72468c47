"""The planner is a pure function. So it is tested with thousands of problems on several devices."""

import math
import random
from dataclasses import replace

import pytest

from seqconv.backends.cuda import kernels
from seqconv.backends.cuda.cost import LAUNCH
from seqconv.backends.cuda.kernels import FORMS, HALF_POINTS, PIECES, WHOLE, half_shape
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
    generator, of_rows = random.Random(0), random.Random(1)
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
            pieces=length % PIECE == 0 and of_rows.random() < 0.8,
            beside=of_rows.choice(["", "", "gelu", "gated", "slope", None]),
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
            if backward and plan.engine == "radix":
                across = problem.sets * problem.channels * (plan.outer if plan.long else 1)
                few = across * MAX_PARTS < limits.processors
                assert plan.parts <= (max(MAX_PARTS, rows // 2) if few else MAX_PARTS)
            if plan.engine == "half":
                check_half(plan, problem, limits, backward, rows)
            else:
                assert plan.shape is None and plan.form == ""
            assert plan.seconds > 0 and str(plan)


def check_half(plan, problem, limits, backward, rows):
    """Its kernel is there, fits, and takes such rows."""
    assert problem.element == 2 and limits.tensor_cores and plan.n in HALF_POINTS
    shape = half_shape(backward, plan.n, plan.form)
    assert plan.shape == shape and plan.threads == shape.threads
    for dtype in kernels.suffixes(plan.form):
        name = f"half_{'backward' if backward else 'forward'}_{dtype}_{plan.n}{plan.form}"
        assert kernels.KERNELS[name].threads == shape.threads
    assert plan.shared == shape.shared and shape.shared + 1024 <= limits.shared_total
    flags = FORMS[plan.form]
    assert problem.fast
    if flags & PIECES:
        assert problem.pieces and not (backward and problem.heads > 1)
        assert not flags & WHOLE or problem.length == plan.n
        told = plan.form.removeprefix("_ragged").removeprefix("_")
        assert told == problem.beside
    resident = plan.blocks // limits.processors
    assert plan.blocks == resident * limits.processors and 1 <= resident <= shape.blocks
    assert resident == 1 or resident * (shape.shared + 1024) <= limits.shared_total
    if backward:  # every slot of a group writes sums of its own
        few = problem.sets * problem.channels < plan.blocks
        assert plan.parts <= max(plan.slots, rows // 2 if few else MAX_PARTS)


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


def half_problem(length: int, **others) -> Problem:
    """64 x 768 rows of 16 bits with as many taps, which can be read in pieces where the length allows it."""
    whole = Problem(64, 1, 768, length, length, 0, False, 2, pieces=length % PIECE == 0)
    return replace(whole, **others)


def test_lengths_do_not_pay_for_the_next_power_of_two():
    """Rows of 16 bits are filled up to one where they have kernels, unless those of float32 rows are faster."""
    base = Problem(8, 1, 768, 0, 0, 0, False, 4)
    for length, most in ((1000, 1.1), (5000, 1.1), (14113, 1.2), (65537, 1.3), (100000, 1.1)):
        problem = replace(base, length=length, taps=length)
        plan, half = make_plan(problem), make_plan(replace(problem, element=2))
        assert plan.n * plan.windows <= most * length + 256, plan
        assert half.engine == "half" or half.n * half.windows <= most * length + 256
        assert half.seconds <= plan.seconds


# The longest rows of 16 bits that every device takes in one pass on tensor cores, forward and backward.
LONGEST = {"h100": 32768, "a100": 32768, "rtx3090": 16384}


@pytest.mark.parametrize("name", LONGEST)
def test_rows_of_one_pass(name):
    """All kinds of rows have kernels on tensor cores that fit up to there. No such row is cut or takes three passes."""
    limits, most = DEVICES[name], LONGEST[name]
    for backward in (False, True):
        for n in HALF_POINTS:
            assert (half_shape(backward, n, "_any").shared <= limits.shared) == (n <= most)
        for length in (256, 1000, 1024, 3000, 8192, 12000, 12001, most - 8, most - 1, most):
            for rev in (0, length - 1):
                plan = make_plan(half_problem(length, taps_rev=rev), limits, backward)
                assert plan.windows == 1 and not plan.long, (length, plan)
                exact = make_plan(half_problem(length, taps_rev=rev, fast=False), limits, backward)
                assert exact.engine == "radix"


@pytest.mark.parametrize("beside", ["", "gelu", "slope", "gated"])
def test_pieces_are_taken_where_they_can_be(beside):
    for n in HALF_POINTS:
        for length in (n, n - 16):
            for backward in (False, True):
                problem = half_problem(length, beside=beside)
                plan = make_plan(problem, H100, backward)
                form = "_ragged" * (length < n) + f"_{beside}" * bool(beside)
                if half_shape(backward, n, form):
                    assert (plan.form, plan.n, plan.windows) == (form, n, 1), (length, plan)
                for less in ({"pieces": False}, {"fast": False}, {"beside": None}):
                    other = make_plan(replace(problem, **less), H100, backward)
                    assert other.form == "_any" or other.engine == "radix"
                    assert other.seconds >= plan.seconds or beside != ""


def test_one_pass_up_to_32768_points():
    for length in HALF_POINTS:
        for rev in (0, length - 1):
            problem = half_problem(length, taps_rev=rev)
            plan = make_plan(problem)
            assert (plan.engine, plan.n, plan.windows, plan.long) == ("half", length, 1, False)
            for batch in (8, 64):  # backward too, where x's spectra of the longest rows wait aside
                plan = make_plan(replace(problem, batch=batch), backward=True)
                assert (plan.engine, plan.n, plan.windows) == ("half", length, 1), plan
                assert plan.aside == (length == 32768)
    for length in (1024, 4096, 16384):
        plan = make_plan(Problem(64, 1, 768, length, length, length - 1, False, 4))
        assert (plan.engine, plan.n, plan.long) == ("radix", length, False)


def test_groups_share_rows_evenly():
    """A block has about the rows that all rows make over all blocks, and rows of few channels keep them all busy."""
    for channels, batch in (
        (1, 640),
        (8, 64),
        (100, 64),
        (263, 64),
        (264, 64),
        (768, 64),
        (768, 3),
    ):
        problem = replace(half_problem(4096), channels=channels, batch=batch)
        plan = make_plan(problem)
        units, share = channels * plan.groups, -(-batch // plan.groups)
        busiest = -(-units // plan.blocks) * share
        even = channels * batch / plan.blocks
        assert busiest <= 1.35 * even + 2 * plan.slots * plan.shape.pair, (channels, batch, plan)


def test_two_sided_takes_the_same_transform():
    for length in (1000, 5000, 16384, 1 << 20):
        causal = Problem(8, 1, 64, length, length, 0, False, 2)
        assert make_plan(replace(causal, taps_rev=length - 1)).n == make_plan(causal).n


def test_kernels_that_know_their_length_have_the_plans_radices():
    assert all(factor(n) == radices for n, radices in kernels.KNOWN.items())


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
    # u is read and y written, of 16 bits each; about 3,000 instructions for a row of 4096 points
    plan = make_plan(Problem(64, 1, 768, 4096, 4096, 0, False, 2))
    assert 1.0 < plan.moved / (2 * 2 * 64 * 768 * 4096) < 1.2
    assert 2500 < plan.work / (64 * 768) < 3500
