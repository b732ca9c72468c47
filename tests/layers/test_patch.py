"""seqconv.patch on layers with the attributes and formulas of other packages': values, gradients, undo, the report."""

import copy
import math
from types import SimpleNamespace

import foreign_layers as foreign
import pytest
import torch
from torch import nn

import seqconv

CASES = {  # name -> a layer, the axis of its channels, lengths
    "s4d": (lambda: foreign.S4D(), 1, (37, 5)),
    "s4d, other layout": (lambda: foreign.S4D(transposed=False, act=nn.ReLU()), 2, (37,)),
    "fftconv": (lambda: foreign.FFTConv(), 1, (50, 7)),
    "fftconv, l_max": (lambda: foreign.FFTConv(L=20, channels=2), 1, (50, 20, 7)),
    "fftconv, two sides": (lambda: foreign.FFTConv(channels=2, bidirectional=True), 1, (30, 7)),
    "fftconv, two sides, l_max": (lambda: foreign.FFTConv(L=9, bidirectional=True), 1, (30, 7)),
    "fftconv, swapped": (
        lambda: foreign.FFTConv(channels=3, swap=True, transposed=False),
        2,
        (30,),
    ),
    "long_conv": (lambda: foreign.LongConv(channels=2), 1, (40, 25, 60)),
    "long_conv, two sides": (lambda: foreign.LongConv(bidirectional=True), 1, (40, 25, 60)),
    "long_conv, other layout": (
        lambda: foreign.LongConv(transposed=False, act=nn.Tanh()),
        2,
        (40,),
    ),
    "long_conv, standalone": (foreign.standalone_long_conv, 1, (40, 25)),
    "gconv": (lambda: foreign.GConv(heads=2), 1, (64, 20, 100)),
    "gconv, two sides": (lambda: foreign.GConv(bidirectional=True), 1, (64, 20)),
    "gconv, sum": (lambda: foreign.GConv(mode="sum_randn_nearest"), 1, (64, 20)),
    "gconv, learnable": (lambda: foreign.GConv(mode="cat_randn_learnable"), 1, (64,)),
    "gconv, linear": (lambda: foreign.GConv(linear=True), 1, (64,)),
    "hyena": (lambda: foreign.HyenaOperator(), 2, (40, 13, 60)),
    "hyena, order 4": (lambda: foreign.HyenaOperator(order=4, act=nn.GELU(), pair=True), 2, (40,)),
    "hyena, standalone": (lambda: foreign.HyenaOperator(order=3, interleaved=False), 2, (40, 13)),
    "cascade": (lambda: foreign.HyenaCascade(), 2, (40, 13)),
    "cascade, short": (lambda: foreign.HyenaCascade(taps=7, groups=4, split=True), 2, (40, 5)),
    "cascade, split": (lambda: foreign.HyenaCascade(split=True, interleave=False), 2, (40,)),
    "cascade, medium": (lambda: foreign.HyenaCascade(taps=128, groups=2, flip=True), 2, (150, 40)),
    "fla": (lambda: foreign.LongConvolution(), 2, (40, 13, 60)),
    "fla, implicit": (lambda: foreign.ImplicitLongConvolution(), 2, (40, 13)),
}


def first(y):
    return y[0] if isinstance(y, tuple) else y


def made(name):
    make, axis, lengths = CASES[name]
    torch.manual_seed(0)
    layer = make().double().eval()
    channels = 24 if "cascade" in name else 6
    shapes = [(2, channels, n) if axis == 1 else (2, n, channels) for n in lengths]
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    if "gconv" in name:
        layer(inputs[0])  # sets the kernel's norm
    return layer, inputs


