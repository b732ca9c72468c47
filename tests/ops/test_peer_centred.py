"""The problems of other packages whose kernels have a centre: "same" and circular convolutions of nvSubquadratic, the
depthwise convolution of flash-fft-conv; and their tests of what may see the future.

fftconv has no centre: lag 0 is tap 0 of k, and taps for the future are k_rev's. These tests also write down how such
kernels are handed over. They are compared with torch's direct sums in float64, which know nothing of that.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate

from seqconv import Hyena, LongConv, fftconv, reference

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

LINEAR_AND_CIRCULAR = (
    (2, 16, 64, 7),
    (2, 32, 128, 32),
    (1, 8, 256, 256),
    (4, 16, 64, 15),
    (2, 8, 64, 15),
    (1, 16, 128, 7),
    (1, 8, 128, 32),
    (2, 8, 256, 15),
    (1, 8, 64, 64),
    (2, 4, 128, 128),
    (2, 96, 64, 7),
)
CHUNKED = ((2, 64, 256, 32), (2, 128, 512, 64), (2, 256, 1024, 128))
CLOSE = {"small": (1e-4, 1e-3), "chunked": (2e-5, 5e-4)}  # of y and of gradients


def centred(function, x, kernel, skip=None, circular=False, layout="bhl", **options):
    """y[t] = sum_j kernel[j] x[t + centre - j] + skip x[t], outside its ends 0 or the other end.

    The centre is K // 2. Of circular kernels with an even number of taps it is one less.
    """
    taps, length = kernel.shape[-1], x.shape[-1 if layout == "bhl" else 1]
    centre = (taps - 1) // 2 if circular else taps // 2
    if circular:
        around = F.pad(kernel, (0, length - taps)).roll(-centre, -1)
        return function(x, around, skip, mode="circular", layout=layout, **options)
    k_rev = kernel[..., :centre].flip(-1)
    return function(x, kernel[..., centre:], skip, k_rev=k_rev, layout=layout, **options)


def direct(x, kernel, skip, circular):
    """The same by torch's direct sums over a padded input."""
    taps = kernel.shape[-1]
    left = taps // 2 if circular else (taps - 1) // 2
    padded = F.pad(x, (left, taps - 1 - left), mode="circular" if circular else "constant")
    y = F.conv1d(padded, kernel.flip(-1)[:, None], groups=len(kernel))
    return y if skip is None else y + skip[:, None] * x


