"""The linear map and GLU of a layer, by tiles of rows, beside torch's two calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqconv import S4D, use_backend
from seqconv.backends import cpu
from seqconv.layers import base, linear_glu

pytestmark = pytest.mark.skipif(bool(cpu.missing), reason="the CPU kernels")


def gradients(function, x, linear: nn.Linear, dy):
    tensors = [t for t in (x, linear.weight, linear.bias) if t is not None]
    y = function(x, linear.weight, linear.bias)
    return [y, *torch.autograd.grad(y, tensors, dy)]


def by_torch(x, weight, bias):
    return F.glu(F.linear(x, weight, bias), dim=-1)


def rel(found, wanted) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


# Channels that fill vectors or do not, rows that fill units and tiles or do not.
SHAPES = [
    (1, 3000, 16, 16),
    (8, 1000, 64, 64),
    (3, 701, 40, 23),
    (2, 9000, 5, 7),
    (1, 300, 256, 128),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_beside_torch_in_float64(shape, bias, isa):
    batch, length, features, channels = shape
    linear = nn.Linear(features, 2 * channels, bias=bias)
    x = torch.randn(batch, length, features, requires_grad=True)
    dy = torch.randn(batch, length, channels)
    assert linear_glu.takes(linear, x, 2 * channels)
    ours = gradients(linear_glu.linear_glu, x, linear, dy)
    theirs = gradients(by_torch, x, linear, dy)
    exact_x = x.detach().double().requires_grad_()
    wide = nn.Linear(features, 2 * channels, bias=bias).double()
    wide.load_state_dict(linear.state_dict())
    exact = gradients(by_torch, exact_x, wide, dy.double())
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert rel(a, c) < 2 * rel(b, c) + 2e-7
    with torch.no_grad():
        assert torch.equal(linear_glu.linear_glu(x, linear.weight, linear.bias), ours[0])


def test_gates_from_closed_to_open(isa):
    gate = torch.linspace(-120, 120, 70001)
    linear = nn.Linear(1, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0], [1.0]]))
        linear.bias.copy_(torch.tensor([1.0, 0.0]))
    x = gate.unsqueeze(-1)
    y = linear_glu.linear_glu(x, linear.weight, linear.bias).squeeze(-1)
    torch.testing.assert_close(y.double(), gate.double().sigmoid(), rtol=5e-7, atol=1e-37)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(30000, 1).unsqueeze(-1)
    y = linear_glu.linear_glu(special, linear.weight * 0 + torch.tensor([[0.0], [1.0]]), None)
    assert y[0, 0].isnan() and y[0, 1].isnan()  # inf * 0 is no number


def test_what_is_not_wanted_and_what_lies_apart():
    linear = nn.Linear(64, 128)
    x = torch.randn(2000, 64, requires_grad=True)
    wide_dy = torch.randn(2000, 2, 64)
    for dy in (wide_dy[:, 1], torch.randn(64, 2000).t(), torch.randn(1).expand(2000, 64)):
        y = linear_glu.linear_glu(x, linear.weight, linear.bias)
        for wanted in ([x], [linear.weight], [linear.bias], [x, linear.bias]):
            found = torch.autograd.grad(y, wanted, dy, retain_graph=True)
            theirs = torch.autograd.grad(by_torch(x, linear.weight, linear.bias), wanted, dy)
            for a, b in zip(found, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_second_derivatives_and_batched_gradients():
    linear = nn.Linear(64, 128)
    x = torch.randn(1000, 64, requires_grad=True)

    def second(function):
        y = function(x, linear.weight, linear.bias)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, linear.weight, linear.bias])

    for a, b in zip(second(linear_glu.linear_glu), second(by_torch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    y = linear_glu.linear_glu(x, linear.weight, linear.bias)
    several = torch.randn(3, 1000, 64)
    (found,) = torch.autograd.grad(y, x, several, is_grads_batched=True)
    (wanted,) = torch.autograd.grad(
        by_torch(x, linear.weight, linear.bias), x, several, is_grads_batched=True
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_threads_change_no_bit_of_the_gate():
    z, dy = torch.randn(5000, 128), torch.randn(5000, 64)
    before, several = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, dz, dbias = torch.empty(5000, 64), torch.empty(5000, 128), torch.zeros(128).double()
            cpu.glu(y, z, None)
            cpu.glu_gradients(dz, dbias, dy, z, None)
            several.append((y, dz, dbias))
    finally:
        torch.set_num_threads(before)
    for other in several[1:]:
        assert all(map(torch.equal, several[0], other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own forward derivatives
def test_who_else_wants_to_see_the_linear_map_sees_it(monkeypatch):
    layer, x = S4D(64), torch.randn(4, 500, 64)
    usual = layer(x)
    calls = []
    monkeypatch.setattr(
        base, "linear_glu", lambda *a: (calls.append(0), linear_glu.linear_glu(*a))[1]
    )
    assert torch.equal(layer(x), usual) and calls == [0]

    def others():
        """A step of each kind that torch computes; the tile's function is not called."""
        calls.clear()
        seen = []
        handle = layer.linear.register_forward_hook(lambda *_: seen.append(0))
        torch.testing.assert_close(layer(x), usual, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert seen == [0]
        with use_backend("reference"):
            torch.testing.assert_close(layer(x), usual, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        torch.func.jvp(layer, (x,), (x,))
        torch.func.grad(lambda x: layer(x).sum())(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(x)
        assert any(event.key == "aten::glu" for event in profile.key_averages())
        layer.double()(x.double())
        return calls

    assert others() == []


def test_what_torch_refuses_or_broadcasts_is_left_to_torch():
    x = torch.randn(2, 500, 64)

    def outcome(linear):
        layer = S4D(64)
        layer.load_state_dict(state)
        layer.linear = linear
        try:
            return layer(x)
        except (RuntimeError, ValueError) as error:
            return type(error), str(error)

    state = S4D(64).state_dict()
    changes = [lambda w, b, n=n: (w, torch.ones(n)) for n in (1, 10, 256)]
    changes += [
        lambda w, b: (w, torch.ones(1, 128)),
        lambda w, b: (w, torch.ones(())),
        lambda w, b: (w, b.to("meta")),
        lambda w, b: (w[:100], b[:100]),
        lambda w, b: (w.unsqueeze(0), b),
        lambda w, b: (w[:, :32].contiguous(), b),
        lambda w, b: (w.double(), b.double()),
    ]
    for change in changes:
        found = []
        for asked in ("auto", "reference"):
            torch.manual_seed(0)
            linear = nn.Linear(64, 128)
            weight, bias = change(linear.weight.detach(), linear.bias.detach())
            linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
            with use_backend(asked):
                found.append(outcome(linear))
        ours, theirs = found
        if isinstance(theirs, tuple):
            assert ours == theirs
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_saved_tensors_may_come_back_as_others():
    linear, dy = nn.Linear(64, 128), torch.randn(1000, 64)
    x = torch.randn(1000, 64, requires_grad=True)
    wanted = gradients(by_torch, x, linear, dy)[1:]
    turned = lambda t: t.t().contiguous().t() if t.dim() == 2 else t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, turned):
        found = gradients(linear_glu.linear_glu, x, linear, dy)[1:]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t),
        pytest.raises(RuntimeError, match=r"must return torch\.float32"),
    ):
        gradients(linear_glu.linear_glu, x, linear, dy)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own forward derivatives
def test_derivatives_over_the_gradient():
    linear, dy = nn.Linear(64, 128), torch.randn(1000, 64)
    x, v = torch.randn(1000, 64, requires_grad=True), torch.randn(1000, 64)

    def tangent(function):
        y = function(x, linear.weight, linear.bias)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(dy, v)
            (grad,) = torch.autograd.grad(y, x, dual)
            return torch.autograd.forward_ad.unpack_dual(grad).tangent

    torch.testing.assert_close(
        tangent(linear_glu.linear_glu), tangent(by_torch), rtol=1e-4, atol=1e-4
    )
    y = linear_glu.linear_glu(x, linear.weight, linear.bias)
    linear.weight.requires_grad_(False)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert dx.requires_grad
