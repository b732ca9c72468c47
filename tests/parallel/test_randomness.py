"""Dropout under context parallelism: other masks on each rank for single steps, the same ones for whole channels."""

import pytest
import torch
import torch.distributed as dist
from layer_table import D
from processes import run
from torch import nn

from seqconv import S4D, ButterflyConv, LongConv, parallel


def gathered(t):
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.stack(parts)


def dropped(tie: bool, seed_of_rank: bool):
    """Which outputs of the dropout between convolution and linear map are zero, on all ranks."""
    torch.manual_seed(0)
    layer = parallel.context_parallel(S4D(D, dropout=0.5, tie_dropout=tie))
    found = []
    layer.linear.register_forward_pre_hook(lambda module, args: found.append(args[0] == 0))
    if seed_of_rank:
        torch.manual_seed(dist.get_rank())
    before = torch.get_rng_state()
    for _ in range(2):
        layer(torch.randn(4, 9, D, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(torch.get_rng_state(), before)
    layer.eval()
    layer(torch.randn(4, 9, D))
    assert not found[2].any()
    return [gathered(zero.byte()).bool() for zero in found[:2]]


@pytest.mark.parametrize("seed_of_rank", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_masks_of_activations(tie, seed_of_rank):
    for first, second in run(2, dropped, tie, seed_of_rank):
        assert 0.3 < first.float().mean() < 0.7
        assert not torch.equal(first, second)
        assert torch.equal(first[0], first[1]) == tie
        if tie:
            assert (first == first[:, :, :1]).all()


def kernels(method: str):
    torch.manual_seed(0)
    layer = parallel.context_parallel(
        LongConv(D, l_max=20, lam=0.0, kernel_dropout=0.5), method=method
    )
    found = []
    layer.kernel.register_forward_pre_hook(lambda module, args: None)
    dropout = layer.kernel.dropout.forward

    def forward(k):  # A hook would make every rank make the whole kernel.
        out = dropout(k)
        found.append(out == 0)
        return out

    layer.kernel.dropout.forward = forward
    layer(torch.randn(2, 10, D)).sum().backward()
    return gathered(found[0].byte()).bool()


def test_masks_of_kernels():
    """Each rank has other channels by a2a, so that their masks must differ; by halo all have the whole kernel."""
    divided, whole = run(2, kernels, "a2a")[0], run(2, kernels, "halo")[0]
    assert divided.shape[1:] == (1, D // 2, 20) and whole.shape[1:] == (1, D, 20)
    assert not torch.equal(divided[0], divided[1])
    assert torch.equal(whole[0], whole[1]) and whole.any()


def butterfly():
    torch.manual_seed(0)
    layer = parallel.context_parallel(
        ButterflyConv(D, l_max=20, kernel_dropout=0.0, dft_dropout=0.5, additive=True)
    )
    torch.manual_seed(dist.get_rank())
    found = []
    layer.input_transform.dropout.register_forward_hook(lambda m, a, out: found.append(out == 0))
    layer(torch.randn(2, 10, D))
    return gathered(found[0].byte()).bool()


def test_masks_of_learned_transforms():
    (masks, _) = run(2, butterfly)
    assert torch.equal(masks[0], masks[1]) and masks.any()


def in_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(S4D(D), nn.Dropout(0.5), nn.Dropout1d(0.5))
    parallel.context_parallel(model)
    x = torch.ones(4, 50, D)
    return gathered(model[1](x)), gathered(model[2](x)), gathered(torch.rand(3))


def test_dropout_of_other_modules():
    for single, tied, after in run(2, in_a_model):
        assert not torch.equal(single[0], single[1])
        assert torch.equal(tied[0], tied[1])
        assert torch.equal(after[0], after[1])


def a_state_needs_the_kernel_itself():
    layer = parallel.context_parallel(S4D(D, kernel_dropout=0.5), method="state")
    x = torch.randn(2, 10, D)
    try:
        layer(x)
    except ValueError as error:
        layer.eval()
        return str(error), layer(x).shape
    return "nothing", None


def test_dropout_of_taps_and_the_state():
    wanted = (
        "ContextParallel: method must be one of 'auto', 'a2a', 'halo' for this S4D, got 'state'"
    )
    assert run(2, a_state_needs_the_kernel_itself) == [(wanted, torch.Size([2, 10, D]))] * 2
