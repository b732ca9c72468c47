"""Every layer: contract, causality, padding masks, casting, compile and export, learning."""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from layer_table import EVERY, LAYERS, D
from torch import nn

from seqconv import S4D, fftconv, param_groups, reference
from seqconv.layers import base, hyena

OPTIONS = {"plain": {}, "two-sided": {"bidirectional": True}, "heads": {"heads": 3}}


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


@pytest.mark.filterwarnings("ignore:.*steps or more away")
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
    for module in (base, hyena):
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
        ({"dropout": 1.5}, r"dropout must be a number from 0 to 1, got 1\.5"),
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
    with pytest.raises(ValueError, match=r"lengths must be between 0 and length=50, got 51$"):
        layer(x, lengths=lengths + 1)
    with pytest.raises(TypeError, match="lengths must be one of int64, int32"):
        layer(x, lengths=lengths.float())
    with pytest.raises(ValueError, match="mask and lengths exclude each other"):
        layer(x, padding, lengths=lengths)


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


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"discretization": "dss_softmax"}])
def test_an_s4d_without_a_recurrence_says_so(options):
    layer = S4D(D, **options)
    x, state = torch.randn(2, 9, D), S4D(D).init_state(2)
    calls = (lambda: layer.init_state(2), lambda: layer.step(x[:, 0], state=state))
    for call in (*calls, lambda: layer.prefill(x, state)):
        with pytest.raises(TypeError, match=r"S4D: .*has no recurrence; .*ha(s|ve)"):
            call()


@pytest.mark.filterwarnings("ignore:.*leaves out taps")
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
    with pytest.raises(
        TypeError, match=r"mask must be bool .* got torch.int64; .* mask == 0 is such"
    ):
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
    dtypes = {t.dtype for n, t in layer.state_dict().items() if not n.endswith("_extra_state")}
    assert dtypes == {torch.float32}


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


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_s4d_by_keops(keops):
    layer, other = S4D(D, bidirectional=True, backend="keops"), S4D(D, bidirectional=True)
    other.load_state_dict(layer.state_dict())
    x, results = torch.randn(2, 50, D), []
    for made in (layer, other):
        y = made(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), made.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


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
