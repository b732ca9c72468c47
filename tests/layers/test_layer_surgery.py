"""What every layer bears: other linear maps, half precision, parametrisations. No layer is known by name here."""

import copy
import inspect

import pytest
import torch
from layer_table import EVERY, D, generators, inputs, relative
from torch import nn

from seqconv.layers.precision import HALF


@pytest.fixture(params=EVERY)
def make(request):
    """Makes a layer of the table, without anything random in its forward pass."""
    return EVERY[request.param]


# ---- linear maps ----


def outer_linears(layer) -> dict[str, nn.Linear]:
    """The layer's own linear maps, by name: not those that make a kernel."""
    return {name: m for name, m in layer.named_children() if isinstance(m, nn.Linear)}


class LowRank(nn.Module):
    """base(x) + x A B, as adapters for finetuning wrap a linear map."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(base.in_features, 2))
        self.B = nn.Parameter(torch.randn(2, base.out_features))

    def forward(self, x):
        return self.base(x) + x @ self.A @ self.B


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def folded(base, weight):
    """base with another weight."""
    twin = nn.Linear(base.in_features, base.out_features)
    twin.load_state_dict({"weight": weight, "bias": base.bias})
    return twin


def low_rank(base):
    wrapped = LowRank(base)
    return wrapped, folded(base, base.weight + (wrapped.A @ wrapped.B).T)


def sequence(base):
    return nn.Sequential(base, nn.Dropout(0.0)), base


def parametrized(base):
    twin = folded(base, 2 * base.weight)
    return nn.utils.parametrize.register_parametrization(base, "weight", Doubled()), twin


@pytest.mark.parametrize("replace", [low_rank, sequence, parametrized])
def test_anything_may_stand_for_a_linear_map(make, replace):
    layer, x = make(), inputs()
    assert outer_linears(layer)
    results = []
    pairs = {name: replace(linear) for name, linear in outer_linears(layer).items()}
    for choice in (0, 1):
        for name, pair in pairs.items():
            setattr(layer, name, pair[choice])
        results.append([layer(x)])
        if hasattr(layer, "step"):
            with torch.no_grad():
                results[-1].append(layer.step(x[:, 0], layer.init_state(2))[0])
            results[-1].append(layer.prefill(x, layer.init_state(2))[0])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"x must be float32 \(the layer's dtype\).* got float64"):
        layer(x.double())


def test_a_linear_map_may_be_none(make):
    if "postact" not in inspect.signature(type(make())).parameters:
        return
    layer, x = make(postact=None), inputs()
    with torch.no_grad():
        layer.linear.weight.copy_(torch.eye(D))
        layer.linear.bias.zero_()
    wanted = layer(x)
    layer.linear = nn.Identity()
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_linear_maps_may_be_quantized(make):
    layer, x = make().eval(), inputs()
    names = set(outer_linears(layer))
    quantized = torch.ao.quantization.quantize_dynamic(layer, names, dtype=torch.qint8)
    assert not outer_linears(quantized)
    assert 1e-6 < relative(quantized(x), layer(x)) < 0.1
    with pytest.raises(TypeError, match=r"x must be float32 \(the layer's dtype\)"):
        quantized(x.to(torch.int8).bfloat16())


def test_a_linear_map_of_another_shape_is_named(make):
    for name in outer_linears(layer := make()):
        setattr(layer, name, nn.Linear(outer_linears(layer)[name].in_features, D + 1))
        text = rf"{type(layer).__name__}: {name} \(Linear\) must map \(2, 50, \d+\) to .* got \(2, 50, 7\)"
        with pytest.raises(ValueError, match=text):
            layer(inputs())
        layer = make()


# ---- kernels in half precision ----


def halves(layer, dtype) -> dict[str, torch.Tensor]:
    """The layer's parameters and buffers, all in half precision."""
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {name: t.detach().to(dtype) for name, t in state.items()}


