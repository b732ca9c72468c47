"""ButterflyConv, on the CPU and through CUDA's road in the emulator."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from accuracy import rel_l2
from emulated import OnDevice
from torch import nn

from seqconv import ButterflyConv, LongConv, param_groups, reference, use_backend
from seqconv.layers.butterfly_conv import Butterfly, fourier, radices

D = 6
OPTIONS = {
    "plain": {},
    "heads": {"heads": 3, "butterfly_heads": 2},
    "additive": {"additive": True, "butterfly_heads": 3},
    "silu": {"activation": "silu", "postact": None},
    "relu inside": {"dft_activation": "relu", "butterfly_heads": 2},
}


def make(**options) -> ButterflyConv:
    return ButterflyConv(D, **{"l_max": 80, "kernel_dropout": 0.0} | options)


def perturb(layer: nn.Module, size: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "matrices" in name:
                p += size * torch.randn_like(p)
    return layer


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(2, 80), (3, 1), (0, 10), (2, 0)])
def test_shape_and_gradients_of_every_parameter(options, shape):
    x = torch.randn(*shape, D, requires_grad=True)
    layer = make(**options)
    y = layer(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    y.square().sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
    if x.numel() and shape[1] > 1:
        assert x.grad.any() and all(p.grad.any() for p in layer.parameters())


def exact_twin(layer: ButterflyConv, **options) -> LongConv:
    twin = LongConv(D, l_max=layer.l_max, kernel_dropout=0.0, **options)
    state = layer.state_dict().items()
    twin.load_state_dict({name: t for name, t in state if "transform" not in name})
    return twin


@pytest.mark.parametrize("l_max, length", [(80, 80), (80, 57), (65, 65), (64, 64), (1, 1), (9, 2)])
@pytest.mark.parametrize("options", [{}, {"heads": 2, "activation": "relu"}], ids=str)
def test_begins_as_the_exact_convolution(options, l_max, length):
    layer = make(l_max=l_max, butterfly_heads=3, **options)
    x = torch.randn(2, length, D)
    wanted = exact_twin(layer, **options)(x)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


def test_begins_as_the_exact_convolution_in_float64(float64):
    for l_max in (80, 1000):
        layer = make(l_max=l_max, heads=2)
        x = torch.randn(2, l_max, D)
        torch.testing.assert_close(layer(x), exact_twin(layer, heads=2)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_is_its_formula(options, float64):
    """Learned matrices; every channel with those of its own head."""
    layer, x = perturb(make(**options)), torch.randn(2, 70, D)
    spectra = []
    for part, rows in ((layer.input_transform, x.mT), (layer.kernel_transform, layer.kernel(80))):
        shared = D // options.get("butterfly_heads", 1)
        channels = []
        for i in range(D):
            factors = {}
            for size, matrix in part.matrices.items():
                own = matrix[i // shared, None]
                extra = fourier(int(size)) if options.get("additive") else 0
                factors[int(size)] = own + extra
            inside = options.get("dft_activation")
            channels.append(reference.butterfly(rows[:, i : i + 1], factors, part.radices, inside))
        spectra.append(torch.view_as_complex(torch.cat(channels, 1)))
    product = spectra[0][:, None] * spectra[1]
    v = torch.fft.ifft(product).real[..., :70] + layer.skip[..., None] * x.mT[:, None]
    h = (F.silu if options.get("activation") == "silu" else F.gelu)(v).permute(0, 3, 1, 2)
    h = h.flatten(2) @ layer.linear.weight.T + layer.linear.bias
    if layer.postact == "glu":
        first, gate = h.chunk(2, -1)
        h = first * torch.sigmoid(gate)
    torch.testing.assert_close(layer(x), h, rtol=1e-10, atol=1e-10)


def test_activation_after_every_pass(float64):
    """32 = 16 x 2 points as two sums written out, silu of both parts after each."""
    transform = perturb(Butterfly(32, activation="silu"))
    x = torch.randn(1, 1, 30)
    f16, f2 = (torch.view_as_complex(transform.matrices[m][0]) for m in ("16", "2"))

    def silu(z):
        return torch.complex(F.silu(z.real), F.silu(z.imag))

    rows = F.pad(x, (0, 2)).reshape(16, 2).to(f16.dtype)  # time 2 i + s
    turns = torch.outer(torch.arange(16.0), torch.arange(2.0)) * (-2 * math.pi / 32)
    first = silu(f16 @ rows * torch.polar(torch.ones_like(turns), turns))
    second = silu(first @ f2.T)  # (p, q): frequency p + 16 q
    torch.testing.assert_close(torch.view_as_complex(transform(x))[0, 0], second.T.flatten())
    linear = Butterfly(32)
    linear.matrices.load_state_dict(transform.matrices.state_dict())
    assert rel_l2(transform(x), linear(x)) > 0.1


def test_causal_at_first_and_no_longer_once_learned(float64):
    """Also that the learned layer is no convolution: a shifted input does not give a shifted output."""
    layer, x = make(activation=None, postact=None), torch.zeros(1, 80, D)
    x[:, 10:30] = torch.randn(20, D)
    moved = x.clone()
    moved[:, 50:] += 10
    shifted = x.roll(5, 1)

    def differences():
        y = layer(x)
        early = (layer(moved) - y)[:, :50].abs().max()
        return early, (layer(shifted) - y.roll(5, 1))[:, 5:].abs().max()

    early, change = differences()
    assert early < 1e-10 and change < 1e-10
    assert (layer(moved) - layer(x))[:, 50:].abs().min() > 1e-6
    perturb(layer)
    early, change = differences()
    assert early > 1e-2 and change > 1e-2


@pytest.mark.parametrize(
    "l_max, sizes, count",
    [
        (1024, [16, 8], 1280),  # 2048 = 16 x 16 x 8
        (1000, [16, 8], 1280),
        (2048, [16], 1024),  # 16 x 16 x 16
        (4096, [16, 2], 1040),  # 16 x 16 x 16 x 2
        (100, [16], 1024),  # 16 x 16
        (16, [16, 2], 1040),
        (500, [16, 4], 1088),
        (3, [8], 256),
        (1, [2], 16),
    ],
)
def test_only_the_sizes_that_occur_are_parameters(l_max, sizes, count):
    layer = make(l_max=l_max)
    for part in (layer.input_transform, layer.kernel_transform):
        assert [p.shape for p in part.parameters()] == [(1, m, m, 2) for m in sizes]
        n = math.prod(part.radices)
        assert 2 * l_max - 1 <= n < 4 * l_max and n & (n - 1) == 0
    total = lambda layer: sum(  # noqa: E731
        p.numel() for name, p in layer.named_parameters() if "matrices" in name
    )
    assert total(layer) == count and total(make(l_max=l_max, butterfly_heads=3)) == 3 * count
    before = {name: p.shape for name, p in layer.state_dict().items()}
    layer(torch.zeros(1, max(l_max // 3, 1), D))
    assert {name: p.shape for name, p in layer.state_dict().items()} == before


def test_radices():
    assert [radices(n) for n in (2, 16, 2048, 4096, 8192, 32768, 131072)] == [
        (2,),
        (16,),
        (16, 16, 8),
        (16,) * 3,
        (16, 16, 16, 2),
        (16, 16, 16, 8),
        (16, 16, 16, 16, 2),
    ]


def test_initialisation():
    for size, matrix in Butterfly(2048, heads=2).matrices.items():
        wanted = torch.fft.fft(torch.eye(int(size), dtype=torch.float64))
        for head in torch.view_as_complex(matrix.double()):
            torch.testing.assert_close(head, wanted, rtol=0, atol=1e-7)
    learned = Butterfly(4096, heads=50, additive=True)
    assert abs(learned.matrices["16"].std() / 0.01 - 1) < 0.05
    x = torch.randn(2, 50, 1000)
    distance = rel_l2(learned(x), torch.view_as_real(torch.fft.fft(x, 4096)))
    # three passes, each with an error of 0.01 sqrt(2 x 16) beside a matrix of norm 4
    assert 0.015 < distance < 0.04


@pytest.mark.parametrize("additive", [False, True])
def test_dft_dropout(additive):
    part = Butterfly(256, heads=20, additive=additive, dropout=0.25)
    seen = []
    part.matrices["16"].register_hook(lambda g: seen.append(g != 0))
    x = torch.randn(1, 20, 256)
    part(x).square().sum().backward()
    assert abs(seen[0].float().mean() - 0.75) < 0.03
    assert not torch.equal(part(x), part(x))
    part.eval()
    assert torch.equal(part(x), part(x))
    dry = Butterfly(256, heads=20, additive=additive)
    dry.load_state_dict(part.state_dict())
    assert torch.equal(part(x), dry(x))


@pytest.mark.parametrize("side", ["left", "right"])
def test_mask(side):
    layer = perturb(make())
    x, padding = torch.randn(2, 50, D), torch.zeros(2, 50, dtype=torch.bool)
    padding[0, 30:] = True
    if side == "left":
        padding = padding.flip(1)
    hidden = padding.unsqueeze(-1)
    wanted = layer(x.masked_fill(hidden, 0))
    noisy = torch.where(hidden, torch.tensor(torch.nan), x)
    assert torch.equal(layer(noisy, padding), wanted)
    assert not torch.allclose(layer(x), wanted)
    additive = torch.zeros(2, 50).masked_fill(padding, -torch.inf)
    assert torch.equal(layer(noisy, mask=additive), wanted)
    if side == "right":
        assert torch.equal(layer(noisy, lengths=torch.tensor([30, 50])), wanted)
        # zeros behind an input change nothing: not even learned transforms see how long it is
        torch.testing.assert_close(wanted[:1, :30], layer(x[:1, :30]), rtol=1e-4, atol=1e-5)


def test_contract():
    layer = make()
    with pytest.raises(
        ValueError, match=r"x must be \(batch, length, d_model=6\), got \(2, 9, 5\)"
    ):
        layer(torch.zeros(2, 9, 5))
    with pytest.raises(ValueError, match=r"x must have length <= l_max=80, got length=81"):
        layer(torch.zeros(2, 81, D))
    for dtype in (torch.int64, torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match=r"x must be .*float32.* got (int64|bfloat16|float64)"):
            layer(torch.zeros(2, 10, D, dtype=dtype))
    with pytest.raises(ValueError, match="rate must be 1"):
        layer(torch.zeros(2, 10, D), rate=2.0)
    for options in ({"unknown": 1}, {"bidirectional": True}):
        with pytest.raises(TypeError, match=next(iter(options))):
            make(**options)
    with pytest.raises(TypeError):
        ButterflyConv(D, 80)
    for name in ("l_max", "heads", "butterfly_heads"):
        for value in (0, -1, 1.5, True):
            with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
                make(**{name: value})
    with pytest.raises(ValueError, match="butterfly_heads must divide d_model=6, got 4"):
        make(butterfly_heads=4)
    with pytest.raises(ValueError, match="additive must be True or False, got 1"):
        make(additive=1)
    with pytest.raises(ValueError, match=r"dft_activation must be one of .* got 'tanh'"):
        make(dft_activation="tanh")
    with pytest.raises(ValueError, match=r"dropout must be a number from 0 to 1, got 1\.5"):
        make(dft_dropout=1.5)
    for n in (1, 12):
        with pytest.raises(ValueError, match=f"n must be a power of two >= 2, got {n}"):
            Butterfly(n)


@pytest.mark.parametrize("additive", [False, True])
def test_state_dict_copies_and_pickles(additive):
    layer, other = perturb(make(additive=additive)), make(additive=additive)
    x = torch.randn(2, 33, D)
    assert not torch.allclose(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert not any(p.is_complex() for p in layer.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("additive", [False, True])
def test_matrices_stay_float32_in_half_precision(dtype, additive):
    layer = make(additive=additive).eval()
    x = torch.randn(2, 60, D).to(dtype)
    wanted = layer(x.float())
    layer.to(dtype)
    kept = [p for name, p in layer.named_parameters() if "matrices" in name or "kernel" in name]
    assert len(kept) == 3 and all(p.dtype == torch.float32 for p in kept)
    assert layer.linear.weight.dtype == layer.skip.dtype == dtype
    y = layer(x)
    assert y.dtype == dtype
    assert (y.float() - wanted).norm() < 2e-2 * wanted.norm()
    y.float().square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_autocast_trains():
    layer, x = make(), torch.randn(2, 60, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.input_transform(x.mT).dtype == torch.float32
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - layer(x)).norm() < 2e-2 * y.float().norm()
    y.float().square().sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in layer.parameters()
    )


@pytest.mark.parametrize(
    "options", [{"heads": 2}, {"additive": True}, {"dft_activation": "gelu"}], ids=str
)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.one_of(2)
def test_compile_and_export(options):
    torch._dynamo.reset()
    layer, x = perturb(make(butterfly_heads=2, **options)), torch.randn(2, 50, D)

    def gradients(function):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        return [leaf.grad, *[p.grad for p in layer.parameters()]]

    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients(compiled), gradients(layer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=80)}
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes={"x": sizes})
    for length in (80, 31):
        other = torch.randn(3, length, D)
        torch.testing.assert_close(program.module()(other), layer(other), rtol=1e-4, atol=1e-5)


def test_param_groups():
    model = nn.Sequential(nn.Linear(1, D), make(dft_lr=5e-4, kernel_lr=2e-3))
    groups = param_groups(model, lr=1e-2, weight_decay=0.05)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        wanted = (1e-2, 0.05)
        if "matrices" in name:
            wanted = (5e-4, 0.0)
        elif name.endswith("kernel.kernel"):
            wanted = (2e-3, 0.0)
        assert found[id(parameter)] == wanted, name


def test_learns_a_delayed_copy():
    """Two layers, in seconds: y[t] = x[t - 20], which no pointwise map can do."""
    delay, length = 20, 64
    layers = [make(l_max=length), make(l_max=length, additive=True)]
    before = copy.deepcopy([dict(part.input_transform.named_parameters()) for part in layers])
    model = nn.Sequential(nn.Linear(1, D), *layers, nn.Linear(D, 1))
    optimizer = torch.optim.AdamW(param_groups(model, 2e-2))
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * 0.5 * (1 + math.cos(math.pi * step / 300))
        x = torch.randn(16, length, 1)
        loss = F.mse_loss(model(x)[:, delay:], x[:, :-delay])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # predicting nothing gives 1
    for part, old in zip(layers, before, strict=True):
        assert all(
            (p - old[name]).abs().max() > 1e-3
            for name, p in part.input_transform.named_parameters()
        )


def test_gradients_of_the_layer(float64):
    layer = perturb(ButterflyConv(2, l_max=4, kernel_dropout=0.0, lam=0.0, butterfly_heads=2))
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(1, 3, 2, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func.jvp
def test_functional_transforms(float64):
    layer, x = perturb(make(l_max=16, butterfly_heads=2)), torch.randn(3, 2, 11, D)
    loss = lambda x: layer(x).square().sum()  # noqa: E731

    def gradient(x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    each = torch.stack([gradient(part) for part in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), each)
    step = 1e-5
    slope = (gradient(x[0] + step * x[1]) - gradient(x[0] - step * x[1])) / (2 * step)
    _, tangent = torch.func.jvp(torch.func.grad(loss), (x[0],), (x[1],))
    torch.testing.assert_close(tangent, slope, rtol=1e-6, atol=1e-6)
    leaf = x[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf, x[1])
    torch.testing.assert_close(second, slope, rtol=1e-6, atol=1e-6)


@pytest.fixture
def on_cuda(emulator):
    """CPU tensors on CUDA's road from the operator down, with the emulator in the driver's place."""
    device = emulator.device()
    with use_backend(OnDevice(device)):
        yield device


@pytest.mark.parametrize("l_max", [128, 100, 40])
def test_the_layer_on_cudas_road(on_cuda, l_max):
    layer = perturb(make(l_max=l_max, heads=2, butterfly_heads=3))
    exact = copy.deepcopy(layer).double()
    x = torch.randn(9, l_max - 3, D)

    def results(layer, x):
        y = layer(x.requires_grad_())
        y.square().sum().backward()
        return [y, x.grad, *[p.grad for p in layer.parameters()]]

    ours = results(layer, x.clone())
    names = [launch[0] for launch in on_cuda.launches]
    assert names == ["butterfly"] * 2 + ["butterfly_backward"] * 2
    with use_backend("reference"):
        theirs = results(exact, x.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32 and rel_l2(a, b) < 2e-6
