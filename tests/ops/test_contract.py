"""What the operator refuses, and what it says; explain, transform lengths and meta tensors."""

import pytest
import torch
from cases import FLOATS, Case

import seqconv
from seqconv import fftconv
from seqconv.backends import cpu

U, K = torch.zeros(2, 4, 10), torch.zeros(4, 10)
ERRORS = {
    "u is no tensor": (lambda: fftconv([1.0], K), TypeError, "u must be a tensor, got list"),
    "u is integer": (
        lambda: fftconv(U.int(), K),
        TypeError,
        "u must be one of float32, float64, bfloat16, float16, got int32",
    ),
    "u is complex": (lambda: fftconv(U.cfloat(), K), TypeError, "u must be .* got complex64"),
    "u is sparse": (lambda: fftconv(U.to_sparse(), K), TypeError, "u must be a dense tensor"),
    "u has two axes": (
        lambda: fftconv(U[0], K),
        ValueError,
        r"u must be \(batch, channels, length\), got \(4, 10\)",
    ),
    "k has other channels": (
        lambda: fftconv(U, K[:3]),
        ValueError,
        r"k must be \(channels=4, K\) or .* got \(3, 10\)",
    ),
    "k has another batch": (
        lambda: fftconv(U, torch.zeros(3, 1, 4, 10)),
        ValueError,
        r"\(batch=2, heads, channels=4, K\) for u .*, got \(3, 1, 4, 10\)",
    ),
    "k is float64": (
        lambda: fftconv(U, K.double()),
        TypeError,
        "k must be one of float32, bfloat16, float16 .no wider than float32 unless u is float64., got",
    ),
    "k_rev without heads": (
        lambda: fftconv(U, K[None], k_rev=K),
        ValueError,
        r"k_rev must be \(heads=1, channels=4, K_rev\), got \(4, 10\)",
    ),
    "skip per head without heads": (
        lambda: fftconv(U, K, torch.zeros(1, 4)),
        ValueError,
        r"skip must be \(channels=4,\), got \(1, 4\)",
    ),
    "skip has other heads": (
        lambda: fftconv(U, K.expand(3, 4, 10), torch.zeros(2, 4)),
        ValueError,
        r"skip must be \(channels=4,\) or \(heads=3, channels=4\), got \(2, 4\)",
    ),
    "pre_gate broadcasts": (
        lambda: fftconv(U, K, pre_gate=U[:1]),
        ValueError,
        r"pre_gate must be \(batch=2, channels=4, length=10\), got \(1, 4, 10\)",
    ),
    "post_gate lacks heads": (
        lambda: fftconv(U, K.expand(3, 4, 10), post_gate=U),
        ValueError,
        r"post_gate must be \(batch=2, heads=3, channels=4, length=10\), got \(2, 4, 10\)",
    ),
    "post_gate in blh": (
        lambda: fftconv(U.mT, K, post_gate=U, layout="blh"),
        ValueError,
        r"post_gate must be \(batch=2, length=10, channels=4\), got \(2, 4, 10\)",
    ),
    "gate in another dtype": (
        lambda: fftconv(U, K, pre_gate=U.bfloat16()),
        TypeError,
        "pre_gate must be float32, got bfloat16",
    ),
    "activation": (
        lambda: fftconv(U, K, activation="tanh"),
        ValueError,
        "activation must be one of None, 'gelu'",
    ),
    "mode": (
        lambda: fftconv(U, K, mode="same"),
        ValueError,
        "mode must be one of 'causal', 'circular', got 'same'",
    ),
    "layout": (
        lambda: fftconv(U, K, layout="lbh"),
        ValueError,
        "layout must be one of 'bhl', 'blh', got 'lbh'",
    ),
    "circular and long": (
        lambda: fftconv(U, torch.zeros(4, 11), mode="circular"),
        ValueError,
        "k must have K <= length=10 in circular mode, got K=11",
    ),
    "circular and two-sided": (
        lambda: fftconv(U, K, k_rev=K, mode="circular"),
        ValueError,
        "k_rev must be None in circular mode",
    ),
    "another device": (
        lambda: fftconv(U, K.to("meta")),
        ValueError,
        "k must be on u's device cpu, got meta",
    ),
    "unknown keyword": (lambda: fftconv(U, K, offset=K), TypeError, "offset"),
    "bias per head without heads": (
        lambda: fftconv(U, K, bias=torch.zeros(1, 4)),
        ValueError,
        r"bias must be \(channels=4,\), got \(1, 4\)",
    ),
    "bias is too wide": (
        lambda: fftconv(U, K, bias=torch.zeros(4).double()),
        TypeError,
        "bias must be one of .*, got float64",
    ),
    "positional option": (lambda: fftconv(U, K, None, K), TypeError, "positional"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_explain():
    u = torch.zeros(1, 8, 1000)
    plan = seqconv.explain(u, torch.zeros(8, 1000))
    assert (plan.backend, plan.algorithm, plan.fallback) == ("cpu", "right-angle fft", None)
    assert plan.fft_size >= 1000 and plan.isa == cpu.isa() and "1000" not in str(plan.fallback)
    assert seqconv.explain(u, torch.zeros(8, 32)).algorithm == "direct sum"
    assert (
        seqconv.explain(u, torch.zeros(8, 32), k_rev=torch.zeros(8, 1)).algorithm
        == "right-angle fft"
    )
    assert "meta" in seqconv.explain(u.to("meta"), torch.zeros(8, 32, device="meta")).fallback
    with pytest.raises(ValueError, match="k must be"):
        seqconv.explain(u, torch.zeros(7, 32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_meta_tensors_keep_shape_dtype_and_strides(dtype):
    case = Case(length=20, taps=20, layout="blh", heads=2, dtype=dtype)
    tensors = case.tensors()
    y = case.run(fftconv, tensors)
    meta = case.run(fftconv, {n: None if t is None else t.to("meta") for n, t in tensors.items()})
    assert (meta.shape, meta.dtype, meta.stride()) == (y.shape, y.dtype, y.stride())
