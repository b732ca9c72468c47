"""What every layer is born with: dtypes, initial values, recurrence or none, vmap. No layer is known by name here."""

import contextlib
import copy
import inspect
import re
import warnings

import pytest
import torch
from layer_table import EVERY, LENGTH, D, generators, inputs, relative, states

from seqconv.layers.butterfly_conv import Butterfly
from seqconv.layers.precision import HALF


@pytest.fixture(params=EVERY)
def make(request):
    """Makes a layer of the table, without anything random in its forward pass."""
    return EVERY[request.param]


# ---- the recurrence ----


def test_what_cannot_stream_has_no_methods_for_it(make):
    """All three or none: code that asks by hasattr gets the truth."""
    layer = make().eval()
    found = [hasattr(layer, name) for name in ("init_state", "step", "prefill")]
    assert found == [hasattr(layer, "init_state")] * 3
    if found[0]:
        with torch.no_grad():
            y, _ = layer.step(inputs()[:, 0], layer.init_state(2))
        assert y.shape == (2, D)


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


# ---- transforms ----


def test_vmap_over_every_argument(make):
    """Inputs, padding masks, and the parameters of several layers at once."""
    layer, other = make().eval(), make().eval()
    x = torch.randn(3, 2, LENGTH, D)
    mask = torch.rand(3, 2, LENGTH) < 0.3
    close = {"rtol": 1e-4, "atol": 1e-5}
    wanted = torch.stack([layer(x[i]) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(layer)(x), wanted, **close)
    wanted = torch.stack([layer(x[i], mask[i]) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(layer)(x, mask), wanted, **close)
    wanted = torch.stack([layer(x[0], mask[i]) for i in range(3)])
    ours = torch.func.vmap(layer, in_dims=(None, 0))(x[0], mask)
    torch.testing.assert_close(ours, wanted, **close)
    stacked = torch.func.stack_module_state([layer, other])

    def call(parameters, buffers, x):
        return torch.func.functional_call(layer, (parameters, buffers), x)

    wanted = torch.stack([layer(x[0]), other(x[0])])
    ours = torch.func.vmap(call, in_dims=(0, 0, None))(*stacked, x[0])
    torch.testing.assert_close(ours, wanted, **close)
