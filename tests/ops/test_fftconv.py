"""The operator against float64: every option, edge lengths, properties, strides and memory."""

import pytest
import torch
from accuracy import EPS, assert_accurate
from cases import Case, double, oracle

from seqconv import fftconv, reference
from seqconv.backends import cpu

CASES = [
    Case(length=1, taps=1, skip="h"),
    Case(length=2, taps=2, skip="h", dtype=torch.float64),
    Case(length=3, taps=3, taps_rev=2, batch=1, channels=1),
    Case(length=63, taps=63, skip="h", activation="gelu"),
    Case(length=64, taps=64, pre_gate=True, skip="h"),
    Case(length=65, taps=65, post_gate=True, skip="h", activation="silu", channels=9),
    Case(
        length=1000,
        taps=1000,
        taps_rev=999,
        skip="h",
        pre_gate=True,
        post_gate=True,
        activation="gelu",
    ),
    Case(length=1000, taps=1000, skip="h", pre_gate=True, post_gate=True, dtype=torch.bfloat16),
    Case(length=1024, taps=1024, heads=3, skip="ch", activation="relu", channels=8),
    Case(
        length=1021,
        taps=1021,
        heads=2,
        per_sample=True,
        skip="h",
        post_gate=True,
        batch=3,
        channels=5,
    ),
    Case(length=4097, taps=4097, channels=17, batch=1, skip="h"),
    Case(length=16384, taps=16384, channels=2, skip="h", taps_rev=16383),
    Case(length=300, taps=1, skip="h"),
    Case(length=300, taps=7, taps_rev=20, skip="ch", heads=2, activation="gelu"),  # direct sum
    Case(length=300, taps=33, taps_rev=3, skip="h"),  # just not
    Case(length=40, taps=90, taps_rev=70, skip="h"),  # taps beyond the input
    Case(length=128, taps=0, skip="h", activation="gelu"),
    Case(length=128, taps=0, taps_rev=127),
    Case(length=127, taps=127, mode="circular", skip="h"),
    Case(
        length=97, taps=20, mode="circular", heads=2, skip="ch", post_gate=True, activation="silu"
    ),
    Case(length=50, taps=3, mode="circular", per_sample=True, heads=1),
    Case(
        length=200,
        taps=200,
        layout="blh",
        skip="h",
        pre_gate=True,
        post_gate=True,
        activation="gelu",
        channels=11,
    ),
    Case(
        length=100,
        taps=100,
        layout="blh",
        heads=2,
        skip="ch",
        post_gate=True,
        taps_rev=99,
        dtype=torch.float16,
    ),
    Case(length=257, taps=257, dtype=torch.float16, skip="h", pre_gate=True, activation="silu"),
    Case(
        length=257,
        taps=257,
        dtype=torch.bfloat16,
        kernel_dtype=torch.bfloat16,
        skip="h",
        activation="gelu",
    ),
    Case(
        length=129,
        taps=129,
        dtype=torch.float64,
        kernel_dtype=torch.float32,
        skip="h",
        taps_rev=128,
    ),
    Case(length=0, taps=5, skip="h"),
    Case(batch=0, skip="h", heads=2),
    Case(channels=0, skip="h", layout="blh"),
    Case(length=0, taps=0, mode="circular"),
]


