"""Gradients of every order, torch.func, forward-mode, torch.compile, export, opcheck and autocast.

Each of these is known to be silently wrong for some way of attaching a gradient to an operator, so
every test compares values with the reference; where a combination is not supported, it must raise.
"""

from unittest.mock import patch

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import Case
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqconv import fftconv, reference, use_backend
from seqconv.ops import register
from seqconv.ops.fftconv import operator

FULL = {"heads": 2, "skip": "ch", "pre_gate": True, "post_gate": True, "batch": 2, "channels": 2}
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture(params=["kernels", "reference"])
def backend(request):
    """The fused kernels, and the torch.fft fallback behind the same operators."""
    with use_backend("reference" if request.param == "reference" else "auto"):
        yield


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def close(value, wanted, tolerance=1e-10):
    torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)


# ---- eager ----


@pytest.mark.parametrize(
    "case",
    [
        Case(length=5, taps=3, taps_rev=2, activation="gelu", **FULL),
        Case(length=5, taps=3, activation="silu", **FULL),
        Case(length=34, taps=34, taps_rev=1, batch=1, channels=1, skip="h", dtype=torch.float64),
        Case(length=4, taps=4, per_sample=True, activation="gelu", **FULL),
        Case(length=5, taps=3, mode="circular", layout="blh", **FULL),
    ],
    ids=str,
)
def test_first_and_second_derivatives(case, backend):
    tensors = {n: t.double().requires_grad_() for n, t in case.tensors().items() if t is not None}

    def call(*values):
        return case.run(fftconv, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(call, list(tensors.values()))
    assert torch.autograd.gradgradcheck(call, list(tensors.values()))


def test_third_derivative_and_one_tensor_as_two_arguments():
    x = torch.randn(1, 2, 40, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    directions = [(torch.randn_like(x), torch.randn_like(k)) for _ in range(3)]

    def derivatives(function):
        y = function(0.3 * x, k, pre_gate=x, post_gate=x, activation="gelu").sum()
        out = []
        for wx, wk in directions:
            gx, gk = torch.autograd.grad(y, (x, k), create_graph=True)
            out += [gx, gk]
            y = (gx * wx).sum() + (gk * wk).sum()
        return out

    for ours, theirs in zip(derivatives(fftconv), derivatives(reference.fftconv_fft), strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_gradients_in_eval_mode_and_none_without_need():
    module = torch.nn.Module().eval()
    assert not module.training
    u, k = torch.randn(1, 2, 50, requires_grad=True), torch.randn(2, 50)
    assert fftconv(u, k).requires_grad
    with torch.no_grad():
        assert not fftconv(u, k).requires_grad
    assert not fftconv(u.detach(), k).requires_grad
    with torch.inference_mode():
        assert fftconv(u, k).is_inference()


# ---- torch.func and forward-mode ----


def loss(function):
    def call(u, k, skip, k_rev):
        return function(u, k, skip, k_rev=k_rev, activation="gelu", pre_gate=u).square().sum()

    return call


def arguments():
    f64 = {"dtype": torch.float64}
    return (
        torch.randn(2, 3, 36, **f64),
        torch.randn(3, 36, **f64),
        torch.randn(3, **f64),
        torch.randn(3, 4, **f64),
    )


@pytest.mark.parametrize("argnum", range(4))
@pytest.mark.parametrize(
    "transform", [grad, jacrev, jacfwd, hessian, lambda f, i: jacrev(jacrev(f, i), i)]
)
def test_func_transforms(transform, argnum, backend):
    args = arguments()
    close(
        transform(loss(fftconv), argnum)(*args),
        transform(loss(reference.fftconv_fft), argnum)(*args),
        1e-8,
    )


NESTED = {
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f, 0), 1),
    "jacfwd of jacfwd of jacfwd": lambda f: jacfwd(jacfwd(jacfwd(f, 0), 1), 2),
    "grad of jvp of jvp": lambda f: grad(lambda *a: push(lambda *b: push(f, *b), *a), (0, 1)),
    "jvp of jvp of grad": lambda f: lambda *a: push(lambda *b: push(grad(f, (0, 1)), *b), *a),
    "jvp of grad of jvp": lambda f: lambda *a: push(grad(lambda *b: push(f, *b), (0, 1)), *a),
}


def push(f, *args):
    return jvp(f, args, args)[1]


@pytest.mark.parametrize("name", NESTED)
def test_nested_forward_mode(name, backend):
    """A jvp rule that torch runs with forward-mode off loses every mixed term without a word."""
    u, k, skip, k_rev = arguments()
    u, k = u[..., :5], k[..., :5]
    ours = NESTED[name](loss(fftconv))(u, k, skip, k_rev)
    theirs = NESTED[name](loss(reference.fftconv_fft))(u, k, skip, k_rev)
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_jvp_and_dual_numbers(backend):
    args = arguments()
    tangents = tuple(torch.randn_like(a) for a in args)
    wanted = jvp(loss(reference.fftconv_fft), args, tangents)[1]
    close(jvp(loss(fftconv), args, tangents)[1], wanted)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, t) for a, t in zip(args, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(loss(fftconv)(*duals)).tangent
    close(tangent, wanted)


@pytest.mark.parametrize("mapped", ["u", "k", "u k", "u k skip k_rev", "skip"])
def test_vmap(mapped):
    args = dict(zip(("u", "k", "skip", "k_rev"), arguments(), strict=True))
    dims = {n: 1 if n in mapped.split() else None for n in args}
    stacked = {n: a if dims[n] is None else torch.stack([a, 2 * a, -a], 1) for n, a in args.items()}

    def call(u, k, skip, k_rev):
        return fftconv(u, k, skip, k_rev=k_rev)

    y = vmap(call, tuple(dims.values()))(*stacked.values())
    for i in range(3):
        close(
            y[i],
            call(*[a if dims[n] is None else a.select(1, i) for n, a in stacked.items()]),
            1e-12,
        )


def test_vmap_over_nothing_is_refused():
    with pytest.raises(ValueError, match="vmap over an axis of size 0"):
        vmap(lambda u: fftconv(u, torch.ones(3, 5)))(torch.zeros(0, 2, 3, 7))


def test_vmap_over_per_sample_kernels():
    u, k = torch.randn(3, 2, 4, 40), torch.randn(2, 3, 4, 40)  # (v b h l), (b heads h k)
    y = vmap(lambda u: fftconv(u, k))(u)
    for i in range(3):
        close(y[i], fftconv(u[i], k), 1e-5)


def test_per_sample_gradients():
    u, k, skip, _ = arguments()

    def one(k, row):
        return fftconv(row.unsqueeze(0), k, skip, activation="gelu").square().sum()

    per_sample = vmap(grad(one), (None, 0))(k, u)
    for i in range(2):
        leaf = k.clone().requires_grad_()
        close(per_sample[i], torch.autograd.grad(one(leaf, u[i]), leaf)[0])


def test_vjp_of_a_module():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.k = torch.nn.Parameter(torch.randn(3, 20))

        def forward(self, u):
            return fftconv(u, self.k)

    model, u, dy = Model(), torch.randn(2, 3, 20), torch.randn(2, 3, 20)
    _, pull = vjp(lambda p: functional_call(model, p, (u,)), dict(model.named_parameters()))
    (wanted,) = torch.autograd.grad(model(u), model.k, dy)
    close(pull(dy)[0]["k"], wanted, 1e-5)


# ---- compile and export ----


def test_compile_forward_and_gradients(backend):
    """The lazy conjugate trap: inside an opaque operator compile drops the flag, and gradients come out wrong."""
    args = arguments()

    def gradients(function):
        leaves = [a.clone().requires_grad_() for a in args]
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(loss(fftconv), fullgraph=True)
    close(compiled(*args), loss(reference.fftconv_fft)(*args))
    for ours, theirs in zip(
        gradients(compiled), gradients(loss(reference.fftconv_fft)), strict=True
    ):
        close(ours, theirs)


def test_compile_never_specialises_on_the_length():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def call(u, k):
        return fftconv(u, k, activation="gelu", layout="blh")

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for length in (64, 100, 777, 1024, 31):
        u, k = torch.randn(2, length, 3), torch.randn(3, length)
        close(compiled(u, k), call(u, k), 1e-6)
    assert len(graphs) == 1


def test_compile_of_vmap():
    u, k, skip, _ = arguments()
    u = torch.stack([u, 2 * u])
    mapped = vmap(lambda u: fftconv(u, k, skip))
    close(torch.compile(mapped, fullgraph=True)(u), mapped(u))


@pytest.mark.parametrize("transform", [grad, jacrev, lambda f: lambda *a: jvp(f, a, a)[1]])
def test_transforms_inside_compile_raise(transform):
    """An operator without such a rule gives silent zeros here."""
    with pytest.raises(Exception, match=r"fftconv|forward-mode|torch\.func"):
        torch.compile(transform(loss(fftconv)), fullgraph=True)(*arguments())


def test_forward_mode_around_compile_and_raw_operators_raise():
    u, k, _, _ = arguments()
    compiled = torch.compile(lambda u, k: fftconv(u, k), backend="aot_eager")
    with forward_ad.dual_level():  # refused, or, by torch 2.15, not compiled
        try:
            y = compiled(forward_ad.make_dual(u, u), k)
        except Exception as error:
            assert "forward-mode" in str(error)
        else:
            assert torch.equal(forward_ad.unpack_dual(y).tangent, fftconv(u, k))
    for transform in (lambda f: jvp(f, (u,), (u,)), lambda f: grad(lambda u: f(u).sum())(u)):
        with pytest.raises(RuntimeError, match=r"through seqconv\.fftconv"):
            transform(lambda u: operator.fwd(u, k, *[None] * 5, 3, "none", False, False))


def test_export_with_dynamic_sizes(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.k = torch.nn.Parameter(torch.randn(2, 3, 64))

        def forward(self, u):
            return fftconv(u, self.k, activation="gelu", layout="blh")

    model, u = Model(), torch.randn(2, 64, 3)
    shapes = {"u": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=1 << 20)}}
    for strict in (False, True):
        program = torch.export.export(model, (u,), dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        other = torch.randn(5, 99, 3)
        close(loaded(other), model(other), 1e-6)
        leaf = other.clone().requires_grad_()
        (ours,) = torch.autograd.grad(loaded(leaf).sum(), leaf)
        (theirs,) = torch.autograd.grad(model(leaf).sum(), leaf)
        close(ours, theirs, 1e-5)


# ---- the raw operators ----


OPCHECK = [
    Case(length=40, taps=40, taps_rev=39, activation="gelu", **FULL),
    Case(length=20, taps=4, skip="h", layout="blh"),
    Case(length=20, taps=20, per_sample=True, heads=1, activation="silu", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", OPCHECK, ids=str)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(case, needs_grad, backend):
    tensors = case.tensors()
    if case.layout == "blh":
        tensors["u"] = tensors["u"].movedim(1, -1)
    order = ("u", "k", "k_rev", "skip", "pre_gate", "post_gate", "bias")
    inputs = [t if t is None else t.requires_grad_(needs_grad) for t in (tensors[n] for n in order)]
    options = (case.activation or "none", case.layout == "blh", False)
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if case.dtype == torch.bfloat16 else {}
    torch.use_deterministic_algorithms(
        False
    )  # opcheck's own machinery has operations without such a form
    flat = operator.flat(inputs)
    torch.library.opcheck(operator.fwd, (*flat, *options), **tolerance)
    dy = torch.randn_like(operator.fwd(*flat, *options)).requires_grad_(needs_grad)
    for wanted in ([True] * 7, [True, False, False, True, False, True, True]):
        torch.library.opcheck(operator.bwd, (dy, *flat, *options, wanted), **tolerance)


# ---- autocast ----


def test_autocast_changes_no_dtype_and_takes_mixed_gates():
    case = Case(
        length=50,
        taps=50,
        skip="h",
        pre_gate=True,
        post_gate=True,
        activation="gelu",
        dtype=torch.bfloat16,
    )
    tensors = case.tensors()
    y = case.run(fftconv, tensors)
    tensors["pre_gate"] = tensors["pre_gate"].float().requires_grad_()
    with pytest.raises(TypeError, match="pre_gate must be bfloat16, got float32"):
        case.run(fftconv, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = case.run(fftconv, tensors)
        wide = fftconv(tensors["u"].float(), tensors["k"])
    assert torch.equal(mixed, y) and mixed.dtype == torch.bfloat16 and wide.dtype == torch.float32
    mixed.float().sum().backward()
    assert tensors["pre_gate"].grad.dtype == torch.float32


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_and_profilers_see_the_operators():
    """Eager calls go past torch's dispatcher only where nobody watches it."""
    u, k = torch.randn(2, 3, 50, requires_grad=True), torch.randn(3, 50, requires_grad=True)
    names = ["seqconv::fftconv_fwd", "seqconv::fftconv_bwd"]
    with Seen() as seen:
        y = fftconv(u, k)
        grads = torch.autograd.grad(y.sum(), (u, k))
        with torch.no_grad():
            assert torch.equal(fftconv(u, k), y)
    assert [name for name in seen.names if name.startswith("seqconv")] == [*names, names[0]]
    with torch.profiler.profile() as profiler:
        torch.autograd.grad(fftconv(u, k).sum(), (u, k))
    found = {event.name for event in profiler.events()}
    assert set(names) <= found
    with patch.object(register, "unwatched", return_value=False):
        same = fftconv(u, k)
        assert torch.equal(same, y)
        assert all(map(torch.equal, torch.autograd.grad(same.sum(), (u, k)), grads))
    with patch.object(operator, "fwd", None), patch.object(operator, "bwd", None):
        assert torch.equal(fftconv(u, k), y)
        assert all(map(torch.equal, torch.autograd.grad(fftconv(u, k).sum(), (u, k)), grads))


def test_compiled_autograd_records_the_operator():
    """A backward that torch.compile traces, of a forward that ran eagerly, is one graph without a break."""
    u, k = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 50), (3, 50)))
    call = lambda: fftconv(u, k, activation="gelu").square().sum()  # noqa: E731
    wanted = torch.autograd.grad(call(), (u, k))
    loss = call()
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    close((u.grad, k.grad), wanted)
