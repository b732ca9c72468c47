"""Every layer: contract, causality, padding masks, casting, compile and export, initial statistics, learning."""

import copy
import inspect
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacfwd, jacrev
from torch.nn.utils import prune

from seqconv import (
    S4D,
    ButterflyConv,
    Hyena,
    LongConv,
    LongConvKernel,
    S4DKernel,
    SGConv,
    SGConvKernel,
    _hints,
    _layer,
    fftconv,
    hyena,
    param_groups,
    reference,
    s4d,
    sgconv,
)
from seqconv.long_conv import squash

D = 6
LAYERS = {
    "s4d": lambda **options: S4D(D, **options),
    "long_conv": lambda **options: LongConv(D, l_max=80, **{"kernel_dropout": 0.0} | options),
    "sgconv": lambda **options: SGConv(D, l_max=80, **options),
}
EVERY = LAYERS | {
    "hyena": lambda **options: Hyena(D, l_max=80, **options),
    "butterfly": lambda **options: ButterflyConv(D, l_max=80, **{"kernel_dropout": 0.0} | options),
    "sgconv, power": lambda **options: SGConv(D, l_max=80, decay="power", **options),
    "s4d, real": lambda **options: S4D(D, init="real", is_real=True, **options),
}
OPTIONS = {"plain": {}, "two-sided": {"bidirectional": True}, "heads": {"heads": 3}}


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(2, 80), (3, 1), (1, 57), (0, 10), (2, 0), (1, 131)])
def test_shape(make, options, shape):
    x = torch.randn(*shape, D, requires_grad=True)
    layer = make(**options)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
    if x.numel() and shape[1] > 1:
        assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_is_its_formula(make, options):
    layer = make(**options).double()
    x = torch.randn(2, 70, D, dtype=torch.float64)
    k = layer.kernel(70)
    heads = options.get("heads", 1)
    assert k.shape == (heads * (2 if layer.bidirectional else 1), D, 70)
    k_rev = k[heads:] if layer.bidirectional else None
    v = reference.fftconv(x, k[:heads], layer.skip, k_rev=k_rev, layout="blh")
    first, gate = (F.gelu(v).flatten(2) @ layer.linear.weight.T + layer.linear.bias).chunk(2, -1)
    torch.testing.assert_close(layer(x), first * torch.sigmoid(gate), rtol=1e-10, atol=1e-10)


HEADS = {"heads": 3, "activation": "silu", "postact": None}
CAUSAL = [
    *((name, {}) for name in ("s4d", "long_conv", "sgconv", "sgconv, power", "hyena", "butterfly")),
    *((name, HEADS) for name in ("s4d", "long_conv", "sgconv", "butterfly")),
    *(("s4d", {"discretization": name}) for name in ("bilinear", "dss", "dss_softmax")),
    *(("long_conv", {"smooth": name}) for name in ("time", "frequency")),
    ("s4d", {"init": "legs", "n_ssm": 2}),
    ("sgconv", {"combine": "sum", "upsample": "nearest", "kernel_dim": 4}),
    ("hyena", {"order": 3}),
]


@pytest.mark.parametrize("size", [10.0, 1e4])
@pytest.mark.parametrize("name, options", CAUSAL, ids=str)
def test_causality(name, options, size, monkeypatch):
    """To round-off, so that 1e-5 of the kernel for the future is too much: ButterflyConv before training. Also
    for inputs much shorter than the kernel there is: cut taps must not wrap to the future."""
    layer = EVERY[name](**options)
    with torch.no_grad():
        layer.skip.zero_()  # the kernels alone
    x = torch.randn(1, 40, D) * (size if name == "hyena" else 1)  # its gates are inputs
    moved = x.clone()
    moved[:, 25:] += size * torch.randn(15, D)

    def change(layer):
        past, future = (layer(moved) - layer(x)).split([25, 15], dim=1)
        assert future.abs().amax((0, 2)).min() > 1e-3
        return past.norm() / future.norm()

    bound = 6 * torch.finfo(torch.float32).eps
    assert change(layer) < bound
    for module in (_layer, hyena):
        monkeypatch.setattr(module, "fftconv", leaking)
    if name == "butterfly":
        with torch.no_grad():
            for matrix in layer.input_transform.matrices.values():
                matrix.mul_(1 + 2e-5 * torch.randn_like(matrix))
    assert change(layer) > bound
    if name in LAYERS:
        assert change(EVERY[name](**options, bidirectional=True)) > 1e-2


def leaking(x, k, skip=None, **options):
    future = {} if k.shape[-1] <= 3 or options.get("k_rev") is not None else {"k_rev": 1e-5 * k}
    return fftconv(x, k, skip, **options | future)


