"""What does not work over several processes is refused on every rank, where it would give a wrong number or a hang."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from layer_table import D
from parallel_cases import relative
from processes import run
from torch import nn

from seqconv import S4D, fftconv, parallel
from seqconv.layers.hyena_filter import HyenaFilter
from seqconv.layers.long_conv import LongConvKernel


def raised(function, *args, **options) -> str:
    try:
        function(*args, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def other_lengths(method):
    """A layer of 5 steps on each rank, called with more and with fewer, and then as at first."""
    layer = parallel.context_parallel(S4D(D), shards=(5, 5), method=method)
    found = []
    with torch.no_grad():
        for steps in (5, 6, 4, 5):
            found.append(raised(layer, torch.randn(2, steps, D)))
    return found


@pytest.mark.parametrize("method", ["a2a", "halo", "state"])
def test_given_shards_hold_for_every_call(method):
    for rank, found in enumerate(run(2, other_lengths, method)):
        text = "ValueError: S4D: shards must be the steps on each of 2 ranks, {} on rank {}, got (5, 5)"
        assert found == ["nothing", text.format(6, rank), text.format(4, rank), "nothing"]


def one_gives_shards():
    u, k = torch.randn(1, 4, 5), torch.randn(4, 3)
    shards = (5, 5) if dist.get_rank() == 0 else None
    return raised(parallel.fftconv, u, k, shards=shards)


def test_all_ranks_give_shards_or_none():
    text = "shards, given or not, got True on rank 0, False on rank 1"
    wanted = f"ValueError: parallel.fftconv: the ranks of the group must agree about {text}"
    assert run(2, one_gives_shards) == [wanted] * 2


def wrong_kinds():
    u, k, first = torch.randn(1, 4, 5), torch.randn(4, 3), dist.get_rank() == 0
    zigzag = {"order": "zigzag", "shards": (5, 5) if first else (6, 4)}
    layer = parallel.context_parallel(S4D(4))
    return [
        raised(parallel.fftconv, u, k, activation=F.gelu if first else "gelu"),
        raised(parallel.fftconv, u, k, shards=5 if first else (5, 5)),
        raised(parallel.fftconv, u, k, shards=(5.0, 5.0) if first else (5, 5)),
        raised(parallel.fftconv, u, k, **zigzag),
        raised(layer, u.mT, rate="fast"),
        raised(parallel.ContextParallel, shards=7),
        raised(parallel.sum_over_ranks, 3.0),
    ]


def test_arguments_of_other_kinds():
    first, second = run(2, wrong_kinds)
    wanted = [
        "ValueError: parallel.fftconv: activation must be one of .*, got <",
        "ValueError: parallel.fftconv: shards must be the number of steps on each rank, got 5",
        "ValueError: parallel.fftconv: shards must be the number of steps on each rank, got .5.0",
        r"ValueError: parallel: shards in zigzag order must have sizes \[4, 6\] .* got \[5, 5\]",
        "TypeError: S4DKernel: rate must be a number, got 'fast'",
        "ValueError: ContextParallel: shards must be the number of steps on each rank, got 7",
        "TypeError: parallel.sum_over_ranks: t must be a tensor, got float",
    ]
    for message, pattern in zip(first, wanted, strict=True):
        assert re.match(pattern, message), message
    told = "parallel.fftconv: rank 0 of the group has refused its arguments"
    assert all(told in message for message in second[:3]), second


def graphs(method):
    """Messages of recorded backward passes, in which k, u or a layer's parameters are differentiated."""
    u, k = torch.randn(2, 4, 5, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    layer = parallel.context_parallel(S4D(D), method=method)
    found = []
    for wanted in (k, u):
        y = parallel.fftconv(u, k, activation="gelu", method=method)
        found.append(raised(torch.autograd.grad, y.sum(), wanted, create_graph=True))
    y = layer(torch.randn(2, 5, D))
    found.append(raised(torch.autograd.grad, y.sum(), layer.skip, create_graph=True))
    return found


@pytest.mark.parametrize("method", ["a2a", "halo"])
def test_second_derivatives(method):
    text = "parallel: create_graph must be False: there are first derivatives only over several processes"
    assert run(2, graphs, method) == [[f"RuntimeError: {text}"] * 3] * 2


def transforms():
    u, k = torch.randn(2, 4, 5), torch.randn(4, 9)
    layer = parallel.context_parallel(S4D(D)).eval().requires_grad_(False)
    x = torch.randn(1, 2, 5, D)
    return [
        raised(torch.vmap(layer), x),
        raised(torch.func.grad(lambda k: parallel.fftconv(u, k).sum()), k),
    ]


def test_transforms():
    text = (
        "torch.func transforms and forward-mode differentiation do not work over several processes"
    )
    names = "S4D", "parallel.fftconv"
    assert run(2, transforms) == [[f"RuntimeError: {name}: {text}" for name in names]] * 2


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.many = nn.ParameterList(nn.Parameter(torch.ones(3)) for _ in range(4000))
        self.layer = S4D(D)


def other_order(other):
    """Ranks that form the gradients of parameters 0 and `other`, of the same shape, in different orders."""
    many = parallel.context_parallel(Many()).many
    first, second = (0, other) if dist.get_rank() == 0 else (other, 0)
    return raised((many[first] + 10.0 * many[second].detach()).sum().backward)


@pytest.mark.parametrize("other", [1, 61, 122, 61 * 61])
def test_gradients_in_different_orders(other):
    text = "the ranks of a group have formed the gradients of their parameters in different orders"
    assert run(2, other_order, other) == [f"RuntimeError: parallel: {text}"] * 2


def sparse():
    model = nn.Sequential(nn.Embedding(5, D, sparse=True), S4D(D))
    y = parallel.context_parallel(model)(torch.ones(2, 3, dtype=torch.long))
    return raised(y.sum().backward)


def test_sparse_gradients():
    for message in run(2, sparse):
        assert message.startswith(
            "TypeError: parallel: gradients must be dense, got layout torch.sp"
        )


def fixed_generators():
    """Generators without parameters, whose taps are buffers."""
    u = torch.randn(1, 4, 10)
    own = u.chunk(2, -1)[dist.get_rank()]
    for make in (LongConvKernel, HyenaFilter):
        generator = make(4, l_max=9, lr=0.0)
        generator.eval()
        y = parallel.fftconv(own, generator)
        wanted = fftconv(u, generator(10)).chunk(2, -1)[dist.get_rank()]
        assert relative(y, wanted) < 1e-6


def test_generators_without_parameters():
    run(2, fixed_generators)
