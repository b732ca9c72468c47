"""What context_parallel refuses, and what becomes of copies, checkpoints and hooks."""

import copy
import pickle

import torch
import torch.distributed as dist
from context_cases import Model
from layer_table import D
from processes import run
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor.parallel import parallelize_module

from seqconv import S4D, ButterflyConv, Hyena, LongConv, parallel
from seqconv.nn import Conv1d
from seqconv.parallel import ContextParallel, context_parallel


def message(call, *args, **options) -> str:
    try:
        call(*args, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals() -> list[str]:
    model = nn.Sequential(S4D(D), Conv1d(D, D, 3, groups=D))
    twice = context_parallel(S4D(D))
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    alone = parallel.fully_shard(S4D(D), mesh=mesh["b"])
    shards = context_parallel(S4D(D), shards=(3, 2))
    x = torch.randn(1, 4, D)
    return [
        message(context_parallel, model),
        message(context_parallel, nn.Linear(2, 2)),
        message(context_parallel, S4D),
        message(context_parallel, twice),
        message(context_parallel, S4D(D), mesh),
        message(context_parallel, S4D(D), method="ring"),
        message(context_parallel, S4D(D), order="striped"),
        message(context_parallel, S4D(D), shards=(1, 2, 3)),
        message(parallelize_module, nn.Linear(2, 2), mesh["a"], ContextParallel()),
        message(context_parallel, alone, mesh["a"]),
        message(shards, x),
        message(context_parallel(ButterflyConv(D, l_max=9), method="halo"), x),
        message(context_parallel(ButterflyConv(D, l_max=7)), x),
        message(context_parallel(LongConv(D, l_max=7), method="state"), x),
        message(twice.step, x[:, 0], None),
        message(pickle.dumps, twice),
        message(parallel.explain, x, S4D(D)),
    ]


def test_refusals():
    wanted = [
        "TypeError: context_parallel: 1 is a Conv1d, whose steps are not divided",
        "ValueError: context_parallel: model must have a layer of seqconv, got none",
        "TypeError: context_parallel: model must be a module, got type",
        "ValueError: ContextParallel: module must be without context parallelism, but it has it",
        "ValueError: context_parallel: group must be a mesh of one axis, got 2 axes",
        "ValueError: ContextParallel: method must be one of 'auto', 'a2a', 'halo', 'state', got 'ring'",
        "ValueError: ContextParallel: order must be one of 'contiguous', 'zigzag', got 'striped'",
        "ValueError: ContextParallel: shards must be 2 numbers, got 3",
        "TypeError: ContextParallel: module must be a layer of seqconv, got Linear",
        "ValueError: ContextParallel: skip must be sharded over a mesh with the ranks [0, 1], got [",
        "ValueError: S4D: shards must be the steps on each of 2 ranks, 4 on rank ",
        "ValueError: ContextParallel: method must be one of 'auto', 'a2a' for this ButterflyConv, got 'halo'",
        "ValueError: ButterflyConv: x must have length <= l_max=7 on all ranks together, got length=8",
        "ValueError: ContextParallel: method must be one of 'auto', 'a2a', 'halo' for this LongConv, got",
        "TypeError: S4D: a layer under context parallelism has no step() and no prefill()",
        "TypeError: ContextParallel: a model under context parallelism cannot be pickled: save its state_dict",
        "ValueError: parallel.explain: the S4D must be under context parallelism to be explained",
    ]
    for found in run(2, refusals):
        for text, start in zip(found, wanted, strict=True):
            assert text.startswith(start), text


def replaced() -> list[str]:
    """Parameters whose gradients nobody would sum."""
    x = torch.randn(2, 5, D)
    mesh = dist.init_device_mesh("cpu", (2,))
    found = []
    copied = copy.deepcopy(context_parallel(S4D(D)))
    with torch.no_grad():
        copied(x)
    found.append(message(copied, x))
    found.append(message(parallel.fully_shard(context_parallel(S4D(D)), mesh=mesh), x))
    normed = context_parallel(S4D(D))
    nn.utils.parametrizations.weight_norm(normed.linear)
    found.append(message(normed, x))
    outside = context_parallel(nn.Sequential(nn.Linear(D, D), S4D(D)))
    outside[0] = nn.Linear(D, D)
    found.append(message(outside, x))
    before = S4D(D)
    nn.utils.parametrizations.weight_norm(before.linear)
    context_parallel(before)(x).sum().backward()
    return found


def test_parameters_that_are_replaced_later():
    for found in run(2, replaced):
        for text in found:
            assert text.startswith("RuntimeError: ContextParallel: the gradient of "), text
            assert "call context_parallel last" in text


def another_method() -> str:
    """FSDP gathers the parameters for a method that is not forward, and calls no hooks for it."""

    class Scorer(Model):
        def score(self, x):
            return self.forward(x).sum()

    model = Scorer()
    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    parallel.fully_shard(model, mesh=mesh)
    context_parallel(model, mesh["cp"])
    register_fsdp_forward_method(model, "score")
    return message(model.score, torch.randn(2, 5, 2))


def test_parameters_that_are_gathered_for_another_method():
    for text in run(2, another_method):
        assert text.startswith("RuntimeError: ContextParallel: the gradient of "), text
        assert "for another method than forward" in text


def state_dicts() -> None:
    torch.manual_seed(0)
    model = Model()
    ours = context_parallel(copy.deepcopy(model))
    assert list(model.state_dict()) == list(ours.state_dict())
    other = Model()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 2)
    own = x.chunk(2, 1)[dist.get_rank()]
    torch.testing.assert_close(ours(own), other(x).chunk(2, 1)[dist.get_rank()])


def test_a_state_dict_is_that_of_one_process():
    run(2, state_dicts)


def orders(rank_dependent: bool) -> str:
    """A model that forms the gradients of two parameters in another order on rank 1."""
    torch.manual_seed(0)
    model = context_parallel(nn.ModuleList([S4D(D), nn.Linear(D, D), nn.Linear(D, D)]))
    x = torch.randn(2, 5, D)
    first, second = model[1], model[2]
    if rank_dependent and dist.get_rank() == 1:
        first, second = second, first
    y = model[0](x)
    return message((first(y).sum() + second(y).sum()).backward)


def test_gradients_of_different_parameters_are_never_added():
    assert run(2, orders, False) == ["nothing"] * 2
    wanted = (
        "RuntimeError: parallel: the ranks of a group have formed the gradients of their parameters"
    )
    for text in run(2, orders, True):
        assert text.startswith(wanted), text


def hooked() -> None:
    """Hooks on a kernel see all of it; a checkpointed layer computes the same."""
    x = torch.randn(2, 6, D, dtype=torch.float64)
    rank = dist.get_rank()
    for name, make in {"s4d": S4D, "hyena": lambda d: Hyena(d, l_max=9)}.items():
        torch.manual_seed(0)
        plain = make(D).double()
        kernel = plain.kernel if name == "s4d" else plain.filter
        kernel.register_forward_hook(lambda m, a, k: k / k.norm())
        ours = context_parallel(copy.deepcopy(plain))
        y = plain(x)
        y.sum().backward()
        for reentrant in (False, True):
            ours.zero_grad()
            own = x.chunk(2, 1)[rank].clone().requires_grad_()
            z = torch.utils.checkpoint.checkpoint(ours, own, use_reentrant=reentrant)
            torch.testing.assert_close(z, y.chunk(2, 1)[rank], rtol=1e-12, atol=1e-12)
            z.sum().backward()
            for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12)


def test_hooks_and_checkpoints():
    run(2, hooked)
