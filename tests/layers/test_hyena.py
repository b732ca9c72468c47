"""Hyena: its formula in float64, causality, padding, gradients, casting, compile and export, statistics, learning."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqconv import Hyena, HyenaFilter, param_groups, reference
from seqconv.layers import hyena

D, L_MAX = 6, 80
ORDERS = [2, 3]


def plain_filter(f, length):
    """(heads, d_model, taps), one time after the other."""
    columns = []
    for step in range(min(length, f.l_max)):
        t = step / max(f.l_max - 1, 1)
        z = [t]
        for turns in range(1, (f.emb_dim - 1) // 2 + 1):
            z.append(math.cos(2 * math.pi * turns * t))
            z.append(-math.sin(2 * math.pi * turns * t))
        # The layer has all the cosines first.
        h = torch.tensor([t, *z[1::2], *z[2::2]], dtype=torch.float64)
        for linear in f.linears[:-1]:
            h = torch.sin(f.frequency.double() * (linear.weight.double() @ h + linear.bias))
        h = (f.linears[-1].weight.double() @ h).reshape(-1, f.d_model)
        for channel in range(f.d_model):
            share = channel / max(f.d_model - 1, 1)
            delta = math.log(0.01) * ((1 - share) / 1.5 + share / 0.3)
            h[:, channel] *= math.exp(-t * abs(delta))
        columns.append(h)
    return torch.stack(columns, -1)


def plain(layer, x):
    """Step by step with explicit gates and the direct sum."""
    x = layer.in_proj(x)
    short = layer.short_bias.expand_as(x)
    for j in range(3):
        short = short + layer.short[:, j] * F.pad(x, (0, 0, j, 0))[:, : x.shape[1]]
    *gates, v = short.chunk(layer.order + 1, dim=-1)
    k = plain_filter(layer.filter, x.shape[1])
    for gate, taps, skip in zip(gates[:-1], k, layer.skip, strict=True):
        v = reference.fftconv(gate * v, taps, skip, layout="blh")
    return layer.out_proj(gates[-1] * v)


@pytest.mark.filterwarnings("ignore:.*steps or more away")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [1, 2, 47, 80, 131])
def test_layer_is_its_formula(order, length):
    layer = Hyena(D, l_max=L_MAX, order=order, emb_dim=5, filter_frequency=3.0).double()
    with torch.no_grad():
        layer.filter.frequency.uniform_(1, 3)
    assert layer.filter(length).shape == (order - 1, D, min(length, L_MAX))
    x = torch.randn(2, length, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_gates_are_fused_into_the_convolutions(order, monkeypatch):
    calls, fftconv = [], hyena.fftconv

    def spy(x, k, *rest, pre_gate=None, post_gate=None, **options):
        calls.append((k.shape[-1], pre_gate is not None, post_gate is not None))
        return fftconv(x, k, *rest, pre_gate=pre_gate, post_gate=post_gate, **options)

    monkeypatch.setattr(hyena, "fftconv", spy)
    Hyena(D, l_max=L_MAX, order=order)(torch.randn(1, 40, D))
    assert calls == [(3, False, False), *[(40, True, i == order) for i in range(2, order + 1)]]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(order, side):
    layer = Hyena(D, l_max=L_MAX, order=order)
    x, padding = torch.randn(2, 50, D), torch.zeros(2, 50, dtype=torch.bool)
    padding[0, 30:] = True
    if side == "left":
        padding = padding.flip(1)
    x = torch.where(padding.unsqueeze(-1), torch.tensor(torch.nan), x)
    y = layer(x, padding)
    for i in range(2):
        alone = layer(x[i, ~padding[i]].unsqueeze(0))[0]
        torch.testing.assert_close(y[i, ~padding[i]], alone, rtol=1e-4, atol=1e-5)
    additive = torch.zeros(2, 50).masked_fill(padding, -torch.inf)
    assert torch.equal(layer(x, mask=additive), y)
    if side == "right":
        assert torch.equal(layer(x, lengths=torch.tensor([30, 50])), y)
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    with pytest.raises(ValueError, match=r"Hyena: mask must be \(batch=2, length=50\)"):
        layer(x, padding[:, 1:])


def test_padding_in_the_middle_is_silent():
    layer = Hyena(D, l_max=L_MAX, order=3)
    x, other, padding = torch.randn(1, 50, D), torch.randn(1, 50, D), torch.zeros(1, 50).bool()
    padding[:, 20:30] = True
    other = torch.where(padding.unsqueeze(-1), other, x)
    assert torch.equal(layer(x, padding)[~padding], layer(other, padding)[~padding])
    # Nor does it answer by itself: what is after it only hears what is before it.
    zero = layer(x.masked_fill(torch.arange(50).reshape(1, 50, 1) < 20, 0.0), padding)
    assert (zero - layer(x, padding))[:, 32:].abs().max() > 1e-4
    before = padding | (torch.arange(50) < 20)
    alone = layer(x[:, 30:])
    torch.testing.assert_close(layer(x, before)[:, 30:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*steps or more away")
@pytest.mark.parametrize("shape", [(2, 80), (3, 1), (1, 57), (0, 10), (2, 0), (1, 131)])
@pytest.mark.parametrize("order", ORDERS)
def test_shapes_and_gradients(shape, order):
    layer, x = Hyena(D, l_max=L_MAX, order=order), torch.randn(*shape, D, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
    if x.numel() and shape[1] > 1:
        assert x.grad.any() and all(p.grad.any() for p in layer.parameters())


def test_gradients_against_the_formula():
    layer = Hyena(3, l_max=20, order=3, filter_width=8).double()
    x = torch.randn(2, 15, 3, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), wanted)
    theirs = torch.autograd.grad(plain(layer, x).square().sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*steps or more away")
def test_longer_inputs_meet_the_taps_there_are():
    layer = Hyena(D, l_max=10)
    x = torch.randn(1, 60, D)
    moved = x.clone()
    moved[:, 0] += 10
    change = (layer(moved) - layer(x)).abs().amax((0, 2))
    assert change[12:].max() < 1e-4 and change[:12].min() > 1e-5  # 10 taps and the short ones'


def test_initialisation():
    layer = Hyena(200, l_max=400, order=3, filter_frequency=2.0)
    assert layer.skip.shape == (2, 200)
    assert abs(layer.skip.mean()) < 0.15 and abs(layer.skip.std() - 1) < 0.1
    assert layer.in_proj.weight.shape == (800, 200) and layer.out_proj.weight.shape == (200, 200)
    for t in (layer.short, layer.short_bias):
        assert t.abs().max() <= 3**-0.5 and abs(t.std() - 1 / 3) < 0.03
    shapes = [tuple(linear.weight.shape) for linear in layer.filter.linears]
    assert shapes == [(64, 3), (64, 64), (64, 64), (400, 64)]
    assert layer.filter.linears[-1].bias is None and layer.filter.frequency.eq(2).all()
    # Decay: the last channel is at 1% after 0.3 l_max, the first at 1% ** (2 / 3) at the end.
    bare = HyenaFilter(3, l_max=101, width=1)
    with torch.no_grad():
        for linear in bare.linears[:-1]:
            linear.weight.zero_()
            linear.bias.fill_(1.0)
        bare.linears[-1].weight.fill_(1 / math.sin(1))
    k = bare(101)[0]
    torch.testing.assert_close(k[:, 0], torch.ones(3))
    torch.testing.assert_close(k[2, 30], torch.tensor(0.01))
    torch.testing.assert_close(k[0, 100], torch.tensor(0.01 ** (2 / 3)))


def test_param_groups():
    model = nn.Sequential(nn.Linear(1, D), Hyena(D, l_max=9, kernel_lr=5e-4))
    groups = param_groups(model, lr=1e-2, weight_decay=0.05)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        wanted = (5e-4, 0.0) if ".filter." in name else (1e-2, 0.05)
        assert found[id(parameter)] == wanted, name


def test_state_dict_copies_and_pickles():
    layer, other = Hyena(D, l_max=L_MAX), Hyena(D, l_max=L_MAX)
    x = torch.randn(2, 33, D)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_filter_stays_float32_in_half_precision(dtype):
    layer = Hyena(D, l_max=L_MAX)
    x = torch.randn(2, 60, D).to(dtype)
    wanted, k = layer(x.float()), layer.filter(60)
    layer.to(dtype)
    assert torch.equal(layer.filter(60), k) and layer.short.dtype == layer.skip.dtype == dtype
    y = layer(x)
    assert y.dtype == dtype and (y.float() - wanted).norm() < 3e-2 * wanted.norm()
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in layer.parameters())


def test_autocast_trains():
    layer, x = Hyena(D, l_max=L_MAX), torch.randn(2, 60, D)
    wanted, k = layer(x), layer.filter(60)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.filter(60), k)
    assert y.dtype == torch.bfloat16 and (y.float() - wanted).norm() < 3e-2 * wanted.norm()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_compile_and_export():
    torch._dynamo.reset()
    layer, x = Hyena(D, l_max=L_MAX, order=3), torch.randn(2, 50, D)
    padding = torch.arange(50).expand(2, 50) >= 40

    def gradients(function):
        layer.zero_grad()
        function(x, padding).square().sum().backward()
        return [p.grad for p in layer.parameters()]

    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x, padding), layer(x, padding), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients(compiled), gradients(layer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=L_MAX - 1)}
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes={"x": sizes})
    other = torch.randn(3, 77, D)
    torch.testing.assert_close(program.module()(other), layer(other), rtol=1e-4, atol=1e-5)


def test_contract():
    layer = Hyena(D, l_max=L_MAX)
    with pytest.raises(ValueError, match=rf"x must be \(batch, length, d_model={D}\), got"):
        layer(torch.zeros(2, 10, 5))
    with pytest.raises(TypeError, match=r"x must be float32.* got bfloat16"):
        layer(torch.zeros(2, 10, D, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="unknown"):
        Hyena(D, l_max=9, unknown=1)
    with pytest.raises(TypeError, match="bidirectional"):
        Hyena(D, l_max=9, bidirectional=True)
    with pytest.raises(ValueError, match="length must be an integer >= 0, got -1"):
        layer.filter(-1)
    for options, message in (
        ({"order": 1}, "order must be an integer >= 2, got 1"),
        ({"order": 2.0}, "order must be an integer >= 2, got 2.0"),
        ({"emb_dim": 4}, "emb_dim must be odd .* got 4"),
        ({"filter_width": 0}, "width must be an integer >= 1, got 0"),
        ({"filter_frequency": 0.0}, "frequency must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Hyena(D, l_max=9, **options)


def test_refuses_what_the_other_layers_refuse_in_their_words():
    with pytest.raises(TypeError, match="Hyena: unknown keyword 'ordr'; did you mean order"):
        Hyena(D, l_max=9, ordr=3)
    layer = Hyena(D, l_max=9)
    x = torch.randn(1, 5, D)
    assert torch.equal(layer(x, rate=1.0), layer(x))
    with pytest.raises(ValueError, match=r"Hyena: rate must be 1 .* got 2\.0"):
        layer(x, rate=2.0)
    with pytest.raises(ValueError, match="Hyena: x must be on the layer's device cpu"):
        layer(x.to("meta"))


def test_learns_a_delayed_copy():
    """y[t] = x[t - 20] in seconds: a kernel's peak away from lag 0, out of smooth waves."""
    delay, length = 20, 64
    layers = [Hyena(D, l_max=length, filter_frequency=10.0) for _ in range(2)]
    model = nn.Sequential(nn.Linear(1, D), *layers, nn.Linear(D, 1))
    optimizer = torch.optim.AdamW(param_groups(model, 2e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        x = torch.randn(16, length, 1)
        loss = F.mse_loss(model(x)[:, delay:], x[:, :-delay])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert loss < 0.2  # predicting nothing gives 1
