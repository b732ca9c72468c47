"""The CUDA kernels run on the host, as source in the emulator and as PTX on its machine.

Every dtype, mode and engine is compared with float64 in several orders of threads, and races are looked for.
"""

import contextlib
import math
from dataclasses import replace
from unittest.mock import patch

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
    OnePlane,
    case_inputs,
    check,
    one_plane,
    planned,
    results,
)
from emulated import OnDevice, forget_recipes
from judge import ROUNDING, STATED
from operator_cases import CASES, PROPERTIES

from seqconv import fftconv, reference, use_backend
from seqconv.backends.cuda import convolution, kernels
from seqconv.backends.cuda.plan import make_plan
from seqconv.backends.cuda.problem import H100, Limits, Problem
from seqconv.backends.cuda.recipe import Recipe


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != torch.float64], ids=str)
def test_the_operators_cases(machine, case):
    device = machine.device()
    check(device, case)
    if case.length and case.batch and case.channels:
        assert device.launches


SUMS = [  # mode and dtype; float32 has one way of adding up
    *[("fast", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)],
    *[("accurate", dtype) for dtype in (torch.float16, torch.bfloat16)],
]


@pytest.mark.parametrize("mode, dtype", SUMS, indirect=["mode"], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
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


@pytest.mark.parametrize("n", kernels.FIXED)
def test_kernels_that_know_their_length(machine, n, monkeypatch):
    """They are as exact as is stated, and give the same bits as the kernel for any length."""
    dtype = (torch.float16, torch.bfloat16)[n.bit_length() % 2]
    case = Case(2, 1, n - 1, n - 1, taps_rev=n - 2, skip="h", dtype=dtype)
    device = machine.device(FEW)
    check(device, case)
    ran = {kernel for kernel, *_ in device.launches if "tensor" in kernel}
    assert len(ran) == 2 and all(kernel.endswith(f"_fast_{n}") for kernel in ran)
    fixed, usual = results(machine, case, FEW, 7), dict(kernels.KERNELS)
    for kernel in ran:
        del usual[kernel]
    monkeypatch.setattr(kernels, "KERNELS", usual)
    forget_recipes()
    for a, b in zip(fixed, results(machine, case, FEW, 0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("length", [16384, 32768, 51200])
def test_longest_single_passes(machine, mode, length):
    """One launch takes a whole row of 16-bit numbers by a transform of the row's length, and two-sided rows too."""
    case = Case(1, 140, length, length, taps_rev=length - 1, skip="h", dtype=torch.bfloat16)
    device = machine.device(FEW)
    tensors = case.tensors()
    narrow = {
        n: None if t is None else t[..., :1, :] if n != "skip" else t[:1]
        for n, t in tensors.items()
    }
    y = torch.empty(1, 1, length, dtype=case.dtype)
    plan = convolution.make_plan(
        convolution.describe(tensors["u"], tensors["k"], tensors["k_rev"]), H100
    )
    assert (plan.engine, plan.n, plan.long) == ("tensor", length, False)
    convolution.forward(
        device,
        y,
        *[narrow[n] for n in ("u", "k", "k_rev", "skip", "pre_gate", "post_gate")],
        "none",
    )
    leaves = {n: t if t is None else t.requires_grad_() for n, t in double(narrow).items()}
    y64 = reference.fftconv_fft(**leaves)
    assert rel_l2(y, y64) <= STATED[mode] + ROUNDING[case.dtype]

    plan = convolution.make_plan(
        convolution.describe(tensors["u"], tensors["k"], tensors["k_rev"]), H100, backward=True
    )
    assert (plan.engine, plan.n, plan.aside) == ("tensor", length, length > 27904)
    names, dy = ("u", "k", "k_rev", "skip"), torch.randn(1, 1, length).to(case.dtype)
    grads = [torch.empty_like(narrow[n]) for n in names]
    inputs = [narrow[n] for n in (*names, "pre_gate", "post_gate")]
    convolution.backward(device, (*grads, None, None), dy, *inputs, "none")
    assert not any(kernel.startswith("long_gradient") for kernel, *_ in device.launches)
    exact = torch.autograd.grad(y64, [leaves[n] for n in names], dy.double())
    for name, grad, grad64 in zip(names, grads, exact, strict=True):
        assert rel_l2(grad, grad64) <= 2 * STATED[mode] + ROUNDING.get(grad.dtype, 0), name


def test_taps_gradients_in_pieces(machine, mode):
    """The rows fit twice as fp16 numbers, but the taps do not fit once as float32 numbers."""
    case = Case(2, 1, 1024, 1024, taps_rev=1023, skip="h", dtype=torch.float16)
    device = machine.device(Limits(shared=8500, shared_total=64000, processors=1))
    check(device, case, mode)
    plan = make_plan(convolution.describe(*case_inputs(case)), device.limits, backward=True)
    assert (plan.engine, plan.n, plan.planes) == ("tensor", 1024, 2)
    assert "long_taps_gradient" in [kernel for kernel, *_ in device.launches]


ONE_PLANE = [
    Case(3, 2, 700, 700, taps_rev=699, skip="h", pre_gate=True, activation="gelu"),  # 3 x 256
    Case(2, 2, 1200, 1200, mode="circular", post_gate=True, layout="blh"),
    Case(3, 2, 2000, 2000, skip="h", taps_rev=7, per_sample=True, heads=1),
    Case(2, 1, 5000, 5000, skip="h", taps_rev=4999),
    Case(2, 1, 9000, 70, skip="h", pre_gate=True),  # windows
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ONE_PLANE, ids=str)
def test_one_plane_for_two_spectra(machine, mode, dtype, case, monkeypatch):
    """Gradients take one pass where the block's memory holds a row only once, and no row of float32 taps."""
    case, plans = replace(case, dtype=dtype), []

    def noted(problem, limits, backward=False):
        plan = make_plan(problem, limits, backward)
        plans.append(plan) if backward else None
        return plan

    monkeypatch.setattr(convolution, "make_plan", noted)
    n = {700: 768, 1200: 1280, 2000: 2048, 5000: 5120, 9000: 1280}[case.length]
    device = machine.device(one_plane(n))
    check(device, case, mode)
    ran = [kernel for kernel, *_ in device.launches]
    assert any(kernel.startswith("tensor_backward") for kernel in ran), ran
    assert not any("backward_c32" in kernel for kernel in ran)
    assert plans and all(plan.aside for plan in plans)
    if case.taps == case.length:
        assert {(plan.n, plan.windows) for plan in plans} == {(n, 1)}
        assert "long_taps_gradient" in ran
    else:
        assert all(plan.windows > 1 for plan in plans)


@pytest.mark.parametrize(
    "case",
    [
        Case(19, 1, 256, 256, skip="h", dtype=torch.bfloat16),
        Case(5, 3, 700, 700, taps_rev=3, pre_gate=True, dtype=torch.float16),
        Case(3, 2, 1000, 1000, heads=1, per_sample=True, dtype=torch.bfloat16),
        Case(2, 1, 5000, 5000, skip="h", activation="silu", dtype=torch.bfloat16),
        Case(2, 1, 20000, 64, taps_rev=30, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_one_plane_or_two_give_the_same(machine, mode, monkeypatch, case):
    """The bits are the same with any number of slots and groups, since what waits in global memory is not rounded.

    Every slot has room of its own, of which nothing is left as NaN. Blocks that share room would meet on a GPU only.
    """
    two = results(machine, case, FEW, 0)
    empty, scratch, pieces, filled = Recipe.empty, convolution._Prepared.scratch, {}, []

    def recorded(recipe, *shape):
        pieces.setdefault(recipe, []).append(empty(recipe, *shape))
        return pieces[recipe][-1]

    def nans(prepared, device):
        filled.append((prepared, scratch(prepared, device).fill_(math.nan)))
        return filled[-1][1]

    # No piece lies where another one was: else it could hide what that left as NaN.
    monkeypatch.setattr(Recipe, "reused", lambda recipe: contextlib.nullcontext())
    monkeypatch.setattr(Recipe, "empty", recorded)
    monkeypatch.setattr(convolution._Prepared, "scratch", nans)
    for a, b in zip(two, results(machine, case, OnePlane(processors=1), 7), strict=True):
        assert torch.equal(a, b)
    found = [
        memory.as_strided(piece.shape, piece.strides, piece.address.offset // 4)
        for prepared, memory in filled
        for _, recipe in prepared.parts
        for piece in pieces[recipe]
    ]
    assert len(filled) == 2 and len(found) > 4 and not any(t.isnan().any() for t in found)


@pytest.mark.parametrize("wanted", ["u", "skip", "u skip", "k"])
@pytest.mark.parametrize(
    "limits", [FEW, OnePlane(processors=1), one_plane(1024)], ids=["2", "1", "pieces"]
)
def test_gradients_of_some_arguments_are_those_of_all(machine, mode, wanted, limits):
    """This holds too where no gradient of taps is wanted, and x's spectra are left out."""
    torch.manual_seed(0)
    case = Case(3, 2, 1000, 1000, taps_rev=5, skip="h", dtype=torch.bfloat16)
    tensors, dy = case.tensors(), torch.randn(3, 2, 1000).to(case.dtype)
    names = ("u", "k", "k_rev", "skip")
    inputs = [tensors[n] for n in names] + [None, None]

    def gradients(limits, some):
        grads = [torch.full_like(tensors[n], math.nan) if n in some else None for n in names]
        with patch.object(convolution, "make_plan", planned):
            device = machine.device(limits)
            convolution.backward(device, (*grads, None, None), dy, *inputs, "none")
        return dict(zip(names, grads, strict=True))

    every = gradients(limits, names)
    for name, grad in gradients(limits, wanted.split()).items():
        assert grad is None or torch.equal(grad, every[name]), name


def test_scratch_of_long_gradients_is_bounded():
    """768 channels go some at a time. A call forward needs scratch for spectra only."""
    for per_sample in (False, True):
        problem = Problem(64, 1, 768, 32768, 32768, 0, per_sample, 2)
        plans = [make_plan(problem, H100, backward=b) for b in (False, True)]
        assert plans[1].aside and plans[1].outer > 1
        slices = list(convolution._slices(problem, plans))
        assert sum(count for _, count in slices) == 768
        each = problem.sets * plans[1].n * (4 + 12 * plans[1].parts + 8)
        assert slices[0][1] == max(1, (1 << 28) // each) < 768
        assert list(convolution._slices(problem, plans[:1])) == [(0, 768)]


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
