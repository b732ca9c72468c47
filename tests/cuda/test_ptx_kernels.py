"""The PTX machine runs every CUDA kernel as NVRTC compiles it.

The results are right, without any fault, and however the tensor cores round their sums.
"""

import contextlib
import os
from dataclasses import replace

import pytest
import ssm_cases
import torch
from butterfly_cases import check_learned_matrices
from cases import Case
from device_cases import A100, FEW, SMALL, TURING, check, run
from emulated import OnDevice
from half_cases import ASKED, forms_of, half_case, half_launches, some, tensor_cores_only
from judge import sums
from stream_problems import one_step

from seqconv.backends.cuda import kernels
from seqconv.backends.cuda.kernels import HALF_POINTS, half_shape
from seqconv.backends.cuda.problem import H100, Limits

ptx_device = pytest.importorskip("ptx_device")
if ptx_device.compiler.compiler_reason():
    pytest.skip(ptx_device.compiler.compiler_reason(), allow_module_level=True)

PASSES = replace(SMALL, tensor_cores=False)
GATED = {"pre_gate": True, "post_gate": True, "activation": "gelu", "skip": "h"}
BF16, FP16 = torch.bfloat16, torch.float16


def float_cases() -> list[tuple[Case, Limits, str, bool]]:
    """(problem, limits, mode, False). Together they launch every kernel of the convolution in float32."""
    found = [
        (Case(3, 2, 17, 17, taps_rev=8, skip="h", bias="h"), FEW),
        (Case(3, 2, 4096, 4096, taps_rev=2048, skip="h", pre_gate=True), FEW),
        (Case(2, 2, 14113, 14113, **GATED), FEW),
        (Case(2, 2, 2049, 2049, heads=2, skip="ch", activation="silu"), FEW),
        (Case(2, 2, 1000, 1000, mode="circular", layout="blh", post_gate=True), FEW),
        (Case(2, 2, 20000, 20000, taps_rev=19999, **GATED), PASSES),
        (Case(2, 2, 9000, 9000, heads=2, per_sample=True, skip="ch"), PASSES),
        (Case(2, 2, 9001, 9001, mode="circular", skip="h", layout="blh"), PASSES),
    ]
    for dtype in (torch.float32, BF16, FP16):
        for n in kernels.KNOWN:
            gated = {"pre_gate": True, "post_gate": True} if n == 1024 else {}
            found.append(
                (Case(3, 1, n - 5, n - 5, taps_rev=7, skip="h", **gated, dtype=dtype), FEW)
            )
    for dtype in (BF16, FP16):
        found += [
            (Case(2, 2, 1000, 1000, heads=2, skip="h", bias="h", dtype=dtype), FEW),
            (Case(2, 2, 9001, 9001, skip="h", post_gate=True, dtype=dtype), PASSES),
        ]
    return [(case, limits, "accurate", False) for case, limits in found]


def half_cases() -> list[Case]:
    """Together they launch every kernel on tensor cores, and some of them with windows and heads."""
    found = []
    for dtype in (BF16, FP16):
        for n in HALF_POINTS:
            small = {"batch": 5 if n < 4096 else 2, "channels": 2 if n < 8192 else 1}
            found += [half_case(n, form, dtype, **small) for form in forms_of(n)]
        found += [
            Case(2, 2, 1200, 1200, heads=2, skip="ch", activation="silu", dtype=dtype),
            Case(2, 2, 1200, 1200, mode="circular", post_gate=True, layout="blh", dtype=dtype),
            Case(3, 2, 1900, 1900, taps_rev=7, per_sample=True, heads=1, dtype=dtype),
            Case(2, 1, 20001, 65, taps_rev=30, pre_gate=True, skip="h", dtype=dtype),
            Case(3, 1, 6000, 60, taps_rev=30, skip="h", dtype=dtype),
        ]
    return found


SHARE = 8  # of the slow problems on tensor cores, one commit proves so many at least