def results(run, tensors, dy):
    """y, and the gradients of all tensors."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = run(*leaves)
    there = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, there, dy.to(y.dtype))]


def check_all(ours, plain, exact, close, refused):
    """Both bounds hold for every result, and fail for what is wrong."""
    for i, (mine, baseline, wanted) in enumerate(zip(ours, plain, exact, strict=True)):
        factor = 3.0 if i else 2.0
        assert_accurate(mine, baseline, wanted, factor, what=f"result {i}")
        torch.testing.assert_close(mine.double(), wanted, atol=close[i > 0], rtol=1e-4)
        with pytest.raises(AssertionError):
            assert_accurate(torch.zeros_like(mine), baseline, wanted, factor)
    for wrong in refused:
        with pytest.raises(AssertionError):
            assert_accurate(wrong.to(ours[0].dtype), plain[0], exact[0])


@pytest.mark.parametrize("circular", [False, True], ids=["same", "circular"])
@pytest.mark.parametrize(
    "shape,layout",
    [*((shape, "bhl") for shape in LINEAR_AND_CIRCULAR), ((2, 16, 64, 7), "blh")],
    ids=str,
)
def test_same_and_circular_convolutions_of_nvsubquadratic(shape, circular, layout):
    check_centred(shape, circular, layout, CLOSE["small"])


@pytest.mark.parametrize(
    "shape",
    CHUNKED,
    ids=str,
)
def test_chunked_convolutions_of_nvsubquadratic(shape):
    """Its chunks are groups of channels, which bound the memory of spectra. fftconv keeps none."""
    check_centred(shape, False, "bhl", CLOSE["chunked"])


def test_a_kernel_of_twice_the_length():
    """The longest that nvSubquadratic takes, and a longer one: taps that meet no input do not matter."""
    for taps in (64, 101):
        check_centred((2, 8, 32, taps), False, "bhl", CLOSE["small"])


def check_centred(shape, circular, layout, close):
    batch, channels, length, taps = shape
    channels = min(channels, 8)  # no channel sees another
    x = torch.randn(batch, channels, length)
    kernel, skip, dy = torch.randn(channels, taps), torch.randn(channels), torch.randn_like(x)

    def of(function):
        if layout == "bhl":
            return lambda x, *rest: centred(function, x, *rest, circular)
        return lambda x, *rest: centred(function, x.mT, *rest, circular, layout="blh").mT

    tensors = (x, kernel, skip)
    exact = results(lambda *t: direct(*t, circular), [t.double() for t in tensors], dy)
    plain = results(of(reference.fftconv_fft), tensors, dy)
    x64, kernel64, skip64 = (t.double() for t in tensors)
    refused = [
        direct(x64, kernel64.roll(1, -1), skip64, circular),
        direct(x64, kernel64, None, circular),
    ]
    check_all(results(of(fftconv), tensors, dy), plain, exact, close, refused)


# Weights may be in float32 for inputs in half precision, and in half precision for inputs in float32.
PAIRS = ((BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F32, F32), (F32, F16), (F32, BF16))


@pytest.mark.parametrize("taps,layout", [(3, "bhl"), (5, "bhl"), (7, "blh")])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "-".join(str(d)[6:] for d in p))
def test_depthwise_convolutions_of_flash_fft_conv(dtypes, taps, layout):
    """Few taps round the present, and a bias, as in nn.Conv1d: tap 0 is the oldest."""
    dtype, weight_dtype = dtypes
    x, dy = (torch.randn(2, 4, 1024).to(dtype) for _ in range(2))
    weight = (torch.randn(4, taps) * taps**-0.5).to(weight_dtype)
    bias = torch.randn(4).to(weight_dtype)

    def of(function):
        if layout == "bhl":
            return lambda x, w, b: centred(function, x, w.flip(-1), bias=b)
        return lambda x, w, b: centred(function, x.mT, w.flip(-1), bias=b, layout="blh").mT

    def by_torch(x, weight, bias):
        return F.conv1d(x, weight[:, None], bias, padding=taps // 2, groups=4)

    tensors = (x, weight, bias)
    exact = results(by_torch, [t.double() for t in tensors], dy)
    x64, weight64, bias64 = (t.double() for t in tensors)
    refused = [by_torch(x64, weight64.roll(1, -1), bias64), by_torch(x64, weight64, None)]
    plain = results(of(reference.fftconv_fft), tensors, dy)
    check_all(results(of(fftconv), tensors, dy), plain, exact, (1e-1, 1.0), refused)


def test_a_step_moves_nothing_before_it():
    """nvSubquadratic's bounds: 1 more at one step, below 1e-5 before it and above 1e-2 from it on."""
    x, kernel = torch.randn(1, 8, 64), torch.randn(8, 15)
    later = x.clone()
    later[..., 32] += 1.0
    moved = (fftconv(later, kernel) - fftconv(x, kernel)).abs()
    assert moved[..., :32].max() < 1e-5 and moved[..., 32:].max() > 1e-2
    moved = (
        fftconv(later, kernel, exact_causal=True) - fftconv(x, kernel, exact_causal=True)
    ).abs()
    assert not moved[..., :32].any() and moved[..., 32:].max() > 1e-2


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_of_one_output_in_half_precision(exact):
    """vortex: for a float16 row of 4,096 steps the future's part is below 1e-2, where the past's is about 1."""
    x = torch.randn(1, 1, 4096).half().requires_grad_()
    y = fftconv(x, torch.randn(1, 4096), exact_causal=exact)
    for t in (0, 1, 63, 64, 2047, 2048, 4094):
        (grad,) = torch.autograd.grad(y[0, 0, t], x, retain_graph=True)
        assert grad[0, 0, t + 1 :].abs().max() <= (0 if exact else 1e-2)
        assert grad[0, 0, : t + 1].any()


def test_layers_see_the_future_where_they_are_to_see_it():
    """nvSubquadratic's causality tests of its Hyena: the last step, all from a middle one, every step, the gradient."""
    causal, both = Hyena(16, l_max=64).eval(), LongConv(16, l_max=64, bidirectional=True).eval()
    with torch.no_grad():
        for length, first in ((64, 63), (64, 32), *product([32], range(1, 32, 5))):
            x = torch.randn(2, length, 16)
            later = x.clone()
            later[:, first:] = torch.randn(2, length - first, 16)
            moved = (causal(later) - causal(x)).abs()
            assert moved[:, :first].max() < 1e-5 and moved[:, first:].max() > 1e-3
            assert (both(later) - both(x))[:, 0].abs().max() > 1e-6
    x = torch.randn(2, 64, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(causal(x)[:, 0].sum(), x)
    assert grad[:, 1:].abs().max() < 1e-5 and grad[:, 0].abs().max() > 1e-3
    (grad,) = torch.autograd.grad(both(x)[:, 0].sum(), x)
    assert grad[:, 1:].abs().max() > 1e-5
