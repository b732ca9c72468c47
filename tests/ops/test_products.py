"""Convolutions as matrix products (seqconv.backends.products), against the definition in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqconv import reference
from seqconv.backends import products
from seqconv.backends.inputs import Inputs


def wide(t):
    return None if t is None else t.double()


def error(inputs: Inputs, activation: str | None = None) -> float:
    """Of the products, relative to the norm of the definition's result."""
    found = products.fftconv(inputs, activation or "none")
    u, k, *rest = map(wide, inputs)
    names = ("k_rev", "skip", "pre_gate", "post_gate", "bias")
    options = dict(zip(names, rest, strict=True))
    wanted = reference.fftconv_fft(u, k, options.pop("skip"), activation=activation, **options)
    assert found.shape == wanted.shape and found.dtype == inputs.u.dtype
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("length", [1, 2, 3, 37, 64, 101, 1000, 4099])
@pytest.mark.parametrize("taps_rev", [0, 45, 5000])
def test_products_are_the_convolution(length, taps_rev):
    like = {"dtype": torch.float64}
    u, k = torch.randn(2, 3, length, **like), torch.randn(3, length + 2, **like)
    k_rev = torch.randn(3, taps_rev, **like) if taps_rev else None
    assert error(Inputs(u, k, k_rev, torch.randn(3, **like), None, None, None)) < 1e-14


def test_every_option():
    batch, heads, channels, length = 2, 3, 4, 90
    for per_sample in (False, True):
        lead = (batch, heads, channels) if per_sample else (heads, channels)
        k, k_rev = torch.randn(*lead, 50), torch.randn(*lead, 40)
        u, pre = torch.randn(2, batch, channels, length)
        post = torch.randn(batch, heads, channels, length)
        skip, bias = torch.randn(2, heads, channels)
        for activation in (None, "gelu", "silu", "relu"):
            assert error(Inputs(u, k, k_rev, skip, pre, post, bias), activation) < 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 320), st.integers(0, 320), st.integers(0, 2))
def test_any_sizes(length, taps, taps_rev, heads):
    like = {"dtype": torch.float64}
    lead = (heads, 2) if heads else (2,)
    u, k, k_rev = torch.randn(2, 2, length, **like), torch.randn(*lead, taps, **like), None
    if taps_rev:
        k_rev = torch.randn(*lead, taps_rev, **like)
    assert error(Inputs(u, k, k_rev, torch.ones(2, **like), None, None, None)) < 1e-13


def test_half_precision_is_computed_in_float32():
    u, k = torch.randn(2, 3, 200).bfloat16(), torch.randn(3, 200)
    exact = reference.fftconv_fft(u.double(), k.double())
    found = products.fftconv(Inputs(u, k, None, None, None, None, None), "none")
    rounded = (exact.bfloat16() - exact).norm()
    assert found.dtype == torch.bfloat16 and (found - exact).norm() < 1.001 * rounded


@pytest.mark.parametrize("length", [1, 5, 127, 1000, 4096, 65536, 100_003])
def test_sizes_of_passes(length):
    sizes = products.radices(length)
    n = math.prod(sizes)
    assert length <= n <= max(1.25 * length, length + 3) and 2 <= min(sizes) and max(sizes) <= 128
    if length >= 1000:  # what the documentation says
        assert 300 < products.flops(length) < 1600


def test_inverse_and_butterfly():
    y = torch.randn(2, 3, 64, 2, dtype=torch.float64)
    exact = torch.fft.ifft(torch.view_as_complex(y)).real
    for n in (2, 4, 64):
        part = y[:, :, :n].contiguous()
        exact = torch.fft.ifft(torch.view_as_complex(part)).real
        torch.testing.assert_close(products.inverse(part, n - 1), exact[..., : n - 1])
    x = torch.randn(2, 4, 60)
    factors = {m: torch.randn(2, m, m, 2) for m in (16, 4)}
    for activation in (None, "silu"):
        exact = reference.butterfly(x, factors, (16, 4), activation)
        found = products.butterfly(x, factors, (16, 4), activation)
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-3)


def test_too_long_a_row_is_refused():
    with pytest.raises(ValueError, match="length must be at most"):
        products.radices(1 << 30)
