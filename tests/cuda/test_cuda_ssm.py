"""The kernels of sums of exponentials on the host, against the dense formula in float64."""

from dataclasses import replace

import pytest
import torch
from accuracy import rel_l2
from emulated import OnDevice
from fake_driver import Device, Driver
from ssm_cases import SIZES, check, dense, problem, results

from seqconv import reference, ssm_kernel, use_backend
from seqconv.backends.cuda import driver, kernels, ssm
from seqconv.backends.cuda.problem import H100
from seqconv.ops.ssm import mode_sum

FEW = replace(H100, processors=1)  # several tiles for every block


@pytest.fixture
def device(machine):
    return machine.device()


PRODUCTS = ("ssm_forward", "ssm_backward")


@pytest.mark.parametrize("c, h, n, length", SIZES)
def test_sizes(device, c, h, n, length):
    check(device, *problem(c, h, n), torch.randn(c, h, length))


def test_no_position_at_all(device):
    a, w = problem(2, 3, 4)
    k, da, dw = results(device, a, w, torch.empty(2, 3, 0))
    assert k.shape == (2, 3, 0) and not da.any() and not dw.any() and not device.launches


def test_long_rows_of_barely_damped_modes(device):
    """Phases make more than a million turns, and every position adds to the gradient in the same direction."""
    length = 65536
    a, w = problem(1, 1, 5, decay=(1e-6, 1.1e-6))
    a[..., 1] = torch.tensor([0.0, 1e-5, 3.1, 77.7, 130.0])
    check(device, a, w, torch.randn(1, 1, length))
    a, w = a[:, 3:4], w[:, :, 3:4].contiguous()
    check(device, a.contiguous(), w, dense(a.contiguous(), w, length).float())


def test_a_phase_is_reduced_exactly(device):
    """It may have any size in one step. Here all of the oracle's products are exact too."""
    a = torch.tensor([[[-(2.0**-20), 100000000.5]]], dtype=torch.float64)
    w = torch.tensor([[[[0.75, -0.5]]]], dtype=torch.float64)
    check(device, a, w, torch.randn(1, 1, 65536))


def test_a_row_of_two_million(machine):
    length = (1 << 21) + 5
    a = torch.tensor([[[-1e-9, 100.3]]], dtype=torch.float64)
    w = torch.tensor([[[[0.6, -0.8]]]], dtype=torch.float64)
    k = torch.empty(1, 1, length)
    ssm.forward(machine.device(FEW), k, a, w)
    assert rel_l2(k, dense(a, w, length)) < 5e-7


def test_vanished_and_growing_modes(device):
    """exp(a l) below float32's range is zero, also times a weight. Beyond the row it never overflows."""
    a = torch.tensor([[[-1000.0, 2.0], [-0.1, 1.0], [-3.0, 0.5]]], dtype=torch.float64)
    w = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    check(device, a, w, torch.randn(1, 1, 3000))
    for size, length in ((8.0, 10), (1.0, 80), (0.03, 2500)):
        a = torch.tensor([[[size, 2.0], [size / 2, -0.3]]], dtype=torch.float64)
        check(device, a, w[:, :, :2].contiguous(), torch.randn(1, 1, length))
    k = results(
        device, torch.full((1, 1, 2), 5.0, dtype=torch.float64), w[:, :, :1], torch.ones(1, 1, 99)
    )
    assert not torch.isfinite(k[0][..., 30:]).any()  # too large is never a wrong number


def test_modes_do_not_meet(device):
    """A NaN in one channel or weight stays there."""
    a, w = problem(2, 3, 4)
    dk = torch.randn(2, 3, 100)
    clean = results(device, a, w, dk)
    a[1, 2, 0] = torch.nan
    k, da, dw = results(device, a, w, dk)
    assert k[:, 1].isnan().any() and da[1, 2].isnan().any() and dw[:, 1, 2].isnan().any()
    k[:, 1], da[1], dw[:, 1] = clean[0][:, 1], clean[1][1], clean[2][:, 1]
    assert all(map(torch.equal, (k, da, dw), clean))


def test_blocks_share_the_length(machine):
    """Every tile has a block where tiles are few. Otherwise every block has several tiles."""
    a, w = problem(2, 17, 3)
    dk = torch.randn(2, 17, 5000)
    for limits, shares in ((H100, 3), (FEW, 1)):
        device = machine.device(limits)
        check(device, a, w, dk)
        assert {grid for name, grid, *_ in device.launches if name in PRODUCTS} == {17 * shares}


