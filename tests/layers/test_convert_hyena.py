"""Hyena layers of safari's and HyenaDNA's state_dicts, against their formulas in float64, with direct sums."""

import math

import pytest
import torch
from hyena_cases import WIDTH, D, L, checkpoint, features, operator, rand

from seqconv import Hyena, HyenaFilter, param_groups
from seqconv.convert import load_hyena


def check(layer, wanted, x):
    with torch.no_grad():
        y = layer(x)
    assert isinstance(layer, Hyena) and wanted.std() > 0.05
    torch.testing.assert_close(y, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("order, emb_dim, inner", [(2, 5, 2), (3, 3, 1), (4, 7, 3)])
def test_layer_is_the_operator(order, emb_dim, inner, interleaved):
    state = checkpoint(order, emb_dim, inner)
    layer = load_hyena(state, shift=0.05, interleaved=interleaved)
    assert layer.order == order and layer.filter.features == "spaced"
    for length in (L, 17):
        x = rand(2, length, D)
        check(layer, operator(state, x, 0.05, interleaved=interleaved), x)


def test_part_of_a_larger_model_streams():
    state = checkpoint(3, prefix="layers.1.mixer.")
    rest = {"layers.0.mixer.in_proj.weight": rand(3)}
    layer = load_hyena(
        state | rest, prefix="layers.1.mixer.", shift=0.0, interleaved=False, order=3, l_max=L
    )
    own = {name.removeprefix("layers.1.mixer."): t for name, t in state.items()}
    x = rand(2, L, D)
    wanted = operator(own, x, 0.0)
    check(layer, wanted, x)
    with torch.no_grad():
        y, states = layer.prefill(x[:, :9], layer.init_state(2))
        steps = [y]
        for t in range(9, L):
            y, states = layer.step(x[:, t], states)
            steps.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=1e-8, atol=1e-8)


def test_trained_features_and_other_options():
    state, x = checkpoint(), rand(2, L, D)
    state["filter_fn.pos_emb.z"] = rand(1, L, 5)
    layer = load_hyena(state, shift=0.3, lr_pos_emb=1e-5, lr=1e-4)
    assert layer.filter.features == "table" and layer.filter.table.requires_grad
    check(layer, operator(state, x, 0.3), x)
    rates = {id(p): g["lr"] for g in param_groups(layer, 1.0) for p in g["params"]}
    assert rates[id(layer.filter.table)] == rates[id(layer.filter.deltas)] == 1e-5
    assert rates[id(layer.filter.frequency)] == 1e-4
    fixed = load_hyena(state, shift=0.3)
    assert "table" in dict(fixed.filter.named_buffers())
    check(load_hyena(state, shift=0.3, modulate=False), operator(state, x, 0, modulate=False), x)
    check(load_hyena(state, shift=0.3, bias=False), operator(state, x, 0.3, bias=False), x)
    # A frequency that was not trained is no key; shared ones may be stored once.
    once = {name: t for name, t in state.items() if not name.endswith(("3.freq", "5.freq"))}
    check(load_hyena(once, shift=0.3), operator(state, x, 0.3), x)
    none = {name: t for name, t in once.items() if not name.endswith("freq")}
    same = {name: torch.full_like(t, 3.0) for name, t in state.items() if name.endswith("freq")}
    check(load_hyena(none, shift=0.3, w=3.0), operator(state | same, x, 0.3), x)
    half = load_hyena({name: t.bfloat16() for name, t in state.items()}, shift=0.3)
    assert half.skip.dtype == torch.bfloat16 and half.filter.deltas.dtype == torch.float32


