"""Layers whose channels are divided among processes: equal to one process, in every gradient and in a step."""

import copy

import pytest
import torch
from processes import run
from torch import nn

from seqconv import S4D, ButterflyConv, Hyena, LongConv, SGConv
from seqconv.parallel import plan

D, LENGTH, BATCH = 7, 20, 3
close = {"rtol": 1e-12, "atol": 1e-12}
LAYERS = {
    "s4d": lambda: S4D(D, d_state=4, dropout=0.0),
    "s4d, two-sided heads": lambda: S4D(D, d_state=4, heads=2, bidirectional=True),
    "s4d, shared": lambda: S4D(8, d_state=4, n_ssm=2, kernel_lr=0.0),
    "s4d, real": lambda: S4D(D, d_state=3, init="real", is_real=True, dt_tie=False),
    "s4d, softmax": lambda: S4D(D, d_state=4, discretization="dss_softmax", postact=None),
    "long_conv": lambda: LongConv(D, l_max=30, kernel_dropout=0.0, lam=0.0, smooth="time"),
    "sgconv": lambda: SGConv(D, l_max=30, kernel_dim=4, heads=2, decay="power"),
    "sgconv, two-sided": lambda: SGConv(D, l_max=30, kernel_dim=4, bidirectional=True),
    "butterfly": lambda: ButterflyConv(D, l_max=30, kernel_dropout=0.0, lam=0.0, additive=True),
    "butterfly, heads": lambda: ButterflyConv(
        8, l_max=30, kernel_dropout=0.0, lam=0.0, heads=2, butterfly_heads=2, dft_activation="silu"
    ),
    "hyena": lambda: Hyena(D, l_max=30, order=3, filter_width=8),
}


def made(name) -> nn.Module:
    torch.manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return LAYERS[name]()
    finally:
        torch.set_default_dtype(before)


def divided(layer, **options):
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return parallelize_module(layer, mesh, plan(layer, **options))


def states(layer):
    return {name: t for name, t in layer.state_dict().items() if not name.endswith("_extra_state")}


def equal_to_one_process(names):
    for name in names:
        layer = made(name)
        own = divided(copy.deepcopy(layer))
        assert type(own).__name__ == type(layer).__name__ and isinstance(own, type(layer))
        assert {n: t.shape for n, t in states(own).items()} == {
            n: t.shape for n, t in states(layer).items()
        }
        for n, t in states(own).items():
            torch.testing.assert_close(t.full_tensor(), states(layer)[n], rtol=0, atol=0)
        x = torch.randn(BATCH, LENGTH, layer.d_model, dtype=torch.float64)
        results = []
        for one in (layer, own):
            optimiser = torch.optim.SGD(one.parameters(), lr=0.1)
            leaf = x.clone().requires_grad_()
            y = one(leaf)
            assert type(y) is torch.Tensor
            y.sin().sum().backward()
            optimiser.step()
            results.append((y, leaf.grad, {n: p.grad for n, p in one.named_parameters()}))
        (y, dx, grads), (our_y, our_dx, our_grads) = results
        torch.testing.assert_close(our_y, y, **close)
        torch.testing.assert_close(our_dx, dx, **close)
        assert grads.keys() == our_grads.keys()
        for n, grad in grads.items():
            assert grad.abs().max() > 1e-9, n
            torch.testing.assert_close(our_grads[n].full_tensor(), grad, **close)
        for n, t in states(own).items():
            torch.testing.assert_close(t.full_tensor(), states(layer)[n], **close)
        channels = -(-layer.d_model // torch.distributed.get_world_size())
        if torch.distributed.get_rank() == 0:
            assert own.skip.to_local().shape[1] == channels


@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_equal_to_one_process(world):
    run(world, equal_to_one_process, list(LAYERS))
