"""A state belongs to the parameters that made it; steps follow what is put in the place of a part."""

import pytest
import torch
from layer_table import D, generators, relative
from stream_layers import STREAMS, every_stream, forward, make, replace_generator, run

pytestmark = pytest.mark.filterwarnings("ignore:.*is not seen")  # inputs longer than kernels


def taps_of(layer):
    """A parameter of the kernel."""
    return next(next(iter(generators(layer).values())).parameters())


CHANGES = {
    "in place": lambda layer: taps_of(layer).mul_(1.1),
    "through data": lambda layer: taps_of(layer).data.mul_(1.1),
    "another state_dict": lambda layer: layer.load_state_dict(
        {k: v if v.dtype == torch.uint8 else v + 0.1 for k, v in layer.state_dict().items()}
    ),
    "an optimiser": lambda layer: _train(layer),
}


def _train(layer):
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.enable_grad():
        layer(torch.randn(1, 9, D, dtype=torch.float64)).square().sum().backward()
    optimiser.step()


@every_stream
@pytest.mark.parametrize("change", CHANGES)
def test_a_state_belongs_to_its_parameters(name, change):
    layer, x = make(name), torch.randn(2, D, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer.step(x, layer.init_state(2))
        layer(torch.randn(1, 9, D, dtype=torch.float64))  # which changes nothing
        _, state = layer.step(x, state)
        CHANGES[change](layer)
        for call in (layer.step, lambda x, state: layer.prefill(x.unsqueeze(1), state)):
            with pytest.raises(ValueError, match=r"parameters have changed.*init_state"):
                call(x, state)
        y, _ = layer.step(x, layer.init_state(2))
        assert relative(y, forward(layer, x.unsqueeze(1)).squeeze(1)) < 1e-12


@pytest.mark.parametrize("name", [name for name in STREAMS if "s4d" not in name])
def test_a_state_of_other_memory_is_refused(name):
    layer, x = make(name, torch.float32), torch.randn(2, D)
    with torch.no_grad():
        state = layer.init_state(4)
        for function, text in [
            (lambda t: t[:2].double(), "dtype"),
            (lambda t: t[:2].half(), "dtype"),
            (lambda t: t[:2] if t.is_floating_point() else t[:2].double(), "clock.*dtype"),
            (lambda t: t[:2].mT if t.dim() > 1 else t[:2], "shape"),
            (lambda t: t[:2, :0] if t.dim() > 1 else t[:2], "shape"),
            (lambda t: t[::2], "contiguous"),
            (lambda t: t[:1].expand(2, *t.shape[1:]), "contiguous"),
        ]:
            with pytest.raises(ValueError, match=rf"step: state\..*{text}"):
                layer.step(x, state.map(function))


def _doubled(module, args, out):
    return 2 * out


def _replace_forward(module):
    forward = module.forward
    module.forward = lambda *args, **options: 2 * forward(*args, **options)


def _replace_activation(layer):
    layer.activation = "relu"


REPLACED = {
    "the generator": replace_generator,
    "the activation": _replace_activation,
    "a hook": lambda layer: parts(layer)[0].register_forward_hook(_doubled),
    "a hook of a part": lambda layer: parts(layer)[-1].register_forward_hook(_doubled),
    "forward": lambda layer: _replace_forward(parts(layer)[0]),
    "forward of a part": lambda layer: _replace_forward(parts(layer)[-1]),
}


def parts(layer):
    return [part for one in generators(layer).values() for part in one.modules()]


@pytest.mark.parametrize("name", [name for name in STREAMS if "s4d" not in name])
@pytest.mark.parametrize("change", REPLACED)
def test_steps_follow_what_is_put_in_the_place_of_a_part(name, change):
    layer, x = make(name), torch.randn(2, 40, D, dtype=torch.float64)
    with torch.no_grad():
        before, _ = run(layer, x, [40], layer.init_state(2))
        REPLACED[change](layer)
        y, _ = run(layer, x, [40], layer.init_state(2))
        assert relative(y, forward(layer, x)) < 1e-12
    if not ("hyena" in name and change == "the activation"):
        assert relative(y, before) > 1e-3


def test_a_hyena_state_belongs_to_the_projection_before_it():
    layer, x = make("hyena"), torch.randn(2, D, dtype=torch.float64)
    for name in ("in_proj.weight", "short_bias"):
        with torch.no_grad():
            _, state = layer.step(x, layer.init_state(2))
            layer.get_parameter(name).mul_(2)
            with pytest.raises(ValueError, match="parameters have changed"):
                layer.step(x, state)


@pytest.mark.parametrize(
    "change",
    {
        "its bias": lambda layer: layer.short_bias.add_(1),
        "in_proj": lambda layer: layer.in_proj.weight.data.mul_(1.1),
        "another in_proj": lambda layer: setattr(
            layer, "in_proj", torch.nn.Linear(D, 3 * D, dtype=torch.float64)
        ),
    }.items(),
    ids=lambda change: change[0],
)
def test_a_state_of_hyena_belongs_to_what_is_before_its_convolutions(change):
    layer, x = make("hyena"), torch.randn(2, D, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer.step(x, layer.init_state(2))
        layer.out_proj.weight.mul_(1.1)  # which no state depends on
        _, state = layer.step(x, state)
        change[1](layer)
        with pytest.raises(ValueError, match="parameters have changed"):
            layer.step(x, state)
        y, _ = layer.step(x, layer.init_state(2))
        assert relative(y, forward(layer, x.unsqueeze(1)).squeeze(1)) < 1e-12