REFUSED = [
    ({"num_heads": 2}, "num_heads must be 1 .* got 2"),
    ({"inner_factor": 2}, "inner_factor must be 1 .* got 2"),
    ({"num_blocks": 2}, "num_blocks must be 1 .* got 2"),
    ({"activation": "gelu"}, "activation must be 'id' .* got 'gelu'"),
    ({"dropout": 0.1}, r"dropout must be 0.0 .* got 0\.1"),
    ({"outer_mixing": True}, "outer_mixing must be False"),
    ({"normalized": True}, "normalized must be False"),
    ({"bidirectional": True}, "bidirectional must be False"),
    ({"short_filter_order": 4}, "short_filter_order must be 3"),
    ({"order": 3}, "order must be 2 .of this state_dict., got 3"),
    ({"l_max": 31}, "l_max must be 30 .of this state_dict., got 31"),
    ({"num_inner_mlps": 1}, "num_inner_mlps must be 2"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_options_without_a_counterpart_are_refused(options, message):
    with pytest.raises(ValueError, match=f"load_hyena: {message}"):
        load_hyena(checkpoint(), shift=0.0, **options)


def test_contract():
    state = checkpoint()
    load_hyena(state, shift=0.0, _name_="hyena", filter_order=WIDTH, fused_bias_fc=False, wd=0.1)
    with pytest.raises(TypeError, match="shift"):
        load_hyena(state)
    with pytest.raises(TypeError, match="load_hyena: unknown option 'shft'"):
        load_hyena(state, shift=0.0, shft=1)
    with pytest.raises(ValueError, match=r"must be True or False for a checkpoint of order > 2"):
        load_hyena(checkpoint(3), shift=0.0)
    with pytest.raises(ValueError, match="post_order_ffn must be False"):
        load_hyena(state | {"ord_proj_w": rand(2, 1, 1)}, shift=0.0)
    for wrong, text in ((None, "a dict of tensors by name, got NoneType"), ([1], "got list")):
        with pytest.raises(TypeError, match=f"load_hyena: state_dict must be .*{text}"):
            load_hyena(wrong, shift=0.0)
    for wrong, text in (
        ({"model": state}, r"got dict; are the weights in it\?"),
        ({"w": 1}, "got int"),
    ):
        with pytest.raises(TypeError, match=rf"state_dict\['\w+'\] must be a tensor, {text}"):
            load_hyena(wrong, shift=0.0)
    with pytest.raises(TypeError, match="prefix must be a string, got 3"):
        load_hyena(state, shift=0.0, prefix=3)
    load_hyena({"a." + name: t for name, t in state.items()} | {"epoch": 3}, shift=0.0, prefix="a.")
    with pytest.raises(ValueError, match=r"unknown keys in state_dict: 'more.weight'"):
        load_hyena(state | {"more.weight": rand(2)}, shift=0.0)
    with pytest.raises(ValueError, match=r"filter_fn.bias must be \(heads d_model=4,\)"):
        load_hyena(state | {"filter_fn.bias": rand(D // 2)}, shift=0.0)
    with pytest.raises(ValueError, match="all sines must be one"):
        load_hyena(state | {"filter_fn.implicit_filter.3.freq": rand(1, WIDTH)}, shift=0.0)
    with pytest.raises(ValueError, match=r"pos_emb.t must be l / \(l_max - 1\)"):
        load_hyena(state | {"filter_fn.pos_emb.t": rand(1, L, 1)}, shift=0.0)
    none = {name: t for name, t in state.items() if not name.endswith("freq")}
    with pytest.raises(ValueError, match="w must be the sines' frequency"):
        load_hyena(none, shift=0.0)
    for key in ("in_proj.bias", "filter_fn.pos_emb.z", "filter_fn.modulation.deltas"):
        with pytest.raises(ValueError, match=f"must have '{key}'"):
            load_hyena({name: t for name, t in state.items() if name != key}, shift=0.0)


def test_filter_options():
    """The features by themselves: a network that passes one of them on."""
    for name in ("spaced", "table"):
        f = HyenaFilter(D, l_max=L, emb_dim=5, features=name, decay="free", shift=0.25).double()
        with torch.no_grad():
            for linear in f.linears[:-1]:
                linear.weight.zero_()
                linear.bias.fill_(1.0)
            f.linears[0].weight[:, :5] = torch.eye(5).repeat(13, 1)[:64]
            f.deltas.zero_()
        z = f.read()[1] if name == "table" else None
        assert (z is None) == (name == "spaced")
        h = torch.sin(f.linears[0].weight @ features(5).T + 1)
        for linear in f.linears[1:-1]:
            h = torch.sin(linear.weight @ h + 1)
        wanted = 1.25 * f.linears[-1].weight @ h
        torch.testing.assert_close(f(L)[0], wanted)
        torch.testing.assert_close(f(12)[0], wanted[:, :12])
        torch.testing.assert_close(f(12, channels=slice(1, 3)), f(12)[:, 1:3])
    free = HyenaFilter(D, l_max=L, heads=2, decay="free")
    plain = HyenaFilter(D, l_max=L, heads=2)
    assert not free.deltas.requires_grad
    plain.load_state_dict(
        {k: t for k, t in free.state_dict().items() if k not in ("deltas", "_extra_state")}
        | {"_extra_state": plain.get_extra_state()}
    )
    torch.testing.assert_close(free(L), plain(L))


def test_filter_options_are_part_of_a_checkpoint():
    state = HyenaFilter(D, l_max=L).state_dict()
    with pytest.raises(RuntimeError, match="features is 'spaced' here and 'whole' there"):
        HyenaFilter(D, l_max=L, features="spaced").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"shift is 0.5 here and 0.0 there"):
        HyenaFilter(D, l_max=L, shift=0.5).load_state_dict(state)
    # A checkpoint from before these options were there.
    state["_extra_state"] = torch.tensor(list(b'{"l_max": 30, "emb_dim": 3}'), dtype=torch.uint8)
    HyenaFilter(D, l_max=L).load_state_dict(state)
    with pytest.raises(RuntimeError, match="features is 'spaced' here and 'whole' there"):
        HyenaFilter(D, l_max=L, features="spaced").load_state_dict(state)
    for options, message in (
        ({"features": "waves"}, "features must be .* got 'waves'"),
        ({"decay": "no"}, "decay must be .* got 'no'"),
        ({"shift": math.inf}, "shift must be finite, got inf"),
        ({"table_lr": -1.0}, "table_lr must be a number >= 0"),
    ):
        with pytest.raises(ValueError, match=f"HyenaFilter: {message}"):
            HyenaFilter(D, l_max=L, **options)
    with pytest.raises(TypeError, match="did you mean filter_shift"):
        Hyena(D, l_max=L, shift=0.1)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize("features", ["spaced", "table"])
def test_compiled(features):
    torch._dynamo.reset()
    options = {"filter_decay": "free", "filter_shift": 0.1, "filter_table_lr": 1e-3}
    layer = Hyena(D, l_max=L, order=3, filter_features=features, **options)
    x = torch.randn(2, 20, D)

    def run(function):
        layer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        return [y, *[p.grad for p in layer.parameters()]]

    ours, wanted = run(torch.compile(layer, fullgraph=True)), run(layer)
    assert layer.filter.deltas.grad.any()
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
