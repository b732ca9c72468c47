"""Mistakes in the kernels on tensor cores, one at a time: in their source, and barriers and waits that are left out.

Each of them must be reported as a fault by the PTX machine or give a wrong result.
"""

import re
from itertools import product

import pytest
import torch
from cases import Case
from half_cases import some, tensor_cores_only
from planted import Problem, changed, outcome, solved

from seqconv.backends.cuda import kernels

ptx_device = pytest.importorskip("ptx_device")
if ptx_device.compiler.compiler_reason():
    pytest.skip(ptx_device.compiler.compiler_reason(), allow_module_level=True)


@pytest.fixture(autouse=True)
def halves():
    with tensor_cores_only():
        yield


BF16, FP16 = torch.bfloat16, torch.float16
WHOLE = Problem(Case(19, 1, 1024, 1024, taps_rev=1023, skip="h", dtype=BF16))
TEAMS = Problem(Case(9, 1, 2048, 2048, skip="h", dtype=BF16))  # of two warps
GATED = Problem(Case(9, 1, 1024, 1024, pre_gate=True, post_gate=True, skip="h", dtype=BF16))
GELU = Problem(Case(9, 4, 1024, 1024, activation="gelu", dtype=BF16))
HEADS = Problem(Case(5, 2, 1024, 1024, heads=2, skip="ch", dtype=BF16))
CUT = Problem(Case(3, 2, 4000, 40, taps_rev=30, skip="h", dtype=BF16))
HALF = Problem(Case(9, 1, 1024, 1024, skip="h", dtype=FP16))
LONG = Problem(Case(3, 1, 16384, 16384, skip="h", dtype=BF16))
EIGHT = Problem(Case(3, 1, 8192, 8192, skip="h", dtype=BF16))
ASIDE = Problem(Case(3, 1, 32768, 32768, skip="h", dtype=BF16))

SLOPES = "if (S::gelu) v[i] = S::slope ? slope(v[i], kGelu) : activate(v[i], kGelu);"
MISTAKES = {  # what stands there, what is planted, and the problem that shows it
    "pieces swap every 128 columns": ("column >> 2 & 16", "column >> 3 & 16", WHOLE),
    "no swap of pieces": ("2 * column ^ (column >> 2 & 16)", "2 * column", WHOLE),
    "a transposed load in order": ("i == 1 ? 2 : i == 2 ? 1 : i", "i", WHOLE),
    "no conjugate on the way back": (
        "multiply<true>(z, as_words(m.twiddle_re)",
        "multiply<false>(z, as_words(m.twiddle_re)",
        WHOLE,
    ),
    "no conjugate of twiddles": ("c.template twiddle<true>(l", "c.template twiddle<false>(l", WHOLE),
    "dk without its rows' scale": ("below < 30 ?", "below < 1000 ? 30u << 10 : below < 30 ?", WHOLE),
    "dk's sum without a rescale": ("each([=](float& x) { x *= down; });", "(void)down;", WHOLE),
    "no second product of the skip": (", mma_of<T>(d[1], a, u[2], u[3]);", ";", WHOLE),
    "the trace beside the diagonal": ("? d[0][1] + d[1][3]", "? d[0][0] + d[1][3]", WHOLE),
    "another exponent": ("up[r] = power_of_two(e[r])", "up[r] = power_of_two(e[r] + 1)", WHOLE),
    "dx's exponent is x's": ("power_of_two(e[0]) * divisor;", "power_of_two(e[1]) * divisor;", WHOLE),
    "pieces one row further on": ("return i * (S::warps", "return (i + 1) * (S::warps", WHOLE),
    "a piece too few": ("i < S::inner; ++i) {\n      const int", "i < S::inner - 1; ++i) {\n      const int", WHOLE),
    "the last row left out": (
        "last = first + share < rows ? first + share : rows;",
        "last = first + share < rows ? first + share : rows - 1;",
        WHOLE,
    ),
    "every slot takes every row": ("row += kStep", "row += kStep - 1", WHOLE),
    "fp16 results swapped": ("pack(v[2] * up, v[3] * up)", "pack(v[3] * up, v[2] * up)", HALF),
    "bf16 results swapped": ("pack(v[2], v[3]), up2)", "pack(v[3], v[2]), up2)", WHOLE),
    "no post_gate": ("v[0] *= Format<T>::low(gate0), v[1] *=", "v[1] *=", GATED),
    "post_gate of other columns": ("v[2] *= Format<T>::low(gate1)", "v[2] *= Format<T>::low(gate0)", GATED),
    "no pre_gate": ("low(v) * Format<T>::low(g) * scale", "low(v) * scale", GATED),
    "du by u, dpre_gate by pre_gate": ("write(du, pre), write(dpre, u);", "write(du, u), write(dpre, pre);", GATED),
    "a gate left out of the skip": ("(F::low(w) * F::low(h))", "F::low(w)", GATED),
    "no gelu": (SLOPES, "", GELU),
    "gelu for its slope": ("S::slope ? slope(v[i], kGelu) :", "", GELU),
    "a head's dx forgotten": ("if (!begins) z.re += dx[t];", "", HEADS),
    "heads share a unit": ("head = index % heads, index /= heads;", "head = 0, index /= heads;", HEADS),
    "windows begin before their rows": ("t >= p.begin && t < p.end", "t < p.end", CUT),
    "windows end behind their rows": ("t >= p.begin && t < p.end", "t >= p.begin", CUT),
    "another butterfly of 2": ("re[1] = sub2(re[0], r)", "re[1] = sub2(r, re[0])", EIGHT),
    "another butterfly of 4": ("kMinus = kInverse ? 3 : 1", "kMinus = kInverse ? 1 : 3", LONG),
    "another butterfly of 8": ("half = 0x39a839a8", "half = 0x39a83800", ASIDE),
    "rows over the matrices in their ends": ("% each * 32 * pitch + 512;", "% each * 32 * pitch + 480;", LONG),
    "aside: parts swapped": ("to[0] = as_words(x.re), to[32] =", "to[32] = as_words(x.re), to[0] =", ASIDE),
    "aside: the first sum is not the first": ("if (!begins) sum = *to;", "sum = *to;", ASIDE),
    "aside: only the last row": ("if (!begins) sum = *to;", "", ASIDE),
}  # fmt: skip


