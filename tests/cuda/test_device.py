"""The CUDA kernels run on the host, as source in the emulator and as PTX on its machine.

Every dtype, mode and engine is compared with float64 in several orders of threads, and races are looked for.
"""

from dataclasses import replace

import pytest
import torch
from accuracy import rel_l2
from cases import Case, double
from device_cases import (
    A100,
    FEW,
    LENGTHS,
    LONG,
    OPTIONS,
    ORDERS,
    SMALL,
    TURING,
    case_inputs,
    check,
    results,
)
from emulated import OnDevice, forget_recipes
from judge import ROUNDING, STATED
from operator_cases import CASES, PROPERTIES

from seqconv import fftconv, reference, use_backend
from seqconv.backends.cuda import convolution, kernels
from seqconv.backends.cuda.problem import H100


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != torch.float64], ids=str)
def test_the_operators_cases(machine, case):
    device = machine.device()
    check(device, case)
    if case.length and case.batch and case.channels:
        assert device.launches


def edges() -> list:
    """A length, a mode and a dtype. float32 has one way of adding up.

    Every number of points has its own kernels. So from 250 points on, half of the others are slow, which are in turn
    one dtype's and the other one's.
    """
    found, modes = [], ("fast", "accurate")
    for i, length in enumerate(LENGTHS):
        found.append(pytest.param(length, "fast", torch.float32))
        for j, dtype in enumerate((torch.float16, torch.bfloat16)):
            for later, mode in enumerate(modes):
                slow = length > 250 and (i + j + later) % 2 == 1
                mark = [pytest.mark.slow] * slow
                found.append(pytest.param(length, mode, dtype, marks=mark))
    return found


@pytest.mark.parametrize("length, mode, dtype", edges(), indirect=["mode"], ids=str)
def test_edge_lengths(machine, mode, dtype, length):
    which = (
        LENGTHS.index(length) + [torch.float32, torch.float16, torch.bfloat16].index(dtype)
    ) % 6
    for order, options in ((0, OPTIONS[which]), ((1, 7)[which % 2], OPTIONS[(which + 3) % 6])):
        options = dict(options)
        if "taps_rev" in options:
            options["taps_rev"] = length - 1
        small = {"batch": 3, "channels": 2} if length < 2000 else {"batch": 2, "channels": 1}
        check(
            machine.device(order=order),
            Case(length=length, taps=length, dtype=dtype, **small, **options),
            mode,
        )


@pytest.mark.parametrize(
    "options", [{}, {"pre_gate": True, "post_gate": True}], ids=["plain", "gated"]
)
@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=[pytest.mark.slow] * (n not in (256, 4096))) for n in kernels.KNOWN]
)
def test_float32_kernels_that_know_their_length(machine, n, options, monkeypatch):
    """They give the same bits as the kernel for any length, of whole rows, of short ones and of gated ones."""
    device = machine.device(FEW)
    check(device, Case(2, 1, n, n, skip="h", **options))
    ran = {kernel for kernel, *_ in device.launches if "ward" in kernel}
    expected = [f"{name}_f32_{n}" for name in ("forward", "backward")]
    assert ran >= {name for name in expected if name in kernels.KERNELS} and expected[0] in ran
    cases = [
        Case(2, 1, n - less, n - less, taps_rev=n - 90, skip="h", **options) for less in (0, 63)
    ]
    known = [results(machine, case, FEW, 7) for case in cases]
    monkeypatch.setattr(convolution, "known_kernel", lambda *_: False)
    forget_recipes()
    for case, found in zip(cases, known, strict=True):
        for a, b in zip(found, results(machine, case, FEW, 0), strict=True):
            assert torch.equal(a, b)
    forget_recipes()


@pytest.mark.parametrize("case", LONG, ids=str)
def test_three_passes(machine, case):
    device = machine.device(replace(SMALL, tensor_cores=False))
    check(device, case)
    assert any(kernel.startswith("long") for kernel, *_ in device.launches)


# The PTX machine takes half a minute.
@pytest.mark.parametrize(
    "machine", ["emulator", pytest.param("ptx", marks=pytest.mark.slow)], indirect=True
)
def test_a_row_of_a_million(machine):
    case = Case(1, 1, (1 << 20) - 3, (1 << 20) - 3, skip="h")
    device = machine.device()
    check(device, case)
    assert any(kernel.startswith("long") for kernel, *_ in device.launches)


