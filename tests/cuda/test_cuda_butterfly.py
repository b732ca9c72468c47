"""The learned butterfly's kernels, which run on the host, against the reference and torch.fft."""

import math

import pytest
import torch
from accuracy import rel_l2
from butterfly_cases import check_learned_matrices, exact, learned

from seqconv import reference
from seqconv.backends.cuda import butterfly

SIZES = [(16,), (16, 2), (16, 16), (16, 16, 4), (16, 16, 8)]


@pytest.fixture
def device(machine):
    return machine.device()


@pytest.mark.parametrize("radices", SIZES, ids=str)
def test_fourier_matrices_give_the_transform(device, radices):
    n = math.prod(radices)
    x, factors = torch.randn(2, 3, n - 3), {r: exact(r) for r in radices}
    expected = torch.view_as_real(torch.fft.fft(x.double(), n))
    assert rel_l2(reference.butterfly(x, factors, radices), expected) < 1e-6
    assert rel_l2(butterfly.transform(device, x, factors, radices), expected) < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("radices", SIZES, ids=str)
def test_learned_matrices_and_their_gradients(device, radices, dtype):
    check_learned_matrices(device, radices, dtype)


def test_strided_input_and_order_of_threads(machine):
    device = machine.device()
    radices, factors = (16, 8), {r: learned(r, 1) for r in (16, 8)}
    x = torch.randn(3, 100, 4).transpose(1, 2)
    z = butterfly.transform(device, x, factors, radices)
    assert torch.equal(z, butterfly.transform(device, x.contiguous(), factors, radices))
    found = butterfly.gradients(device, torch.ones_like(z), x, factors, radices)
    for order in (1, 7):
        again = machine.device(order=order)
        assert torch.equal(z, butterfly.transform(again, x, factors, radices))
        dx, grads = butterfly.gradients(again, torch.ones_like(z), x, factors, radices)
        assert torch.equal(dx, found[0])
        assert all(torch.equal(grads[r], found[1][r]) for r in grads)


def test_every_barrier_is_needed(emulator):
    radices, factors = (16, 8), {r: learned(r, 1) for r in (16, 8)}
    x = torch.randn(66, 2, 120)  # several rows to a block

    def results(without=""):
        one = emulator.device(without=without)
        z = butterfly.transform(one, x, factors, radices)
        dx, grads = butterfly.gradients(one, z, x, factors, radices)
        return [z, dx, *grads.values()]

    right = results()
    sites = {s for s in emulator.library.emulator_visited().decode().split() if "butterfly" in s}
    assert len(sites) >= 6
    for site in sites:
        try:
            found = results(site)
        except RuntimeError as error:
            assert "race" in str(error)
            continue
        assert not all(map(torch.equal, found, right)), f"{site} is not needed"
