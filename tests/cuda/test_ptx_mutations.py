"""Whether the tests on the PTX machine can fail: mistakes in the inline assembly, in the PTX and in memory.

Each of them must be reported as a fault or give a wrong result. test_half_mutations.py has mistakes in the source.
"""

import re

import pytest
import torch
from cases import Case
from emulated import forget_recipes
from planted import Problem, changed, outcome

from seqconv.backends.cuda import convolution, kernels
from seqconv.backends.cuda.recipe import Recipe

ptx_device = pytest.importorskip("ptx_device")
if ptx_device.compiler.compiler_reason():
    pytest.skip(ptx_device.compiler.compiler_reason(), allow_module_level=True)

# One round of rows for every slot, and several units.
WHOLE = Problem(Case(5, 3, 1024, 1024, taps_rev=1023, skip="h", dtype=torch.bfloat16))
RAGGED = WHOLE.but(length=1000, taps=1000, taps_rev=None)
GATED = WHOLE.but(pre_gate=True, post_gate=True)
FORWARD, BACKWARD = "half_forward_bf16_1024", "half_backward_bf16_1024"


@pytest.mark.parametrize("order", [0, 1, 2])
def test_without_a_mistake_all_is_right(order):
    for problem in (WHOLE, RAGGED, GATED):
        assert outcome(problem, order=order) == "right"


# The assembly stands in csrc/device/mma.cuh and compat.cuh.
ASSEMBLY = {
    "pack: operands swapped": (': "f"(y), "f"(x));', ': "f"(x), "f"(y));', WHOLE),
    "ldmatrix without .trans": ("ldmatrix.sync.aligned.m8n8.x4.trans", "ldmatrix.sync.aligned.m8n8.x4", WHOLE),
    "stmatrix without .trans": ("stmatrix.sync.aligned.m8n8.x4.trans", "stmatrix.sync.aligned.m8n8.x4", WHOLE),
    "stmatrix: two tiles swapped": ('"r"(b), "r"(c), "r"(d), "r"(at)', '"r"(c), "r"(b), "r"(d), "r"(at)', WHOLE),
    "mma: two registers of a swapped": ('"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])', WHOLE),
    "mma: registers of b swapped": ('"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', WHOLE),
    "a low half for a high one": ("return low(x >> 16);", "return low(x);", GATED),
    "negate2 left out": ('asm("neg.f16x2 %0, %1;"', 'asm("mov.b32 %0, %1;"', WHOLE),
    "fma2: a and c swapped": ('"r"(a), "r"(b), "r"(c));', '"r"(c), "r"(b), "r"(a));', WHOLE),
    "every lane's own largest": ("redux.sync.max.u32 %0, %1, 0xffffffff;", "mov.b32 %0, %1;", WHOLE),
    "zeros that are read": ("[%0], [%1], 16, %2;", "[%0], [%1], 16;", RAGGED),
    "half a piece": ("cp.async.cg.shared.global [%0], [%1], 16;", "cp.async.ca.shared.global [%0], [%1], 8;", WHOLE),
    "a generic address for a shared one": ("(u32)__cvta_generic_to_shared(p)", "(u32)(unsigned long long)p", WHOLE),
}  # fmt: skip


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", ASSEMBLY)
def test_mistakes_in_the_assembly(name):
    before, after, problem = ASSEMBLY[name]
    assert outcome(problem, change=changed(before, after, several=True)) != "right"


def only(change):
    """Makes the change in the two kernels of whole rows, and in no other."""
    return lambda kernel, text: change(text) if kernel in (FORWARD, BACKWARD) else text


def without_first(instruction: str):
    def change(ptx: str) -> str:
        start = ptx.index(instruction)
        return ptx[:start] + ptx[ptx.index(";", start) + 1 :]

    return change


IN_PTX = {
    "bf16 results as fp16": lambda ptx: ptx.replace("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"),
    "a matrix 16 bytes further on": lambda ptx: re.sub(r"(ldmatrix.*\[%r\d+)\]", r"\1+16]", ptx),
    "a product left out": without_first("mma.sync"),
    "a matrix load left out": without_first("ldmatrix"),
    "a matrix store left out": without_first("stmatrix"),
    "a copy left out": without_first("cp.async.cg"),
    "copies of no group": lambda ptx: ptx.replace("cp.async.commit_group;", ""),
    "a store to the neighbour": lambda ptx: re.sub(
        r"(st\.shared\.v4\.u32\s+\[%r\d+)\]", r"\1+16]", ptx
    ),
    "every block takes the same units": lambda ptx: ptx.replace("%ctaid.x", "%nctaid.x"),
}


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", IN_PTX)
def test_mistakes_in_the_ptx(name):
    change = IN_PTX[name]
    for kernel in (FORWARD, BACKWARD):
        ptx = ptx_device.ptx_of(kernels.source(kernel), "sm_90")
        assert change(ptx) != ptx, "nothing was changed"
        alter = lambda name, text, kernel=kernel: change(text) if name == kernel else text  # noqa: E731
        assert outcome(WHOLE, alter=alter) != "right"


SUM = "if (parts.dskip != nullptr) *parts.dskip = S::pre ? gated_skip : of_diagonal(skip, l.lane);"
BESIDE = {  # the gradient's kernel also touches one element beside a piece of scratch memory; its results are right
    "written behind": f"{SUM} a.divisors[3] = 0.f;",
    "written before": f"{SUM} a.dskip_parts[-1] = 0.f;",
    "read behind": f"{SUM} if (a.divisors[3] == 1e30f) *parts.dskip = 0.f;",
}


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", BESIDE)
def test_a_step_beside_a_piece_of_scratch_memory(name, monkeypatch):
    """In one allocation without bands between the pieces nobody notices it. With bands it is a fault."""
    change = changed(SUM, BESIDE[name])
    assert "outside of global memory" in outcome(WHOLE, change=change)
    monkeypatch.setattr(convolution, "Recipe", Recipe)
    forget_recipes()
    assert outcome(WHOLE, change=change, races="shared") == "right"


@pytest.mark.parametrize("short", ["shared", "table"])
def test_memory_that_is_too_small(short, monkeypatch):
    """A block's memory or a table has a few bytes less than planned."""
    device = ptx_device.PtxDevice
    if short == "shared":
        usual = device.launch
        fewer = lambda self, k, g, t, s, a: usual(self, k, g, t, s - 128 * k.startswith("half"), a)  # noqa: E731
        monkeypatch.setattr(device, "launch", fewer)
        full = WHOLE.but(batch=16)  # every slot has rows
        assert "outside of shared memory" in outcome(full)
        return
    whole, kept = device.table, []

    def table(function, *arguments):
        words = whole(function, *arguments).flatten()
        # It has 8 words less, behind which nothing lives.
        kept.append(words[: words.numel() - 8].clone())
        return kept[-1]

    monkeypatch.setattr(device, "table", staticmethod(table))
    assert outcome(WHOLE) != "right"
