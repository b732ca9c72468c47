"""What CONTRIBUTING says of a new operator and of a new layer: each is one file, and these are such files."""

from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn
from toy_operator import Inputs, decayed_sum

from seqconv import fftconv, param_groups
from seqconv.layers.base import ConvLayer, KernelGenerator, TiedDropout
from seqconv.layers.module import fill, kernel_dtype
from seqconv.layers.options import Defaults, refuse
from seqconv.ops.checks import check_flag, check_learning_rate, check_positive


def test_a_new_operator():
    """The other tests of operators have it as a row."""
    x, log_decay = torch.randn(2, 3, 9, dtype=torch.float64), -torch.rand(3, dtype=torch.float64)
    y = decayed_sum(Inputs(x, log_decay), 2.0)
    state = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(9):
        state = log_decay.exp() * state + x[..., t]
        torch.testing.assert_close(y[..., t], 2.0 * state)


# ---- a kernel generator and its layer: k[l] = exp(-l rate) ----


class DecayKernel(KernelGenerator):
    """Kernel generator of Decay: k[l] = exp(-l rate), (heads, d_model, length).

    Parameter: rate (heads, d_model), initially uniform in [0, 1). It takes min(lr, `lr` here) and no weight
    decay. With lr=0 it is a buffer.
    """

    shown = ("heads",)
    reads = ("rate",)

    def __init__(self, d_model: int, *, heads: int = 1, lr: float = 1e-3):
        super().__init__()
        check_positive("DecayKernel", d_model=d_model, heads=heads)
        check_learning_rate("DecayKernel", lr=lr)
        self.d_model, self.heads = d_model, heads
        self.rate = nn.Parameter(torch.empty(heads, d_model, dtype=kernel_dtype()))
        self.override("rate", lr=lr, weight_decay=0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill(self, {"rate": torch.rand(self.rate.shape, device=self.rate.device)})

    def generate(self, tensors: list[Tensor], length: int, rate: float) -> Tensor:
        (rates,) = tensors
        lags = torch.arange(length, dtype=rates.dtype, device=rates.device)
        return torch.exp(-rates.unsqueeze(-1) * lags)


KERNEL, BLOCK = Defaults(DecayKernel), Defaults(ConvLayer)


class Decay(ConvLayer):
    """(batch, length, d_model) -> the same: ConvLayer's block around DecayKernel.

    Parameters: those of ConvLayer, and kernel.rate, which takes min(lr, kernel_lr) and no weight decay.
    """

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = KERNEL.heads,
        bidirectional: bool = False,
        kernel_lr: float = KERNEL.lr,
        activation: str | None = BLOCK.activation,
        dropout: float = BLOCK.dropout,
        tie_dropout: bool = BLOCK.tie_dropout,
        postact: str | None = BLOCK.postact,
        **unknown: NoReturn,
    ):
        options = locals()
        refuse(self, Decay, unknown)
        check_flag("Decay", bidirectional=bidirectional)
        check_positive("Decay", d_model=d_model, heads=heads)
        directions = heads * (1 + bidirectional)
        kernel = DecayKernel(d_model, **KERNEL.among(options, heads=directions, lr=kernel_lr))
        super().__init__(d_model, kernel, **BLOCK.among(options))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_new_layer(bidirectional):
    layer = Decay(4, heads=2, bidirectional=bidirectional).eval()
    x = torch.randn(2, 30, 4)
    k = layer.kernel(30)
    k, k_rev = (k[:2], k[2:]) if bidirectional else (k, None)
    v = fftconv(x.mT, k, layer.skip, k_rev=k_rev, activation="gelu")
    wanted = nn.functional.glu(layer.linear(v.permute(0, 3, 1, 2).flatten(2)), dim=-1)
    torch.testing.assert_close(layer(x), wanted)
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    mask = torch.arange(30).expand(2, 30) >= 20
    torch.testing.assert_close(layer(x, mask)[:, :20], layer(x[:, :20]))
    (group,) = (group for group in param_groups(layer, 1e-2, 0.1) if group["lr"] == 1e-3)
    assert group["weight_decay"] == 0.0 and group["params"] == [layer.kernel.rate]
    again = Decay(4, heads=2, bidirectional=bidirectional).eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert layer.to(torch.bfloat16).kernel.rate.dtype == torch.float32


def test_the_options_of_a_new_layer():
    """They reach the generator and the block, and what is unknown or wrong is refused."""
    layer = Decay(4, heads=3, activation="silu", dropout=0.25, tie_dropout=True, postact=None)
    assert layer.activation == "silu" and layer.postact is None
    assert layer.dropout.p == 0.25 and type(layer.dropout) is TiedDropout
    assert layer.kernel.rate.shape == (3, 4) and "heads=3" in repr(layer.kernel)
    fixed = Decay(4, kernel_lr=0.0)
    assert fixed.kernel.rate in [*fixed.buffers()] and not [*fixed.kernel.parameters()]
    with pytest.raises(TypeError, match=r"Decay: unknown keyword 'lr'; did you mean kernel_lr\?"):
        Decay(4, lr=1e-3)
    with pytest.raises(ValueError, match="lr must be a number >= 0, got -1"):
        Decay(4, kernel_lr=-1)
    with pytest.raises(TypeError, match="positional"):
        Decay(4, 2)
    for call in (Decay, DecayKernel):
        with pytest.raises(ValueError, match="heads must be"):
            call(4, heads=0)


def test_the_initial_values_of_a_new_layer():
    rate = DecayKernel(2000).rate
    assert rate.dtype == torch.float32 and 0 <= rate.min() < 0.01 and 0.99 < rate.max() < 1
    assert abs(rate.mean() - 0.5) < 0.05 and abs(rate.std() - 12**-0.5) < 0.02
