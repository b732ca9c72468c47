"""SGConv: its kernel against the formula in float64, scales and lengths, statistics, norm, and other sampling rates."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seqconv import SGConv, SGConvKernel, fftconv, param_groups

D = 6
LAWS = ("geometric", "power", "power_fixed")


def offsets(kernel):
    """(start, stretch) of every piece."""
    scales, _, _, d = kernel.pieces.shape
    for i in range(scales):
        stretch = 2 ** (kernel.init_scale + (max(i - 1, 0) if kernel.combine == "cat" else i))
        yield (d * stretch if i and kernel.combine == "cat" else 0), stretch


def by_torch(kernel):
    """All taps, undivided by the norm, with torch's own interpolation: (heads, d_model, taps)."""
    mode = {"mode": "linear", "align_corners": False}
    mode = mode if kernel.upsample == "linear" else {"mode": "nearest"}
    parts = [
        F.interpolate(w, scale_factor=float(stretch), **mode)
        for w, (_, stretch) in zip(kernel.pieces.double(), offsets(kernel), strict=True)
    ]
    decay = kernel.decay.double().unsqueeze(-1)
    if kernel.law == "geometric":
        parts = [part * decay**-i for i, part in enumerate(parts)]
    if kernel.combine == "sum":
        parts = [sum(F.pad(part, (0, kernel.taps - part.shape[-1])) for part in parts)]
    k = torch.cat(parts, dim=-1)
    if kernel.law != "geometric":
        k = k * torch.arange(1, k.shape[-1] + 1) ** -decay
    return k


def at(kernel, head, channel, t):
    """k(t) norm for one real t, term by term."""
    value, p = 0.0, kernel.decay[channel].item()
    d = kernel.pieces.shape[-1]
    for i, (start, stretch) in enumerate(offsets(kernel)):
        if (i and t < start - 0.5) or t >= start + d * stretch - 0.5:
            if kernel.combine == "cat" or t > 0:
                continue
        weights = kernel.pieces[i, head, channel].detach().double().numpy()
        place = (t - start + 0.5) / stretch
        if kernel.upsample == "linear":
            term = np.interp(place - 0.5, np.arange(d), weights)
        else:
            term = weights[max(math.floor(place), 0)]
        value += term * (p**-i if kernel.law == "geometric" else (max(t, 0) + 1) ** -p)
    return value


# Table of the released settings: l_max, kernel_dim, init_scale -> scales, taps.
RELEASED = {
    "listops": (2048, 1, 0, 12, 2048),
    "text": (4096, 2, 0, 12, 4096),
    "retrieval": (4000, 1, 0, 13, 4096),
    "image": (1024, 32, 0, 6, 1024),
    "path-x": (16384, 64, 1, 8, 16384),
    "shorter than a piece": (5, 32, 0, 1, 32),
    "just above": (65, 32, 0, 3, 128),
    "coarse": (100, 8, 9, 1, 4096),
}


@pytest.mark.parametrize("setting", RELEASED)
@pytest.mark.parametrize("combine", ["cat", "sum"])
def test_scales_and_taps(setting, combine):
    l_max, d, init_scale, scales, taps = RELEASED[setting]
    kernel = SGConvKernel(2, l_max=l_max, kernel_dim=d, init_scale=init_scale, combine=combine)
    assert kernel.pieces.shape == (scales, 1, 2, d) and kernel.taps == taps
    assert kernel(10 * taps).shape[-1] == taps  # what there is, and no zeros after it
    assert kernel(l_max).shape[-1] == l_max
    assert SGConvKernel(2, l_max=l_max, kernel_dim=d, n_scales=3).taps == 4 * d


