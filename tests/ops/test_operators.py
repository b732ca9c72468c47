"""What every operator is born with, as the recipe promises it: see helpers/operator_table.py for the rows."""

from contextlib import nullcontext

import pytest
import torch
from operator_table import OPERATORS

from seqconv import use_backend

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(params=OPERATORS)
def problem(request):
    operator, inputs, options = OPERATORS[request.param]()
    leaves = [t if t is None else t.requires_grad_() for t in inputs]
    return operator, operator.name_inputs(leaves), options


def present(inputs):
    return [t for t in inputs if t is not None]


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
    torch.library.opcheck(operator.fwd, (*inputs, *options))
    dy = torch.randn_like(operator.fwd(*inputs, *options)).requires_grad_()
    torch.library.opcheck(operator.bwd, (dy, *inputs, *options, [t is not None for t in inputs]))
