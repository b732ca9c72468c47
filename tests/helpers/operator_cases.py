"""What the operator must get right on every device: problems with every option, and properties."""

import torch
from accuracy import EPS, assert_accurate
from cases import Case, double, oracle

from seqconv import fftconv, reference

CASES = [
    Case(length=1, taps=1, skip="h"),
    Case(length=2, taps=2, skip="h", dtype=torch.float64),
    Case(length=3, taps=3, taps_rev=2, batch=1, channels=1),
    Case(length=63, taps=63, skip="h", bias="h", activation="gelu"),
    Case(length=64, taps=64, pre_gate=True, skip="h"),
    Case(length=65, taps=65, post_gate=True, skip="h", bias="h", activation="silu", channels=9),
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
    Case(length=1024, taps=1024, heads=3, skip="ch", bias="ch", activation="relu", channels=8),
    Case(length=1000, taps=900, bias="h", dtype=torch.bfloat16),
    Case(
        length=1021,
        taps=1021,
        heads=2,
        per_sample=True,
        skip="h",
        bias="h",
        post_gate=True,
        batch=3,
        channels=5,
    ),
    Case(length=4097, taps=4097, channels=17, batch=1, skip="h"),
    Case(length=16384, taps=16384, channels=2, skip="h", taps_rev=16383),
    Case(length=300, taps=1, skip="h"),
    Case(
        length=300, taps=7, taps_rev=20, skip="ch", bias="ch", heads=2, activation="gelu"
    ),  # direct
    Case(length=300, taps=33, taps_rev=3, skip="h"),  # just not
    Case(length=40, taps=90, taps_rev=70, skip="h"),  # taps beyond the input
    Case(length=128, taps=0, skip="h", activation="gelu"),
    Case(length=128, taps=0, taps_rev=127, bias="h", layout="blh"),
    Case(length=127, taps=127, mode="circular", skip="h"),
    Case(
        length=97,
        taps=20,
        mode="circular",
        heads=2,
        skip="ch",
        bias="h",
        post_gate=True,
        activation="silu",
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
    Case(channels=0, skip="h", bias="h", layout="blh"),
    Case(length=0, taps=0, mode="circular"),
]


def check_accuracy(case: Case) -> None:
    """y and every gradient are as exact as plain torch makes them, both measured against float64."""
    tensors = case.tensors()
    y, grads, dy = case.with_gradients(fftconv, tensors)
    exact, definition = oracle(case)
    y64, grads64, _ = exact.with_gradients(definition, double(tensors), dy.double())
    y_fft, grads_fft, _ = case.with_gradients(reference.fftconv_fft, tensors, dy)
    assert_accurate(y, y_fft, y64)
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype
        assert_accurate(grad, grads_fft[name], grads64[name], factor=3.0, what=f"d{name}")


def gradient_of_one_argument_alone(wanted):
    case = Case(
        length=100,
        taps=90,
        taps_rev=80,
        heads=2,
        skip="h",
        bias="h",
        pre_gate=True,
        post_gate=True,
        activation="gelu",
    )
    tensors = case.tensors()
    _, grads, dy = case.with_gradients(fftconv, tensors)
    leaf = tensors[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(case.run(fftconv, tensors), leaf, dy)
    assert torch.equal(grad, grads[wanted])


def gradients_without_gates_or_kernel_gradient():
    """Each combination of wanted gradients takes its own branches; all must agree with the full set."""
    for case in (Case(length=50, taps=50, skip="h"), Case(length=50, taps=5, skip="h", heads=2)):
        tensors = case.tensors()
        _, grads, dy = case.with_gradients(fftconv, tensors)
        for name in ("u", "k", "skip"):
            leaves = {n: t if n != name else t.clone().requires_grad_() for n, t in tensors.items()}
            (grad,) = torch.autograd.grad(case.run(fftconv, leaves), leaves[name], dy)
            assert torch.equal(grad, grads[name])


def unknown_taps_do_not_matter():
    """Taps that no output can see may hold anything, and get no gradient."""
    u, k, k_rev = torch.randn(1, 2, 50), torch.randn(2, 80), torch.randn(2, 80)
    y = fftconv(u, k[:, :50], k_rev=k_rev[:, :49])
    k[:, 50:], k_rev[:, 49:] = torch.nan, torch.inf
    k.requires_grad_(), k_rev.requires_grad_()
    again = fftconv(u, k, k_rev=k_rev)
    assert torch.equal(y, again)
    dk, dk_rev = torch.autograd.grad(again.sum(), (k, k_rev))
    assert not dk[:, 50:].any() and not dk_rev[:, 49:].any() and torch.isfinite(dk).all()


def the_future_moves_the_past_by_roundoff_only(size):
    length, edit = 1024, 700
    u, k = torch.randn(1, 2, length), torch.randn(2, length)
    moved = u.clone()
    moved[..., edit:] += size * torch.randn(1, 2, length - edit)
    leak = (fftconv(moved, k) - fftconv(u, k))[..., :edit].abs().max()
    bound = 2.0**-23 * (moved - u).norm(dim=-1).max() * k.norm(dim=-1).max()
    assert leak <= bound


def extremes_stay_finite():
    for dtype, size in ((torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 1e4)):
        u = (size * torch.randn(1, 2, 300)).to(dtype)
        k = torch.zeros(2, 300)
        k[:, 5] = 1.0
        y = fftconv(u, k, activation="gelu")
        exact = reference.fftconv(u.double(), k.double(), activation="gelu")
        assert torch.isfinite(y).all()
        assert (y.double() - exact).norm() <= 4 * EPS[dtype] * exact.norm()


def strided_variants(t: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan)
    wide[..., 1 : 2 * t.shape[-1] : 2] = t
    last_first = t.movedim(-1, 0).contiguous().movedim(0, -1)
    return {
        "every other": wide[..., 1 : 2 * t.shape[-1] : 2],
        "transposed": last_first,
        "negated": torch._neg_view(-t),
    }


def strides(variant):
    case = Case(
        length=90,
        taps=80,
        taps_rev=30,
        heads=2,
        skip="ch",
        bias="ch",
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


def expanded_inputs_and_gradients():
    row, k = torch.randn(1, 1, 60), torch.randn(1, 60)
    u = row.expand(3, 5, 60).requires_grad_()
    y = fftconv(u, k.expand(5, 60))
    assert torch.equal(y, fftconv(u.contiguous(), k.repeat(5, 1)))
    (expanded,) = torch.autograd.grad(y.sum(), u)  # dy has stride 0
    assert torch.equal(
        expanded, torch.autograd.grad(fftconv(u, k.expand(5, 60)), u, torch.ones_like(y))[0]
    )


def blh_output_is_contiguous():
    y = fftconv(torch.randn(2, 30, 4), torch.randn(3, 4, 30), layout="blh")
    assert y.shape == (2, 30, 3, 4) and y.is_contiguous()


def only_inputs_are_saved():
    case = Case(length=100, taps=100, skip="h", pre_gate=True, post_gate=True, activation="gelu")
    leaves = {n: None if t is None else t.requires_grad_() for n, t in case.tensors().items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()), lambda t: t
    ):
        case.run(fftconv, leaves)
    assert set(saved) <= {t.data_ptr() for t in leaves.values() if t is not None} and saved


def inputs_are_not_written():
    case = Case(
        length=100,
        taps=100,
        taps_rev=9,
        heads=2,
        skip="h",
        bias="h",
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


# Name of a test -> the function and its arguments. Tensors are made on torch's default device.
PROPERTIES = {
    f"{function.__name__}-{argument}" if argument else function.__name__: (
        function,
        (argument,) if argument else (),
    )
    for function, arguments in (
        (
            gradient_of_one_argument_alone,
            ["u", "k", "k_rev", "skip", "pre_gate", "post_gate", "bias"],
        ),
        (gradients_without_gates_or_kernel_gradient, [None]),
        (unknown_taps_do_not_matter, [None]),
        (the_future_moves_the_past_by_roundoff_only, [1.0, 1e3, 1e6]),
        (extremes_stay_finite, [None]),
        (strides, ["every other", "transposed", "negated"]),
        (expanded_inputs_and_gradients, [None]),
        (blh_output_is_contiguous, [None]),
        (only_inputs_are_saved, [None]),
        (inputs_are_not_written, [None]),
    )
    for argument in arguments
}
