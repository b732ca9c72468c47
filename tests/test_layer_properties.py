"""What every layer is born with: linear maps of any kind, dtypes, initial values. No layer is known by name here."""

import contextlib
import copy
import inspect
import re
import warnings

import pytest
import torch
from layer_table import EVERY, LENGTH, D, generators, inputs, relative, states
from torch import nn

from seqconv._module import HALF
from seqconv.butterfly_conv import Butterfly


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


# ---- the recurrence ----


def test_what_cannot_stream_has_no_methods_for_it(make):
    """All three or none: code that asks by hasattr gets the truth."""
    layer = make()
    found = [hasattr(layer, name) for name in ("init_state", "step", "prefill")]
    assert found == [hasattr(layer, "init_state")] * 3
    if found[0]:
        y, _ = layer.step(inputs()[:, 0], layer.init_state(2))
        assert y.shape == (2, D)


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
        with pytest.raises(TypeError, match=text):
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


# ---- dtypes ----


@contextlib.contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_default_dtypes(make, dtype):
    """The layer has the default dtype, its kernel float32 at least, and computes to that precision."""
    with default(dtype):
        layer = make().eval()
    inside = {f"{g}.{n}" for g, m in generators(layer).items() for n in states(m)}
    for name, t in states(layer).items():
        wanted = torch.promote_types(dtype, torch.float32) if name in inside else dtype
        assert t.dtype == wanted, name
    exact, x = make().eval().double(), inputs(dtype)
    exact.load_state_dict(layer.state_dict())  # 64 bits hold them all
    y = layer(x)
    assert y.dtype == dtype
    assert relative(y, exact(x.double())) < (1e-12 if dtype == torch.float64 else 2e-2)
    for name, kernel in generators(layer).items():
        if not isinstance(kernel, Butterfly):
            assert relative(kernel(LENGTH), exact.get_submodule(name)(LENGTH)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_initial_values_are_as_exact_as_the_kernel_under_any_default_dtype(make, dtype):
    """What is not drawn is not rounded: the same numbers as under float64, in the kernel's precision."""
    with default(dtype):
        layer = make()
    with default(torch.float64):
        exact = make()
    single = states(make())
    fixed = [n for n, t in states(exact).items() if relative(single[n], t) < 1e-6]
    for name in fixed:
        assert relative(states(layer)[name], states(exact)[name]) < 1e-6, name


def test_checkpoints_of_other_default_dtypes_load_exactly(make):
    """From narrower into wider, and a kernel always."""
    dtypes = (*HALF, torch.float32, torch.float64)
    layers = []
    for dtype in dtypes:
        with default(dtype):
            layers.append(make())
    for layer in layers:
        for other in layers:
            target = copy.deepcopy(other)
            target.load_state_dict(layer.state_dict())
            for name, t in states(target).items():
                given = states(layer)[name]
                if torch.promote_types(given.dtype, t.dtype) == t.dtype:
                    assert torch.equal(t.double(), given.double()), name


def test_gradients_in_float64(make):
    with default(torch.float64):
        layer, x = make().eval(), torch.randn(1, 9, D).requires_grad_()
    parameters = dict(layer.named_parameters())

    def function(x, *values):
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, x)

    assert torch.autograd.gradcheck(function, (x, *parameters.values()), fast_mode=True)


def test_a_layer_does_not_read_the_default_dtype_again(make):
    layer, x = make().eval(), inputs()
    wanted = layer(x)
    for dtype in (torch.float64, *HALF):
        with default(dtype):
            assert torch.equal(layer(x), wanted)


# ---- initial values ----


def holders(layer):
    """Modules that hold parameters or buffers themselves."""
    for name, module in layer.named_modules():
        own = {**module._parameters, **module._buffers}
        own = {key: t for key, t in own.items() if t is not None}
        if own:
            yield name, module, own


RATES = {"kernel_lr": 0.0}, {}


@pytest.mark.parametrize("options", RATES, ids=str)
def test_reset_parameters_is_what_the_constructor_calls(make, options, monkeypatch):
    """From the same random state it gives the very same numbers, to what a module holds itself, and to that only."""
    began = {}

    def spied(reset):
        def spy(self):
            began[id(self)] = torch.get_rng_state()
            reset(self)

        return spy

    bases = {base for m in make(**options).modules() for base in type(m).__mro__}
    for base in bases:
        if "reset_parameters" in vars(base):
            monkeypatch.setattr(base, "reset_parameters", spied(base.reset_parameters))
    layer = make(**options)
    for name, module, own in holders(layer):
        assert id(module) in began, name
        random, wanted = began[id(module)], {key: t.clone() for key, t in own.items()}
        others = {n: t.clone() for n, t in states(layer).items() if t not in set(own.values())}
        with torch.no_grad():
            for t in own.values():
                t.fill_(torch.nan)
        torch.set_rng_state(random)
        module.reset_parameters()
        assert all(torch.equal(own[key], wanted[key]) for key in own), name
        assert all(torch.equal(states(layer)[n], t) for n, t in others.items()), name


@pytest.mark.parametrize("options", RATES, ids=str)
def test_meta_device_then_empty_then_reset(make, options):
    """As FSDP and Lightning make large models, module by module; from one seed two of them are the same."""
    made = []
    for _ in range(2):
        with torch.device("meta"):
            layer = make(**options)
        assert all(t.is_meta for t in states(layer).values())
        torch.manual_seed(3)
        for _, module, _ in holders(layer):
            module.to_empty(
                device="cpu", recurse=False
            )  # NaN, as the tests ask torch to fill memory
            module.reset_parameters()
        made.append(layer)
    layer, twin = made
    for name, t in states(layer).items():
        assert torch.equal(t, states(twin)[name]), name
    x, built = inputs(), make(**options)
    assert {n: t.shape for n, t in states(built).items()} == {
        n: t.shape for n, t in states(layer).items()
    }
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    assert 0.2 < layer(x).norm() / built(x).norm() < 5
    torch.manual_seed(4)
    layer.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert not all(torch.equal(t, states(twin)[n]) for n, t in states(layer).items())


# ---- long inputs ----


def test_inputs_longer_than_the_kernel_warn_once(make):
    """Of every layer by itself; those that take no longer inputs say so, and those without an end never warn."""
    for _ in range(2):
        layer = make().eval()
        for length in (80, 1, 0):
            layer(inputs(length=length))
        if "l_max" not in inspect.signature(type(layer)).parameters:
            layer(inputs(length=500))
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                layer(inputs(length=500))
            except ValueError as error:
                assert "x must have length <= l_max=80, got length=500" in str(error)
                continue
            layer(inputs(length=600))
        (warning,) = said
        assert re.search(r"length 500 and the kernel \d+ taps.*larger l_max", str(warning.message))
