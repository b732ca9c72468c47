"""What kernels take in machine code: warp instructions for a row and spilled registers, by one compiler for sm_90.

Counts are exact for what the compiler made, and say nothing of time. Another release of NVRTC may make other code, so
the bars leave a few per cent of room.
"""

from dataclasses import replace

import pytest
import torch
from cases import Case
from device_cases import FEW, run

from bench.device_model import count
from bench.model.code import disassembler_reason
from seqconv.backends.cuda import compiler, convolution, kernels

ptx_device = pytest.importorskip("ptx_device")
if reason := compiler.compiler_reason() or disassembler_reason():
    pytest.skip(f"seqconv: {reason}", allow_module_level=True)

BARS = {
    "half_forward_bf16_256": 260,
    "half_forward_bf16_512": 430,
    "half_forward_bf16_1024": 800,
    "half_forward_bf16_2048": 1600,
    "half_forward_bf16_4096": 3100,
    "half_forward_bf16_8192": 6600,
    "half_forward_bf16_16384": 16500,
    "half_forward_bf16_32768": 40000,
    "half_forward_bf16_4096_gated": 3900,
    "half_backward_bf16_1024": 1400,
    "half_backward_bf16_2048": 2750,
    "half_backward_bf16_4096": 5500,
    "half_backward_bf16_8192": 11500,
    "half_backward_bf16_16384": 32000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name, bar", BARS.items())
def test_instructions_of_a_row(name, bar):
    found = count(name)
    assert 0.8 * bar < found.instructions <= bar, found.instructions
    if "forward" in name:
        assert found.spills == 0
    assert found.registers * kernels.KERNELS[name].threads * found.described.blocks <= 65536


@pytest.mark.slow
def test_the_planners_table_is_what_the_model_says():
    """Of a few kernels, within what another turn of the simulation changes."""
    from bench.model.table import row_of_planner
    from seqconv.backends.cuda.simulated import ROWS

    described = {n.replace("_bf16", "") for n in kernels.HALF_SHAPES if "_bf16_" in n}
    wanted = {n for n in described if not ("_any" in n or "_ragged" in n)}
    assert set(ROWS) == wanted
    for name in ("half_forward_1024", "half_forward_4096_gated", "half_backward_4096"):
        found = row_of_planner(name.replace("ward_", "ward_bf16_"))
        assert found == pytest.approx(ROWS[name], rel=0.1)


def executed(name: str, batch: int) -> int:
    """The warp instructions of PTX that the machine has run of a kernel, after so many more rows of 4,096 points."""
    device = ptx_device.PtxDevice(FEW)
    u, k = torch.randn(batch, 1, 4096), torch.randn(1, 4096) / 64
    convolution.forward(device, torch.empty_like(u), u, k, *[None] * 5, "none")
    assert name in [kernel for kernel, *_ in device.launches]
    return sum(warps for warps, *_ in device.program(name).counts())


def test_float32_rows_take_six_tenths_of_what_the_kernel_for_any_length_took():
    """It took 25,636 instructions of PTX for a row of 4,096 points."""
    before, one, nine = (executed("forward_f32_4096", batch) for batch in (1, 1, 9))
    of_row = ((nine - one) - (one - before)) / 8
    assert 12000 < of_row <= 0.6 * 25636


def conflicts(case: Case, **options) -> dict[str, int]:
    """The turns of shared memory that bank conflicts cost the kernels of rows, by their names."""
    device = ptx_device.PtxDevice(FEW, races="banks", **options)
    run(device, case)
    rows = {name for name, *_ in device.launches if "ward" in name}
    return {n: sum(turns for turns, *_ in device.program(n).bank_conflicts()) for n in rows}


GATES = {"pre_gate": True, "post_gate": True}


@pytest.mark.parametrize("n", [256, 512, 1024, 2048, 4096, 8192, 16384, 32768])
def test_no_bank_conflicts(n):
    case = Case(2, 1, n, n, skip="h", dtype=torch.bfloat16)
    found = conflicts(case)
    if n == 4096:
        found |= conflicts(replace(case, **GATES)) | conflicts(replace(case, activation="gelu"))
        found |= conflicts(replace(case, dtype=torch.float32))
    assert len(found) >= 2 and not any(found.values()), found


def test_bank_conflicts_are_seen():
    """Rows of a plane that begin in the same bank."""
    change = lambda _, source: source.replace("(rows <= 4 ? 34 : 33)", "32")  # noqa: E731
    found = conflicts(Case(2, 1, 2048, 2048, dtype=torch.bfloat16), change=change)
    assert all(turns > 100 for turns in found.values()), found
