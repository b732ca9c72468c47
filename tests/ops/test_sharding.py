"""Operators on DTensors: each row that an operator declares, and torch's rules made of the rows, in processes."""

import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import toy_operator
from operator_table import IN_GRAPHS, OPERATORS
from processes import run
from sharding_cases import CASES, L, convolution

from seqconv import fftconv, use_backend
from seqconv.ops.sharding import SUM, gradient_row, rows_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

close = {"rtol": 1e-12, "atol": 1e-12}
WORLDS = [2, 3, 4]


def seeded(name):
    torch.manual_seed(1)
    return CASES[name]()


def test_every_operator_declares_how_it_is_shared():
    for make in (OPERATORS | IN_GRAPHS).values():
        operator, inputs, options = make()
        assert rows_of(operator, inputs, options, 2), operator.name
        assert operator.name in {CASES[case]()[0].name for case in CASES}


def test_rows_name_inputs():
    inputs = toy_operator.Inputs(torch.zeros(2, 3, 4), torch.zeros(3))
    rows = lambda *_, ranks: [(0, {"y": 0})]  # noqa: E731
    operator = SimpleNamespace(name="toy", shardings=rows)
    with pytest.raises(ValueError, match="toy: shardings must name x, log_decay, got y"):
        rows_of(operator, inputs, (), 2)


# ---- the rows, by parts that one process computes in turn ----


def cut(t, kind, ranks):
    """What each process has of t."""
    if t is None or kind is None:
        return [t] * ranks
    if kind == SUM:
        parts = [torch.randn_like(t) for _ in range(ranks - 1)]
        return [*parts, t - sum(parts)]
    parts = list(t.chunk(ranks, kind))
    return parts + [t.narrow(kind, 0, 0)] * (ranks - len(parts))


def joined(parts, kind):
    if kind is None:
        for part in parts:
            torch.testing.assert_close(part, parts[0], **close)
        return parts[0]
    return sum(parts) if kind == SUM else torch.cat(parts, kind)


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_the_parts_give_the_whole(name, ranks):
    operator, inputs, options = seeded(name)
    wanted = [t is not None for t in inputs]
    y = operator(inputs, *options)
    dy = torch.randn_like(y)
    whole = operator.raw_gradients(dy, inputs, options, wanted)
    rows = rows_of(operator, inputs, options, ranks)
    for out, kinds in rows:
        parts = zip(*[cut(t, k, ranks) for t, k in zip(inputs, kinds, strict=True)], strict=True)
        parts = [operator.name_inputs(part) for part in parts]
        torch.testing.assert_close(joined([operator(p, *options) for p in parts], out), y, **close)
        grads, (dy_kind, *_) = gradient_row((out, kinds))
        found = [
            operator.raw_gradients(own, part, options, wanted)
            for own, part in zip(cut(dy, dy_kind, ranks), parts, strict=True)
        ]
        for kind, grad, own in zip(grads, whole, zip(*found, strict=True), strict=True):
            if grad is not None:
                torch.testing.assert_close(joined(own, kind), grad, **close)


# ---- torch's rules, in processes ----


def mesh_of(*shape):
    return torch.distributed.init_device_mesh("cpu", shape)


def placement(kind):
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Replicate() if kind is None else Partial() if kind == SUM else Shard(kind)


