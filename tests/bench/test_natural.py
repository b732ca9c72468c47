"""The baseline of the benchmarks computes what seqconv.fftconv computes, in both layouts."""

import itertools

import pytest
import torch

import seqconv
from bench.micro import natural
from seqconv import S4D

CASES = list(itertools.product(("bhl", "blh"), (0, 2), (5, 16, 40), (16, 17)))


@pytest.mark.parametrize("through", natural.LAYOUTS)
def test_the_baseline_is_the_convolution(through):
    for layout, heads, taps, length in CASES:
        for two_sided, gated, activation in itertools.product(
            (False, True), (False, True), (None, "gelu")
        ):
            leading = (heads,) if heads else ()

            def signal(*leading, layout=layout, length=length):
                x = torch.randn(2, *leading, 3, length, dtype=torch.float64)
                return x.movedim(-1, 1).contiguous() if layout == "blh" else x

            k, k_rev = torch.randn(2, *leading, 3, taps, dtype=torch.float64)
            skip, bias = torch.randn(2, *leading, 3, dtype=torch.float64)
            u = signal()
            options = {"bias": bias, "activation": activation, "layout": layout}
            options["k_rev"] = k_rev if two_sided else None
            if gated:
                options |= {"pre_gate": signal(), "post_gate": signal(*leading)}
            found = natural.fftconv(u, k, skip, through=through, **options)
            torch.testing.assert_close(found, seqconv.fftconv(u, k, skip, **options))


def test_layers_call_it_inside_of_the_block_only(monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.fft, "rfft", lambda *a, rfft=torch.fft.rfft, **k: (calls.append(0), rfft(*a, **k))[1]
    )
    layer, x = S4D(4), torch.randn(2, 50, 4)
    with natural.in_layers("blh"):
        theirs = layer(x)
    assert len(calls) == 2
    torch.testing.assert_close(layer(x), theirs, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
