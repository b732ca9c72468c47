"""What CONTRIBUTING says of a new operator and of a new layer: each is one file, and these are such files."""

import pytest
import torch
from torch import Tensor, nn
from toy_operator import Inputs, decayed_sum

from seqconv import fftconv, param_groups
from seqconv.layers.base import ConvLayer, KernelGenerator
from seqconv.layers.module import fill, kernel_dtype


def test_a_new_operator():
    """The other tests of operators have it as a row."""
    x, log_decay = torch.randn(2, 3, 9, dtype=torch.float64), -torch.rand(3, dtype=torch.float64)
    y = decayed_sum(Inputs(x, log_decay), 2.0)
    state = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(9):
        state = log_decay.exp() * state + x[..., t]
        torch.testing.assert_close(y[..., t], 2.0 * state)


# ---- a kernel generator and its layer: k[l] = weight exp(-l rate) ----


class DecayKernel(KernelGenerator):
    shown = ("d_model",)
    reads = ("rate",)

    def __init__(self, d_model: int, heads: int = 1):
        super().__init__()
        self.d_model = d_model
        self.rate = nn.Parameter(torch.empty(heads, d_model, dtype=kernel_dtype()))
        self.override("rate", lr=1e-4, weight_decay=0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill(self, {"rate": torch.rand_like(self.rate)})

    def generate(self, tensors: list[Tensor], length: int, rate: float) -> Tensor:
        (rates,) = tensors
        return torch.exp(-rates.unsqueeze(-1) * torch.arange(length, device=rates.device))


class Decay(ConvLayer):
    def __init__(self, d_model: int, *, heads: int = 1, bidirectional: bool = False):
        kernel = DecayKernel(d_model, heads * (1 + bidirectional))
        super().__init__(d_model, kernel, heads=heads, bidirectional=bidirectional)


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
    assert any(group["lr"] == 1e-4 for group in param_groups(layer, 1e-2, 0.1))
    again = Decay(4, heads=2, bidirectional=bidirectional).eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert layer.to(torch.bfloat16).kernel.rate.dtype == torch.float32
