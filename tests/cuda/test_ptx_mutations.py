"""Whether the tests on the PTX machine can fail.

Mistakes are planted in the inline assembly, in the PTX and in the source, one at a time. Each of them must be reported
as a fault or give a wrong result.
"""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from accuracy import rel_l2
from cases import Case, double, oracle
from device_cases import FEW
from emulated import OnDevice, forget_recipes
from judge import ROUNDING, STATED

from seqconv import fftconv, use_backend
from seqconv.backends.cuda import convolution, kernels
from seqconv.backends.cuda.recipe import Recipe

ptx_device = pytest.importorskip("ptx_device")
if ptx_device.compiler.compiler_reason():
    pytest.skip(ptx_device.compiler.compiler_reason(), allow_module_level=True)

# These run kernels that know their length, with one round of rows for every block, with several, and with two heads.
CASE = Case(3, 1, 1024, 1024, taps_rev=1023, skip="h", dtype=torch.bfloat16)
ROUNDS, HEADS = replace(CASE, batch=40), replace(CASE, batch=5, heads=2)
FORWARD, BACKWARD = "tensor_forward_bf16_fast_1024", "tensor_backward_bf16_fast_1024"


@cache
def problem(case: Case):
    torch.manual_seed(3)
    tensors, (exact, definition) = case.tensors(), oracle(case)
    y64, grads64, dy = exact.with_gradients(definition, double(tensors))
    return tensors, dy.to(case.dtype), [y64, *grads64.values()]


def outcome(case: Case = CASE, backward: bool = True, **device) -> str:
    """ "right", "wrong", or what the machine reports."""
    tensors, dy, exact = problem(case)
    one = ptx_device.PtxDevice(FEW, **device)
    try:
        with use_backend(OnDevice(one)):
            if backward:
                y, grads, _ = case.with_gradients(fftconv, tensors, dy)
                found = [y, *grads.values()]
            else:
                found = [case.run(fftconv, tensors)]
    except RuntimeError as error:
        assert ", block " in str(error), error
        return str(error)
    for value, expected in zip(found, exact[: len(found)], strict=True):
        if not rel_l2(value, expected) <= 2 * STATED["fast"] + ROUNDING.get(value.dtype, 0):
            return "wrong"
    return "right"


@pytest.mark.parametrize("order", [0, 1, 2])
def test_without_a_mistake_all_is_right(order):
    assert outcome(order=order) == "right"


# The assembly stands in csrc/device/mma.cuh and compat.cuh.
ASSEMBLY = {
    "pack: operands swapped": (': "f"(y), "f"(x));', ': "f"(x), "f"(y));'),
    "ldmatrix without .trans": ("m8n8.x4.trans.shared", "m8n8.x4.shared"),
    "mma: two registers of a swapped": ('"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'),
    "mma: registers of b swapped": ('"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)'),
    "unpack: halves swapped": ("%0, l; cvt.f32.f16 %1, h;", "%0, h; cvt.f32.f16 %1, l;"),
    "negate2 left out": ('asm("neg.f16x2 %0, %1;"', 'asm("mov.b32 %0, %1;"'),
    "fma2: a and c swapped": ('"r"(a), "r"(b), "r"(c));', '"r"(c), "r"(b), "r"(a));'),
    "a generic address for a shared one": (
        "(u32)__cvta_generic_to_shared(p)",
        "(u32)(unsigned long long)p",
    ),
}


@pytest.mark.parametrize("name", ASSEMBLY)
def test_mistakes_in_the_assembly(name):
    """unpack runs in sums in float32 only, where spectra are read."""
    before, after = ASSEMBLY[name]
    assert kernels.headers().count(before) >= 1
    backward = name.startswith("unpack")
    assert (
        outcome(CASE, backward, change=only(lambda source: source.replace(before, after)))
        != "right"
    )


def swap(pattern: str, template: str):
    return lambda ptx: re.sub(pattern, template, ptx)


def only(change):
    """Makes the change in the two kernels that know their length, and in no other."""
    return lambda kernel, text: change(text) if kernel in (FORWARD, BACKWARD) else text


def without_first(instruction: str):
    def change(ptx: str) -> str:
        start = ptx.index(instruction)
        return ptx[:start] + ptx[ptx.index(";", start) + 1 :]

    return change