def gradients(layer, x):
    x = x.clone().requires_grad_()
    wanted = [x, *layer.parameters()]
    return torch.autograd.grad(first(layer(x)).square().sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_undo(name):
    layer, inputs = made(name)
    # vortex computes its convolutions in float32 whatever the input is.
    close = {"rtol": 1e-4, "atol": 1e-4} if "cascade" in name else {"rtol": 1e-8, "atol": 1e-9}
    parameters, state = list(layer.parameters()), layer.state_dict()
    wanted, slopes = [layer(x) for x in inputs], gradients(layer, inputs[0])
    undo = seqconv.patch(layer, test=False)
    assert [row.name for row in undo.rows] == [""] and "forward" in vars(layer)
    for x, y in zip(inputs, wanted, strict=True):
        ours = layer(x)
        assert isinstance(ours, tuple) == isinstance(y, tuple) and first(ours).dtype == x.dtype
        assert first(y).std() > 0.01
        torch.testing.assert_close(first(ours), first(y), **close)
    for ours, theirs in zip(gradients(layer, inputs[0]), slopes, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            scale = theirs.abs().max().item()
            assert (ours - theirs).abs().max() <= max(close["rtol"], 1e-7) * scale
    assert all(p is q for p, q in zip(layer.parameters(), parameters, strict=True))
    assert layer.state_dict().keys() == state.keys()
    undo()
    assert "forward" not in vars(layer)
    assert all(torch.equal(first(layer(x)), first(y)) for x, y in zip(inputs, wanted, strict=True))
    undo()


@pytest.mark.parametrize("name", ["s4d", "long_conv", "gconv", "hyena", "fla"])
def test_our_convolution_runs(name, monkeypatch):
    """Outputs alone would not tell."""
    from seqconv.patching import gated, rule

    layer, inputs = made(name)
    calls = []

    def spy(*args, **options):
        calls.append(options)
        return seqconv.fftconv(*args, **options)

    for module in (gated, rule):
        monkeypatch.setattr(module, "fftconv", spy)
    layer(inputs[0])
    assert not calls
    seqconv.patch(layer, test=False)
    layer(inputs[0])
    assert calls
    if name == "hyena":
        assert calls[-1]["pre_gate"] is not None and calls[-1]["post_gate"] is not None


def test_dropout_and_training():
    layer, (x, *_) = made("hyena")
    optimizer = torch.optim.SGD(layer.parameters(), 1e-5)
    seqconv.patch(layer, test=False)
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), y) and not torch.equal(layer(x), y)
    before = layer.eval()(x)
    layer(x).square().sum().backward()
    optimizer.step()
    assert layer(x).square().sum() < before.square().sum()


def test_lengths_states_and_masks_are_as_before():
    layer, (x, *_) = made("long_conv")
    lengths = torch.tensor([40, 11])
    wanted = layer(x, lengths=lengths)[0]
    seqconv.patch(layer, test=False)
    torch.testing.assert_close(layer(x, lengths=lengths)[0], wanted)
    torch.testing.assert_close(layer(x, rate=2.0)[0], type(layer).forward(layer, x, rate=2.0)[0])
    layer, (x, *_) = made("fftconv")
    seqconv.patch(layer, test=False)
    assert layer(x, state=1)[1] == "state"
    for name in ("cascade", "cascade, short", "cascade, medium"):
        layer, (x, *_) = made(name)
        mask = (torch.arange(x.shape[1]) < torch.tensor([[x.shape[1]], [20]])).double()
        wanted = layer(x, None, mask)[0]
        seqconv.patch(layer, test=False)
        torch.testing.assert_close(layer(x, None, mask)[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cascade", "cascade, short", "cascade, medium"])
def test_caches_hold_the_same_states(name):
    layer, inputs = made(name)

    def run():
        caches = ("fir_state_dict", "fir_inner_state_dict", "state_dict")
        cache = SimpleNamespace(**{cache: {} for cache in caches})
        y, same = layer(inputs[-1], cache)
        assert same is cache
        assert layer(inputs[-1][:, :1], cache)[0] == "a step"  # those are the layer's own
        return [y, *[t for found in vars(cache).values() for t in found.values()]]

    wanted = run()
    seqconv.patch(layer, test=False)
    found = run()
    assert len(wanted) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


def test_report(capsys):
    other = foreign.HyenaOperator()
    other.num_blocks = 2
    fresh = foreign.GConv()
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(foreign.LongConv(), nn.Linear(3, 3)),
            "b": foreign.HyenaOperator(),
            "c": other,
            "d": fresh,
            "e": Own(),
            "f": seqconv.S4D(4),
        }
    )
    model.train()
    torch.manual_seed(5)
    wanted = torch.randn(3)
    torch.manual_seed(5)
    report = seqconv.patch(model, length=30, batch=2, repeats=3)
    assert torch.equal(torch.randn(3), wanted)  # The program's random numbers are untouched.
    assert all(module.training for module in model.modules()) and not fresh.kernel_norm_initialized
    assert all(p.grad is None for p in model.parameters())
    assert [(row.name, row.kind, row.package) for row in report.rows] == [
        ("a.0", "LongConv", "safari"),
        ("b", "HyenaOperator", "safari, HyenaDNA"),
    ]
    for row in report.rows:
        assert 0 <= row.error < 1e-5 and min(row.ms) > 0 and min(row.mib) > 0
    assert report.left == [
        ("c", "HyenaOperator", "num_blocks is 2"),
        ("d", "GConv", "its kernel's norm is set by a first forward"),
        ("e", "Own", "unknown"),
    ]
    print(report)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].split()[:3] == ["layer", "class", "error"]
    assert lines[1].startswith("a.0 ") and lines[3] == "left: c (HyenaOperator): num_blocks is 2"
    # Patched once more, the layers are left alone.
    again = seqconv.patch(model, test=False)
    assert not again.rows and again.left[0] == ("a.0", "LongConv", "it has a forward of its own")
    report.undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_compute_something_else_are_left_alone(monkeypatch):
    from seqconv.patching import rule

    right = rule.wrapped
    monkeypatch.setattr("seqconv.patching.long.wrapped", lambda *a, **o: 1.5 * right(*a, **o))
    layer = foreign.FFTConv()
    report = seqconv.patch(layer)
    assert not report.rows and "forward" not in vars(layer)
    ((name, kind, why),) = report.left
    assert (name, kind) == ("", "FFTConv") and "computes something else" in why
    assert float(why.split()[-1]) > 0.01
    assert len(seqconv.patch(layer, test=False).rows) == 1  # Nobody looked.
    monkeypatch.undo()

    class S4D(foreign.S4D):  # somebody's own version
        def forward(self, u, *args, **kwargs):
            return super().forward(2 * u, *args, **kwargs)

    report = seqconv.patch(nn.Sequential(S4D(8), foreign.LongConv()), length=30)
    assert [row.kind for row in report.rows] == ["LongConv"]
    assert [(name, kind) for name, kind, _ in report.left] == [("0", "S4D")]


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda y, u, gate: y[0], "returns"),
        (lambda y, u, gate: (y[0], u.sum()), "returns"),
        (lambda y, u, gate: (y[0].double(), y[1]), "returns"),
        (lambda y, u, gate: (y[0][..., 1:-3], y[1]), "returns"),
        (lambda y, u, gate: (y[0] + gate * u, y[1]), "the gradient of gate would be another"),
        (lambda y, u, gate: (y[0] + 1e-2, y[1]), "outputs would differ"),
    ],
)
def test_changes_of_a_layer_that_its_test_sees(change, why):
    class S4D(foreign.S4D):
        def __init__(self, d_model):
            super().__init__(d_model)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, u, *args, **kwargs):
            return change(super().forward(u, *args, **kwargs), u, self.gate)

    model = nn.ModuleList([S4D(8), foreign.LongConv()])
    report = seqconv.patch(model, length=30)
    assert [row.kind for row in report.rows] == ["LongConv"]
    ((_, _, told),) = report.left
    assert why in told


