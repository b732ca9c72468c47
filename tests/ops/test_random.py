"""hypothesis draws problems: shapes, dtypes, options and strides nobody thought of."""

import torch
from accuracy import assert_accurate
from cases import FLOATS, Case, double, oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqconv import fftconv, reference


@st.composite
def problems(draw) -> Case:
    length = draw(st.one_of(st.integers(0, 40), st.integers(41, 400)))
    circular = draw(st.integers(0, 3)) == 0
    taps = draw(st.integers(0, length if circular else length + 10))
    heads = draw(st.one_of(st.none(), st.integers(1, 3)))
    dtype = draw(st.sampled_from(FLOATS))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        batch=draw(st.integers(0, 3)),
        channels=draw(st.one_of(st.integers(0, 3), st.integers(7, 18))),
        length=length,
        taps=taps,
        taps_rev=None if circular else draw(st.one_of(st.none(), st.integers(0, length + 10))),
        heads=heads,
        per_sample=heads is not None and draw(st.booleans()),
        skip=draw(st.sampled_from(["", "h", "h" if heads is None else "ch"])),
        pre_gate=draw(st.booleans()),
        post_gate=draw(st.booleans()),
        bias=draw(st.sampled_from(["", "h", "h" if heads is None else "ch"])),
        activation=draw(st.sampled_from([None, "gelu", "silu", "relu"])),
        mode="circular" if circular else "causal",
        layout=draw(st.sampled_from(["bhl", "blh"])),
        dtype=dtype,
        kernel_dtype=draw(st.sampled_from([wide, torch.float32, torch.bfloat16, torch.float16])),
    )


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(problems())
def test_any_problem(case):
    torch.manual_seed(0)
    tensors = case.tensors()
    y, grads, dy = case.with_gradients(fftconv, tensors)
    exact, definition = oracle(case)
    y64, grads64, _ = exact.with_gradients(definition, double(tensors), dy.double())
    y_fft, grads_fft, _ = case.with_gradients(reference.fftconv_fft, tensors, dy)
    # Norms over a handful of numbers, each of which may be a small difference of large ones.
    ulps = 2.0 if y.numel() >= 64 else 16.0
    assert_accurate(y, y_fft, y64, ulps=ulps)
    for name, grad in grads.items():
        ulps = 2.0 if grad.numel() >= 64 else 16.0
        assert_accurate(
            grad, grads_fft[name], grads64[name], factor=3.0, ulps=ulps, what=f"d{name}"
        )
