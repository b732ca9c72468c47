"""seqconv.nn.Conv1d and conv1d_taps against torch's layer, in float64."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from seqconv import fftconv
from seqconv.convert import conv1d_taps
from seqconv.nn import Conv1d

F64 = {"dtype": torch.float64}
PADDINGS = ["same", "valid", 1, 6, 40, (2,)]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def depthwise(taps, channels=3, multiplier=1, **options):
    options = F64 | options
    return nn.Conv1d(channels, multiplier * channels, taps, groups=channels, **options)


def outcome(conv, x):
    """The output, if it is contiguous, and the gradients of everything; or the error."""
    leaves = [x.clone().requires_grad_(), *conv.parameters()]
    try:
        y = conv(leaves[0])
    except Exception as error:
        return [type(error), str(error)]
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    return [y.is_contiguous(), y, *torch.autograd.grad((weights * y).sum(), leaves)]


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
def test_every_option_is_torchs(padding_mode, padding):
    """Where torch refuses (padding as long as a reflected row, a kernel longer than its row), so does Conv1d."""
    computed = 0
    strides = (1,) if padding == "same" else (1, 3)
    channels = itertools.cycle([(3, 1, True), (2, 2, False), (1, 3, True)])
    products = itertools.product((1, 4, 5, 40), (1, 3), strides, (0, 3, 60))
    for (taps, dilation, stride, length), case in zip(products, channels, strict=False):
        n, multiplier, bias = case
        options = {"padding": padding, "padding_mode": padding_mode, "bias": bias}
        conv = depthwise(taps, n, multiplier, stride=stride, dilation=dilation, **options)
        x = torch.randn(2, n, length, **F64)
        wanted = outcome(conv, x)
        ours = outcome(Conv1d.from_torch(conv), x)
        case = f"{conv} at length {length}"
        assert len(ours) == len(wanted) and ours[0] == wanted[0], (case, ours[:2], wanted[:2])
        for one, other in zip(ours[1:], wanted[1:], strict=True):
            if isinstance(one, str):
                assert one == other, case
                continue
            computed += 1
            text = lambda message: f"{case}: {message}"  # noqa: E731, B023
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=text)
    assert computed > 25


@pytest.mark.parametrize("options", [{"padding": -1}, {"dilation": 0}, {"stride": 0}], ids=str)
def test_what_torch_refuses_at_last(options):
    conv, x = depthwise(3, **options), torch.randn(1, 3, 9, **F64)
    wanted = outcome(conv, x)
    assert wanted[0] is RuntimeError and outcome(Conv1d.from_torch(conv), x) == wanted


@pytest.mark.parametrize("shape", [(3, 50), (0, 3, 50), (2, 3, 50)], ids=str)
def test_shapes(shape):
    conv = depthwise(9, padding=2)
    fast, x = Conv1d.from_torch(conv), torch.randn(shape, **F64)
    torch.testing.assert_close(fast(x), conv(x))
    strided = torch.randn(*shape[:-1], 100, **F64)[..., ::2]
    torch.testing.assert_close(fast(strided), conv(strided))


def test_takes_the_place_of_torchs_by_name():
    """Same arguments, same initial weights from one seed, and checkpoints of either load into the other."""
    arguments = (4, 8, 35, 1, "same", 2, 4)
    torch.manual_seed(3)
    conv = nn.Conv1d(*arguments, **F64)
    torch.manual_seed(3)
    fast = Conv1d(*arguments, **F64)
    assert inspect.signature(Conv1d) == inspect.signature(nn.Conv1d) and isinstance(fast, nn.Conv1d)
    assert str(fast) == str(conv)
    for name, tensor in conv.state_dict().items():
        assert torch.equal(tensor, fast.state_dict()[name])
    other = nn.Conv1d(*arguments, **F64)
    x = torch.randn(2, 4, 100, **F64)
    assert (other(x) - fast(x)).abs().max() > 1e-2
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(x), other(x))
    conv.load_state_dict(fast.state_dict())
    torch.testing.assert_close(conv(x), other(x))


def test_from_torch_shares_the_parameters():
    conv = depthwise(9).eval()
    conv.weight.requires_grad_(False)
    fast = Conv1d.from_torch(conv)
    assert fast.weight is conv.weight and fast.bias is conv.bias and not fast.training
    assert Conv1d.from_torch(depthwise(9, bias=False)).bias is None
    x = torch.randn(1, 3, 40, **F64)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin.weight is not fast.weight and torch.equal(twin(x), fast(x))
    with torch.device("meta"):
        assert Conv1d.from_torch(nn.Conv1d(3, 3, 9, groups=3))(torch.randn(1, 3, 40)).is_meta


def test_parametrizations_of_the_replacement():
    x = torch.randn(2, 3, 60, **F64)
    conv = depthwise(35)
    fast = weight_norm(copy.deepcopy(Conv1d.from_torch(conv)))
    conv = weight_norm(conv)
    fast.load_state_dict(conv.state_dict())
    torch.testing.assert_close(outcome(fast, x), outcome(conv, x))
    with pytest.raises(TypeError, match=r"without parametrizations, got .*ParametrizedConv1d"):
        Conv1d.from_torch(conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    conv = depthwise(129, padding="same", dtype=dtype)
    x = torch.randn(2, 3, 400, dtype=dtype)
    y = Conv1d.from_torch(conv)(x)
    error = (y.double() - copy.deepcopy(conv).double()(x.double())).norm() / y.double().norm()
    assert y.dtype == dtype and error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast(given):
    """torch's dtype; the result has one rounding of the input and one or two of the output."""
    conv, x = depthwise(65, padding=9, dtype=torch.float32), torch.randn(2, 3, 300).to(given)
    fast = Conv1d.from_torch(conv)
    with torch.autocast("cpu", torch.bfloat16):
        y, theirs = fast(x), conv(x)
    assert y.dtype == theirs.dtype == torch.bfloat16
    wanted = copy.deepcopy(conv).double()(x.bfloat16().double())
    assert (y - wanted).norm() < 6e-3 * wanted.norm()
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32 and conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("taps", [32, 33])
def test_round_off_is_as_documented(taps):
    """A loud sample: direct sums keep the quiet ones' digits, a transform keeps those of the row's norm."""
    conv, x = depthwise(taps, dtype=torch.float32), torch.randn(1, 3, 400)
    x[..., 300] = 1e6
    error = (Conv1d.from_torch(conv)(x) - copy.deepcopy(conv).double()(x.double())).abs()
    far = error[..., : 300 - taps].amax()
    assert error.amax() < 1e6 * 1e-6
    assert far < 2e-6 if taps == 32 else 1e-5 < far < 1e6 * 1e-6