@pytest.mark.parametrize("isa", ["portable", "neon", "avx2", "avx512"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case, isa):
    chosen = cpu.isa()
    if not cpu.set_isa(isa):
        pytest.skip(f"{isa} does not run on this processor")
    try:
        tensors = case.tensors()
        y, grads, dy = case.with_gradients(fftconv, tensors)
    finally:
        cpu.set_isa(chosen)
    exact, definition = oracle(case)
    y64, grads64, _ = exact.with_gradients(definition, double(tensors), dy.double())
    y_fft, grads_fft, _ = case.with_gradients(reference.fftconv_fft, tensors, dy)
    assert_accurate(y, y_fft, y64)
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype
        assert_accurate(grad, grads_fft[name], grads64[name], factor=3.0, what=f"d{name}")


@pytest.mark.parametrize("wanted", ["u", "k", "k_rev", "skip", "pre_gate", "post_gate"])
def test_gradient_of_one_argument_alone(wanted):
    case = Case(
        length=100,
        taps=90,
        taps_rev=80,
        heads=2,
        skip="h",
        pre_gate=True,
        post_gate=True,
        activation="gelu",
    )
    tensors = case.tensors()
    _, grads, dy = case.with_gradients(fftconv, tensors)
    leaf = tensors[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(case.run(fftconv, tensors), leaf, dy)
    assert torch.equal(grad, grads[wanted])


def test_gradients_without_gates_or_kernel_gradient():
    """Each combination of wanted gradients takes its own branches; all must agree with the full set."""
    for case in (Case(length=50, taps=50, skip="h"), Case(length=50, taps=5, skip="h", heads=2)):
        tensors = case.tensors()
        _, grads, dy = case.with_gradients(fftconv, tensors)
        for name in ("u", "k", "skip"):
            leaves = {n: t if n != name else t.clone().requires_grad_() for n, t in tensors.items()}
            (grad,) = torch.autograd.grad(case.run(fftconv, leaves), leaves[name], dy)
            assert torch.equal(grad, grads[name])


# ---- properties ----


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


def test_unknown_taps_do_not_matter():
    """Taps that no output can see may hold anything, and get no gradient."""
    u, k, k_rev = torch.randn(1, 2, 50), torch.randn(2, 80), torch.randn(2, 80)
    y = fftconv(u, k[:, :50], k_rev=k_rev[:, :49])
    k[:, 50:], k_rev[:, 49:] = torch.nan, torch.inf
    k.requires_grad_(), k_rev.requires_grad_()
    again = fftconv(u, k, k_rev=k_rev)
    assert torch.equal(y, again)
    dk, dk_rev = torch.autograd.grad(again.sum(), (k, k_rev))
    assert not dk[:, 50:].any() and not dk_rev[:, 49:].any() and torch.isfinite(dk).all()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_the_future_moves_the_past_by_roundoff_only(size):
    length, edit = 1024, 700
    u, k = torch.randn(1, 2, length), torch.randn(2, length)
    moved = u.clone()
    moved[..., edit:] += size * torch.randn(1, 2, length - edit)
    leak = (fftconv(moved, k) - fftconv(u, k))[..., :edit].abs().max()
    bound = 2.0**-23 * (moved - u).norm(dim=-1).max() * k.norm(dim=-1).max()
    assert leak <= bound


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


def test_extremes_stay_finite():
    for dtype, size in ((torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 1e4)):
        u = (size * torch.randn(1, 2, 300)).to(dtype)
        k = torch.zeros(2, 300)
        k[:, 5] = 1.0
        y = fftconv(u, k, activation="gelu")
        oracle = reference.fftconv(u.double(), k.double(), activation="gelu")
        assert torch.isfinite(y).all()
        assert (y.double() - oracle).norm() <= 4 * EPS[dtype] * oracle.norm()


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


def strided_variants(t: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan)
    wide[..., 1 : 2 * t.shape[-1] : 2] = t
    last_first = t.movedim(-1, 0).contiguous().movedim(0, -1)
    return {
        "every other": wide[..., 1 : 2 * t.shape[-1] : 2],
        "transposed": last_first,
        "negated": torch._neg_view(-t),
    }


@pytest.mark.parametrize("variant", ["every other", "transposed", "negated"])
def test_strides(variant):
    case = Case(
        length=90,
        taps=80,
        taps_rev=30,
        heads=2,
        skip="ch",
        pre_gate=True,
        post_gate=True,
        activation="silu",
    )
    tensors = case.tensors()
    strided = {n: strided_variants(t)[variant] for n, t in tensors.items()}
    assert torch.equal(case.run(fftconv, strided), case.run(fftconv, tensors))
    _, grads, dy = case.with_gradients(fftconv, tensors)
    leaves = {n: t.requires_grad_() for n, t in strided.items()}
    again = torch.autograd.grad(case.run(fftconv, leaves), list(leaves.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(again, grads.values(), strict=True))


def test_expanded_inputs_and_gradients():
    row, k = torch.randn(1, 1, 60), torch.randn(1, 60)
    u = row.expand(3, 5, 60).requires_grad_()
    y = fftconv(u, k.expand(5, 60))
    assert torch.equal(y, fftconv(u.contiguous(), k.repeat(5, 1)))
    (expanded,) = torch.autograd.grad(y.sum(), u)  # dy has stride 0
    assert torch.equal(
        expanded, torch.autograd.grad(fftconv(u, k.expand(5, 60)), u, torch.ones_like(y))[0]
    )


def test_blh_output_is_contiguous():
    y = fftconv(torch.randn(2, 30, 4), torch.randn(3, 4, 30), layout="blh")
    assert y.shape == (2, 30, 3, 4) and y.is_contiguous()


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


def test_only_inputs_are_saved():
    case = Case(length=100, taps=100, skip="h", pre_gate=True, post_gate=True, activation="gelu")
    leaves = {n: None if t is None else t.requires_grad_() for n, t in case.tensors().items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()), lambda t: t
    ):
        case.run(fftconv, leaves)
    assert set(saved) <= {t.data_ptr() for t in leaves.values() if t is not None} and saved


def test_inputs_are_not_written():
    case = Case(
        length=100,
        taps=100,
        taps_rev=9,
        heads=2,
        skip="h",
        pre_gate=True,
        post_gate=True,
        activation="gelu",
    )
    tensors = case.tensors()
    copies = {n: t.clone() for n, t in tensors.items()}
    leaves = [t.requires_grad_() for t in tensors.values()]
    case.run(fftconv, tensors).square().sum().backward()
    assert all(torch.equal(tensors[n], copies[n]) for n in copies) and all(
        t.grad is not None for t in leaves
    )