def spread(t, kinds, mesh):
    """t as a DTensor, which every process knows whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if t is None:
        return None
    d = distribute_tensor(t, mesh, [placement(None if k == SUM else k) for k in kinds])
    if SUM not in kinds:
        return d
    ranks = torch.distributed.get_world_size()
    assert len(kinds) == 1
    torch.manual_seed(7)
    part = cut(t, SUM, ranks)[torch.distributed.get_rank()]
    return DTensor.from_local(part, mesh, [placement(SUM)], run_check=False)


def with_gradients(operator, inputs, options, dy):
    real = [t is not None and t.is_floating_point() for t in inputs]  # Offsets have no gradient.
    pairs = list(zip(inputs, real, strict=True))
    leaves = [t.detach().requires_grad_() if has else t for t, has in pairs]
    y = operator(operator.name_inputs(leaves), *options)
    dy = dy(y) if callable(dy) else dy
    return y, *torch.autograd.grad(y, [t for t, has in zip(leaves, real, strict=True) if has], dy)


def same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.full_tensor(), theirs, **close)


def fits(inputs, kinds, ranks):
    """Whether torch cuts the tensors so: every process gets something."""
    pairs = zip(inputs, kinds, strict=True)
    return all(t is None or not isinstance(k, int) or t.shape[k] >= ranks for t, k in pairs)


def rows_in_processes(names):
    mesh = mesh_of(ranks := torch.distributed.get_world_size())
    for name in names:
        operator, inputs, options = seeded(name)
        dy = torch.randn_like(operator(inputs, *options))
        wanted = with_gradients(operator, inputs, options, dy)
        whole = [(None, [None] * len(inputs))]
        for out, kinds in rows_of(operator, inputs, options, ranks) + whole:
            pairs = zip(inputs, kinds, strict=True)
            own = operator.name_inputs([spread(t, [kind], mesh) for t, kind in pairs])
            grads, (dy_kind, *_) = gradient_row((out, kinds))
            if kinds == whole[0][1]:
                grads = kinds
            found = with_gradients(operator, own, options, spread(dy, [dy_kind], mesh))
            same(found, wanted)
            if fits(inputs, kinds, ranks):
                pairs = zip(grads, inputs, strict=True)
                present = [g for g, t in pairs if t is not None and t.is_floating_point()]
                assert [t.placements[0] for t in found] == [placement(k) for k in (out, *present)]
            for kind in (None, SUM):
                same(with_gradients(operator, own, options, spread(dy, [kind], mesh)), wanted)


@pytest.mark.one_of(2)
@pytest.mark.parametrize("world", [3, *[pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)]])
def test_every_row_in_processes(world):
    run(world, rows_in_processes, list(CASES))


def rows_by_the_definitions(names):
    with use_backend("reference"):
        rows_in_processes(names)


def test_every_row_by_the_definitions():
    run(2, rows_by_the_definitions, ["fftconv gelu", "fftconv heads", "ssm", "butterfly heads"])


def two_dimensions(names):
    mesh = mesh_of(2, 2)
    for name in names:
        operator, inputs, options = seeded(name)
        y = operator(inputs, *options)
        dy = torch.randn_like(y)
        wanted = with_gradients(operator, inputs, options, dy)
        rows = [r for r in rows_of(operator, inputs, options, 4) if SUM not in (r[0], *r[1])]
        for (out, kinds), (other_out, others) in product(rows, rows):
            pairs = zip(inputs, kinds, others, strict=True)
            own = operator.name_inputs([spread(t, [a, b], mesh) for t, a, b in pairs])
            found = with_gradients(operator, own, options, spread(dy, [out, other_out], mesh))
            same(found, wanted)


def test_a_mesh_of_two_dimensions():
    run(4, two_dimensions, ["toy", "fftconv heads", "fftconv per sample", "ssm", "butterfly heads"])


def along_the_sequence(_):
    mesh = mesh_of(torch.distributed.get_world_size())
    for name in ("toy", "fftconv gelu", "fftconv heads", "ssm", "butterfly"):
        operator, inputs, options = seeded(name)
        dy = torch.randn_like(operator(inputs, *options))
        wanted = with_gradients(operator, inputs, options, dy)
        for last in product((False, True), repeat=sum(t is not None for t in inputs)):
            flags = iter(last)
            kinds = [None if t is None or not next(flags) else t.dim() - 1 for t in inputs]
            own = [spread(t, [k], mesh) for t, k in zip(inputs, kinds, strict=True)]
            own = operator.name_inputs(own)
            same(with_gradients(operator, own, options, spread(dy, [2], mesh)), wanted)


@pytest.mark.parametrize(
    "world", [2, pytest.param(3, marks=(pytest.mark.slow, pytest.mark.one_of(2)))]
)
def test_what_is_cut_along_the_sequence_is_gathered(world):
    run(world, along_the_sequence, None)


def calls_that_look_alike(_):
    """Torch keeps one decision for all calls that it takes for alike."""
    mesh = mesh_of(torch.distributed.get_world_size())
    torch.manual_seed(1)
    operator, inputs, _ = convolution(gates=["pre_gate", "post_gate"], bias="h")
    calls = [("none", False, False), ("gelu", True, False)]
    calls += [("none", True, False), ("relu", False, False)]
    patterns = [(True,) * 7, (False, True) * 3 + (False,), (True, False) * 3 + (True,)]
    patterns.append((True, *[False] * 6))
    signals, kernels = [(None, None), (0, None), (1, 0), (SUM, None)], [True, False]
    for (signal, kernel), (options, wanted), gates, reverse in product(
        signals, zip(calls, patterns, strict=True), product([True, False], repeat=2), kernels
    ):
        named = inputs._replace(k_rev=inputs.k if reverse else None)
        named = named._replace(pre_gate=inputs.pre_gate if gates[0] else None)
        named = named._replace(post_gate=inputs.post_gate if gates[1] else None)
        dy = torch.randn_like(inputs.u)
        want = [flag and t is not None for flag, t in zip(wanted, named, strict=True)]
        theirs = [operator(named, *options), *operator.raw_gradients(dy, named, options, want)]
        kinds = [signal, kernel, kernel, kernel, signal, signal, kernel]
        own = [spread(t, [k], mesh) for t, k in zip(named, kinds, strict=True)]
        own = operator.name_inputs(own)
        gradient = spread(dy, [signal], mesh)
        ours = [operator(own, *options), *operator.raw_gradients(gradient, own, options, want)]
        assert [t is None for t in ours] == [t is None for t in theirs]
        pairs = [pair for pair in zip(ours, theirs, strict=True) if pair[0] is not None]
        same(*zip(*pairs, strict=True))


def test_calls_that_look_alike():
    run(2, calls_that_look_alike, None)


def test_what_is_given_is_checked():
    operator, inputs, options = convolution()
    *tensors, bits = operator.flat(inputs)
    assert bits == 0b1111
    with pytest.raises(ValueError, match="fftconv: given must be 15 for these tensors, got 7"):
        operator.fwd(*tensors, 7, *options)


def every_road(_):
    from torch.distributed.tensor import DTensor, Partial

    mesh = mesh_of(torch.distributed.get_world_size())
    u, k, skip, gate = (torch.randn(*s).double() for s in ((5, L, 7), (3, 7, 6), (3, 7), (5, L, 7)))
    plain = u, k, skip, gate
    own = [spread(t, [i], mesh) for t, i in zip(plain, (2, 1, 1, 2), strict=True)]
    options = {"activation": "gelu", "layout": "blh"}

    def call(u, k, skip, gate, mode="causal"):
        return fftconv(u, k, skip, pre_gate=gate, mode=mode, **options)

    def results(call, tensors, **more):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = call(*leaves, **more)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        with torch.no_grad():
            again = call(*tensors, **more)
        return y, again, *first, *second

    for mode in ("causal", "circular"):
        same(results(call, own, mode=mode), results(call, plain, mode=mode))

    def sums(call, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = call(*leaves)
        return y, *torch.autograd.grad(y.sin().sum(), leaves)

    torch._dynamo.reset()
    same(sums(torch.compile(call, backend="aot_eager", fullgraph=True), own), sums(call, plain))
    with pytest.raises((RuntimeError, TypeError), match="DTensor"):
        call(own[0], *plain[1:])
    mean = DTensor.from_local(u + torch.distributed.get_rank() - 0.5, mesh, [Partial("avg")])
    same([fftconv(mean, own[1], layout="blh")], [fftconv(u, k, layout="blh")])
    for name in ("toy", "ssm"):
        operator, inputs, rest = seeded(name)
        _, kinds = rows_of(operator, inputs, rest, 2)[0]
        own = [spread(t, [kind], mesh) for t, kind in zip(inputs, kinds, strict=True)]
        call = lambda *t, op=operator, rest=rest: op(op.name_inputs(t), *rest)  # noqa: E731
        same(results(call, own), results(call, inputs))


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.10 cannot flip sharded tensors")
def test_every_road():
    """Eager calls with and without gradients, their second derivatives, and graphs."""
    run(2, every_road, None)


# ---- when the rules are made ----

IMPORTS = """
import sys
{first}
import seqconv
from typing import NamedTuple
from torch import Tensor
from seqconv.ops.register import Operator