@pytest.mark.parametrize("upsample", ["linear", "nearest"])
@pytest.mark.parametrize("combine", ["cat", "sum"])
@pytest.mark.parametrize("init", ["randn", "cos"])
@pytest.mark.parametrize("decay", LAWS)
def test_kernel_is_its_formula(upsample, combine, init, decay):
    options = {"upsample": upsample, "combine": combine, "init": init, "decay": decay}
    for d, init_scale in ((8, 0), (5, 1), (1, 0)):
        sizes = {"kernel_dim": d, "init_scale": init_scale, "heads": 2}
        kernel = SGConvKernel(
            D, l_max=70, decay_min=1.5, decay_max=2.5, **sizes, **options
        ).double()
        wanted = by_torch(kernel)
        norm = wanted.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(kernel(kernel.taps), wanted / norm, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(kernel(33), kernel(kernel.taps)[..., :33])
        torch.testing.assert_close(kernel.norm, norm, rtol=1e-6, atol=0)
        unit = kernel(kernel.taps).norm(dim=-1)
        torch.testing.assert_close(unit, torch.ones_like(unit), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:.*leaves out taps")
@pytest.mark.parametrize("rate", [0.5, 0.3, 2.0, 3.7])
@pytest.mark.parametrize("two_sided", [False, True])
def test_rate_samples_the_same_function(rate, two_sided):
    for upsample, combine, decay in itertools.product(
        ("linear", "nearest"), ("cat", "sum"), ("geometric", "power")
    ):
        options = {"upsample": upsample, "combine": combine, "decay": decay}
        kernel = SGConvKernel(2, l_max=28, kernel_dim=7, heads=2, two_sided=two_sided, **options)
        kernel = kernel.double()
        k = kernel(1000, rate) * kernel.norm / rate
        assert k.shape == (2, 2, math.ceil(27.5 / rate))
        for channel, length in itertools.product(range(2), range(1, k.shape[-1])):
            past = at(kernel, 0, channel, rate * length)
            assert abs(k[0, channel, length] - past) < 1e-9
            t = rate * (length + 1) - 1 if two_sided else rate * length
            assert abs(k[1, channel, length] - at(kernel, 1, channel, t)) < 1e-9
        edge = torch.tensor([[at(kernel, i, c, 0.0) for c in range(2)] for i in range(2)]).double()
        scaled = edge / kernel.norm.squeeze(-1)
        if two_sided:
            first = rate * scaled[0] + (1 - rate) / 2 * (scaled[0] - scaled[1])
        else:
            first = (1 + rate) / 2 * scaled[0]
        torch.testing.assert_close(kernel(9, rate)[0, :, 0], first, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(kernel(3, rate), kernel(1000, rate)[..., :3])
        assert torch.equal(kernel(28, 1.0), kernel(28))


def make_smooth(kernel, tau=(20.0, 60.0)):
    """Weights from exp(-t / tau) cos(t / tau), one tau a channel."""
    tau = torch.tensor(tau).unsqueeze(-1)
    d = kernel.pieces.shape[-1]
    with torch.no_grad():
        for i, (start, stretch) in enumerate(offsets(kernel)):
            t = start + (torch.arange(d) + 0.5) * stretch - 0.5
            kernel.pieces[i] = 2.0**i * torch.exp(-t / tau) * torch.cos(t / tau)


@pytest.mark.filterwarnings("ignore:.*leaves out taps")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.filterwarnings("ignore:.*steps or more away")
def test_zero_shot_resolution(bidirectional):
    """A layer made for steps of 1 on inputs twice and half as dense, whose period is 20 steps or more:
    the same output at the same times within 0.2% and 0.5%."""
    layer = SGConv(2, l_max=512, bidirectional=bidirectional, activation=None, postact=None)
    make_smooth(layer.kernel)
    phase = 6.28 * torch.rand(12, 2)

    def signal(t):
        turns = torch.arange(1, 13).unsqueeze(-1) / 240
        return torch.sin(2 * math.pi * t.reshape(-1, 1, 1) * turns + phase).sum(1).unsqueeze(0)

    inner, times = slice(300, 900), torch.arange(1200.0)
    with torch.no_grad():
        layer.skip.zero_()
        wanted = layer(signal(times))
        dense = layer(signal(torch.arange(2400) / 2), rate=0.5)[:, ::2]
        sparse = layer(signal(times[::2]), rate=2.0)
    scale = (wanted - layer.linear.bias)[:, inner].norm()
    assert (dense - wanted)[:, inner].norm() < 2e-3 * scale
    assert (sparse[:, 150:450] - wanted[:, 300:900:2]).norm() * 2**0.5 < 5e-3 * scale
    assert (layer(signal(torch.arange(2400) / 2))[:, ::2] - wanted)[:, inner].norm() > 0.3 * scale


def test_rate_is_checked():
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="rate must be positive and finite, got"):
            SGConv(D, l_max=9)(torch.randn(1, 5, D), rate=rate)


def test_initialisation():
    kernel = SGConvKernel(500, l_max=256, heads=2, kernel_dim=8)
    assert kernel.pieces.shape == (6, 2, 500, 8) and kernel.decay.eq(2).all()
    for i in range(6):
        assert abs(kernel.pieces[i].mean()) < 0.05 and abs(kernel.pieces[i].std() - 1) < 0.05
    steps = SGConvKernel(5, l_max=9, decay_min=1.0, decay_max=3.0).decay
    torch.testing.assert_close(steps, torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0]))
    p = SGConvKernel(4000, l_max=9, decay="power", decay_min=0.5, decay_max=1.5).decay
    assert isinstance(p, torch.nn.Parameter) and 0.5 <= p.min() and p.max() <= 1.5
    assert abs(p.mean() - 1) < 0.02 and abs(p.std() - 12**-0.5) < 0.02

    waves = SGConvKernel(10, l_max=64, heads=2, kernel_dim=32, init="cos").pieces
    wanted = torch.cos(2 * math.pi * torch.arange(10.0).unsqueeze(-1) * torch.arange(32) / 31)
    orders = []
    for w in waves:
        assert torch.equal(w[0], w[1])
        match = torch.cdist(w[0], wanted) < 1e-3  # (channel, turns)
        assert (match.sum(0) == 1).all() and (match.sum(1) == 1).all()
        orders.append(tuple(match.int().argmax(1).tolist()))
    assert len(set(orders)) == len(orders) and tuple(range(10)) not in orders