def test_options_of_the_block(make):
    x = torch.randn(2, 40, D, dtype=torch.float64)
    plain = make(activation="silu", postact=None).double()
    k = plain.kernel(40)
    v = reference.fftconv(x, k, plain.skip, layout="blh").flatten(2)
    wanted = F.silu(v) @ plain.linear.weight.T + plain.linear.bias
    torch.testing.assert_close(plain(x), wanted, rtol=1e-10, atol=1e-10)
    tied = make(activation=None, postact=None, dropout=0.4, tie_dropout=True)
    with torch.no_grad():
        tied.linear.weight.copy_(torch.eye(D))
        tied.linear.bias.zero_()
    x = torch.randn(50, 9, D)
    kept = (tied(x) != 0).float().mean(1)
    assert ((kept == 0) | (kept == 1)).all() and abs(kept.mean() - 0.6) < 0.1
    scaled = tied.train()(x)
    wanted = tied.eval()(x) / 0.6
    torch.testing.assert_close(scaled, torch.where(scaled == 0, 0.0, wanted))
    for options, text in (
        ({"activation": "tanh"}, "activation must be one of None, 'gelu'"),
        ({"postact": "relu"}, "postact must be one of 'glu', None"),
        ({"tie_dropout": 1}, "tie_dropout must be True or False, got 1"),
        ({"bidirectional": "yes"}, "bidirectional must be True or False, got 'yes'"),
    ):
        with pytest.raises(ValueError, match=text):
            make(**options)


def test_lengths(make):
    layer, x = make(bidirectional=True), torch.randn(3, 50, D)
    lengths = torch.tensor([50, 20, 0])
    padding = torch.arange(50) >= lengths[:, None]
    assert torch.equal(layer(x, lengths=lengths), layer(x, padding))
    with pytest.raises(ValueError, match="lengths must be between 0 and length=50"):
        layer(x, lengths=lengths + 1)
    with pytest.raises(TypeError, match="lengths must be one of int64, int32"):
        layer(x, lengths=lengths.float())
    with pytest.raises(ValueError, match="mask and lengths exclude each other"):
        layer(x, padding, lengths=lengths)


@pytest.mark.parametrize("name", EVERY)
def test_per_sample_gradients_of_padded_data(name):
    """vmap over lengths, and over masks of both kinds, which checks them as eager calls do."""
    layer = EVERY[name]().double()
    x = torch.randn(3, 20, D, dtype=torch.float64)
    lengths = torch.tensor([20, 7, 0])
    padding = torch.arange(20) >= lengths[:, None]
    floats = torch.zeros(3, 20, dtype=torch.float64).masked_fill(padding, -torch.inf)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x, given, option):
        options = {option: given.unsqueeze(0)}
        return torch.func.functional_call(layer, parameters, (x.unsqueeze(0),), options).square()

    def per_sample(given, option):
        call = torch.func.grad(lambda *args: loss(*args, option).sum())
        return torch.func.vmap(call, (None, 0, 0))(parameters, x, given)

    found = [
        per_sample(lengths, "lengths"),
        per_sample(padding, "mask"),
        per_sample(floats, "mask"),
    ]
    for i in range(3):
        y = layer(x[i : i + 1], padding[i : i + 1])
        wanted = torch.autograd.grad(y.square().sum(), parameters.values(), allow_unused=True)
        for n, g in zip(parameters, wanted, strict=True):
            for grads in found:
                torch.testing.assert_close(grads[n][i], g, rtol=1e-8, atol=1e-10)
    for given, option, text in (
        (lengths + 1, "lengths", "lengths must be between 0 and length=20"),
        (floats + torch.tensor([[1.0], [0.0], [0.0]]), "mask", "mask must be bool"),
    ):
        with pytest.raises(ValueError, match=text):
            per_sample(given, option)
        with pytest.raises(ValueError, match=text):
            layer(x, **{option: given})
    nested = torch.func.vmap(torch.func.vmap(lambda x, n: layer(x, lengths=n)))
    y = nested(torch.stack([x, 2 * x]).unsqueeze(2), lengths.expand(2, 3).unsqueeze(2))
    torch.testing.assert_close(y[1, :, 0], layer(2 * x, lengths=lengths))


