"""LongConv's kernel: both smoothings against plain loops, their order, initial statistics, taps that are dead."""

import cmath
import math
import warnings

import pytest
import torch

from seqconv import LongConv, LongConvKernel, param_groups
from seqconv.layers import long_conv

D = 6
SMOOTH = ["time", "frequency"]


@pytest.fixture(autouse=True)
def warned(monkeypatch):
    """Kernels that are mostly dead are wanted here, but for one test."""
    monkeypatch.setattr(long_conv, "_warned", True)


def smoothed(k, kind, window):
    """One row (taps,), by the definition."""
    n, reach = len(k), window // 2
    if kind == "time":
        inside = [[k[j + i] for i in range(-reach, reach + 1) if 0 <= j + i < n] for j in range(n)]
        return torch.tensor([sum(taps) / window for taps in inside], dtype=torch.float64)
    turn = -2j * math.pi / n
    spectrum = [sum(k[j] * cmath.exp(turn * f * j) for j in range(n)) for f in range(n // 2 + 1)]
    mixed = [
        sum(
            math.exp(-0.5 * i * i) * spectrum[f + i]
            for i in range(-reach, reach + 1)
            if 0 <= f + i < len(spectrum)
        )
        for f in range(len(spectrum))
    ]
    # The other half of a real row's spectrum is the conjugate; frequencies 0 and n / 2 are real.
    whole = [mixed[f] if f < len(mixed) else mixed[n - f].conjugate() for f in range(n)]
    whole[0] = whole[0].real
    if n % 2 == 0:
        whole[n // 2] = whole[n // 2].real
    row = [sum(whole[f] * cmath.exp(-turn * f * j) for f in range(n)) / n for j in range(n)]
    return torch.tensor([value.real for value in row], dtype=torch.float64)


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("length", [1, 2, 7, 30, 31, 40])
@pytest.mark.parametrize("window", [1, 7, 9])
def test_kernel_is_its_formula(smooth, length, window):
    """Cut, smooth, squash: what is cut off neither smooths nor wraps, for odd lengths too."""
    options = {"smooth": smooth, "smooth_window": window, "lam": 0.003}
    kernel = LongConvKernel(2, l_max=31, heads=2, init="random", **options).double().eval()
    with torch.no_grad():
        kernel.kernel.mul_(10)
    k = kernel(length)
    assert k.shape == (2, 2, min(length, 31))
    for head in range(2):
        for channel in range(2):
            row = smoothed(kernel.kernel[head, channel, :length].tolist(), smooth, window)
            wanted = row.sign() * (row.abs() - 0.003).clamp(min=0)
            torch.testing.assert_close(k[head, channel], wanted, rtol=1e-6, atol=1e-9)
    assert (k == 0).any() or length < 30


@pytest.mark.parametrize("smooth", SMOOTH)
def test_smoothing_is_a_setting_and_no_state(smooth):
    layer = LongConv(D, l_max=40, smooth=smooth, kernel_dropout=0.0)
    plain = LongConv(D, l_max=40, kernel_dropout=0.0)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        plain.kernel.kernel.copy_(layer.kernel.kernel)
    with pytest.raises(RuntimeError, match="smooth is None here and"):
        plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 33, D)
    assert (plain(x) - layer(x)).abs().max() > 1e-4
    before = layer.kernel(33)
    assert torch.equal(layer.to(torch.bfloat16).kernel(33), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.kernel(33), before)
    groups = param_groups(layer, 1e-2, weight_decay=0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(3, 0.1), (1, 0.0)]


@pytest.mark.parametrize(
    "smooth", [pytest.param("time", marks=(pytest.mark.slow, pytest.mark.one_of(2))), "frequency"]
)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.one_of(2)
def test_smoothed_layer_trains_compiles_and_exports(smooth):
    torch._dynamo.reset()
    layer = LongConv(D, l_max=80, smooth=smooth, bidirectional=True, kernel_dropout=0.0)
    for length in (0, 1, 50, 80, 131):
        layer.zero_grad()
        layer(torch.randn(2, length, D)).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        assert length < 50 or layer.kernel.kernel.grad.any()
    # The compiler for all of it once. Other lengths are other graphs, which are traced and run as they are.
    for length, backend in ((80, "inductor"), (131, "aot_eager"), (51, "aot_eager")):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        x = torch.randn(2, length, D)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=79)}}
    program = torch.export.export(layer.eval(), (x[:, :51],), dynamic_shapes=shapes)
    other = torch.randn(2, 78, D)
    torch.testing.assert_close(program.module()(other), layer(other), rtol=1e-4, atol=1e-5)