def test_transforms():
    conv = depthwise(40, padding="same", dilation=2)
    fast = Conv1d.from_torch(conv)
    x = torch.randn(4, 2, 3, 90, **F64)
    wanted = torch.stack([conv(each) for each in x])
    torch.testing.assert_close(torch.vmap(fast)(x), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager", dynamic=True)
    torch.testing.assert_close(compiled(x[0]), wanted[0])
    torch.testing.assert_close(compiled(x[0, ..., :70]), conv(x[0, ..., :70]))
    doubled = {name: 2 * tensor for name, tensor in conv.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(fast, doubled, x[0]), 2 * wanted[0])


def test_refusals():
    with pytest.raises(ValueError, match=r"groups must be in_channels=4 \(depthwise\), got 1"):
        Conv1d(4, 4, 3)
    with pytest.raises(ValueError, match=r"groups must be in_channels=4 \(depthwise\), got 2"):
        Conv1d.from_torch(nn.Conv1d(4, 4, 3, groups=2))
    for conv in (nn.ConvTranspose1d(4, 4, 3, groups=4), nn.LazyConv1d(4, 3), torch.zeros(4, 1, 3)):
        with pytest.raises(TypeError, match=r"conv must be a torch\.nn\.Conv1d"):
            Conv1d.from_torch(conv)
    hooked = depthwise(3)
    hooked.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(TypeError, match="must have no hooks, got _forward_pre_hooks"):
        Conv1d.from_torch(hooked)
    fast, x = Conv1d.from_torch(depthwise(3)), torch.zeros(2, 3, 9, **F64)
    with pytest.raises(ValueError, match=r"x must be \(batch, in_channels=3, length\) or .* got"):
        fast(x[:, :2])
    with pytest.raises(TypeError, match=r"x must be float64 .* outside autocast, got float32"):
        fast(x.float())
    with pytest.raises(ValueError, match="x must be on the layer's device cpu, got meta"):
        fast(x.to("meta"))


# ---- the weights as taps ----


@pytest.mark.parametrize("taps", [1, 2, 4, 5, 40])
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_taps(taps, dilation, bias):
    x, reach = torch.randn(2, 3, 24, **F64), dilation * (taps - 1)
    options = {"dilation": dilation, "bias": bias}
    same = depthwise(taps, padding="same", **options)
    wanted = same(x)
    offset = same.bias.unsqueeze(-1) if bias else 0
    k, k_rev = conv1d_taps(same)
    torch.testing.assert_close(fftconv(x, k, k_rev=k_rev) + offset, wanted)
    for ours in (conv1d_taps(same, "same"), conv1d_taps(same.weight, "same", dilation=dilation)):
        torch.testing.assert_close(ours, (k, k_rev))
    (ours,) = torch.autograd.grad((fftconv(x, k, k_rev=k_rev) + offset).square().sum(), same.weight)
    (theirs,) = torch.autograd.grad(wanted.square().sum(), same.weight)
    torch.testing.assert_close(ours, theirs)
    if reach % 2 == 0:
        torch.testing.assert_close(
            conv1d_taps(depthwise(taps, padding=reach // 2, **options), "same")[0].shape, k.shape
        )

    for padding in {0, reach}:
        conv = depthwise(taps, padding=padding, **options)
        wanted = F.conv1d(F.pad(x, (reach, 0)), conv.weight, conv.bias, dilation=dilation, groups=3)
        offset = conv.bias.unsqueeze(-1) if bias else 0
        if padding:
            torch.testing.assert_close(wanted, conv(x)[..., :24])
        k, k_rev = conv1d_taps(conv, "causal")
        assert k_rev is None and torch.equal(k, conv1d_taps(conv.weight, dilation=dilation)[0])
        torch.testing.assert_close(fftconv(x, k) + offset, wanted)


def test_taps_refusals():
    def refuses(conv, text, *args, error=ValueError, **options):
        with pytest.raises(error, match=f"conv1d_taps: {text}"):
            conv1d_taps(conv, *args, **options)

    weight = depthwise(9, dilation=4).weight
    refuses(weight, "dilation must be given beside a weight alone", error=TypeError)
    refuses(depthwise(9), "dilation must be None beside", dilation=2, error=TypeError)
    refuses(weight, "dilation must be an integer >= 1, got 0", dilation=0)
    refuses(weight, "padding must be one of None, 'causal', 'same', got 'valid'", "valid")
    refuses(nn.ConvTranspose1d(4, 4, 3, groups=4), "conv must be an nn.Conv1d", error=TypeError)
    refuses(nn.Conv1d(4, 4, 3).weight, r"weight must be .*per group=1.*\(depthwise\)", dilation=1)
    refuses(nn.Conv1d(4, 4, 3), r"conv must have .*\(depthwise\), got 4, 4, 1")
    refuses(depthwise(3, multiplier=2), r"conv must have .*\(depthwise\), got 3, 6, 3")
    refuses(depthwise(3, stride=2), "conv's stride must be 1, got 2; seqconv.nn.Conv1d")
    reflect = depthwise(3, padding=1, padding_mode="reflect")
    refuses(reflect, "conv's padding_mode must be 'zeros', got 'reflect'; seqconv.nn.Conv1d")
    refuses(depthwise(5, padding=1), r"conv's padding must be 'same' or 2 or 0 or 4, got \(1,\)")
    refuses(depthwise(5, padding="same"), "conv's padding must be 0 or 4 for padding='c", "causal")
    refuses(depthwise(5, padding=4, dilation=4), r"conv's padding must be 'same' or 8 or 0 or 16")