SECOND = {
    "forward over forward": lambda g: jacfwd(jacfwd(g, 0), 1),
    "forward over reverse": lambda g: jacfwd(jacrev(g, 0), 1),
    "reverse over forward": lambda g: jacrev(jacfwd(g, 0), 1),
    "reverse over reverse": lambda g: jacrev(jacrev(g, 0), 1),
}
TWICE = [
    *((name, {}) for name in EVERY),
    *((name, {"activation": "silu"}) for name in LAYERS),
    *(
        ("s4d", {"discretization": name, "d_state": 8})
        for name in ("bilinear", "dss", "dss_softmax")
    ),
    (
        "s4d",
        {"dt_transform": "softplus", "real_transform": "softplus", "imag_transform": "softplus"},
    ),
    ("s4d", {"bidirectional": True, "heads": 2, "bandlimit": 0.5, "real_transform": "sigmoid"}),
    ("s4d", {"init": "legs", "d_state": 8, "dt_tie": False, "dt_sinh": True, "postact": None}),
    ("long_conv", {"smooth": "time", "bidirectional": True}),
    ("long_conv", {"smooth": "frequency"}),
    ("sgconv", {"combine": "sum", "bidirectional": True}),
    ("hyena", {"order": 3}),
    ("butterfly", {"additive": True, "dft_activation": "gelu", "butterfly_heads": 2}),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", SECOND)
@pytest.mark.parametrize("name, options", TWICE, ids=str)
def test_second_derivatives_of_layers(name, options, how):
    """Of every parameter and the input at once, along two directions, against finite differences."""
    layer = EVERY[name](**options).double()
    x = torch.randn(1, 12, D, dtype=torch.float64)
    point = {"x": x} | {n: p.detach() for n, p in layer.named_parameters()}
    first, second = ({n: 0.3 * torch.randn_like(t) * t for n, t in point.items()} for _ in range(2))

    def along(s, t):
        moved = {n: p + s * first[n] + t * second[n] for n, p in point.items()}
        x = moved.pop("x")
        return torch.func.functional_call(layer, moved, (x,)).square().sum()

    zero, h = torch.zeros((), dtype=torch.float64), 2e-4
    with torch.no_grad():
        corners = [[along(zero + s, zero + t) for t in (-h, h)] for s in (-h, h)]
    wanted = (corners[1][1] - corners[1][0] - corners[0][1] + corners[0][0]) / (4 * h * h)
    found = SECOND[how](along)(zero, zero)
    assert abs(wanted) > 1e-2
    torch.testing.assert_close(found, wanted, rtol=3e-5, atol=1e-5)


HUGE = [(name, {}, 1e15) for name in EVERY if name != "hyena"]
HUGE += [("hyena", {}, 1e10), ("hyena", {"order": 3}, 1e5)]  # outputs of 1e30 and 1e20


@pytest.mark.parametrize("name, options, size", HUGE)
def test_outputs_and_gradients_are_finite_for_huge_inputs(name, options, size):
    layer = EVERY[name](**options)
    for length in (1, 70):
        layer.zero_grad()
        x = (size * torch.randn(1, length, D)).requires_grad_()
        y = layer(x)
        (y * size ** -getattr(layer, "order", 1)).sum().backward()
        assert all(
            torch.isfinite(t).all() for t in (y, x.grad, *[p.grad for p in layer.parameters()])
        )


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in ("long_conv", "sgconv", "hyena", "butterfly")),
        *((name, {"bidirectional": True}) for name in LAYERS),
        ("s4d", {"discretization": "dss_softmax"}),
    ],
    ids=str,
)
def test_layers_without_a_recurrence_say_so(name, options):
    layer = EVERY[name](**options)
    x, state = torch.randn(2, 9, D), torch.zeros(2, D, 32, 2)
    calls = (lambda: layer.init_state(2), lambda: layer.step(x[:, 0], state=state))
    for call in (*calls, lambda: layer.prefill(x, state)):
        with pytest.raises(
            TypeError, match=f"{type(layer).__name__}: .*has no recurrence; .*ha(s|ve)"
        ):
            call()


def test_rate(make):
    layer, x = make(), torch.randn(1, 50, D)
    if layer.resamples:
        torch.testing.assert_close(
            layer(x, rate=2.0), make_like(layer, layer.kernel(50, rate=2.0))(x)
        )
    else:
        with pytest.raises(
            ValueError, match=r"rate must be 1 \(its taps have no time scale\), got 2"
        ):
            layer(x, rate=2.0)


@pytest.mark.parametrize("name", EVERY)
def test_rates_are_positive_numbers(name):
    layer, x = EVERY[name](), torch.randn(1, 50, D)
    for rate in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"rate must be positive and finite, got {rate}"):
            layer(x, rate=rate)
    for rate, got in (("2", "'2'"), (torch.tensor(1.0), "Tensor"), (None, "None"), (True, "True")):
        with pytest.raises(TypeError, match=f"rate must be a number, got {got}"):
            layer(x, rate=rate)