# Quick are some of the mistakes, which are others at each commit.
NOW = some([name for name, (*_, problem) in MISTAKES.items() if problem.case.length <= 1024], 8)


def marked(name: str):
    return pytest.param(name, marks=[pytest.mark.slow] * (name not in NOW))


@pytest.mark.one_of(3)
@pytest.mark.parametrize(
    "problem", [WHOLE, TEAMS, GATED, GELU, HEADS, CUT, HALF], ids=lambda p: str(p.case)
)
def test_without_a_mistake_all_is_right(problem):
    for order, copies in ((0, 0), (1, 1), (2, 2)):
        assert outcome(problem, order=order, copies=copies) == "right"


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", [marked(name) for name in MISTAKES])
def test_mistakes_in_the_source(name):
    before, after, problem = MISTAKES[name]
    solved(problem.case)
    assert outcome(problem, change=changed(before, after)) != "right"


# A kernel, problems with rows for several rounds of all slots and with several units for a block, and how many of its
# barriers and waits may be spared. Forward kernels of any rows have one behind their tables, which is needed where a
# block has several teams and no spectrum: with 8,192 points.
RAGGED = {"length": 1000, "taps": 1000, "taps_rev": None}
ODD = {"length": 1001, "taps": 1001, "taps_rev": None}
FEW_ROWS = {"channels": 3, "batch": 3}
SYNCHRONISED = {
    "half_forward_bf16_1024": ((WHOLE, WHOLE.but(**FEW_ROWS)), 0),
    "half_forward_bf16_2048": ((TEAMS, TEAMS.but(channels=3)), 0),
    "half_forward_bf16_1024_gated": ((GATED.but(batch=23), GATED.but(**FEW_ROWS)), 0),
    "half_forward_bf16_1024_ragged": ((WHOLE.but(**RAGGED), WHOLE.but(**RAGGED | FEW_ROWS)), 0),
    "half_forward_bf16_1024_any": ((WHOLE.but(**ODD), WHOLE.but(**ODD | FEW_ROWS)), 1),
    "half_backward_bf16_1024": ((WHOLE, WHOLE.but(**FEW_ROWS)), 0),
    "half_backward_bf16_2048": ((TEAMS, TEAMS.but(channels=3)), 0),
    "half_backward_bf16_1024_any": ((WHOLE.but(**ODD), WHOLE.but(**ODD | FEW_ROWS)), 0),
    "half_forward_bf16_8192_any": ((LONG.but(length=8191, taps=8191),), 0),
    "half_forward_bf16_16384": ((LONG, LONG.but(channels=2)), 0),
    "half_backward_bf16_16384": ((LONG, LONG.but(channels=2)), 0),
    "half_backward_bf16_16384_any": ((LONG.but(length=16383, taps=16383),), 0),
    "half_backward_bf16_32768": ((ASIDE,), 0),
}
QUICK = ("half_forward_bf16_2048",)
WAITS = r"(?:bar\.(?:warp\.)?sync|barrier[.\w]*|cp\.async\.wait_group)[^;]*;"


def spared_in(kernel: str, problems) -> tuple[int, list[str]]:
    """How many barriers and waits ran, and those that nothing misses: the line of the PTX and what stands there."""
    ptx = ptx_device.ptx_of(kernels.source(kernel), "sm_90")
    backward = kernel.startswith("half_backward")
    for problem in problems:
        assert outcome(problem) == "right"
    ran = {line for warps, _, line, _ in ptx_device.program_of(ptx).counts() if warps}
    count, spared = 0, []
    for place in re.finditer(WAITS, ptx):
        line = ptx.count("\n", 0, place.start()) + 1
        if line not in ran:
            continue
        count += 1
        without = ptx[: place.start()] + ptx[place.end() :]
        alter = lambda name, text, without=without: without if name == kernel else text  # noqa: E731
        tries = product(problems, (0, 1, 2), (1, 0, 2))
        if all(
            outcome(Problem(problem.case, backward), alter=alter, order=order, copies=copies)
            == "right"
            for problem, order, copies in tries
        ):
            spared.append(f"{line}: {place[0]}")
    return count, spared


# Of the slow kernels some are tried at each commit.
SLOW = [pytest.param(k, marks=pytest.mark.slow) for k in SYNCHRONISED if k not in QUICK]


@pytest.mark.one_of(3)
@pytest.mark.parametrize("kernel", [*QUICK, *some(SLOW, 3)])
def test_barriers_and_waits_are_needed(kernel):
    problems, most = SYNCHRONISED[kernel]
    count, spared = spared_in(kernel, problems)
    least = 12  # of them has half_backward_bf16_16384
    assert count >= least and len(spared) <= most, (count, spared)
