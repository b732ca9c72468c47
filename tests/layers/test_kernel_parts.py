"""Kernel generators make the kernel of some channels, which several processes divide among them."""

import pytest
import torch
from layer_table import EVERY, D, generators

from seqconv import S4D, Hyena, LongConvKernel, S4DKernel

MORE = {
    "s4d, shared sets": lambda: S4D(D, n_ssm=2),
    "s4d, a step per mode": lambda: S4D(D, dt_tie=False, bidirectional=True, bandlimit=0.5),
    "s4d, dss_softmax": lambda: S4D(D, discretization="dss_softmax"),
    "hyena, three kernels": lambda: Hyena(D, l_max=80, order=4),
}
PARTS = (slice(0, D), slice(1, 4), slice(5, D), slice(2, 2), slice(None))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", EVERY | MORE)
def test_the_parts_are_those_of_the_whole(name):
    kernels = [g for g in generators((EVERY | MORE)[name]()).values() if g.reads]
    assert kernels
    for generator in kernels:
        assert generator.makes_parts
        parameters = list(generator.parameters())
        whole = generator(50)
        for channels in PARTS:
            part = generator(50, channels=channels)
            torch.testing.assert_close(part, whole[:, channels], rtol=0, atol=1e-15)
            weight = torch.randn_like(part)
            ours = torch.autograd.grad(part, parameters, weight)
            wanted = torch.autograd.grad(whole[:, channels], parameters, weight, retain_graph=True)
            for grad, other in zip(ours, wanted, strict=True):
                torch.testing.assert_close(grad, other, rtol=1e-12, atol=1e-14)


def test_rates_reach_the_parts():
    kernel = S4DKernel(D)
    part = kernel(20, rate=0.5, channels=slice(2, 4))
    torch.testing.assert_close(part, kernel(20, rate=0.5)[:, 2:4], rtol=0, atol=1e-15)


def test_another_generate_or_system_is_cut_from_the_whole():
    """A subclass need not know of parts."""

    class Reversed(LongConvKernel):
        def generate(self, tensors, length, rate):
            return super().generate(tensors, length, rate).flip(1)

    class Slower(S4DKernel):
        def system(self, rate=1.0):
            log_dt, A, B, C = super().system(rate)
            return log_dt - torch.arange(self.d_model), A, B, C

    for kernel in (Reversed(D, l_max=80, kernel_dropout=0.0), Slower(D)):
        assert not kernel.makes_parts
        part = kernel(50, channels=slice(1, 3))
        torch.testing.assert_close(part, kernel(50)[:, 1:3], rtol=0, atol=0)


@pytest.mark.parametrize("channels", [3, (0, 2), slice(0, 4, 2), slice(-2, None), slice(0, D + 1)])
def test_channels_are_checked(channels):
    wanted = rf"S4DKernel: channels must be a slice of 0 \.\.\. {D} in steps of 1, got"
    with pytest.raises(ValueError, match=wanted):
        S4DKernel(D)(20, channels=channels)
