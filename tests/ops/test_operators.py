"""What every operator is born with, as the recipe promises it: see helpers/operator_table.py for the rows."""

from contextlib import nullcontext

import pytest
import torch
from operator_table import OPERATORS
from torch.fx.experimental.proxy_tensor import make_fx

from seqconv import use_backend

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(params=OPERATORS)
def problem(request):
    operator, inputs, options = OPERATORS[request.param]()
    return operator, operator.name_inputs([leaf(t) for t in inputs]), options


def is_number(t):
    """Whether the input has a gradient: offsets have none."""
    return t is not None and t.is_floating_point()


def leaf(t):
    return t.requires_grad_() if is_number(t) else t


def present(inputs):
    return [t for t in inputs if is_number(t)]


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def with_gradients(call, inputs):
    y = call(inputs)
    weights = torch.linspace(0.5, 2.0, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), present(inputs))]


@pytest.mark.parametrize("backend", [None, "reference"], ids=["chosen", "reference"])
def test_it_is_its_plain_definition(problem, backend):
    operator, inputs, options = problem
    theirs = with_gradients(lambda inputs: operator.plain(inputs, *options), inputs)
    assert all(t.abs().max() > 1e-3 for t in theirs)
    with use_backend(backend) if backend else nullcontext():
        close(with_gradients(lambda inputs: operator(inputs, *options), inputs), theirs)
        with torch.no_grad():
            assert torch.equal(operator(inputs, *options), operator(inputs, *options))


def test_it_has_derivatives_of_both_orders(problem):
    operator, inputs, options = problem
    call = lambda *tensors: operator(operator.name_inputs(tensors), *options)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(inputs), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tuple(inputs), fast_mode=True)


def test_only_what_is_wanted_is_returned(problem):
    operator, inputs, options = problem
    y = operator(inputs, *options)
    whole = torch.autograd.grad(y.sum(), present(inputs))
    for one, wanted in zip(present(inputs), whole, strict=True):
        (alone,) = torch.autograd.grad(operator(inputs, *options).sum(), one)
        torch.testing.assert_close(alone, wanted)


def test_transforms_see_the_plain_definition(problem):
    operator, inputs, options = problem
    first, *rest = inputs
    call = lambda t: operator(operator.name_inputs([t, *rest]), *options)  # noqa: E731
    plain = lambda t: operator.plain(operator.name_inputs([t, *rest]), *options)  # noqa: E731
    tangent = torch.randn_like(first)
    close(torch.func.jvp(call, (first,), (tangent,)), torch.func.jvp(plain, (first,), (tangent,)))
    close([torch.func.vmap(call)(torch.stack([first, tangent]))[0]], [call(first)])
    gradient = torch.func.grad(lambda t: call(t).sin().sum())(first)
    close([gradient], torch.autograd.grad(plain(first).sin().sum(), first))


def test_it_compiles(problem):
    torch._dynamo.reset()
    operator, inputs, options = problem
    call = lambda *tensors: operator(operator.name_inputs(tensors), *options)  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    close(
        with_gradients(lambda inputs: compiled(*inputs), inputs),
        with_gradients(lambda inputs: call(*inputs), inputs),
    )


def test_the_raw_operators_pass_opcheck(problem):
    operator, inputs, options = problem
    torch.use_deterministic_algorithms(False)  # opcheck has operations without a deterministic form
    flat = operator.flat(inputs)
    torch.library.opcheck(operator.fwd, (*flat, *options))
    dy = torch.randn_like(operator.fwd(*flat, *options)).requires_grad_()
    wanted = [is_number(t) for t in inputs]
    torch.library.opcheck(operator.bwd, (dy, *flat, *options, wanted))


def test_lazy_tensors_are_resolved(problem):
    """Lazily negated and lazily zero tensors have no memory of their own to give to a kernel."""
    operator, inputs, options = problem
    inputs = operator.name_inputs([t if t is None else t.detach() for t in inputs])
    wanted = [is_number(t) for t in inputs]
    dy = torch.randn_like(operator(inputs, *options))

    def results(inputs, dy):
        return operator(inputs, *options), *operator.raw_gradients(dy, inputs, options, wanted)

    for i, t in enumerate(inputs):
        if not is_number(t):
            continue
        lazy = operator.name_inputs(
            [torch._neg_view(-t) if j == i else s for j, s in enumerate(inputs)]
        )
        close(results(lazy, dy), results(inputs, dy))
        zero = operator.name_inputs(
            [
                torch._efficientzerotensor(t.shape, dtype=t.dtype) if j == i else s
                for j, s in enumerate(inputs)
            ]
        )
        real = operator.name_inputs(
            [torch.zeros_like(t) if j == i else s for j, s in enumerate(inputs)]
        )
        close(results(zero, dy), results(real, dy))
    leaves = operator.name_inputs([leaf(t) for t in inputs])
    for lazy, real in (
        (torch._neg_view(-dy), dy),
        (torch._efficientzerotensor(dy.shape, dtype=dy.dtype), torch.zeros_like(dy)),
    ):
        found = [
            torch.autograd.grad(operator(leaves, *options), present(leaves), g)
            for g in (lazy, real)
        ]
        close(*found)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_a_batch_at_once(problem, create_graph):
    """torch.autograd.grad(is_grads_batched=True), which vectorized Jacobians use, has a vmap of its own."""
    operator, inputs, options = problem
    y = operator(inputs, *options)
    several = torch.randn(3, *y.shape, dtype=y.dtype)
    more = {"create_graph": create_graph, "retain_graph": True}
    together = torch.autograd.grad(y, present(inputs), several, is_grads_batched=True, **more)
    for i, dy in enumerate(several):
        close(
            [g[i] for g in together], torch.autograd.grad(y, present(inputs), dy, retain_graph=True)
        )
    if create_graph:
        again = torch.autograd.grad(together[0].square().sum(), present(inputs), allow_unused=True)
        assert any(g is not None and g.any() for g in again)


def test_second_derivatives_that_are_zero_are_zeros(problem):
    operator, inputs, options = problem
    for one in present(inputs):
        alone = operator.name_inputs([t if t is one or t is None else t.detach() for t in inputs])
        (first,) = torch.autograd.grad(operator(alone, *options).sum(), one, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), one)
        assert second.shape == one.shape


def test_a_graph_made_before_dispatch_has_the_operator(problem):
    """torch's export traces in this mode, which is not among the modes that a call would notice."""
    operator, inputs, options = problem
    leaves = [t.detach() for t in present(inputs)]

    def call(*tensors):
        found = iter(tensors)
        whole = [next(found) if is_number(t) else t for t in inputs]
        return operator(operator.name_inputs(whole), *options)

    graph = make_fx(call, tracing_mode="real", pre_dispatch=True)(*leaves)
    assert operator.fwd in {node.target for node in graph.graph.nodes}
    close([graph(*leaves)], [call(*leaves)])
