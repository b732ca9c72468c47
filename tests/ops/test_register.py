"""A new operator is one file and a new kernel generator another: these are such files, and what they get."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from seqconv import fftconv, param_groups
from seqconv.layers.base import ConvLayer
from seqconv.layers.module import KernelGenerator, fill, kernel_dtype
from seqconv.ops.register import Operator

# ---- an operator: y[t] = sum_{s <= t} decay^(t-s) x[s] ----


class Inputs(NamedTuple):
    x: Tensor  # (batch, channels, length)
    log_decay: Tensor  # (channels,)


def _definition(inputs: Inputs, scale: float) -> Tensor:
    steps = torch.arange(inputs.x.shape[-1], dtype=inputs.x.dtype, device=inputs.x.device)
    lag = steps.unsqueeze(-1) - steps
    table = torch.exp(inputs.log_decay[:, None, None] * lag.clamp(min=0)) * (lag >= 0)
    return scale * torch.einsum("hts,bhs->bht", table, inputs.x)


decayed_sum = Operator("toy_decayed_sum", Inputs, "float scale", _definition)


def problem():
    return Inputs(
        torch.randn(2, 3, 9, dtype=torch.float64).requires_grad_(),
        (-torch.rand(3, dtype=torch.float64)).requires_grad_(),
    )


def test_it_equals_its_definition():
    x, log_decay = problem()
    y = decayed_sum(Inputs(x, log_decay), 2.0)
    state = torch.zeros(2, 3, dtype=torch.float64)
    for t in range(9):
        state = log_decay.exp() * state + x[..., t]
        torch.testing.assert_close(y[..., t], 2.0 * state)


def test_it_has_derivatives_of_both_orders():
    call = lambda *tensors: decayed_sum(Inputs(*tensors), 2.0)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(problem()))
    assert torch.autograd.gradgradcheck(call, tuple(problem()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_works_under_transforms():
    x, log_decay = problem()
    call = lambda x: decayed_sum(Inputs(x, log_decay), 2.0)  # noqa: E731
    tangent = torch.randn_like(x)
    _, moved = torch.func.jvp(call, (x,), (tangent,))
    torch.testing.assert_close(moved, call(tangent))
    torch.testing.assert_close(torch.func.vmap(call)(x.unsqueeze(0))[0], call(x))


def test_it_compiles_and_passes_opcheck():
    torch._dynamo.reset()
    call = torch.compile(
        lambda *tensors: decayed_sum(Inputs(*tensors), 2.0), backend="aot_eager", fullgraph=True
    )
    tensors = problem()
    y = call(*tensors)
    ours = torch.autograd.grad(y.square().sum(), tensors)
    plain = _definition(tensors, 2.0)
    theirs = torch.autograd.grad(plain.square().sum(), tensors)
    for a, b in zip((y, *ours), (plain, *theirs), strict=True):
        torch.testing.assert_close(a, b)
    torch.library.opcheck(decayed_sum.fwd, (*tensors, 2.0))
    dy = torch.randn_like(y).requires_grad_()
    torch.library.opcheck(decayed_sum.bwd, (dy, *tensors, 2.0, [True, True]))


# ---- a kernel generator and its layer: k[l] = weight exp(-l rate) ----


class DecayKernel(KernelGenerator):
    shown = ("d_model",)

    def __init__(self, d_model: int, heads: int = 1):
        super().__init__()
        self.d_model = d_model
        self.rate = nn.Parameter(torch.empty(heads, d_model, dtype=kernel_dtype()))
        self.override("rate", lr=1e-4, weight_decay=0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        fill(self, {"rate": torch.rand_like(self.rate)})

    def forward(self, length: int) -> Tensor:
        (rate,) = self.read("rate")
        return torch.exp(-rate.unsqueeze(-1) * torch.arange(length, device=rate.device))


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
