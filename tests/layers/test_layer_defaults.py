"""Layers as shipped: what they share begins alike, defaults, initial statistics, optimiser groups."""

import copy
import dataclasses
import inspect
import math
import pydoc
import re
import sys
from typing import NoReturn

import pytest
import torch
from layer_table import EVERY, D
from torch import nn
from torch.nn.utils import prune

from bench.lra import options as lra
from seqconv import (
    S4D,
    ButterflyConv,
    Hyena,
    LongConv,
    LongConvKernel,
    S4DKernel,
    SGConv,
    SGConvKernel,
    param_groups,
)
from seqconv.layers import options
from seqconv.layers.base import ConvLayer
from seqconv.layers.long_conv import squash


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
        "filter_features": "whole",
        "filter_decay": "fixed",
        "filter_shift": 0.0,
        "filter_table_lr": 0.0,
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
    *parameters, unknown = inspect.signature(layer).parameters.values()
    assert unknown.kind is unknown.VAR_KEYWORD and unknown.annotation is NoReturn
    assert {p.name for p in parameters if p.default is p.empty} <= {"d_model", "l_max"}
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == DEFAULTS[layer]
    known = DEFAULTS[layer] | {"lr": 1e-3, "two_sided": False}
    generators = {S4D: S4DKernel, LongConv: LongConvKernel, SGConv: SGConvKernel}
    for p in inspect.signature(generators.get(layer, LongConvKernel)).parameters.values():
        assert p.default is p.empty or layer is Hyena or p.default == known[p.name]


@pytest.mark.parametrize("layer", DEFAULTS)
def test_options_are_spelled_where_they_can_be_read(layer):
    """In the signature of __init__ itself, with a type, for editors; and in help(), with their defaults."""
    own, code = inspect.signature(layer.__init__), layer.__init__.__code__
    names = {*own.parameters} - {"self", "unknown"}
    assert names == {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]} - {"self"}
    assert all(own.parameters[name].annotation is not inspect.Parameter.empty for name in names)
    text = pydoc.render_doc(layer.__init__, renderer=pydoc.plaintext)
    for name, value in DEFAULTS[layer].items():
        assert re.search(rf"\b{name}: [^,]*= {re.escape(repr(value))}", text), name


GENERATORS = {"S4D": S4DKernel, "LongConv": LongConvKernel, "SGConv": SGConvKernel}


@pytest.mark.parametrize("layer", [S4D, LongConv, SGConv, ButterflyConv])
def test_every_option_reaches_what_it_is_for(layer, monkeypatch):
    """Nothing is forgotten between the layer and its generator, or the layer and the block."""
    found = {}

    def generator(d_model, **options):
        found["generator"] = options

    def block(self, d_model, kernel, **options):
        found["block"] = options
        raise StopIteration

    class_ = GENERATORS.get(layer.__name__, LongConvKernel)
    known = {
        "block": inspect.signature(ConvLayer).parameters.keys() - {"d_model", "kernel"},
        "generator": inspect.signature(class_).parameters.keys() - {"d_model"},
    }
    monkeypatch.setattr(sys.modules[layer.__module__], class_.__name__, generator)
    monkeypatch.setattr(ConvLayer, "__init__", block)
    two_sided = layer is not ButterflyConv
    given = {name: object() for name in inspect.signature(layer).parameters.keys() - {"unknown"}}
    sizes = {"d_model": 5, "heads": 3, "d_state": 6, "l_max": 7, "butterfly_heads": 1}
    sizes |= {"additive": True, "dft_activation": "gelu", "bidirectional": two_sided}
    given |= {name: value for name, value in sizes.items() if name in given}
    with pytest.raises(StopIteration):
        layer(**given)
    given["bidirectional"] = two_sided
    assert found["block"] == {name: given[name] for name in known["block"]}
    given |= {"heads": 6 if two_sided else 3, "two_sided": two_sided, "lr": given["kernel_lr"]}
    assert found["generator"] == {name: given[name] for name in known["generator"]}


def test_the_benchmark_has_the_layers_defaults():
    """Except where the recipes of the papers have others; it knows the layers' options without torch."""
    kinds = {"s4d": S4D, "sgconv": SGConv, "long_conv": LongConv, "butterfly": ButterflyConv}
    apart = {"init": "random", "heads": 2}
    apart = {"long_conv": apart, "butterfly": apart, "s4d": {"bidirectional": True, "dt_lr": None}}
    apart["sgconv"] = {"bidirectional": True}
    for name, layer in (kinds | {"hyena": Hyena}).items():
        own = {field.name: field.default for field in dataclasses.fields(lra.KERNELS[name])}
        wanted = DEFAULTS[layer] | apart.get(name, {})
        assert own == {option: wanted[option] for option in own}


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


def test_param_groups_survive_copies_sharing_and_freezing():
    model = copy.deepcopy(nn.ModuleList([S4D(D)] * 2))
    model[0].linear.requires_grad_(False)
    groups = param_groups(model, lr=1e-2, weight_decay=0.1)
    assert [len(g["params"]) for g in groups] == [2, 4]
    with pytest.raises(ValueError, match="lr and weight_decay must be >= 0"):
        param_groups(model, lr=-1)
    with pytest.raises(TypeError, match="model must be a module, got generator"):
        param_groups(model.parameters(), lr=1e-2)


# ---- checkpoints ----


@pytest.mark.parametrize(
    "layer, here, there, text",
    [
        (Hyena, {"l_max": 512}, {"l_max": 256}, "l_max is 512 here and 256 there"),
        (LongConv, {"l_max": 9}, {"l_max": 9, "lam": 0.001}, "lam is 0.003 here and 0.001 there"),
        (
            SGConv,
            {"l_max": 64, "decay": "power"},
            {"l_max": 64, "decay": "power_fixed"},
            "decay is",
        ),
        (S4D, {"heads": 2}, {"bidirectional": True}, "bidirectional is False here and True there"),
        (ButterflyConv, {"l_max": 9}, {"l_max": 9, "additive": True}, "additive is False here and"),
    ],
    ids=str,
)
def test_checkpoints_of_other_options_are_refused(layer, here, there, text):
    model, other = nn.Sequential(layer(8, **here)), nn.Sequential(layer(8, **there))
    with pytest.raises(RuntimeError, match=rf"0\.(\w+\.)?_extra_state: \w+: the check.*{text}"):
        model.load_state_dict(other.state_dict())


def test_all_options_that_differ_are_named():
    layer, other = S4D(16), S4D(16, discretization="bilinear", dt_transform="softplus")
    text = "discretization is 'zoh' here and 'bilinear' there; dt_transform is 'exp' here and 'soft"
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(other.state_dict())


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
    assert set(options._MEANT.values()) <= everything
    for layer in (S4D, LongConv, SGConv, Hyena, ButterflyConv):
        own = options._ELSEWHERE.keys() & inspect.signature(layer).parameters.keys()
        own |= (
            options._OF_A_LAYER[layer.__name__].keys() & inspect.signature(layer).parameters.keys()
        )
        assert not own
