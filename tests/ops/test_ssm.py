"""The kernel of a state space model: definition, precision, gradients, backends, transforms, memory."""

import math
import subprocess
import sys

import pytest
import torch

import seqconv
from seqconv import reference, ssm_kernel
from seqconv.backends import cpu, fallback
from seqconv.ops.ssm import DISCRETIZATIONS, operator

LENGTHS = (0, 1, 2, 47, 48, 49, 63, 1000, 4097, 32768)


def system(channels=3, modes=5, heads=2, dtype=torch.float64, tied=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    log_dt = 0.5 * torch.randn((channels,) if tied else (channels, modes), generator=g) - 3
    real = -0.1 - torch.rand(channels, modes, generator=g)
    A = torch.stack([real, 8 * torch.randn(channels, modes, generator=g)], -1)
    B = torch.randn(channels, modes, 2, generator=g)
    C = torch.randn(heads, channels, modes, 2, generator=g)
    return [t.to(dtype) for t in (log_dt, A, C, B)]


def distance(ours, wanted) -> float:
    return ((ours - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("length", LENGTHS)
def test_the_kernel_is_its_definition(isa, length):
    for shape in ((1, 1, 1), (3, 5, 2), (2, 33, 1)):
        log_dt, A, C, B = system(*shape)
        wanted = reference.ssm_kernel(log_dt, A, C, length, B=B)
        ours = ssm_kernel(log_dt, A, C, length, B=B)
        assert ours.shape == (shape[2], shape[0], length) and ours.dtype == torch.float64
        single = ssm_kernel(log_dt, A, C.float(), length, B=B)
        assert single.dtype == torch.float32
        if length:
            wanted32 = reference.ssm_kernel(log_dt, A, C.float().double(), length, B=B)
            assert distance(ours, wanted) < 1e-12
            assert distance(single.double(), wanted32) < 5e-7


@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("tied", [True, False])
def test_discretizations_and_their_gradients(discretization, backend, tied):
    log_dt, A, C, B = system(tied=tied)
    if discretization == "dss_softmax":
        A[0] *= -1  # modes that grow
    inputs = [t.requires_grad_() for t in (log_dt, A, C, B)]
    options = {"B": B, "discretization": discretization}
    ours = ssm_kernel(log_dt, A, C, 300, backend=backend, **options)
    wanted = reference.ssm_kernel(log_dt, A, C, 300, **options)
    # DSS's reciprocal is regularised by 1e-7
    bound = 1e-6 if discretization == "dss_softmax" else 1e-12
    assert distance(ours, wanted) < bound
    dk = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, dk), torch.autograd.grad(wanted, inputs, dk), strict=True
    ):
        assert distance(mine, theirs) < 10 * bound


@pytest.mark.parametrize("discretization", ["zoh", "bilinear", "dss"])
def test_single_precision_gradients(isa, discretization):
    for length in (1, 50, 1000, 20000):
        log_dt, A, C, B = system(2, 33, 2)
        inputs = [t.requires_grad_() for t in (log_dt, A, C, B)]
        options = {"B": B, "discretization": discretization}
        wanted = reference.ssm_kernel(log_dt, A, C, length, **options)
        dk = torch.randn_like(wanted)
        expected = torch.autograd.grad(wanted, inputs, dk)
        ours = ssm_kernel(log_dt, A, C.float(), length, **options)
        for mine, theirs in zip(
            torch.autograd.grad(ours, inputs, dk.float()), expected, strict=True
        ):
            assert distance(mine, theirs) < 2e-6
        strided = dk.float().mT.contiguous().mT
        again = torch.autograd.grad(
            ssm_kernel(log_dt, A, C.float(), length, **options), inputs, strided
        )
        for mine, theirs in zip(again, expected, strict=True):
            assert distance(mine, theirs) < 2e-6


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dt", [0.1, 1e-3])
def test_long_phases_keep_their_digits(dt, backend):
    """Im A up to 1300, one mode barely damped, 65,536 steps: phases of millions of turns."""
    log_dt = torch.tensor([dt]).log()
    A = torch.tensor([[[-0.5, 1300.0], [-1e-6 / dt, 1290.0], [-1e-6, 3.0]]])
    C = torch.ones(1, 1, 3, 2)
    k = ssm_kernel(log_dt, A, C, 65536, backend=backend)
    assert distance(k, reference.ssm_kernel(log_dt, A, C.double(), 65536)) < 5e-7


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_small_steps_do_not_cancel(backend):
    log_dt, A, C, _ = system(2, 8, 1, torch.float32)
    log_dt = torch.full_like(log_dt, math.log(1e-6))
    k = ssm_kernel(log_dt, A, C, 100, backend=backend)
    wanted = reference.ssm_kernel(log_dt.double(), A.double(), C.double(), 100)
    assert distance(k, wanted) < 5e-7


def test_extremes():
    """A mode at rest, one gone at once, one that grows past the largest number, and Abar = 0."""
    A = torch.tensor([[[0.0, 0.0], [-1e6, 0.0], [0.5, 0.0]]]).double().requires_grad_()
    C = torch.zeros(3, 1, 3, 2).double()
    C[range(3), 0, range(3), 0] = 0.5
    k = ssm_kernel(torch.zeros(1), A, C, 3000)
    torch.testing.assert_close(k[0, 0], torch.ones(3000).double())
    assert (k[1, 0, 1:] == 0).all() and k[1, 0, 0] > 0
    assert not torch.isfinite(k[2, 0, -1])
    (grad,) = torch.autograd.grad(k[:2].sum(), A)
    assert torch.isfinite(grad[:, :2]).all()
    still = torch.tensor([[[-2.0, 0.0]]]).double().requires_grad_()
    k = ssm_kernel(torch.zeros(1), still, C[:1, :, :1], 4, discretization="bilinear")
    torch.testing.assert_close(k[0, 0], torch.tensor([0.5, 0, 0, 0]).double())
    assert torch.isfinite(torch.autograd.grad(k.sum(), still)[0]).all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modes_that_grow_in_short_kernels(isa, dtype, backend):
    """exp(40 l) overflows within the columns of a table, not within the kernel."""
    A = torch.tensor([[[40.0, 1.0], [-1.0, 2.0]]]).double().requires_grad_()
    C = torch.ones(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    for length in (1, 2):
        ours = ssm_kernel(torch.zeros(1), A, C.to(dtype), length, backend=backend)
        wanted = reference.ssm_kernel(torch.zeros(1), A, C, length)
        grads = torch.autograd.grad(ours.sum(), (A, C))
        for mine, theirs in zip(grads, torch.autograd.grad(wanted.sum(), (A, C)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear", "dss", "dss_softmax"])
def test_modes_at_and_near_rest(discretization):
    """Bbar and its derivative are those of the limit: K[l] = dt (1 + (l + 1/2) dt A) to first order."""
    C = torch.tensor([1.0, 0.0]).double().expand(1, 1, 1, 2)
    for size in (0.0, 1e-200, 1e-9, 1e-4):
        A = torch.tensor([[[-size, 0.0]]]).double().requires_grad_()
        k = ssm_kernel(torch.zeros(1), A, C, 5, discretization=discretization)
        (grad,) = torch.autograd.grad(k.sum(), A)
        assert torch.isfinite(k).all() and torch.isfinite(grad).all()
        if discretization != "dss_softmax":
            factor = 1.0 if discretization == "dss" else 2.0
            torch.testing.assert_close(k / factor, torch.ones_like(k), rtol=1e-3, atol=0)
            assert abs(grad[0, 0, 0] / factor - 12.5) < 0.01
    log_dt, A, C, B = system(1, 2, 1)
    A[0, 0] = 0
    inputs = [t.requires_grad_() for t in (log_dt, A, C, B)]

    def kernel(log_dt, A, C, B):
        return ssm_kernel(log_dt, A, C, 6, B=B, discretization=discretization)

    if discretization != "dss_softmax":  # its regularised pole is too steep for differences
        assert torch.autograd.gradcheck(kernel, inputs)
        assert torch.autograd.gradgradcheck(kernel, inputs)


def test_derivatives_of_nothing():
    for heads, length in ((1, 0), (0, 4)):
        log_dt, A, C, _ = (t.requires_grad_() for t in system(heads=heads))
        k = ssm_kernel(log_dt, A, C, length)
        grads = torch.autograd.grad(k.sum(), (A, C), create_graph=True)
        again = torch.autograd.grad(sum(g.sum() for g in grads), (A, C))
        assert all(not g.any() for g in again)


def raw_gradients(dk, a, w):
    single = dk.dtype == torch.float32
    return operator.bwd(dk, a, w, 3, dk.shape[-1], single, True, [True, True])


def test_the_torch_gradient_is_the_compiled_one():
    a = torch.stack([-torch.rand(9, 4), torch.randn(9, 4)], -1).double()
    for length in (1, 2, 3, 50, 1000):
        w, dk = torch.randn(2, 9, 4, 2).double(), torch.randn(2, 9, length).double()
        for x, y in zip(
            fallback.mode_sum_gradients(dk, a, w), raw_gradients(dk, a, w), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_the_torch_gradient_keeps_its_precision_under_autocast():
    a = torch.stack([-torch.rand(3, 4), torch.randn(3, 4)], -1).double()
    w, dk = torch.randn(2, 3, 4, 2).double(), torch.randn(2, 3, 300)
    wanted = fallback.mode_sum_gradients(dk, a, w)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fallback.mode_sum_gradients(dk, a, w)
    assert all(torch.equal(x, y) for x, y in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_derivatives_of_every_order(backend):
    inputs = [t.requires_grad_() for t in system(1, 2, 2)]

    def kernel(log_dt, A, C, B):
        return ssm_kernel(log_dt, A, C, 60, B=B, backend=backend)

    assert torch.autograd.gradcheck(kernel, inputs)
    assert torch.autograd.gradgradcheck(kernel, inputs)

    def third(k):
        (g,) = torch.autograd.grad(k.square().sum(), inputs[1], create_graph=True)
        (g,) = torch.autograd.grad(g.square().sum(), inputs[1], create_graph=True)
        return torch.autograd.grad(g.square().sum(), inputs[1])[0]

    log_dt, A, C, B = inputs
    ours = third(kernel(*inputs))
    assert distance(ours, third(reference.ssm_kernel(log_dt, A, C, 60, B=B))) < 1e-9


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms():
    log_dt, A, C, _ = system()

    def kernel(A):
        return ssm_kernel(log_dt, A, C, 70)

    wanted = reference.ssm_kernel(log_dt, A, C, 70)
    many = torch.stack([A, 2 * A])
    torch.testing.assert_close(torch.func.vmap(kernel)(many)[0], wanted)
    _, tangent = torch.func.jvp(kernel, (A,), (A,))
    small = 1e-6 * A
    torch.testing.assert_close(
        tangent, (kernel(A + small) - kernel(A - small)) / 2e-6, rtol=1e-6, atol=1e-6
    )
    grads = torch.func.vmap(torch.func.grad(lambda A: kernel(A).sum()))(many)
    (expected,) = torch.autograd.grad(kernel(A.requires_grad_()).sum(), A)
    torch.testing.assert_close(grads[0], expected)


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_operators_pass_opcheck(fused):
    a = torch.stack([-torch.rand(3, 4), torch.randn(3, 4)], -1).double().requires_grad_()
    w = torch.randn(2, 3, 4, 2).double().requires_grad_()
    for single in (True, False):
        torch.library.opcheck(operator.fwd, (a, w, 3, 50, single, fused))
        dk = torch.randn(2, 3, 50, dtype=torch.float32 if single else torch.float64)
        arguments = (dk.requires_grad_(), a, w, 3, 50, single, fused, [True, True])
        torch.library.opcheck(operator.bwd, arguments)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_once_for_all_lengths(backend):
    torch._dynamo.reset()
    log_dt, A, C, B = system(dtype=torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda length: ssm_kernel(log_dt, A, C, length, B=B, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend=count,
    )
    for length in (50, 70, 4000):
        expected = ssm_kernel(log_dt, A, C, length, B=B, backend=backend)
        torch.testing.assert_close(compiled(length), expected)
    assert len(graphs) == 1


def test_threads_do_not_change_a_bit():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for channels in (1, 9):
                inputs = [t.requires_grad_() for t in system(channels, 8, 2, torch.float32)]
                k = ssm_kernel(*inputs[:3], 100_000, B=inputs[3])
                results.append([k, *torch.autograd.grad(k.square().sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    for later in range(2, 6):
        for a, b in zip(results[later % 2], results[later], strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, modes, length, more",
    [
        ("auto", 64, 65536, 100),
        ("torch", 64, 65536, 250),
    ]  # all powers, complex64: 2 GB; the kernel: 16 MB
    + [
        ("auto", 1024, 16384, 100),
        ("torch", 1024, 16384, 400),
    ],  # modes sqrt(length) of them: 268 MB
)
def test_memory_does_not_hold_all_powers(backend, modes, length, more):
    code = f"""
import resource, torch
from pathlib import Path
from seqconv import ssm_kernel
C = torch.randn(1, 64, {modes}, 2, requires_grad=True)
A = torch.stack([-torch.rand(64, {modes}), torch.randn(64, {modes})], -1).requires_grad_()
log_dt = torch.full((64,), -5.0, requires_grad=True)
ssm_kernel(log_dt, A, C, 100, backend="{backend}").sum().backward()
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + ({more} << 20), -1))
ssm_kernel(log_dt, A, C, {length}, backend="{backend}").sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_keops(keops):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 5e-7)):
        log_dt, A, C, B = system()
        inputs = [t.requires_grad_() for t in (log_dt, A, C, B)]
        ours = ssm_kernel(log_dt, A, C.to(dtype), 300, B=B, backend="keops")
        wanted = reference.ssm_kernel(log_dt, A, C.to(dtype), 300, B=B)
        assert ours.dtype == dtype and distance(ours, wanted) < bound
        dk = torch.randn_like(wanted)
        mine = torch.autograd.grad(ours, inputs, dk)
        for a, b in zip(mine, torch.autograd.grad(wanted, inputs, dk), strict=True):
            assert distance(a, b) < 10 * bound
    assert ssm_kernel(log_dt, A, C, 0, backend="keops").shape == (2, 3, 0)


def test_explain():
    log_dt, A, C, _ = system()
    plan = seqconv.explain_ssm_kernel(log_dt, A, C, 100)
    assert (plan.backend, plan.algorithm, plan.fallback) == ("cpu", "matrix product", None)
    assert plan.isa == cpu.isa() and plan.threads == torch.get_num_threads()
    for backend in ("torch", "keops"):
        plan = seqconv.explain_ssm_kernel(log_dt, A, C, 100, backend=backend)
        assert plan.backend == backend and plan.fallback is None
    away = [t.to("meta") for t in (log_dt, A, C)]
    assert "meta" in str(seqconv.explain_ssm_kernel(*away, 100))
    with seqconv.use_backend("reference"):
        plan = seqconv.explain_ssm_kernel(log_dt, A, C, 100)
    assert plan.backend == "torch" and "use_backend('reference')" in plan.fallback
    with pytest.raises(ValueError, match="length must be"):
        seqconv.explain_ssm_kernel(log_dt, A, C, -1)


def test_where_keops_comes_from(monkeypatch):
    """Its own name on the package index, not an extra of a package that may not be there."""
    monkeypatch.setitem(sys.modules, "pykeops", None)
    log_dt, A, C, _ = system()
    with pytest.raises(ImportError, match=r"pip install 'pykeops>=2\.3'$"):
        ssm_kernel(log_dt, A, C, 10, backend="keops")


def test_contract():
    log_dt, A, C, B = system(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"ssm_kernel: C must be \(heads, channels=3, modes=5, "):
        ssm_kernel(log_dt, A, C[:, :2], 10)
    with pytest.raises(
        ValueError, match=r"log_dt must be \(channels=3,\) or \(channels=3, modes=5\)"
    ):
        ssm_kernel(log_dt[:2], A, C, 10)
    with pytest.raises(ValueError, match="B must be"):
        ssm_kernel(log_dt, A, C, 10, B=B[..., 0])
    with pytest.raises(TypeError, match=r"A must be one of float32.* got complex64"):
        ssm_kernel(log_dt, torch.view_as_complex(A), C, 10)
    with pytest.raises(ValueError, match="length must be an integer >= 0, got -1"):
        ssm_kernel(log_dt, A, C, -1)
    with pytest.raises(ValueError, match=r"discretization must be one of 'zoh'.* got 'euler'"):
        ssm_kernel(log_dt, A, C, 10, discretization="euler")
    with pytest.raises(ValueError, match="backend must be one of 'auto'"):
        ssm_kernel(log_dt, A, C, 10, backend="cuda")
    assert ssm_kernel(log_dt[:0], A[:0], C[:, :0], 10).shape == (2, 0, 10)
    assert ssm_kernel(log_dt, A[:, :0], C[:, :, :0], 10).eq(0).all()
