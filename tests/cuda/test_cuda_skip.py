"""The skip's gradient on a device: the kernel that ends its sum, alone and behind every plan of the backward pass."""

import contextlib
from dataclasses import replace

import pytest
import torch
from cases import Case, double
from device_cases import FEW, SMALL, run
from emulated import forget_recipes
from half_cases import half_launches, tensor_cores_only

from seqconv import reference
from seqconv.backends.cuda import convolution
from seqconv.backends.cuda.arguments import arguments
from seqconv.backends.cuda.convolution import SKIP_THREADS, SUFFIX
from seqconv.backends.cuda.problem import H100

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def added_up(device, partial: torch.Tensor, dskip: torch.Tensor) -> torch.Tensor:
    parts, heads, channels, threads = partial.shape
    sizes = {"parts": parts, "heads": heads, "channels": channels, "threads": threads}
    told = arguments("skip_gradient", **sizes, dskip_parts=partial, dskip=dskip)
    device.launch("skip_gradient", heads * channels, SKIP_THREADS, 8 * SKIP_THREADS, told)
    return dskip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (5, 1, 3, 48), (7, 3, 2, 288), (2, 2, 5, 512)])
def test_sums_in_float64(machine, shape, dtype):
    """Parts of 1 stand beside others of a million times as much, which cancel. Float32 would lose the former."""
    partial = torch.randn(shape)
    large = 2.0**24 * torch.randn(shape[1:3]).sign()
    partial[0, :, :, 0] += large
    partial[-1, :, :, -1] -= large
    found = [
        added_up(machine.device(order=order), partial, torch.empty(shape[1:3], dtype=dtype))
        for order in (0, 1, 7)
    ]
    wanted = partial.double().sum((0, 3)).float().to(dtype)
    assert all(torch.equal(one, wanted) for one in found)


def test_what_is_not_a_number_stays_with_its_channel(machine):
    partial = torch.ones(2, 1, 3, 32)
    partial[1, 0, 1, 5] = torch.inf
    partial[0, 0, 2, 31] = torch.nan
    found = added_up(machine.device(), partial, torch.empty(1, 3))[0]
    assert found[:2].tolist() == [64, torch.inf] and found[2].isnan()


PLANS = {
    "one pass": (Case(5, 3, 300, 300), FEW),
    "one pass, many parts": (Case(19, 2, 256, 256), H100),
    "windows": (Case(2, 2, 20001, 65, taps_rev=30), H100),
    "three passes": (Case(3, 2, 9000, 9000), replace(SMALL, tensor_cores=False)),
    "a kernel per sample": (Case(3, 2, 300, 300, heads=1, per_sample=True), FEW),
    "two heads": (Case(3, 2, 300, 300, heads=2), FEW),
    "two heads per sample": (Case(3, 2, 300, 300, heads=2, per_sample=True), FEW),
    "two heads, three passes": (
        Case(2, 2, 9000, 9000, heads=2),
        replace(SMALL, tensor_cores=False),
    ),
    "pieces": (Case(5, 3, 1000, 1000, dtype=torch.bfloat16), FEW),
    "whole rows": (Case(5, 3, 1024, 1024, dtype=torch.float16), FEW),
    "any rows": (Case(5, 3, 1001, 1001, dtype=torch.float16), FEW),
    "heads on tensor cores": (Case(3, 2, 1024, 1024, heads=2, dtype=torch.bfloat16), FEW),
    "one row at a time": (Case(3, 1, 32768, 32768, dtype=torch.bfloat16), FEW),
}
# What a plan launches on tensor cores.
HALF = {"pieces": "1024_ragged", "whole rows": "1024", "any rows": "1024_any"}
HALF |= {"heads on tensor cores": "1024_any", "one row at a time": "32768"}


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(machine, plan, monkeypatch):
    """One skip serves all heads, or each has its own. The gradients lie apart and have any dtype. They are the same to
    the bit in every order of the threads, and whether all channels go at once or some at a time."""
    case, limits = PLANS[plan]
    ran = {f"half_backward_{SUFFIX[case.dtype]}_{HALF[plan]}"} if plan in HALF else set()
    with tensor_cores_only() if plan in HALF else contextlib.nullcontext():
        check_plan(machine, case, limits, ran, monkeypatch)


def check_plan(machine, case: Case, limits, ran: set[str], monkeypatch):
    for skip in ("h", "ch") if case.heads else ("h",):
        tensors = replace(case, skip=skip).tensors()
        names = ("u", "k", "k_rev", "skip", "pre_gate", "post_gate", "bias")
        inputs = [tensors[name] for name in names]
        shape = (
            tensors["u"].shape
            if not case.heads
            else (case.batch, case.heads, *tensors["u"].shape[1:])
        )
        dy = torch.randn(shape).to(case.dtype)
        leaf = tensors["skip"].double().requires_grad_()
        y64 = reference.fftconv_fft(**double(tensors) | {"skip": leaf})
        (exact,) = torch.autograd.grad(y64, leaf, dy.double())
        seen = {}
        for order, dtype, most in (
            (0, torch.float32, 1 << 28),
            (7, torch.float32, 1),
            (1, torch.bfloat16, 1 << 28),
        ):
            monkeypatch.setattr(convolution, "SCRATCH_BYTES", most)
            forget_recipes()
            memory = torch.full((*leaf.shape[:-1], 3, 2 * leaf.shape[-1]), 7.0, dtype=dtype)
            dskip = memory[..., 1, ::2]
            device = machine.device(limits, order)
            grads = (None, None, None, dskip, None, None, None)
            convolution.backward(device, grads, dy, *inputs, "none")
            assert any(kernel == "skip_gradient" for kernel, *_ in device.launches)
            assert half_launches(device) == ran
            assert (memory[..., ::2, :] == 7).all() and (memory[..., 1::2] == 7).all()
            assert torch.equal(seen.setdefault(dtype, dskip), dskip)
            allowed = 2e-6 if dtype == torch.float32 else 4e-3
            size = (dy.double().square().sum() * tensors["u"].double().square().sum()).sqrt()
            assert (dskip - exact).abs().max() <= 1e-7 * size + allowed * exact.abs().max()
        assert torch.equal(seen[torch.bfloat16], seen[torch.float32].bfloat16())


def test_without_a_skip_nothing_is_added_up(machine):
    device = machine.device(FEW)
    run(device, Case(2, 2, 300, 300))
    assert not any(kernel == "skip_gradient" for kernel, *_ in device.launches)