@pytest.mark.parametrize("decay", LAWS)
def test_gradients(decay):
    kernel = SGConvKernel(3, l_max=20, kernel_dim=3, decay=decay, decay_min=0.8).double()
    names = [name for name, _ in kernel.named_parameters()]
    assert names == (["pieces", "decay"] if decay == "power" else ["pieces"])

    def run(*values):
        return torch.func.functional_call(kernel, dict(zip(names, values, strict=True)), (15,))

    values = [p.detach().clone().requires_grad_() for p in kernel.parameters()]
    assert torch.autograd.gradcheck(run, values)
    # The norm is a constant: the kernel grows with its weights.
    torch.testing.assert_close(run(2 * values[0], *values[1:]), 2 * kernel(15))


def test_norm_is_part_of_a_checkpoint():
    for decay in LAWS:
        options = {"l_max": 60, "kernel_dim": 4, "decay": decay, "decay_min": 1.0}
        first, second = SGConv(D, **options), SGConv(D, **options)
        with torch.no_grad():
            first.kernel.pieces.mul_(3)
        second.load_state_dict(first.state_dict())
        assert {"kernel.norm", "kernel.decay"} <= set(first.state_dict())
        x = torch.randn(2, 50, D)
        assert torch.equal(second(x), first(x)) and torch.equal(copy.deepcopy(first)(x), first(x))
        norm = second.kernel(second.kernel.taps).norm(dim=-1)
        torch.testing.assert_close(norm, torch.full_like(norm, 3.0))


def test_param_groups_leave_weight_decay_on():
    layer = SGConv(D, l_max=60, decay="power", kernel_lr=5e-4)
    groups = param_groups(layer, lr=1e-2, weight_decay=0.05)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for name, parameter in layer.named_parameters():
        lr = 5e-4 if name in ("kernel.pieces", "kernel.decay") else 1e-2
        assert found[id(parameter)] == (lr, 0.05), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_stay_float32_too(dtype):
    kernel = SGConvKernel(D, l_max=60, decay="power_fixed", decay_min=1.0)
    before = kernel(60)
    assert torch.equal(kernel.to(dtype)(60), before)
    assert {t.dtype for t in (*kernel.parameters(), *kernel.buffers())} == {torch.float32}


def test_rates_that_leave_out_taps_of_a_rough_kernel_warn_once():
    layer, x = SGConv(D, l_max=80), torch.randn(1, 50, D)
    with pytest.warns(UserWarning, match=r"SGConvKernel: rate=2\.0 leaves out taps"):
        layer(x, rate=2.0)
    layer(x, rate=2.0)
    SGConv(D, l_max=80, init_scale=1)(x, rate=2.0)
    SGConv(D, l_max=80)(x, rate=0.5)


@pytest.mark.filterwarnings("ignore:.*steps or more away")
def test_longer_inputs_meet_the_taps_there_are():
    layer = SGConv(D, l_max=30, kernel_dim=4, activation=None, postact=None)
    x = torch.randn(1, 100, D)
    assert layer.kernel(100).shape[-1] == 32
    y = fftconv(x, layer.kernel(100)[0], layer.skip[0], layout="blh")
    torch.testing.assert_close(layer(x), layer.linear(y))
    moved = layer(x + F.pad(torch.ones(1, 1, D), (0, 0, 0, 99))) - layer(x)
    assert moved[:, 32:].abs().max() < 1e-5 and moved[:, 31].abs().max() > 1e-4


def test_options_are_checked():
    for options, message in (
        ({"upsample": "cubic"}, "upsample must be one of 'linear', 'nearest', got 'cubic'"),
        ({"combine": "stack"}, "combine must be one of 'cat', 'sum', got 'stack'"),
        ({"init": "ones"}, "init must be one of 'randn', 'cos', got 'ones'"),
        ({"decay": None}, "decay must be one of 'geometric', .* got None"),
        ({"init_scale": -1}, "init_scale must be an integer >= 0, got -1"),
        ({"n_scales": 0}, "n_scales must be an integer >= 1, got 0"),
        ({"kernel_dim": 1.5}, "kernel_dim must be an integer >= 1, got 1.5"),
        ({"decay_min": 0.0}, r"0 < decay_min .* <= decay_max < inf wanted, got decay_min=0\.0"),
        ({"decay_max": math.nan}, "wanted, got decay_min=2.0, decay_max=nan"),
        ({"decay": "power", "decay_max": 1.0}, r"wanted, got decay_min=2\.0, decay_max=1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SGConv(D, l_max=9, **options)
    with pytest.raises(ValueError, match="heads must be even with two_sided=True, got 3"):
        SGConvKernel(D, l_max=9, heads=3, two_sided=True)


def test_construction_without_memory():
    with torch.device("meta"):
        layer = SGConv(D, l_max=60)
    filled = layer.to_empty(device="cpu")
    filled.load_state_dict(SGConv(D, l_max=60).state_dict())
    assert torch.isfinite(filled(torch.randn(1, 50, D))).all()