def run(machine, order=0, **options):
    """A block has several tiles and heads, and one group of modes or two."""
    torch.manual_seed(0)
    found = []
    for n in (3, 35):
        device = machine.device(FEW, order, **options)
        a, w = problem(2, 17, n)
        dk = torch.randn(2, 17, 2100)
        found += results(device, a, w, dk)
    return found


def test_order_of_threads(machine):
    right = run(machine)
    for order in (1, 7):
        assert all(map(torch.equal, run(machine, order), right))


def test_every_barrier_is_needed(emulator):
    right = run(emulator)
    sites = {s for s in emulator.library.emulator_visited().decode().split() if s.startswith("ssm")}
    assert len(sites) == 6
    for site in sites:
        try:
            found = run(emulator, without=site)
        except RuntimeError as error:
            assert "race" in str(error)
            continue
        assert not all(map(torch.equal, found, right)), f"{site} is not needed"


def test_through_the_driver_with_any_strides(emulator, monkeypatch):
    """A gradient is read in place, whether it is transposed, expanded or a slice."""
    monkeypatch.setattr(driver, "find_prebuilt", lambda name, *_: b"\x7fELF " + name.encode())
    device = Device(0, Driver(emulator.device()))
    a, w = problem(2, 3, 4)
    for dk in (
        torch.randn(100, 3, 2).permute(2, 1, 0),
        torch.randn(1, 3, 100).expand(2, 3, 100),
        torch.randn(2, 1, 1).expand(2, 3, 100),
        torch.randn(2, 3, 201)[..., 1::2],
    ):
        check(device, a, w, dk)
    names = set(device.driver.names.values())
    assert names == {name for name in kernels.KERNELS if name.startswith("ssm")} - {"ssm_step"}
    assert {launch[4] for launch in device.driver.launches} == {77}


def test_lazy_gradients_have_memory_when_they_arrive(emulator):
    """Lazily negated and lazily zero ones, by the operator, which has torch resolve them."""
    inputs = [t.requires_grad_() for t in problem(2, 3, 4)]
    lazy = torch.imag(torch.randn(2, 3, 100, dtype=torch.complex64).conj())
    zero = torch._efficientzerotensor((2, 3, 100))
    assert lazy.is_neg() and zero._is_zerotensor()
    with use_backend(OnDevice(device := emulator.device())):
        for dk, real in ((lazy, lazy.clone()), (zero, torch.zeros(2, 3, 100))):
            found, wanted = (
                torch.autograd.grad(mode_sum(*inputs, 100, True), inputs, g) for g in (dk, real)
            )
            assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
            assert wanted[1].any() or not real.any()
    assert any(name == "ssm_backward" for name, *_ in device.launches)


def test_memory_does_not_grow_with_modes_times_length(machine, monkeypatch):
    """Beside the results, 64 bytes are allocated for each digit of a mode, and 32 for a block's sums of one."""
    sizes, empty = [], torch.empty

    def counted(*args, **options):
        made = empty(*args, **options)
        sizes.append(made.numel() * made.element_size())
        return made

    h, n = 17, 40
    a, w = problem(1, h, n)
    for length, digits in ((600, 4), (5000, 5)):
        dk = torch.randn(1, h, length)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", counted)
            ssm.backward(machine.device(FEW), torch.empty_like(a), torch.empty_like(w), dk, a, w)
        assert sorted(sizes) == [32 * h * n, 64 * digits * h * n]
        sizes.clear()


def test_the_operator_on_cudas_road(machine):
    """ssm_kernel runs from its parameters to their gradients, with the emulator in the driver's place."""
    device = machine.device()
    inputs = [torch.randn(3) - 3, torch.randn(3, 4, 2), torch.randn(2, 3, 4, 2)]
    inputs[1][..., 0] = -inputs[1][..., 0].abs()
    inputs = [t.requires_grad_() for t in inputs]
    with use_backend(OnDevice(device)):
        ours = ssm_kernel(*inputs, 300)
    dk = torch.randn_like(ours)
    found = [ours, *torch.autograd.grad(ours, inputs, dk)]
    names = [launch[0] for launch in device.launches]
    wanted = ["ssm_powers", "ssm_forward", "ssm_powers", "ssm_backward", "ssm_gradients"]
    assert names == wanted
    exact = [t.detach().double().requires_grad_() for t in inputs]
    theirs = reference.ssm_kernel(*exact, 300)
    theirs = [theirs, *torch.autograd.grad(theirs, exact, dk.double())]
    for a, b in zip(found, theirs, strict=True):
        assert (a - b).norm() < 2e-6 * b.norm()