class Rounded(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


class Step(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer.step(x, self.layer.init_state(len(x)))


WAY_OUT = "must be float32 or float64, got {}: rounded to that .*layer.to.*seqconv.parallel"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_kernels_in_half_precision_are_refused_by_name(make, dtype):
    """Whether all of them are, as under mixed precision, or a single one."""
    layer, x = make().eval(), inputs(dtype)
    text = WAY_OUT.format(str(dtype).removeprefix("torch."))
    with pytest.raises(TypeError, match=text):
        torch.func.functional_call(layer, halves(layer, dtype), x)
    if hasattr(layer, "step"):
        with pytest.raises(TypeError, match=text), torch.no_grad():
            torch.func.functional_call(Step(layer), halves(Step(layer), dtype), x[:, 0])
    found = 0
    for place, generator in generators(layer).items():
        for name, _ in (*generator.named_parameters(), *generator.named_buffers()):
            path = f"{place}.{name}"
            with pytest.raises(TypeError, match=f"{type(generator).__name__}: {name} {text}"):
                torch.func.functional_call(
                    layer, {path: halves(layer, dtype)[path]}, inputs(), strict=False
                )
            found += 1
    assert found


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_checkpoints_with_kernels_in_half_precision_are_refused(make, dtype, assign):
    layer, other = make(), make()
    before = {name: t.clone() for name, t in halves(layer, torch.float64).items()}
    for place, generator in generators(other).items():
        for name in dict(generator.named_parameters()):
            state = other.state_dict()
            state[f"{place}.{name}"] = state[f"{place}.{name}"].to(dtype)
            with pytest.raises(TypeError, match=rf"{name} of the checkpoint must be float32"):
                layer.load_state_dict(state, assign=assign)
            if not assign:
                now = halves(layer, torch.float64)[f"{place}.{name}"]
                assert torch.equal(now, before[f"{place}.{name}"])
    # The rest of the layer may be cast, in the checkpoint as by .to().
    layer.load_state_dict(copy.deepcopy(other).to(dtype).state_dict(), assign=True)
    x = inputs(dtype)
    assert relative(layer(x), other(x.float())) < 2e-2


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_parametrizations_that_round_kernels_are_refused(make, dtype):
    for place, generator in generators(make()).items():
        for name, _ in (*generator.named_parameters(recurse=False),):
            layer = make()
            nn.utils.parametrize.register_parametrization(
                layer.get_submodule(place), name, Rounded(dtype), unsafe=True
            )
            with pytest.raises(TypeError, match=f"{name} must be float32 or float64, got"):
                layer(inputs())


# ---- parametrisations ----


class Scaled(nn.Module):
    """A parametrisation with a parameter of its own, as low-rank updates have."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.factor * x

    def right_inverse(self, x):
        return x / self.factor


def first_tensors(layer):
    """Each module's first trained tensor, with its place; a parameter dictionary cannot be parametrized."""
    for place, module in layer.named_modules():
        names = [n for n, p in module._parameters.items() if p is not None]
        if names and not isinstance(module, nn.ParameterDict):
            yield place, names[0]


def everything(layer, x) -> torch.Tensor:
    """The outputs of the convolution and, where there is one, of the recurrence."""
    y = layer(x)
    if hasattr(layer, "step"):
        with torch.no_grad():
            now, _ = layer.step(x[:, 0], layer.init_state(len(x)))
        y = torch.cat([y, now.unsqueeze(1)], 1)
    return y


@pytest.mark.parametrize("before", [True, False])
def test_parametrizations_count_whenever_they_come(make, before):
    """Registered before or after a first pass, without gradients; what changes in them later counts as well."""
    x = inputs()
    for place, name in first_tensors(make()):
        layer = make().eval()
        twin = copy.deepcopy(layer)
        if not before:
            with torch.no_grad():
                everything(layer, x)
        scaled = Scaled()
        nn.utils.parametrize.register_parametrization(layer.get_submodule(place), name, scaled)
        for factor in (1.0, 1.5):
            with torch.no_grad():
                scaled.factor.fill_(factor)
                own = getattr(twin.get_submodule(place), name)
                own.mul_(factor)
                ours, theirs = everything(layer, x), everything(twin, x)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=f"{place}.{name}")
        everything(layer, x).square().sum().backward()
        assert scaled.factor.grad.isfinite() and scaled.factor.grad != 0, f"{place}.{name}"
        twin = copy.deepcopy(layer)
        twin.load_state_dict(layer.state_dict())
        layer.get_submodule(place).reset_parameters()  # through the parametrisation
        assert everything(layer, x).isfinite().all()
