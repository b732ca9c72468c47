"""What state_dict and repr say of every layer: which function its parameters mean. No layer is known by name here."""

import ast
import contextlib
import copy
import inspect
import pickle
import re
import warnings

import pytest
import torch
from layer_table import EVERY, LENGTH, D, generators, inputs, states
from torch import nn


@pytest.fixture(params=EVERY)
def make(request):
    """Makes a layer of the table, without anything random in its forward pass."""
    return EVERY[request.param]


def alternatives(make, name, default) -> list:
    """Other values of an option: those that its error names, or near the default."""
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, (int, float)):
        return [default + 1, default + 2, default * 2, default / 2] if default else [1, 0.25]
    try:
        make(**{name: "?"})
    except ValueError as error:
        choices = re.search(r"must be one of (.*), got", str(error))
        if choices:
            named = ast.literal_eval(f"[{choices[1]}]")
            return [c for c in named if c not in (default, "keops")]  # which compiles for a minute
    except TypeError:
        pass
    return [1, 2, 0.3]


def variants(make):
    """For every option, layers with other values of it, all of them or a number, made of the same random numbers."""
    untried = []
    for name, p in list(inspect.signature(type(make())).parameters.items())[1:-1]:
        found = 0
        for value in alternatives(make, name, 80 if p.default is p.empty else p.default):
            torch.manual_seed(0)
            layer = None
            with contextlib.suppress(ValueError, TypeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer = make(**{name: value}).eval()
                found += 1
            if layer is not None:
                yield name, value, layer
                if not isinstance(value, str | None):
                    break
        untried += [name] * (not found)
    assert len(untried) <= 1, untried  # one that wants another with it


def outputs(layer):
    x = torch.randn(2, LENGTH, D, generator=torch.Generator().manual_seed(1))
    rates = (1.0, 2.0) if getattr(layer, "resamples", False) else (1.0,)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.stack([layer(x, rate=rate) for rate in rates])


def test_a_checkpoint_loads_into_the_same_function_or_not_at_all(make):
    """Whatever option differs: an error names it, or a size does, or it makes no difference."""
    layer = make().eval()
    state, wanted = layer.state_dict(), outputs(layer)
    refused = set()
    for name, value, other in variants(make):
        try:
            other.load_state_dict(state)
        except RuntimeError as error:
            text = str(error)
            if "mean another function" in text:
                refused.add(name)
                assert re.search(r"\b\w+ is .* here and .* there", text), text
            else:
                assert re.search("size mismatch|Missing key|Unexpected key", text), text
        else:
            torch.testing.assert_close(
                outputs(other), wanted, rtol=1e-4, atol=1e-5, msg=f"{name}={value}"
            )
    if "activation" in inspect.signature(type(layer)).parameters:
        assert "activation" in refused


def test_repr_shows_every_option_that_changes_the_function(make):
    torch.manual_seed(0)
    layer = make().eval()
    shown, wanted = repr(layer), outputs(layer)
    assert re.search(r"\(\s*6, ", shown)
    for name in ("l_max", "lam", "d_state", "init", "discretization"):
        if name in inspect.signature(type(layer)).parameters:
            assert f"{name}=" in shown
    for name, value, other in variants(make):
        y = outputs(other)
        if y.shape != wanted.shape or not torch.allclose(y, wanted, rtol=1e-4, atol=1e-5):
            assert repr(other) != shown, f"{name}={value}"


def test_options_changed_later_count(make):
    """What is kept and shown is what the layer computes with now."""
    layer, other = make(), make()
    changed = 0
    for place, generator in generators(layer).items():
        for name in generator.meaning:
            attribute = generator.attributes.get(name, name)
            state = layer.state_dict()
            before = getattr(generator, attribute)
            setattr(generator, attribute, "something else")
            assert "something else" in repr(layer)
            with pytest.raises(RuntimeError, match=f"{place}.*{name} is 'something else' here and"):
                layer.load_state_dict(state)
            setattr(generator, attribute, before)
            changed += 1
    layer.load_state_dict(other.state_dict())


def kept(state) -> list[str]:
    return [name for name in state if name.endswith("_extra_state")]


def test_checkpoints_without_options_load_with_one_warning(make):
    """As all did before options were kept, in a model of several layers; a part of a model without any."""
    model, other = nn.ModuleList([make(), make()]), nn.ModuleList([make(), make()])
    old = {name: t for name, t in model.state_dict().items() if not name.endswith("_extra_state")}
    assert len(old) < len(model.state_dict())
    for _ in range(2):
        with pytest.warns(UserWarning, match="does not hold the options") as caught:
            assert not any(other.load_state_dict(old, strict=True))
        assert len(caught) == 1
        assert torch.equal(outputs(other[1]), outputs(model[1]))
    other.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_checkpoints_go_through_files_and_other_places(make, tmp_path):
    layer, twin = make(), make()
    state = layer.state_dict()
    assert kept(state) and all(state[n].dtype == torch.uint8 for n in kept(state))
    torch.save(state, tmp_path / "torch")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "safe")
    loaded = (
        torch.load(tmp_path / "torch", weights_only=True),
        safetensors.load_file(tmp_path / "safe"),
    )
    with torch.device("meta"):
        empty = make()
    for given in loaded:
        twin.load_state_dict(given)
        empty.load_state_dict(given, assign=True)
        y = torch.func.functional_call(make(), given, inputs())
        assert y.shape == (2, LENGTH, D)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert torch.equal(outputs(other), outputs(layer)) and repr(other) == repr(layer)
    left = {n for n, t in states(empty).items() if t.is_meta}
    assert left <= set(states(empty)) - set(state)  # buffers that are not kept
    if not left:
        assert torch.equal(outputs(empty), outputs(layer))
