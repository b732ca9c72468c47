"""The operator from S4D's parameters to its kernel, beside the formulas in torch and the definition."""

import itertools

import pytest
import torch
from torch.autograd import gradgradcheck

from seqconv import S4DKernel, reference, use_backend
from seqconv.layers import s4d_kernel
from seqconv.layers.s4d_init import POSITIVE

D, LENGTH = 6, 37
PLACES = {
    "discretization": ("zoh", "bilinear", "dss"),
    "real_transform": tuple(POSITIVE),
    "imag_transform": ("none", "softplus", "exp"),
    "dt_transform": ("exp", "softplus"),
    "dt_sinh": (False, True),
    "dt_tie": (True, False),
    "n_ssm": (6, 2, 1),
    "bandlimit": (None, 0.4),
    "is_real": (False, True),
}
# Every pair of neighbouring choices meets, without all of their products.
DRAWN = [
    {
        name: values[(i * step + i // 7) % len(values)]
        for step, (name, values) in enumerate(PLACES.items(), 1)
    }
    for i in range(42)
]


def made(options: dict, dtype=torch.float64, **more) -> S4DKernel:
    options = {"dt_max": 2.0, "heads": 2, "d_state": 8, **options, **more}
    if options["is_real"]:
        options |= {"init": "real", "imag_transform": "none"}
        if options["real_transform"] == "sigmoid":  # whose values are below 1
            options["real_transform"] = "exp"
    return S4DKernel(D, **options).to(dtype)


def both(kernel: S4DKernel, rate: float, length: int = LENGTH) -> list[list[torch.Tensor]]:
    """The kernel and the gradients of everything that it is made of, by the operator and by torch."""
    values, copies = kernel.read(), D // kernel.n_ssm
    _, *options = kernel._arguments(values, rate, copies)
    options = (length, kernel.C.dtype == torch.float32, True, *options)
    found = []
    for make in (s4d_kernel.s4d_kernel, s4d_kernel._plain):
        tensors = [t.detach().clone().requires_grad_() for t in values]
        k = make(s4d_kernel.Parameters(*tensors), *options)
        dk = torch.randn(k.shape, generator=torch.Generator().manual_seed(1)).to(k.dtype)
        found.append([k, *torch.autograd.grad(k, tensors, dk)])
    return found


@pytest.mark.parametrize("options", DRAWN, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_beside_torch(options):
    kernel = made(options)
    for rate in (1.0, 2.5):
        for ours, theirs in zip(*both(kernel, rate), strict=True):
            size = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11 * size)
    assert kernel(LENGTH).abs().max() > 0.01


@pytest.mark.parametrize("options", DRAWN[::6], ids=lambda o: o["discretization"])
def test_values_beside_the_definition(options):
    kernel = made(options)
    log_dt, A, B, C = kernel.system()
    form = kernel.discretization
    wanted = reference.ssm_kernel(log_dt, A, C, LENGTH, B=B, discretization=form)
    torch.testing.assert_close(kernel(LENGTH), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", PLACES["discretization"])
def test_steps_from_tiny_to_large(form):
    """(exp(a) - 1) / a is a power series for small a; no digit may be lost around the place where that begins."""
    kernel = S4DKernel(D, d_state=8, discretization=form, init="quad").double()
    for size in (1e-12, 1e-6, 1e-3, 0.02, 0.1, 0.15, 0.2, 1.0, 3.0):
        torch.nn.init.constant_(kernel.inv_dt, torch.tensor(size).log().item())
        for ours, theirs in zip(*both(kernel, 1.0), strict=True):
            size = theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * size)


def test_single_precision_rounds_once():
    kernel = made(DRAWN[0], torch.float32)
    for ours, theirs in zip(*both(kernel, 1.0), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


def test_threads_change_no_bit():
    kernel = S4DKernel(96, d_state=64, n_ssm=48, heads=2)

    def found():
        k = kernel(700)
        return [k, *torch.autograd.grad(k.sin().sum(), kernel.parameters())]

    before = torch.get_num_threads()
    try:
        several = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            several.append(found())
    finally:
        torch.set_num_threads(before)
    for other in several[1:]:
        assert all(map(torch.equal, several[0], other))


@pytest.mark.parametrize(
    "options", [DRAWN[0], DRAWN[1], DRAWN[5]], ids=lambda o: o["discretization"]
)
def test_second_derivatives(options):
    kernel = made(options, d_state=4, heads=1)
    _, *rest = kernel._arguments(kernel.read(), 1.0, D // kernel.n_ssm)
    tensors = [t.detach().requires_grad_() for t in kernel.read()]

    def make(*tensors):
        return s4d_kernel.s4d_kernel(s4d_kernel.Parameters(*tensors), 3, False, True, *rest)

    gradgradcheck(make, tensors, atol=1e-4, rtol=1e-4)


def test_other_backends_agree():
    kernel = made(DRAWN[0])
    ours = kernel(LENGTH)
    with use_backend("reference"):
        torch.testing.assert_close(kernel(LENGTH), ours, rtol=1e-11, atol=1e-12)
    kernel.backend = "torch"
    torch.testing.assert_close(kernel(LENGTH), ours, rtol=1e-11, atol=1e-12)


def test_shapes_that_do_not_fit_are_left_to_the_general_function():
    """Whose messages name what is wrong."""
    for name, shape in (
        ("B", (D, 5, 2)),
        ("inv_dt", (3,)),
        ("C", (1, D, 5, 2)),
        ("inv_A_real", (D, 5)),
    ):
        kernel = S4DKernel(D, d_state=8)
        setattr(kernel, name, torch.nn.Parameter(torch.ones(shape)))
        with pytest.raises((ValueError, RuntimeError)):
            kernel(LENGTH)
    values = S4DKernel(D, d_state=8).read()
    assert s4d_kernel.fit(values, 1, False)
    for i, wrong in itertools.product(range(len(values)), (torch.half, torch.complex64)):
        changed = [t.to(wrong) if i == j else t for j, t in enumerate(values)]
        assert not s4d_kernel.fit(changed, 1, False)
    shared = S4DKernel(4, d_state=8, n_ssm=2).read()
    assert s4d_kernel.fit(shared, 2, False)
    odd = [torch.ones(1, 5, 4, 2), shared[1], torch.ones(5), *shared[3:]]
    assert not s4d_kernel.fit(odd, 2, False)


def test_a_step_onto_the_bilinear_pole_has_finite_gradients(isa):
    """At dt A = -2 a mode forgets all at once, and the logarithm of its factor has no derivative."""
    options = {"d_state": 1, "discretization": "bilinear", "is_real": True, "init": "real"}
    kernel = S4DKernel(1, **options, dt_tie=False).double()
    with torch.no_grad():
        kernel.inv_dt.fill_(0.0)
        kernel.inv_A_real.fill_(0.0)
    k = kernel(3, rate=2.0)
    grads = torch.autograd.grad(k.double().sum(), list(kernel.parameters()))
    assert k.isfinite().all() and all(g.isfinite().all() for g in grads)
