"""Rows, gates, taps and gradients on tensor cores whose sizes lie far apart or near the ends of their type's range."""

import pytest
import torch
from accuracy import rel_l2
from cases import Case, double
from device_cases import FEW
from emulated import OnDevice
from judge import ROUNDING, STATED

from seqconv import fftconv, reference, use_backend

BF16, FP16 = torch.bfloat16, torch.float16


def computed(machine, inputs: dict, dy, **options):
    """y and the gradients of all inputs, on the machine and in float64; and the kernels that ran."""
    device = machine.device(FEW)
    mine = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    exact = {n: t.requires_grad_() for n, t in double(inputs).items()}
    with use_backend(OnDevice(device)):
        y = fftconv(**mine, **options)
        grads = torch.autograd.grad(y, list(mine.values()), dy)
    y64 = reference.fftconv_fft(**exact, **options)
    grads64 = torch.autograd.grad(y64, list(exact.values()), dy.double())
    names = ["y", *inputs]
    kernels = [name for name, *_ in device.launches if name.startswith("half")]
    assert kernels
    return dict(zip(names, [y, *grads], strict=True)), dict(
        zip(names, [y64, *grads64], strict=True)
    )


def assert_right(found, wanted, names):
    for name in names:
        value = found[name]
        allowed = (1 if name == "y" else 2) * STATED["fast"] + ROUNDING.get(value.dtype, 0)
        assert rel_l2(value, wanted[name]) <= allowed, name


@pytest.mark.parametrize("length", [2048, 2047])
def test_small_rows_count_in_the_gradient_of_the_taps(machine, length):
    """Rows whose products are 2^-25 of one impulse's, and whose sum is not small beside it."""
    u = torch.full((9, 1, length), 2.0**-12.5)
    u[0] = 0
    u[0, 0, 0] = 1.0
    k = torch.randn(1, length) / length
    found, wanted = computed(machine, {"u": u.to(BF16), "k": k}, u.to(BF16))
    assert_right(found, wanted, ["k"])


@pytest.mark.parametrize("size, taps", [(3e37, 1.0), (1e19, 1e17), (1e-30, 1e-5)])
def test_results_near_the_ends_of_bfloat16s_range(machine, size, taps):
    u = (torch.randn(2, 1, 1024).clamp(-2, 2) * size / 2).to(BF16)
    k = torch.zeros(1, 1024)
    k[0, 3] = taps
    dy = torch.randn(2, 1, 1024).to(BF16)
    found, wanted = computed(machine, {"u": u, "k": k}, dy)
    assert_right(found, wanted, ["y", "u"])
    # The gradient of the input is convolved by the same taps.
    found, wanted = computed(machine, {"u": dy, "k": k}, u)
    assert_right(found, wanted, ["u"])


@pytest.mark.parametrize(
    "dtype, row, gate",
    [(FP16, 300.0, 300.0), (FP16, 6e4, 6e4), (BF16, 1e-38, 1e38), (BF16, 1e38, 1e-37)],
)
def test_products_of_gates_beyond_the_types_range(machine, dtype, row, gate):
    """Only what they are multiplied to counts."""
    u = (row * (1 + torch.rand(3, 1, 1024)) / 2).to(dtype)
    pre = (gate * torch.randn(3, 1, 1024).sign()).to(dtype)
    post = torch.randn(3, 1, 1024).to(dtype)
    k = torch.randn(1, 1024) / 32 / (row * gate)
    dy = torch.randn(3, 1, 1024).to(dtype)
    found, wanted = computed(machine, {"u": u, "k": k, "pre_gate": pre, "post_gate": post}, dy)
    assert_right(found, wanted, ["y", "post_gate"])
    scale = wanted["k"].abs().max()
    assert rel_l2(found["k"] / scale, wanted["k"] / scale) <= 2 * STATED["fast"]


@pytest.mark.parametrize("size", [1e-6, 2e4])
def test_gradients_before_gelu_have_the_range_that_they_need(machine, size):
    """Small gradients of fp16 rows are not rounded before they are convolved, and large ones do not overflow."""
    case = Case(3, 1, 1024, 1024, skip="h", activation="gelu", dtype=FP16)
    tensors = case.tensors()
    inputs = {n: tensors[n] for n in ("u", "k", "skip")}
    dy = (torch.randn(3, 1, 1024) * size).to(FP16)
    found, wanted = computed(machine, inputs, dy, activation="gelu")
    for name in ("k", "skip"):
        scale = wanted[name].abs().max()
        value, exact = found[name].double() / scale, wanted[name] / scale
        if wanted[name].abs().max() < 6e4:
            assert rel_l2(value, exact) <= 2 * STATED["fast"] + 2.9e-4 / min(1.0, size * 1e5), name