class Inputs(NamedTuple):
    x: Tensor

assert ("torch.distributed.tensor" in sys.modules) == {before}
{then}
early = Operator("early", Inputs, "", lambda inputs: inputs.x.sin())
import torch.distributed.tensor.parallel
from seqconv.ops import sharding
assert not sharding._declared
late = Operator("late", Inputs, "", lambda inputs: inputs.x.sin())
assert not any("seqconv.ops" in str(finder) for finder in sys.meta_path)
rules = torch.distributed.tensor.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
found = {{str(op) for op in rules if str(op).startswith("seqconv")}}
names = "fftconv ssm butterfly s4d_kernel sgconv_taps butterfly_product early late".split()
assert found >= {{f"seqconv.{{name}}_{{kind}}.default" for name in names for kind in ("fwd", "bwd")}}
"""


ASKED = "import importlib.util; importlib.util.find_spec('torch.distributed.tensor')"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("", ""),
        ("import torch.distributed.tensor", ""),
        ("import torch.distributed", ""),
        ("", ASKED),
    ],
)
def test_the_rules_are_there_when_dtensors_are(first, then):
    text = IMPORTS.format(first=first, then=then, before=first.endswith("tensor"))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr


def plain_offsets(_):
    """Offsets are no DTensor where all else is: every process has them."""
    mesh = mesh_of(torch.distributed.get_world_size())
    torch.manual_seed(1)
    u, k, offsets = torch.randn(5, 12), torch.randn(5, 4), torch.tensor([0, 3, 12])
    whole = fftconv(u, k, cu_seqlens=offsets)
    own = [spread(t, [0], mesh) for t in (u, k)]
    torch.testing.assert_close(fftconv(*own, cu_seqlens=offsets).full_tensor(), whole)
    with pytest.raises(ValueError, match="return_history False with cu_seqlens and DTensors"):
        fftconv(*own, cu_seqlens=offsets, return_history=True)


def test_offsets_need_be_no_dtensor():
    run(2, plain_offsets, None)