IN_PTX = {
    "bf16 results as fp16": lambda ptx: ptx.replace("cvt.rn.bf16.f32", "cvt.rn.f16.f32"),
    "a matrix 16 bytes further on": lambda ptx: re.sub(r"(ldmatrix.*\[%r\d+)\]", r"\1+16]", ptx),
    "a product left out": without_first("mma.sync"),
    "a matrix load left out": without_first("ldmatrix"),
    "a store to the neighbour": lambda ptx: re.sub(
        r"(st\.shared\.[ub]32\s+\[%r\d+)\]", r"\1+4]", ptx
    ),
    "every block takes the same row": lambda ptx: ptx.replace("%ctaid.x", "%nctaid.x"),
}


@pytest.mark.parametrize("name", IN_PTX)
def test_mistakes_in_the_ptx(name):
    change = IN_PTX[name]
    ptx = ptx_device.ptx_of(kernels.source(FORWARD), "sm_90")
    assert change(ptx) != ptx, "nothing was changed"
    assert outcome(alter=only(change)) != "right"


@pytest.mark.parametrize("kernel", [FORWARD, pytest.param(BACKWARD, marks=pytest.mark.slow)])
def test_barriers_are_needed(kernel):
    """Each barrier that runs is left out in turn, which gives a race, something unwritten or a wrong result.

    Two may be spared: the one before a team of one warp writes again, and one where the next round meets another one.
    test_emulator.py needs every one.
    """
    ptx = ptx_device.ptx_of(kernels.source(kernel), "sm_90")
    cases = (CASE, ROUNDS, HEADS) if kernel == FORWARD else (CASE, ROUNDS)
    assert {outcome(case) for case in cases} == {"right"}
    ran = {line for warps, _, line, _ in ptx_device.program_of(ptx).counts() if warps}
    spared = count = 0
    for place in re.finditer(r"bar\.(?:warp\.)?sync[^;]*;", ptx):
        if ptx.count("\n", 0, place.start()) + 1 not in ran:
            continue
        changed = ptx[: place.start()] + ptx[place.end() :]
        without = lambda name, text, changed=changed: changed if name == kernel else text  # noqa: E731
        tries = ((case, order) for case in cases for order in (0, 1))
        count += 1
        spared += all(
            outcome(case, kernel == BACKWARD, alter=without, order=order) == "right"
            for case, order in tries
        )
    assert count >= 6 and spared <= 2


SUM = "*mine = begins ? dskip : *mine + dskip;"
BESIDE = {  # the gradient's kernel also touches one element beside a piece of scratch memory; its results are right
    "written behind": (SUM, f"{SUM} a.divisors[1] = 0.f;"),
    "written before": (SUM, f"{SUM} a.dskip_parts[-1] = 0.f;"),
    "read behind": (SUM, f"{SUM} if (a.divisors[1] == 1e30f) *mine = 0.f;"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_step_beside_a_piece_of_scratch_memory(name, monkeypatch):
    """In one allocation without bands between the pieces nobody notices it. With bands it is a fault."""
    before, after = BESIDE[name]
    assert kernels.headers().count(before) >= 1
    change = only(lambda source: source.replace(before, after))
    assert "outside of global memory" in outcome(change=change)
    monkeypatch.setattr(convolution, "Recipe", Recipe)
    forget_recipes()
    assert outcome(change=change, races="shared") == "right"


@pytest.mark.parametrize("short", ["shared", "table"])
def test_memory_that_is_too_small(short, monkeypatch):
    """A block's memory or a table has a few bytes less than planned."""
    device = ptx_device.PtxDevice
    if short == "shared":
        usual = device.launch
        fewer = lambda self, k, g, t, s, a: usual(self, k, g, t, s - 16 * k.startswith("tensor"), a)  # noqa: E731
        monkeypatch.setattr(device, "launch", fewer)
        assert "outside of shared memory" in outcome()
        return
    whole, kept = device.table, []

    def table(function, *arguments):
        words = whole(function, *arguments)
        words = words.flatten()
        kept.append(
            words[: words.numel() - 8].clone()
        )  # with 8 words less, behind which nothing lives
        return kept[-1]

    monkeypatch.setattr(device, "table", staticmethod(table))
    assert outcome() != "right"