def quick(case: Case) -> bool:
    """Rows of 256 points in bfloat16, of every form. Other tests run those of 1,024."""
    return case.dtype == BF16 and case.length <= 256


def chosen() -> list:
    """The installed NVRTC is proved by all cases of float32 and the quick ones, and by some of the others at each
    commit; another NVRTC by some of all."""
    floats, halves = float_cases(), [(case, FEW, "fast", True) for case in half_cases()]
    if os.environ.get("SEQCONV_NVRTC"):
        return [marked(*c) for c in some(floats, 2) + some(halves, 4)]
    now = [c for c in halves if quick(c[0])]
    later = [c for c in halves if c not in now]
    return [marked(*c) for c in floats + now + some(later, -(-len(later) // SHARE))]


def marked(case: Case, limits, mode: str, half: bool):
    """Slow are rows of which one takes seconds, and on tensor cores all that are not quick."""
    longest = 1024 if case.length + 5 in kernels.KNOWN else 10000
    slow = not quick(case) if half else case.length > longest or case.dtype == FP16
    name = f"{case}-{mode}" + f"-{limits.shared}" * (limits.shared < 1 << 17)
    return pytest.param(case, limits, mode, half, id=name, marks=[pytest.mark.slow] * slow)


def planned(half: bool):
    """The planner as it is, or one that knows tensor cores only."""
    return tensor_cores_only() if half else contextlib.nullcontext()


class Recording(ptx_device.PtxDevice):
    """A device that only notes which kernels would run."""

    def launch(self, kernel, grid, threads, shared, arguments):
        self.launches.append((kernel, grid, threads, shared))


def test_the_cases_launch_every_kernel():
    found = set()
    every = float_cases() + [(case, FEW, "fast", True) for case in half_cases()]
    for case, limits, mode, half in every:
        device = Recording(limits)
        with sums(mode), planned(half):
            run(device, case)
        found |= {kernel for kernel, *_ in device.launches}
    names = ("butterfly", "packed", "ssm", "stream")
    others = {n for n in kernels.KERNELS if n.startswith(names)}
    assert found == set(kernels.KERNELS) - others


@pytest.mark.parametrize("case, limits, mode, half", chosen())
def test_kernels(case, limits, mode, half):
    """Results are as exact as is stated, in another order of threads too, and however tensor cores round sums."""
    with sums(mode), planned(half):
        check(ptx_device.PtxDevice(limits), case, mode)
        for rounding, copies in (("in order", 1), ("pessimistic", 2)) if half else ():
            device = ptx_device.PtxDevice(limits, order=1, rounding=rounding, copies=copies)
            check(device, case, mode)
            assert half_launches(device)


@pytest.mark.parametrize("order", [0, 2])
def test_sums_of_exponentials(order):
    a, w = ssm_cases.problem(2, 3, 17)
    device = ptx_device.PtxDevice(FEW, order)
    ssm_cases.check(device, a, w, torch.randn(2, 3, 5000))
    few = {name for name, *_ in device.launches}
    device = ptx_device.PtxDevice(H100, order)
    ssm_cases.check(device, *ssm_cases.problem(1, 1, 5), torch.randn(1, 1, 300))
    few |= {name for name, *_ in device.launches}
    assert few == {name for name in kernels.KERNELS if name.startswith("ssm")} - {"ssm_step"}


# Of tiles, the last of four pieces. Two rows, so that a slot of small ones repeats the last row.
POINTS = [*kernels.TILES, 65536]


def test_the_tiles_launch_every_kernel_of_streams():
    found = set()
    for points in POINTS:
        for spread in (False, True):
            device = Recording()
            one_step(OnDevice(device), 1, 2, 1, points, torch.tensor([points - 1]), spread)
            found |= {kernel for kernel, *_ in device.launches}
    assert found == {name for name in kernels.KERNELS if name.startswith("stream")}


@pytest.mark.slow
@pytest.mark.parametrize("points", some(POINTS, 4))
def test_tiles_of_streams(points):
    device = ptx_device.PtxDevice(order=2)
    for spread in (False, True):
        clock = torch.tensor([points - 1])
        assert one_step(OnDevice(device), 1, 2, 1, points, clock, spread) < 1e-6


@pytest.mark.parametrize("radices", [(16, 16, 8), (16, 2)], ids=str)
def test_learned_butterfly(radices):
    device = ptx_device.PtxDevice(FEW)
    check_learned_matrices(device, radices, torch.bfloat16)
    assert {name for name, *_ in device.launches} == {"butterfly", "butterfly_backward"}


# Architectures beside sm_90, each with the limits of a device of it.
GAMING = Limits(101376, 102400, 82, 1.7e9, 9.3e11)
OTHERS = {
    "sm_75": TURING,
    "sm_80": A100,
    "sm_86": GAMING,
    "sm_89": GAMING,
    "sm_100": H100,
    "sm_120": GAMING,
}
EVERYWHERE = [
    Case(3, 2, 3000, 3000, taps_rev=50, skip="h", activation="silu"),
    Case(3, 2, 1024, 1024, skip="h", dtype=BF16),
    Case(2, 1, 700, 700, taps_rev=5, pre_gate=True, dtype=FP16),
]


@pytest.mark.slow
@pytest.mark.parametrize("arch", some(OTHERS, 1))
def test_other_architectures(arch):
    for case in EVERYWHERE:
        check(ptx_device.PtxDevice(replace(OTHERS[arch], processors=1), arch=arch), case)
    device = ptx_device.PtxDevice(FEW, arch=arch)
    ssm_cases.check(device, *ssm_cases.problem(2, 3, 17), torch.randn(2, 3, 3000))
    check_learned_matrices(device, (16, 8), torch.float32)
    for points, spread in ((32, False), (256, False), (256, True)):
        clock = torch.tensor([points - 1])
        assert one_step(OnDevice(device), 1, 2, 3, points, clock, spread) < 1e-6


def fits(limits: Limits, n: int, form: str) -> bool:
    """Whether forward and backward have kernels for rows of this form, or for any ones in their place."""
    shapes = [[half_shape(back, n, f) for f in (form, "_any")] for back in (False, True)]
    return all(any(s and s.shared <= limits.shared for s in some) for some in shapes)


def of_others() -> list:
    """Of each architecture with tensor cores one form of 256 points and one of many, which change at each commit."""
    found, now = [], some([arch for arch, limits in OTHERS.items() if limits.tensor_cores], 2)
    for i, (arch, limits) in enumerate(OTHERS.items()):
        if limits.tensor_cores:
            forms = [(256, form) for form in forms_of(256)]
            long = [(n, form) for n in HALF_POINTS[1:] for form in forms_of(n)]
            long = [(n, form) for n, form in long if fits(limits, n, form)]
            step = 0 if ASKED == "all" else int(ASKED)
            for n, form in (forms[(step + i) % len(forms)], long[(7 * step + 11 * i) % len(long)]):
                mark = [pytest.mark.slow] * (n > 256 or arch not in now)
                found.append(pytest.param(arch, n, form, marks=mark, id=f"{arch}-{n}{form}"))
    return found


@pytest.mark.parametrize("arch, n, form", of_others())
def test_tensor_cores_of_other_architectures(arch, n, form):
    """Before 9.0 there are no stores of matrices, and pairs of bfloat16 are multiplied and compared otherwise."""
    limits = replace(OTHERS[arch], processors=1)
    small = {"batch": 3, "channels": 2} if n < 8192 else {"batch": 1, "channels": 1}
    with tensor_cores_only():
        device = ptx_device.PtxDevice(limits, order=1, copies=1, arch=arch)
        check(device, half_case(n, form, (BF16, FP16)[n > 256], **small))
    ran = half_launches(device)
    assert ran and all(shared <= limits.shared for *_, shared in device.launches)
    stores = ["stmatrix" in ptx_device.ptx_of(kernels.source(kernel), arch) for kernel in ran]
    assert all(stores) if int(arch[3:]) >= 90 else not any(stores)
