"""The operator against float64: every option, edge lengths, properties, strides and memory."""

import pytest
import torch
from cases import Case
from operator_cases import CASES, PROPERTIES, check_accuracy

from seqconv import fftconv, reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case, isa):
    check_accuracy(case)


# ---- properties ----


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name):
    function, arguments = PROPERTIES[name]
    function(*arguments)


def test_impulse_returns_the_kernel():
    u = torch.zeros(1, 4, 500)
    u[..., 0] = 1
    k = torch.randn(4, 500)
    torch.testing.assert_close(fftconv(u, k)[0], k, rtol=0, atol=3e-6)


def test_linearity():
    k, a, b = torch.randn(3, 300), torch.randn(2, 3, 300), torch.randn(2, 3, 300)
    torch.testing.assert_close(
        fftconv(2 * a - 3 * b, k), 2 * fftconv(a, k) - 3 * fftconv(b, k), rtol=1e-4, atol=1e-4
    )


def test_shift_equivariance():
    u, k = torch.randn(1, 2, 400), torch.randn(2, 400)
    late = torch.nn.functional.pad(u, (17, 0))[..., :400]
    torch.testing.assert_close(
        fftconv(late, k)[..., 17:], fftconv(u, k)[..., :-17], rtol=1e-4, atol=1e-4
    )


def test_delta_kernel_and_skip_add():
    u, skip = torch.randn(2, 3, 77), torch.randn(3)
    delta = torch.zeros(3, 77)
    delta[:, 0] = 1
    torch.testing.assert_close(
        fftconv(u, delta, skip), u * (1 + skip[:, None]), rtol=1e-5, atol=1e-5
    )


def test_short_kernels_see_no_future_at_all():
    u, k = torch.randn(2, 3, 500), torch.randn(3, 32)
    moved = u.clone()
    moved[..., 300:] = torch.nan
    assert torch.equal(fftconv(moved, k)[..., :300], fftconv(u, k)[..., :300])


@pytest.mark.parametrize("taps", [8, 200])
@pytest.mark.parametrize("layout", ["bhl", "blh"])
def test_rows_never_contaminate_each_other(taps, layout):
    u, k, k_rev = torch.randn(3, 10, 200), torch.randn(10, taps), torch.randn(10, taps)
    spoilt = u.clone()
    spoilt[1, 4, 100] = torch.nan
    spoilt[2, 9, 0] = torch.inf
    turn = (lambda t: t) if layout == "bhl" else (lambda t: t.mT.contiguous())
    clean = turn(fftconv(turn(u), k, k_rev=k_rev, activation="gelu", layout=layout))
    y = turn(fftconv(turn(spoilt), k, k_rev=k_rev, activation="gelu", layout=layout))
    rows = torch.ones(3, 10, dtype=torch.bool)
    rows[1, 4] = rows[2, 9] = False
    assert torch.equal(y[rows], clean[rows])
    assert torch.isnan(y[1, 4]).any() and not torch.isfinite(y[2, 9]).all()


def test_repeats_and_thread_counts_are_bit_equal():
    case = Case(
        batch=5,
        channels=20,
        length=777,
        taps=777,
        heads=2,
        skip="h",
        post_gate=True,
        activation="gelu",
    )
    tensors = case.tensors()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            dy = torch.ones_like(case.run(fftconv, tensors))
            y, grads, _ = case.with_gradients(fftconv, tensors, dy)
            results.append([y, *grads.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_activations_over_their_whole_range(activation):
    """A delta kernel of weight one, so that v is u: every size from -1e30 to 1e30, and the derivative too."""
    size = torch.logspace(-6, 30, 2000)
    u = (
        torch.cat([-size, size, torch.linspace(-15, 15, 4001), torch.zeros(1)])
        .reshape(1, 1, -1)
        .requires_grad_()
    )
    y = fftconv(u, torch.ones(1, 1), activation=activation)
    (grad,) = torch.autograd.grad(y.sum(), u)
    exact = u.detach().double().requires_grad_()
    y64 = reference.activate(exact, activation)
    (grad64,) = torch.autograd.grad(y64.sum(), exact)
    assert ((y.double() - y64).abs() <= 1e-6 * y64.abs() + 3e-7).all()
    assert ((grad.double() - grad64).abs() <= 2e-6).all()
    special = fftconv(
        torch.tensor([[[torch.inf, torch.nan]]]), torch.ones(1, 1), activation=activation
    )
    assert special[0, 0, 0] == torch.inf and special[0, 0, 1].isnan()


# ---- memory ----


@pytest.mark.parametrize("heads", [(), (2,)])
def test_blh_output_takes_in_place_operations(heads):
    u = torch.randn(2, 9, 3, requires_grad=True)
    fftconv(u, torch.randn(*heads, 3, 4), layout="blh").relu_().sum().backward()
    assert torch.isfinite(u.grad).all()


def test_float16_subnormals_survive_flushing():
    u = torch.full((1, 1, 4), 3e-5, dtype=torch.float16)
    torch.set_flush_denormal(True)
    try:
        y = fftconv(u, torch.ones(1, 1))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, u)