@pytest.mark.parametrize("limits", [A100, TURING, SMALL], ids=["a100", "turing", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_devices(machine, limits, dtype):
    for length, taps in ((300, 300), (3000, 3000), (7000, 7000), (6000, 100)):
        case = Case(2, 2, length, taps, taps_rev=50, skip="h", dtype=dtype, activation="silu")
        check(machine.device(limits), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows(machine, dtype):
    """Where taps are much fewer than steps, a row takes several transforms, forward and backward."""
    for length, taps, options in (
        (20001, 65, {"taps_rev": 30, "pre_gate": True}),
        (20001, 65, {"activation": "gelu", "pre_gate": True, "post_gate": True}),
        (20000, 64, {"taps_rev": 30}),
        (20000, 62, {}),
    ):
        case = Case(2, 1, length, taps, skip="h", dtype=dtype, **options)
        device = machine.device()
        check(device, case)
        plan = convolution.make_plan(convolution.describe(*case_inputs(case)), H100)
        assert plan.windows > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_hard_signals(machine, mode, dtype):
    """The energy is in one frequency, one sample or one row, and sizes are at the ends of the dtype's range."""
    n = 1000
    t = torch.arange(n)
    signals = [
        torch.ones(n),
        torch.cos(0.3 * t),
        torch.nn.functional.one_hot(torch.tensor(n - 1), n).float(),
        torch.randn(n).cumsum(0) / n**0.5,
        torch.randn(n) * torch.logspace(0, -3, n),
        torch.zeros(n),
    ]
    u = torch.stack([s for s in signals])[None]
    scales = [1e-3, 1.0] if dtype == torch.float16 else [1e-25, 1.0, 1e25]
    for scale in scales:
        k = torch.stack([torch.exp(-t / 100.0) / 10] * 3 + [torch.ones(n) / n] * 3)
        case = Case(1, 6, n, n, dtype=dtype)
        tensors = {name: None for name in case.tensors()} | {"u": (u * scale).to(dtype), "k": k}
        with use_backend(OnDevice(machine.device())):
            y = case.run(fftconv, tensors)
        y64 = case.run(reference.fftconv_fft, double(tensors))
        # Round-off is relative to the whole convolution, of which a causal output may keep little.
        whole = tensors["u"][0].double().norm(dim=-1) * k.double().norm(dim=-1)
        size = torch.maximum(y64[0].norm(dim=-1), whole)
        error = (y[0].double() - y64[0]).norm(dim=-1)
        subnormal = 2.0**-25 * n**0.5 if dtype == torch.float16 else 0.0
        allowed = (STATED[mode] if dtype != torch.float32 else 1e-6) + ROUNDING.get(dtype, 0)
        assert (error <= allowed * size + subnormal).all(), error / size
        assert not y[0, 5].any()


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-22, 1e19, 1e30])
def test_kernels_of_any_size(machine, mode, scale):
    """A channel whose taps have all but vanished, or whose squares leave float32's range, is as exact as any."""
    u, k = torch.randn(2, 1, 1000).bfloat16(), torch.randn(1, 1000) / 30
    grow = min(1.0, 1e30 / scale)  # of u, so that the result is a number
    with use_backend(OnDevice(machine.device())):
        y, plain = fftconv(u * grow, k * scale), fftconv(u, k)
    assert torch.isfinite(y).all()
    assert rel_l2(y.double() / (scale * grow), plain.double()) < 2 * STATED[mode] + 4e-3


def test_rows_do_not_meet(machine):
    """A NaN spoils its own row of (sample, channel) only, however many rows a block holds."""
    for dtype in (torch.float32, torch.bfloat16):
        u, k = torch.randn(9, 2, 256).to(dtype), torch.randn(2, 256)
        with use_backend(OnDevice(machine.device(FEW))):
            clean = fftconv(u, k)
            u[3, 1, 200] = torch.nan
            y = fftconv(u, k)
        assert y[3, 1].isnan().any()
        y[3, 1] = clean[3, 1]
        assert torch.equal(y, clean)


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_operators_properties(machine, name):
    function, given = PROPERTIES[name]
    device = machine.device()
    with use_backend(OnDevice(device)):
        function(*given)
    assert device.launches


@pytest.mark.parametrize("case, limits", ORDERS, ids=[str(case) for case, _ in ORDERS])
def test_thread_order_does_not_matter(machine, case, limits):
    forwards = results(machine, case, limits, 0)
    for order in (1, 7):
        for a, b in zip(forwards, results(machine, case, limits, order), strict=True):
            assert torch.equal(a, b)