def make_like(layer, k):
    """layer with a given kernel."""
    twin = copy.copy(layer)
    return lambda x: twin._mix(F.gelu(reference.fftconv(x, k, layer.skip, layout="blh")).flatten(2))


@pytest.mark.parametrize("side", ["left", "right"])
def test_mask(make, side):
    layer = make(bidirectional=True)
    x, padding = torch.randn(2, 50, D), torch.zeros(2, 50, dtype=torch.bool)
    padding[0, 30:] = True
    if side == "left":
        padding = padding.flip(1)
    filled = x.masked_fill(padding.unsqueeze(-1), 0)
    noisy = torch.where(padding.unsqueeze(-1), torch.tensor(torch.nan), x)
    wanted = layer(filled)
    assert torch.equal(layer(noisy, padding), wanted)
    additive = torch.zeros(2, 50).masked_fill(padding, -torch.inf)
    assert torch.equal(layer(noisy, mask=additive), wanted)
    with pytest.raises(ValueError, match=r"mask must be \(batch=2, length=50\), got \(2, 49\)"):
        layer(x, padding[:, 1:])
    with pytest.raises(ValueError, match=r"bool \(True is padding\) or float with 0 and -inf only"):
        layer(x, (~padding).float())
    with pytest.raises(TypeError, match=r"mask must be one of bool.* got int64"):
        layer(x, padding.long())


def test_contract(make):
    layer = make()
    with pytest.raises(
        ValueError, match=rf"x must be \(batch, length, d_model={D}\), got \(2, 10, 5\)"
    ):
        layer(torch.zeros(2, 10, 5))
    for dtype in (torch.int64, torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match=r"x must be .*float32.* got (int64|bfloat16|float64)"):
            layer(torch.zeros(2, 10, D, dtype=dtype))
    name = type(layer).__name__
    for wrong, meant in (("unknown", "there are d_model"), ("channels", "did you mean heads")):
        with pytest.raises(TypeError, match=f"{name}: unknown keyword '{wrong}'; {meant}"):
            make(**{wrong: 1})
    assert "dropout" in inspect.signature(type(layer)).parameters  # of the block: help() shows it
    with pytest.raises(ValueError, match="lr must be a number >= 0, got -1"):
        make(kernel_lr=-1)
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="heads must be an integer >= 1"):
            make(heads=value)


HINTS = [
    ("s4d", "l_max", "S4D takes any length"),
    ("s4d", "mode", "S4D is s4's mode='s4d' or 'diag'"),
    ("s4d", "disc", r"did you mean discretization\?"),
    ("s4d", "measure", r"did you mean init\?"),
    ("s4d", "N", r"did you mean d_state\?"),
    ("s4d", "rank", "A is diagonal here"),
    ("s4d", "dt_mim", r"did you mean dt_min\?"),
    ("s4d", "wd", "weight decay is seqconv.param_groups's"),
    ("s4d", "d_conv", "it belongs to Mamba"),
    ("long_conv", "seq_len", r"did you mean l_max\?"),
    ("long_conv", "learning_rate", r"did you mean kernel_lr\?"),
    ("long_conv", "transposed", r"x is always \(batch, length, d_model\)"),
    ("long_conv", "causal", r"did you mean bidirectional\?"),
    ("long_conv", "gate", "put it around"),
    ("sgconv", "mode", "upsample, combine, init and decay"),
    ("sgconv", "channels", r"did you mean heads\?"),
    ("butterfly", "bidirectional", "no past and future"),
    ("butterfly", "verbose", "it is not a choice here"),
    ("hyena", "filter_order", r"did you mean filter_width\?"),
    ("hyena", "num_heads", "Hyena has one head"),
    ("hyena", "dropout", "Hyena has no dropout"),
    ("hyena", "causal", "Hyena is causal"),
]


@pytest.mark.parametrize("name, keyword, text", HINTS)
def test_keywords_of_other_repositories_are_known(name, keyword, text):
    with pytest.raises(TypeError, match=f"unknown keyword '{keyword}'; .*{text}"):
        EVERY[name](**{keyword: 1})


def test_hints_name_what_there_is():
    everything = {name for known in DEFAULTS.values() for name in known} | {"d_model", "l_max"}
    assert set(_hints._MEANT.values()) <= everything
    for layer in (S4D, LongConv, SGConv, Hyena, ButterflyConv):
        own = _hints._ELSEWHERE.keys() & inspect.signature(layer).parameters.keys()
        own |= (
            _hints._OF_A_LAYER[layer.__name__].keys() & inspect.signature(layer).parameters.keys()
        )
        assert not own


