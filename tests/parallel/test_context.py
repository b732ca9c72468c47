"""Layers under context parallelism on 1 to 4 processes against one process: values and every gradient."""

import pytest
import torch
import torch.distributed as dist
from context_cases import ALL, model_trains, run_layers
from parallel_cases import zigzag
from processes import run

from seqconv import parallel
from seqconv.parallel.shards import chunk_sizes

SIZES = {
    1: [[37]],
    2: [[19, 18], [5, 32], [0, 23]],
    3: [[13, 13, 11]],
    4: [[10, 10, 10, 7], [0, 20, 3, 0]],
}


@pytest.mark.parametrize("name", ALL)
def test_equal_to_one_process(name):
    for world, sizes in SIZES.items():
        calls = [((name, s), {}) for s in sizes]
        assert max(run(world, run_layers, calls)) < 1e-12


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("masked", [None, "mask", "lengths"])
def test_orders_and_masks(order, masked):
    for world, length in ((2, 37), (3, 31)):
        sizes = zigzag(length, world) if order == "zigzag" else chunk_sizes(length, world)
        calls = [((name, sizes), {"order": order, "masked": masked}) for name in ALL]
        assert max(run(world, run_layers, calls)) < 1e-12


@pytest.mark.parametrize("method", ["a2a", "halo", "state"])
def test_methods(method):
    names = {"state": ["s4d", "s4d, real", "s4d, two-sided", "s4d, shared sets", "s4d, dss"]}
    names = names.get(method, [name for name in ALL if "butterfly" not in name])
    for world in (2, 4):
        calls = [((name, s), {"method": method}) for name in names for s in SIZES[world]]
        assert max(run(world, run_layers, calls)) < 1e-12


@pytest.mark.parametrize("wrap", [None, "ddp", "ddp of all", "fsdp", "fsdp, flat"])
def test_models_train_as_in_one_process(wrap):
    """On a mesh of 2 data ranks and 2 context ranks; also with all four as context ranks."""
    run(4, model_trains, 4, 2 if wrap else 4, wrap)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp", "fsdp, flat"])
@pytest.mark.parametrize(("world", "context"), [(2, 2), (2, 1), (3, 3), (4, 1)])
def test_models_train_on_other_meshes(wrap, world, context):
    """FSDP reduces by other operations where a mesh has an axis of one rank, and in float32."""
    run(world, model_trains, world, context, wrap, torch.float32, 1e-4)
    run(world, model_trains, world, context, wrap)


def pools():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = x.clone().requires_grad_()
    wanted = whole.mean(1).square().sum()
    wanted.backward()
    own = x.chunk(ranks, 1)[rank].clone().requires_grad_()
    mean = parallel.sum_over_ranks(own.sum(1)) / 7
    loss = mean.square().sum()
    (loss / ranks).backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(own.grad, whole.grad.chunk(ranks, 1)[rank], rtol=1e-14, atol=1e-16)


def test_sums_over_ranks():
    run(3, pools)
