"""The bytes that explain() promises are those that the collectives move, and the fewest are chosen."""

import time

import pytest
import torch
import torch.distributed as dist
from layer_table import D
from parallel_cases import case, compare, part
from processes import run

from bench.micro.traffic import Traffic
from seqconv import (
    S4D,
    HyenaFilter,
    LongConvKernel,
    S4DKernel,
    SGConvKernel,
    fftconv,
    parallel,
)
from seqconv.parallel.shards import Shards, halo
from seqconv.parallel.traffic import Problem


def traffic(sizes, method, options):
    """(promised, counted) bytes of this rank's forward pass, and the bytes of its backward pass."""
    tensors, options, shards, _ = case(sizes, **options)
    rank, step = dist.get_rank(), 1 if options.get("layout") == "blh" else -1
    own = {
        n: part(t, shards, rank, step) if n in ("u", "pre_gate", "post_gate") else t
        for n, t in tensors.items()
    }
    own["u"].requires_grad_()
    promised = parallel.explain(**own, **options, method=method)
    with Traffic() as forward:
        y = parallel.fftconv(**own, **options, method=method)
    with Traffic() as backward:
        y.sum().backward()
    assert str(promised).startswith({"a2a": "all-to-all", "halo": "halo"}[promised.method])
    return promised.sent[rank], forward.sent, backward.sent, promised.others


OPTIONS = [
    {"taps": 3},
    {"taps": 30, "heads": 2},
    {"taps": 4, "future": 2, "layout": "blh"},
    {"taps": 5, "mode": "circular"},
    {"taps": 3, "dtype": torch.bfloat16},
    {"taps": 3, "dtype": torch.bfloat16, "gates": ("pre", "post")},
    {"taps": 3, "dtype": torch.bfloat16, "gates": ("post",)},
]


@pytest.mark.parametrize("method", ["a2a", "halo", "auto"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bytes_are_those_that_are_promised(method, options):
    for sizes in ([8, 7], [6, 0, 5], [4, 4, 4, 2]):
        found = run(len(sizes), traffic, sizes, method, options)
        for promised, forward, _, _ in found:
            assert promised == forward
        assert 0 < sum(f for _, f, _, _ in found) == sum(b for _, _, b, _ in found)
        if method == "auto":
            others = found[0][3]
            if options["taps"] > sum(sizes) / len(sizes):
                del others["halo"]
            assert sum(f for _, f, _, _ in found) == min(others.values())


def test_the_formula_of_even_shards():
    """Per rank and forward pass, as the documentation has it."""
    b, c, h, ranks, steps, taps, modes = 2, 12, 3, 4, 25, 9, 32
    problem = Problem(Shards((steps,) * ranks), b, c, h, (taps - 1, 0), False, 4, 4, modes)
    share = (ranks - 1) / ranks
    assert problem.bytes_of("a2a", 1) == b * c * steps * share * 4 * (1 + h)
    assert problem.bytes_of("halo", 1) == b * c * (taps - 1) * 4
    assert problem.bytes_of("halo", ranks - 1) == 0  # nobody comes after it
    assert problem.bytes_of("state", 1) == b * c * modes * 16 * (ranks - 1)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("circular", [False, True])
def test_the_total_is_that_of_every_rank(order, circular):
    for reach in ((0, 0), (3, 0), (5, 2), (17, 30)):
        for ranks in (1, 3, 4):
            sizes = (12,) * ranks if order == "zigzag" else (5, 0, 9, 7)[:ranks]
            problem = Problem(Shards(sizes, order), 2, 3, 2, reach, circular, 2, 4, 8)
            for method in problem.ways():
                ours = [problem.bytes_of(method, rank) for rank in range(ranks)]
                assert problem.total(method) == sum(ours), (reach, ranks, method)


def test_hundreds_of_ranks_choose_quickly():
    """Each rank chooses before each call, and must not look at every pair of ranks and at all shards for it."""
    ranks = 512
    for taps, chosen in ((100, "halo"), (1 << 20, "a2a")):
        shards = Shards((1 << 11,) * ranks)
        problem = Problem(shards, 1, 4096, 1, (taps - 1, 0), False, 2, 2, 1)
        begin = time.process_time()
        assert problem.choose("auto") == chosen
        assert time.process_time() - begin < 5
    # A rank that sends must know what all others lack, and finds it again at the next call.
    halo.cache_clear()
    for _ in range(2):
        assert problem.bytes_of("halo", 0) == 4096 * (ranks - 1) * (1 << 11) * 2
    assert halo.cache_info().hits == ranks - 1


def layer_traffic(layer, length, method):
    torch.manual_seed(0)
    model = parallel.context_parallel(layer(), method=method)
    x = torch.randn(2, length // dist.get_world_size(), D, requires_grad=True)
    promised = parallel.explain(x, model)
    with Traffic() as forward:
        model(x)
    return promised.method, promised.sent[dist.get_rank()], forward.sent


def s4d():
    return S4D(D)


def two_sided():
    return S4D(D, bidirectional=True, heads=2)


def test_bytes_of_layers():
    """A state is cheaper than the steps themselves where there are enough of them."""
    for make, length in ((s4d, 10_000), (two_sided, 10_000)):
        for method, promised, forward in run(2, layer_traffic, make, length, "auto"):
            assert method == "state" and promised == forward
    for method, promised, forward in run(2, layer_traffic, s4d, 20, "auto"):
        assert method != "state" and promised == forward
    for method, promised, forward in run(4, layer_traffic, s4d, 400, "a2a"):
        assert method == "a2a" and promised == forward


GENERATORS = {
    "s4d": lambda: S4DKernel(5, heads=2),
    "long_conv": lambda: LongConvKernel(5, l_max=12, kernel_dropout=0.0),
    "sgconv": lambda: SGConvKernel(5, l_max=40),
    "hyena": lambda: HyenaFilter(5, l_max=40),
}


def generated(name, method, known):
    """A generator in the place of k: y and the gradients of its parameters; which channels it made."""
    torch.manual_seed(0)
    generator = GENERATORS[name]().double()
    sizes = [9, 8, 4]
    tensors, _, shards, _ = case(sizes, skip=False)
    rank, u = dist.get_rank(), tensors["u"]
    y = fftconv(u, generator(shards.length))
    weight = torch.randn(y.shape, dtype=y.dtype)
    y.mul(weight).sum().backward()
    wanted = [p.grad.clone() for p in generator.parameters()]
    generator.zero_grad()
    made = []
    part_of = generator.part
    generator.part = lambda t, n, r, channels: made.append(channels) or part_of(t, n, r, channels)
    options = {"shards": tuple(sizes)} if known else {}
    ours = parallel.fftconv(part(u, shards, rank, -1), generator, method=method, **options)
    ours.mul(part(weight, shards, rank, -1)).sum().backward()
    torch.testing.assert_close(ours, part(y, shards, rank, -1), rtol=1e-12, atol=1e-12)
    for p, grad in zip(generator.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-11, atol=1e-12)
    return made


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
def test_generators_make_the_channels_of_their_rank_only(name, known):
    slices = [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert run(3, generated, name, "a2a", known) == [[s] for s in slices]
    assert run(3, generated, name, "halo", known) == [[], [], []]


def in_half_precision(dtype):
    """Equal to one process to the bit where each number is rounded at the same places."""
    for options in OPTIONS:
        given = case([9, 6, 8], **options | {"dtype": dtype})
        for method in ("a2a", "halo"):
            errors = compare(given, method=method, bound=2e-2)
            assert errors["y"] < (1e-5 if dtype == torch.float32 else 5e-3), (options, errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    run(3, in_half_precision, dtype)