@pytest.mark.parametrize("length", [-1, 10.0, "8"])
def test_generators_check_the_length(make, length):
    with pytest.raises(ValueError, match="length must be an integer >= 0"):
        make().kernel(length)


def test_state_dict_copies_and_pickles(make):
    layer, other = make(), make()
    x = torch.randn(2, 33, D)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert all(p.is_floating_point() and not p.is_complex() for p in layer.state_dict().values())


def test_s4d_state_does_not_depend_on_the_length():
    layer = S4D(D)
    before = {n: t.shape for n, t in layer.state_dict().items()}
    layer(torch.zeros(1, 1000, D))
    assert {n: t.shape for n, t in layer.state_dict().items()} == before


def test_kernel_parameters_are_float32_under_a_half_default_dtype(make):
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float32 for p in layer.kernel.parameters())
    assert layer.linear.weight.dtype == torch.bfloat16
    assert layer(torch.randn(1, 20, D).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_parameters_stay_float32_in_half_precision(make, dtype):
    layer = make().eval()
    x = torch.randn(2, 60, D).to(dtype)
    wanted = layer(x.float())
    layer.to(dtype)
    assert all(p.dtype == torch.float32 for p in layer.kernel.parameters())
    assert layer.linear.weight.dtype == layer.skip.dtype == dtype
    y = layer(x)
    assert y.dtype == dtype
    assert (y.float() - wanted).norm() < 2e-2 * wanted.norm()
    layer.float()
    assert layer.linear.weight.dtype == torch.float32
    twice = make().double().to(dtype)
    assert twice(x).dtype == dtype and all(
        p.dtype == torch.float32 for p in twice.kernel.parameters()
    )


def test_autocast_trains(make):
    layer, x = make(), torch.randn(2, 60, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert layer.kernel(50).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in layer.parameters()
    )


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize(
    "name, options", [*((n, {}) for n in LAYERS), ("s4d", {"backend": "torch"})]
)
def test_compile_and_export(name, options):
    torch._dynamo.reset()
    layer = LAYERS[name](bidirectional=True, **options)
    x = torch.randn(2, 50, D)

    def gradients(function):
        layer.zero_grad()
        function(x).square().sum().backward()
        return [p.grad for p in layer.parameters()]

    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients(compiled), gradients(layer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    # A graph of LongConv holds up to l_max, one of S4D for every length.
    longest = 5000 if name == "s4d" else 79
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=longest)}
    shapes = {"x": sizes}
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=shapes)
    other = torch.randn(3, min(longest, 777) - 2, D)
    torch.testing.assert_close(program.module()(other), layer(other), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_jit_trace(name, padded, tmp_path):
    """Equal for the traced length, also from a file and in its gradients; refused for every other."""
    layer = EVERY[name]()
    mask = torch.zeros(2, 30).masked_fill(torch.arange(30) > 20, -torch.inf)
    options = (mask,) if padded else ()
    traced = torch.jit.trace(layer, (torch.randn(2, 30, D), *options))
    torch.jit.save(traced, tmp_path / "layer.pt")
    loaded = torch.jit.load(tmp_path / "layer.pt")
    x = torch.randn(2, 30, D, requires_grad=True)
    wanted = layer(x, *options)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    for made in (traced, loaded):
        y = made(x, *options)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], gradient)
        for length in (1, 29, 31):
            wrong = (torch.zeros(2, length),) if padded else ()
            with pytest.raises(RuntimeError, match=r"unflatten: .* size of dim 1"):
                made(torch.randn(2, length, D), *wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_of_steps_follows_the_parameters():
    layer, x = S4D(D), torch.randn(2, D)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, state):
            return self.layer.step(x, state)

    state = layer.init_state(2)
    with torch.no_grad():
        layer.step(x, state)
        traced = torch.jit.trace(Step(), (x, state))
        layer.kernel.C.mul_(2)
        torch.testing.assert_close(traced(x, state)[0], layer.step(x, state)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "options, call",
    [
        *(({"discretization": name}, {}) for name in ("bilinear", "dss", "dss_softmax")),
        ({}, {"rate": 2.0}),
        ({"bidirectional": True}, {"lengths": torch.tensor([50, 20])}),
    ],
    ids=str,
)
def test_compile_s4d_options(options, call):
    torch._dynamo.reset()
    layer, x = S4D(D, **options), torch.randn(2, 50, D)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, layer):
        y = function(x, **call)
        results.append([y, *torch.autograd.grad(y.square().sum(), layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


PARTS = [("s4d", {"bandlimit": 0.5, "heads": 2}), ("sgconv", {"decay": "power"})]
PARTS += [("s4d", {"is_real": True, "init": "real", "train_B": False}), ("sgconv", {})]
PARTS += [("hyena", {"order": 3})]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name, options", PARTS, ids=str)
def test_what_the_compiler_does_not_look_into(name, options):
    """The parameters' operator: in a graph of few operations, right in values and gradients, with guards on
    every option that changes it, and not in exported programs."""
    torch._dynamo.reset()
    layer, x, sizes = EVERY[name](**options), torch.randn(2, 50, D), []
    kernel = layer.filter if name == "hyena" else layer.kernel

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for change in (("bandlimit", 0.1), ("upsample", "nearest"), ("l_max", 60), None):
        for rate in (1.0, 2.0) if name != "hyena" else (1.0,):
            results = []
            for function in (compiled, layer):
                y = function(x, rate=rate)
                results.append([y, *torch.autograd.grad(y.square().sum(), layer.parameters())])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        if change is not None:
            setattr(kernel, *change)
    torch.compile(layer, fullgraph=True, backend=count)(x)
    assert len(sizes) == 1 and sizes[0] < 60
    with torch.no_grad():
        program = torch.export.export(layer.eval(), (x,))
    names = [str(node.target) for node in program.graph.nodes]
    assert not any(
        part in n for part in ("s4d_modes", "sgconv_taps", "hyena_filter") for n in names
    )
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opaque_operators_keep_torchs_contract():
    torch.use_deterministic_algorithms(
        False
    )  # opcheck's own machinery has some without such a form
    kernel = S4DKernel(D, d_state=8, bandlimit=0.5).double()
    torch.library.opcheck(s4d._modes_op, kernel._ingredients(2.0), atol=1e-10, rtol=1e-10)
    kernel = SGConvKernel(D, l_max=40, decay="power").double()
    tensors = [kernel.pieces, kernel.decay, kernel.norm]
    rest = (["linear", "cat", "power"], 0, False, 2.0, 20)
    torch.library.opcheck(sgconv._taps_op, (tensors, *rest), atol=1e-10, rtol=1e-10)
    with pytest.raises(RuntimeError, match=r"for torch\.compile only"):
        torch.func.grad(lambda t: sgconv._taps_op([t, *tensors[1:]], *rest).sum())(tensors[0])


@pytest.mark.slow
def test_s4d_by_keops(keops):
    layer, other = S4D(D, bidirectional=True, backend="keops"), S4D(D, bidirectional=True)
    other.load_state_dict(layer.state_dict())
    x, results = torch.randn(2, 50, D), []
    for made in (layer, other):
        y = made(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), made.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    script = str(Path(__file__).with_name("two_processes.py"))
    commands = [[sys.executable, script, str(rank), str(tmp_path / "meet")] for rank in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen(command, **pipes) for command in commands]
    for rank in ranks:
        output, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0, output


@pytest.mark.slow
def test_learns_a_delayed_copy(make):
    """Two layers, in seconds: y[t] = x[t - 20], which no pointwise map can do."""
    delay, length = 20, 64
    layers = [make(), make()]
    model = nn.Sequential(nn.Linear(1, D), layers[0], layers[1], nn.Linear(D, 1))
    optimizer = torch.optim.AdamW(param_groups(model, 2e-2))
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * 0.5 * (1 + math.cos(math.pi * step / 400))
        x = torch.randn(16, length, 1)
        loss = F.mse_loss(model(x)[:, delay:], x[:, :-delay])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # predicting nothing gives 1


# ---- as shipped ----


@pytest.mark.parametrize("layer", [S4D, LongConv, SGConv, Hyena, ButterflyConv])
def test_what_layers_share_begins_alike(layer):
    """skip is standard normal; linear maps are torch's: uniform in +-1 / sqrt(features), biases too."""
    heads = {} if layer is Hyena else {"heads": 2}
    made = layer(2000, **heads, **({} if layer is S4D else {"l_max": 4}))
    skip = made.skip.flatten()
    assert made.skip.shape == (heads.get("heads", 1), 2000)
    assert abs(skip.mean()) < 0.08 and abs(skip.std() - 1) < 0.06
    assert 0.65 < (skip.abs() < 1).float().mean() < 0.72  # 0.683 of a normal distribution
    for linear in (made.in_proj, made.out_proj) if layer is Hyena else (made.linear,):
        bound = linear.in_features**-0.5
        for t in (linear.weight, linear.bias):
            assert 0.99 * bound < t.abs().max() <= bound and abs(t.mean()) < 0.05 * bound
            assert abs(t.std() * 3**0.5 / bound - 1) < 0.05


BLOCK = {"heads": 1, "activation": "gelu", "dropout": 0.0, "tie_dropout": False, "postact": "glu"}
BLOCK |= {"kernel_lr": 1e-3}
FREE = {
    "init": "double_exp",
    "lam": 0.003,
    "smooth": None,
    "smooth_window": 7,
    "kernel_dropout": 0.2,
}
DEFAULTS = {
    S4D: BLOCK
    | {"bidirectional": False, "d_state": 64, "n_ssm": None, "init": "lin", "discretization": "zoh"}
    | {"real_transform": "exp", "imag_transform": "none", "is_real": False, "real_scale": 1.0}
    | {
        "imag_scale": 1.0,
        "real_random": False,
        "imag_random": False,
        "B_init": None,
        "B_scale": 1.0,
    }
    | {"normalize_B": False, "train_B": True, "dt_min": 1e-3, "dt_max": 1e-1, "dt_tie": True}
    | {"dt_transform": "exp", "dt_sinh": False, "deterministic": False, "bandlimit": None}
    | {"kernel_dropout": 0.0, "backend": "auto"},
    LongConv: BLOCK | FREE | {"bidirectional": False},
    SGConv: BLOCK
    | {"bidirectional": False, "kernel_dim": 32, "n_scales": None, "init_scale": 0, "init": "randn"}
    | {"upsample": "linear", "combine": "cat"}
    | {"decay": "geometric", "decay_min": 2.0, "decay_max": 2.0},
    Hyena: {
        "order": 2,
        "emb_dim": 3,
        "filter_width": 64,
        "filter_layers": 2,
        "filter_frequency": 1.0,
    }
    | {"kernel_lr": 1e-3},
    ButterflyConv: BLOCK
    | FREE
    | {"butterfly_heads": 1, "additive": False, "dft_activation": None, "dft_dropout": 0.0}
    | {"dft_lr": 1e-3},
}


@pytest.mark.parametrize("layer", DEFAULTS)
def test_defaults(layer):
    """Those of the papers and their code: a new one is a decision, not an accident."""
    parameters = inspect.signature(layer).parameters.values()
    assert {p.name for p in parameters if p.default is p.empty} <= {"d_model", "l_max"}
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == DEFAULTS[layer]
    known = DEFAULTS[layer] | {"lr": 1e-3, "two_sided": False}
    generators = {S4D: S4DKernel, LongConv: LongConvKernel, SGConv: SGConvKernel}
    for p in inspect.signature(generators.get(layer, layer)).parameters.values():
        assert p.default is p.empty or p.default == known[p.name]


# ---- LongConv ----


def test_squash():
    k = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5], requires_grad=True)
    y = squash(k, 0.2)
    torch.testing.assert_close(y, torch.tensor([-0.3, 0.0, 0.0, 0.0, 0.3]))
    assert torch.autograd.grad(y.sum(), k)[0].tolist() == [1, 0, 0, 0, 1]


def test_long_conv_initialisation():
    channels, taps = 8, 4000
    kernel = LongConvKernel(channels, l_max=taps, heads=20).kernel
    for i in range(channels):
        rate = (channels // 2) ** (i / channels)
        for j in (0, taps - 100):
            decay = math.exp(-rate * (j + 50) / taps)
            assert abs(kernel[:, i, j : j + 100].std() / (0.02 * decay) - 1) < 0.1
    assert torch.isfinite(LongConvKernel(1, l_max=10).kernel).all()


def test_long_conv_kernel_dropout_and_shorter_or_longer_inputs():
    kernel = LongConvKernel(D, l_max=400, lam=0.0, kernel_dropout=0.25)
    trained = kernel(400)
    kernel.eval()
    dropped = (trained == 0).float().mean()
    assert abs(dropped - 0.25) < 0.05
    torch.testing.assert_close(trained, torch.where(trained == 0, 0.0, kernel(400) / 0.75))
    assert torch.equal(kernel(100), kernel(400)[..., :100])
    assert kernel(900).shape[-1] == 400
    with pytest.raises(ValueError, match="lam must be >= 0"):
        LongConv(D, l_max=4, lam=-1.0)
    with pytest.raises(ValueError, match="lam must be >= 0, got nan"):
        LongConv(D, l_max=4, lam=math.nan)


# ---- optimiser groups ----


def test_param_groups():
    model = nn.Sequential(
        nn.Linear(1, D), S4D(D), LongConv(D, l_max=9, kernel_lr=5e-4), nn.LayerNorm(D)
    )
    groups = param_groups(model, lr=1e-2, weight_decay=0.05)
    everything = [p for g in groups for p in g["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        wanted = (1e-2, 0.05)
        if name.endswith(("inv_dt", "inv_A_real", "inv_A_imag", ".B")):
            wanted = (1e-3, 0.0)
        elif name.endswith("kernel.kernel"):
            wanted = (5e-4, 0.0)
        assert found[id(parameter)] == wanted, name
    assert {g["lr"] for g in param_groups(model, lr=1e-4)} == {1e-4}  # never above the global one
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("name", EVERY)
def test_a_kernel_with_learning_rate_0_is_buffers(name):
    make = EVERY[name]
    rates = {"kernel_lr": 0.0} | ({"dft_lr": 0.0} if name == "butterfly" else {})
    learned, fixed = make(), make(**rates)
    assert learned.state_dict().keys() == fixed.state_dict().keys()
    fixed.load_state_dict(learned.state_dict())
    slow = {id(p) for g in param_groups(learned, lr=1.0) if g["lr"] < 1 for p in g["params"]}
    left = [n for n, p in learned.named_parameters() if id(p) not in slow]
    assert slow and left == [n for n, _ in fixed.named_parameters()]
    x = torch.randn(2, 30, D)
    y = fixed(x)
    assert torch.equal(y, learned(x))
    y.square().sum().backward()
    assert all(p.grad.any() for p in fixed.parameters())
    assert not any(t.requires_grad for t in fixed.buffers())
    (group,) = param_groups(fixed, lr=1.0)
    assert len(group["params"]) == len(left)


def test_param_groups_see_through_parametrization():
    layer = LongConv(D, l_max=9)
    nn.utils.parametrize.register_parametrization(layer.kernel, "kernel", nn.Identity())
    assert [len(g["params"]) for g in param_groups(layer, lr=1e-2, weight_decay=0.1)] == [3, 1]


REPLACED = {  # a parameter by others, by torch's hooks and parametrisations
    "pruning": prune.identity,
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "weight_norm, parametrised": torch.nn.utils.parametrizations.weight_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", REPLACED)
@pytest.mark.parametrize("name", ["s4d", "long_conv", "sgconv, power", "hyena", "butterfly"])
def test_param_groups_see_through_hooks(name, how):
    rates = {"kernel_lr": 1e-4} | ({"dft_lr": 1e-4} if name == "butterfly" else {})
    layer = EVERY[name](**rates)
    kernel = layer.filter if name == "hyena" else layer.kernel
    places = {"s4d": "C inv_A_real B", "sgconv, power": "pieces", "hyena": "linears.1.weight"}
    places = [(kernel, place) for place in places.get(name, "kernel").split()]
    if name == "butterfly":
        places.append((layer.input_transform, "matrices.16"))

    def settings():
        groups = param_groups(layer, lr=1e-2, weight_decay=0.1)
        by_tensor = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
        return {n: by_tensor[id(p)] for n, p in layer.named_parameters()}

    for module, place in places:
        holder, _, last = place.rpartition(".")
        holder, before = module.get_submodule(holder), settings()
        REPLACED[how](holder, last)
        after = settings()
        (gone,) = before.keys() - after.keys()
        assert before[gone] == (1e-2, 0.1) if place == "C" else before[gone][0] == 1e-4
        made = after.keys() - before.keys()
        assert made and all(after[n] == before.get(n, before[gone]) for n in after)


def test_param_groups_have_names():
    model = nn.Sequential(S4D(D), LongConv(D, l_max=9, kernel_lr=5e-4), SGConv(D, l_max=9))
    groups = param_groups(model, lr=1e-2, weight_decay=0.05)
    assert [g["name"] for g in groups] == ["weights", "kernels", "kernels2", "kernels3"]
    for make in (torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop):
        optimizer = make(groups)
        model(torch.randn(1, 9, D)).sum().backward()
        optimizer.step()
        again = make(param_groups(model, lr=1e-2, weight_decay=0.05))
        again.load_state_dict(optimizer.state_dict())
        assert [g["name"] for g in again.param_groups] == [g["name"] for g in groups]
    model[1:].requires_grad_(False)
    model[0].requires_grad_(False).kernel.requires_grad_(True)
    names = [(g["name"], len(g["params"])) for g in param_groups(model, lr=1e-2)]
    assert names == [("weights", 1), ("kernels", 4)]


def test_param_groups_survive_copies_sharing_and_freezing():
    model = copy.deepcopy(nn.ModuleList([S4D(D)] * 2))
    model[0].linear.requires_grad_(False)
    groups = param_groups(model, lr=1e-2, weight_decay=0.1)
    assert [len(g["params"]) for g in groups] == [2, 4]
    with pytest.raises(ValueError, match="lr and weight_decay must be >= 0"):
        param_groups(model, lr=-1)
    with pytest.raises(TypeError, match="model must be a module, got generator"):
        param_groups(model.parameters(), lr=1e-2)
