"""The PTX machine runs every CUDA kernel as NVRTC compiles it.

The results are right, without any fault, and however the tensor cores round their sums.
"""

import os
from dataclasses import replace
from unittest.mock import patch

import pytest
import ssm_cases
import torch
from butterfly_cases import check_learned_matrices
from cases import Case
from device_cases import A100, FEW, SMALL, TURING, check, one_plane, planned, run
from judge import sums

from seqconv.backends.cuda import convolution, kernels
from seqconv.backends.cuda.problem import H100

ptx_device = pytest.importorskip("ptx_device")
if ptx_device.compiler.compiler_reason():
    pytest.skip(ptx_device.compiler.compiler_reason(), allow_module_level=True)

NO_TENSOR_CORES = replace(FEW, tensor_cores=False)
PASSES = replace(SMALL, tensor_cores=False)
GATED = {"pre_gate": True, "post_gate": True, "activation": "gelu", "skip": "h"}


def cases() -> list[tuple[Case, object, str]]:
    """(problem, limits of the device, mode). Together they launch every kernel of the convolution."""
    found = []
    for n in kernels.FIXED:
        later = n - 1 if n < 16384 else None
        for dtype in (torch.bfloat16, torch.float16):
            case = Case(2, 1, n, n, taps_rev=later, skip="h", dtype=dtype)
            found.append((case, FEW, "fast"))
    for dtype, (first, second) in (
        (torch.bfloat16, ("fast", "accurate")),
        (torch.float16, ("accurate", "fast")),
    ):
        found += [
            (Case(5, 2, 255, 255, **GATED, dtype=dtype), FEW, first),
            (Case(3, 2, 700, 700, taps_rev=699, **GATED, dtype=dtype), FEW, second),
            (Case(2, 1, 5000, 5000, taps_rev=7, skip="h", dtype=dtype), FEW, first),
            (Case(2, 2, 1200, 1200, heads=2, skip="ch", activation="silu", dtype=dtype), FEW, second),
            (Case(2, 2, 1200, 1200, mode="circular", post_gate=True, layout="blh", dtype=dtype), FEW, first),
            (Case(3, 2, 1900, 1900, taps_rev=7, per_sample=True, heads=1, dtype=dtype), FEW, second),
            (Case(2, 1, 5000, 5000, taps_rev=4999, dtype=dtype), one_plane(5120), first),
            (Case(2, 1, 20001, 65, taps_rev=30, pre_gate=True, skip="h", dtype=dtype), H100, second),
            (Case(2, 2, 1000, 1000, skip="h", dtype=dtype), NO_TENSOR_CORES, first),
            (Case(2, 2, 9001, 9001, skip="h", post_gate=True, dtype=dtype), PASSES, first),
        ]  # fmt: skip
    found += [
        (Case(3, 2, 17, 17, taps_rev=8, skip="h"), FEW, "fast"),
        (Case(3, 2, 4096, 4096, taps_rev=2048, skip="h", pre_gate=True), FEW, "fast"),
        (Case(2, 2, 14113, 14113, **GATED), FEW, "fast"),
        (Case(2, 2, 2049, 2049, heads=2, skip="ch", activation="silu"), FEW, "fast"),
        (Case(2, 2, 1000, 1000, mode="circular", layout="blh", post_gate=True), FEW, "fast"),
        (Case(2, 2, 20000, 20000, taps_rev=19999, **GATED), PASSES, "fast"),
        (Case(2, 2, 9000, 9000, heads=2, per_sample=True, skip="ch"), PASSES, "fast"),
        (Case(2, 2, 9001, 9001, mode="circular", skip="h", layout="blh"), PASSES, "fast"),
    ]
    return found


ASKED = os.environ.get("SEQCONV_COMPILE", "0")  # as in test_cuda_compile.py


def some(things, count: int) -> list:
    """`count` of the things, which are others at each commit, or all of them."""
    things = list(things)
    if ASKED == "all":
        return things
    return [things[(count * int(ASKED) + i) % len(things)] for i in range(count)]