def test_outputs_that_are_no_numbers_are_no_reason():
    layer = foreign.FFTConv()
    with torch.no_grad():
        layer.D.fill_(torch.nan)
    assert len(seqconv.patch(layer).rows) == 1


def test_outputs_that_are_zero_and_the_memory_of_both(monkeypatch):
    layer, _ = made("hyena")
    with torch.no_grad():
        layer.out_proj.weight.zero_()
        layer.out_proj.bias.zero_()
    assert [row.error for row in seqconv.patch(layer).rows] == [0.0]
    # The minimal S4D makes a complex tensor (channels, modes, length) there, and none here.
    row = seqconv.patch(foreign.S4D(8, modes=64), length=2000, repeats=1).rows[0]
    assert row.mib[0] > 8 * 8 * 64 * 2000 / 2**20 > 4 * row.mib[1]


def test_copies_compute_with_their_own_parameters():
    layer, (x, *_) = made("hyena")
    seqconv.patch(layer, test=False)
    y = layer(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.out_proj.weight.zero_()
    assert torch.equal(layer(x), y) and not torch.equal(twin(x), y)


def test_a_failed_patch_leaves_the_model_as_it_was():
    bad = foreign.LongConv()
    bad.L = "no"
    model = nn.Sequential(foreign.FFTConv(), bad)
    with pytest.raises(TypeError):
        seqconv.patch(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_contract():
    with pytest.raises(TypeError, match=r"patch: model must be a torch.nn.Module, got int"):
        seqconv.patch(1)
    with pytest.raises(ValueError, match="patch: length must be an integer >= 1, got 0"):
        seqconv.patch(nn.Linear(1, 1), length=0)
    with pytest.raises(ValueError, match="patch: test must be True or False"):
        seqconv.patch(nn.Linear(1, 1), test=1)
    row = seqconv.patch(foreign.LongConvolution(), test=False).rows[0]
    assert math.isnan(row.error) and all(map(math.isnan, (*row.ms, *row.mib)))
