"""Steps and chunks under torch.func, torch.export and torch.compile."""

import copy

import pytest
import torch
from layer_table import D, relative
from stream_layers import every_stream, forward, make, replace_generator, run
from torch._dynamo.testing import CompileCounter

pytestmark = pytest.mark.filterwarnings("ignore:.*is not seen")  # inputs longer than kernels


class Chunks(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y, state = self.layer.prefill(x[:, :20], self.layer.init_state(len(x)))
        return torch.cat([y, self.layer.prefill(x[:, 20:], state)[0]], 1)


class OneStep(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, state):
        return self.layer.step(x, state)


@pytest.mark.parametrize("name", ["s4d", "long_conv", "hyena"])
def test_transforms_see_the_parameters_of_prefill(name):
    layer, x = make(name), torch.randn(2, 50, D, dtype=torch.float64)
    model = Chunks(layer)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    call = lambda parameters: torch.func.functional_call(model, parameters, (x,))  # noqa: E731
    found = torch.func.grad(lambda parameters: call(parameters).square().sum())(parameters)
    model(x).square().sum().backward()
    for key, p in model.named_parameters():
        assert relative(found[key], p.grad) < 1e-10, key
    several = {key: torch.stack([p, 1.1 * p]) for key, p in parameters.items()}
    ys = torch.func.vmap(call)(several)
    assert relative(ys[0], forward(layer, x)) < 1e-12 and relative(ys[1], ys[0]) > 1e-3
    with torch.no_grad():
        y, _ = run(layer, x, [50], layer.init_state(2))
    assert relative(y, forward(layer, x)) < 1e-12


def test_transforms_do_not_see_steps():
    layer, x = make("long_conv"), torch.randn(3, 2, D, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"in place.*prefill"):
        state = layer.init_state(2)
        torch.func.vmap(lambda x: layer.step(x, state)[0])(x)


@pytest.mark.parametrize("name", ["s4d", "long_conv", "hyena"])
@pytest.mark.slow
@pytest.mark.one_of(2)
def test_steps_are_exported(name):
    layer, x = make(name), torch.randn(2, 40, D, dtype=torch.float64)
    with torch.no_grad():
        state = layer.init_state(2)
        program = torch.export.export(OneStep(layer), (x[:, 0], copy.deepcopy(state)), strict=False)
        for now, wanted in zip(x.unbind(1), forward(layer, x).unbind(1), strict=True):
            y, state = program.module()(now, state)
            assert relative(y, wanted) < 1e-12


@pytest.mark.parametrize("name", ["s4d", "long_conv", "hyena"])
@pytest.mark.slow
@pytest.mark.one_of(2)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
def test_compiled_chunks(name):
    """They have gradients, and the graph serves batches and lengths of any size."""
    layer = make(name)
    torch._dynamo.reset()
    prefill = torch.compile(layer.prefill, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 34)):
        x = torch.randn(batch, 2 * length, D, dtype=torch.float64)
        found = []
        for call in (prefill, layer.prefill):
            layer.zero_grad()
            y, state = call(x[:, :length], layer.init_state(batch))
            z, _ = call(x[:, length:], state, lengths=torch.full((batch,), length))
            y = torch.cat([y, z], 1)
            y.square().sum().backward()
            found.append([y, *[p.grad.clone() for p in layer.parameters()]])
        assert relative(found[0][0], forward(layer, x)) < 1e-12
        for one, other in zip(*found, strict=True):
            assert relative(one, other) < 1e-10


@pytest.mark.parametrize("name", ["long_conv", "hyena"])
@pytest.mark.slow
@pytest.mark.one_of(2)
def test_compiled_steps_see_another_generator(name):
    layer, x = make(name), torch.randn(2, D, dtype=torch.float64)
    torch._dynamo.reset()
    step = torch.compile(layer.step, backend="eager", fullgraph=True)
    with torch.no_grad():
        _, state = step(x, layer.init_state(2))
        replace_generator(layer)
        with pytest.raises(ValueError, match="parameters have changed"):
            step(x, state)


@every_stream
@pytest.mark.slow
@pytest.mark.one_of(2)
def test_compiled_steps(name):
    """One graph for all steps, without a graph break."""
    layer = make(name)
    x = torch.randn(2, 80, D, dtype=torch.float64)
    torch._dynamo.reset()
    count = CompileCounter()
    step = torch.compile(layer.step, backend=count, fullgraph=True)
    with torch.no_grad():
        wanted, state = layer(x), layer.init_state(2, spread=True)
        found = []
        for now in x.unbind(1):
            y, state = step(now, state)
            found.append(y)
    assert relative(torch.stack(found, 1), wanted) < 1e-12 and count.frame_count == 1