# The installed NVRTC is proved by all cases, another one by some at each commit.
CASES = some(cases(), 4) if os.environ.get("SEQCONV_NVRTC") else cases()


def marked(case: Case, limits, mode: str):
    """Slow are float16's cases beside bfloat16's, rows of which one takes seconds, and all but one known length."""
    known = case.length in kernels.FIXED
    slow = case.length > 10000 or (case.length > 1024 if known else case.dtype == torch.float16)
    name = f"{case}-{mode}" + f"-{limits.shared}" * (limits.shared < 1 << 17)
    return pytest.param(case, limits, mode, id=name, marks=[pytest.mark.slow] * slow)


class Recording(ptx_device.PtxDevice):
    """A device that only notes which kernels would run."""

    def launch(self, kernel, grid, threads, shared, arguments):
        self.launches.append((kernel, grid, threads, shared))


def test_the_cases_launch_every_kernel():
    found = set()
    for case, limits, mode in cases():
        device = Recording(limits)
        with sums(mode):
            run(device, case)
        found |= {kernel for kernel, *_ in device.launches}
    others = {name for name in kernels.KERNELS if name.startswith(("butterfly", "ssm"))}
    assert found == set(kernels.KERNELS) - others


@pytest.mark.parametrize("case, limits, mode", [marked(*c) for c in CASES])
def test_kernels(case, limits, mode):
    """Results are as exact as is stated, in another order of threads too, and however tensor cores round sums."""
    with sums(mode), patch.object(convolution, "make_plan", planned):
        first = ptx_device.PtxDevice(limits)
        check(first, case, mode)
        if any(kernel.startswith("tensor") for kernel, *_ in first.launches):
            for rounding in ("in order", "pessimistic"):
                check(ptx_device.PtxDevice(limits, order=1, rounding=rounding), case, mode)


@pytest.mark.parametrize("order", [0, 2])
def test_sums_of_exponentials(order):
    a, w = ssm_cases.problem(2, 3, 17)
    device = ptx_device.PtxDevice(FEW, order)
    ssm_cases.check(device, a, w, torch.randn(2, 3, 5000))
    few = {name for name, *_ in device.launches}
    device = ptx_device.PtxDevice(H100, order)
    ssm_cases.check(device, *ssm_cases.problem(1, 1, 5), torch.randn(1, 1, 300))
    few |= {name for name, *_ in device.launches}
    assert few == {name for name in kernels.KERNELS if name.startswith("ssm")}


@pytest.mark.parametrize("radices", [(16, 16, 8), (16, 2)], ids=str)
def test_learned_butterfly(radices):
    device = ptx_device.PtxDevice(FEW)
    check_learned_matrices(device, radices, torch.bfloat16)
    assert {name for name, *_ in device.launches} == {"butterfly", "butterfly_backward"}


# Architectures beside sm_90, each with the limits of a device of it.
OTHERS = {
    "sm_75": TURING,
    "sm_80": A100,
    "sm_86": A100,
    "sm_89": A100,
    "sm_100": H100,
    "sm_120": A100,
}
EVERYWHERE = [
    Case(3, 2, 3000, 3000, taps_rev=50, skip="h", activation="silu"),
    Case(3, 2, 1024, 1024, skip="h", dtype=torch.bfloat16),
    Case(2, 1, 700, 700, taps_rev=5, pre_gate=True, dtype=torch.float16),
]


@pytest.mark.slow
@pytest.mark.parametrize("arch", some(OTHERS, 1))
def test_other_architectures(arch):
    for case in EVERYWHERE:
        check(ptx_device.PtxDevice(replace(OTHERS[arch], processors=1), arch=arch), case)
    device = ptx_device.PtxDevice(FEW, arch=arch)
    ssm_cases.check(device, *ssm_cases.problem(2, 3, 17), torch.randn(2, 3, 3000))
    check_learned_matrices(device, (16, 8), torch.float32)