def test_dropout_comes_last():
    """Dropped taps are 0 and the others scaled: dropped before the average there would be no zero."""
    kernel = LongConvKernel(D, l_max=400, smooth="time", lam=0.0, kernel_dropout=0.25)
    trained, plain = kernel(400), kernel.eval()(400)
    assert abs((trained == 0).float().mean() - 0.25) < 0.05
    torch.testing.assert_close(trained, torch.where(trained == 0, 0.0, plain / 0.75))


def test_random_initialisation_and_its_dead_taps():
    for lam, dead in ((0.001, 0.38), (0.002, 0.68), (0.003, 0.87), (0.004, 0.95)):
        kernel = LongConvKernel(4, l_max=20_000, init="random", lam=lam, kernel_dropout=0.0)
        std = kernel.kernel.std(-1)
        assert ((std - 0.002).abs() < 5e-5).all() and kernel.kernel.mean().abs() < 5e-5
        k = kernel(20_000)
        assert abs((k == 0).float().mean() - dead) < 0.01
        k.sum().backward()
        assert torch.equal(kernel.kernel.grad == 0, kernel.kernel.abs() <= lam)
    for lam, dead in ((0.001, 0.04), (0.004, 0.16)):  # where the default has not decayed yet
        kernel = LongConvKernel(4000, l_max=200, lam=lam, kernel_dropout=0.0)
        assert abs((kernel(200)[..., 0] == 0).float().mean() - dead) < 0.02


@pytest.mark.parametrize("smooth", SMOOTH)
def test_smoothing_revives_dead_taps(smooth):
    """A tap of 0 among large ones has no gradient by itself, and has one through its neighbours."""
    gradients = {}
    for kind in (None, smooth):
        kernel = LongConvKernel(1, l_max=41, lam=0.01, smooth=kind, kernel_dropout=0.0)
        with torch.no_grad():
            kernel.kernel.fill_(1.0)
            kernel.kernel[..., 4] = 0.0
        kernel(41).sum().backward()
        gradients[kind] = kernel.kernel.grad[0, 0, 4].item()
    assert gradients[None] == 0 and abs(gradients[smooth]) > 1e-2


def test_a_kernel_that_is_dead_from_the_start_warns_once(monkeypatch):
    monkeypatch.setattr(long_conv, "_warned", False)
    LongConv(256, l_max=1000, bidirectional=True)  # the defaults are fine
    LongConvKernel(D, l_max=1000, init="random")
    with torch.device("meta"):
        LongConv(D, l_max=1000, lam=9.0)
    message = r"lam=0\.004 squashes 9[56]% of the taps .* no gradient and will never move, unless smoothing"
    with pytest.warns(UserWarning, match=message) as caught:
        LongConv(D, l_max=10_000, init="random", lam=0.004)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LongConv(D, l_max=1000, init="random", lam=0.1)


def test_options_are_checked():
    for options, message in (
        ({"init": "ones"}, "init must be one of 'double_exp', 'random', got 'ones'"),
        ({"smooth": "both"}, "smooth must be one of None, 'time', 'frequency', got 'both'"),
        ({"smooth": "time", "smooth_window": 4}, "smooth_window must be odd, got 4"),
        ({"smooth_window": 0}, "smooth_window must be an integer >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LongConv(D, l_max=9, **options)


@pytest.mark.filterwarnings("ignore:.*steps or more away")
def test_gradients_are_finite_without_a_threshold():
    for options in ({"lam": 0.0}, {"lam": 0.0, "smooth": "frequency"}):
        layer = LongConv(4, l_max=30, **options)
        for length in (1, 30, 40):
            layer.zero_grad()
            layer(1e10 * torch.randn(1, length, 4)).sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
