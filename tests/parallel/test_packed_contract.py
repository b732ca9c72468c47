"""Packs that are divided among processes: rows that do not meet, what is refused on every rank, dropout and options."""

import copy
import re
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from context_cases import ALL, made
from layer_table import D
from packed_parallel import draw, offsets
from parallel_cases import part, relative
from processes import run
from torch import nn

from seqconv import S4D, ButterflyConv, Hyena, LongConv, fftconv, parallel
from seqconv.parallel.shards import Shards

LENGTHS = [
    4,
    0,
    9,
    1,
    6,
]  # of 20 steps; with 8, 7 and 5 on a rank every cut divides a row or ends one
SIZES = {2: (9, 11), 3: (8, 7, 5)}


def spoilt(calls):
    """The rows that a NaN in row 2 reaches, as the outputs and the input's gradient show it on this rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    shards, pack = Shards(SIZES[ranks]), offsets(LENGTHS)
    row = torch.repeat_interleave(torch.tensor(LENGTHS))
    row = part(row, shards, rank, 0)
    warnings.filterwarnings("ignore", message=".*taps .l_max.*")
    for name, method in calls:
        layer = parallel.context_parallel(made(name), method=method)
        x = draw(20, D)
        clean = layer(part(x, shards, rank, 0), cu_seqlens=pack)
        x[6:9] = torch.nan
        own = part(x, shards, rank, 0).requires_grad_()
        y = layer(own, cu_seqlens=pack)
        y.sum().backward()
        others = row != 2
        assert torch.equal(y[others], clean[others]), (name, method)
        assert own.grad[others].isfinite().all(), (name, method)
        assert others.all() or y[~others].isnan().any(), (name, method)


@pytest.mark.parametrize("world", [2, 3])
def test_a_nan_stays_in_its_row(world):
    warm = [(name, "auto") for name in ALL]
    calls = [(name, method) for name in ("s4d", "s4d, two-sided") for method in ("halo", "a2a")]
    run(world, spoilt, warm + calls + [("s4d", "state"), ("s4d, two-sided", "state")])


def raised(function, *args, **options) -> str:
    try:
        function(*args, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


WRONG = {  # of rank 1, and what every rank says
    "other rows": (
        {"cu_seqlens": [0, 0, 7, 10]},
        "agree about cu_seqlens, which are those of .* r",
    ),
    "fewer rows": (
        {"cu_seqlens": [0, 3, 10]},
        "agree about cu_seqlens's axis 0, got 4 on rank 0, 3",
    ),
    "no pack": ({"cu_seqlens": None}, "agree about cu_seqlens's presence, got True on .* False on"),
    "other longest": (
        {"max_seqlen": 9},
        "agree about max_seqlen, got nothing on rank 0, 9 on rank 1",
    ),
}


def differing(what: str, shards):
    torch.manual_seed(0)
    rank, changes = dist.get_rank(), WRONG[what][0]
    options = {"cu_seqlens": [0, 3, 5, 10]} | (changes if rank else {})
    if options["cu_seqlens"] is not None:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"])
    x, u = torch.randn(5, D), torch.randn(5, 4)
    if options["cu_seqlens"] is None:
        x, u = x.unsqueeze(0), u.unsqueeze(0)
    found = [
        raised(parallel.context_parallel(make(D), shards=shards), x, **options)
        for make in (S4D, lambda d: Hyena(d, l_max=9))
    ]
    options |= {"layout": "blh", "shards": shards}
    return [*found, raised(parallel.fftconv, u, torch.randn(4, 3), **options)]


@pytest.mark.parametrize("shards", [None, (5, 5)])
@pytest.mark.parametrize("what", WRONG)
def test_ranks_that_disagree(what, shards):
    for found in run(2, differing, what, shards):
        for name, text in zip(("S4D", "Hyena", "parallel.fftconv"), found, strict=True):
            head = f"ValueError: {name}: the ranks of the group must "
            assert re.match(re.escape(head) + WRONG[what][1], text), text


def later(operator: bool):
    """With given shards, rows that all ranks have had before on rank 0, and others on rank 1."""
    given = {"shards": (5, 5), "method": "a2a"}
    layer = parallel.context_parallel(S4D(D), **given)
    if operator:
        layer = partial(parallel.fftconv, k=torch.randn(D, 3), layout="blh", **given)
    x = torch.randn(5, D)
    for pack in ([0, 3, 5, 10], [0, 10]):
        layer(x, cu_seqlens=torch.tensor(pack))
    end = 6 if dist.get_rank() else 5
    return raised(layer, x, cu_seqlens=torch.tensor([0, 3, end, 10]))


@pytest.mark.parametrize("operator", [False, True])
def test_ranks_that_disagree_at_a_later_call(operator):
    for text in run(2, later, operator):
        assert "must agree about cu_seqlens, which are those of the whole pack" in text, text


def invalid():
    """Calls that rank 1 alone refuses, and then calls that all ranks refuse alike."""
    rank = dist.get_rank()
    layer, conv = (
        parallel.context_parallel(S4D(D)),
        parallel.context_parallel(LongConv(D, l_max=20)),
    )
    short = parallel.context_parallel(ButterflyConv(D, l_max=7))
    x, good = torch.randn(5, D), torch.tensor([0, 3, 10])
    one = lambda wrong, right: wrong if rank else right  # noqa: E731
    alone = [
        raised(layer, x, cu_seqlens=one([0, 3, 10], good)),
        raised(layer, x, cu_seqlens=one(good.float(), good)),
        raised(layer, one(x[:, :2], x), cu_seqlens=good),
        raised(layer, x, cu_seqlens=one(torch.tensor([0, 12, 10]), good)),
        raised(parallel.fftconv, x, one(x, x[:4].mT), cu_seqlens=good, layout="blh"),
    ]
    alike = [
        raised(layer, x, cu_seqlens=torch.tensor([0, 3, 5])),
        raised(layer, x, cu_seqlens=torch.tensor([1, 3, 10])),
        raised(layer, x, cu_seqlens=good, max_seqlen=6),
        raised(layer, x, max_seqlen=6),
        raised(layer, x, cu_seqlens=good, lengths=torch.tensor([1, 2])),
        raised(layer, x, torch.zeros(2, 5), cu_seqlens=good),
        raised(layer, x.unsqueeze(0), cu_seqlens=good),
        raised(layer, x, cu_seqlens=good, rate=torch.ones(2)),
        raised(conv, x, cu_seqlens=good, rate=2.0),
        raised(short, x, cu_seqlens=torch.tensor([0, 2, 10])),
        raised(parallel.fftconv, x.mT, x.mT, cu_seqlens=torch.tensor([0, 3, 5])),
        raised(parallel.fftconv, x.mT, x.mT, cu_seqlens=good, mode="circular"),
        raised(parallel.fftconv, x.mT, x.mT, max_seqlen=3),
        raised(layer.prefill, x, None, cu_seqlens=good),
        raised(conv.prefill, x, None, cu_seqlens=good),
        raised(parallel.context_parallel(Hyena(D, l_max=9)).prefill, x, None, cu_seqlens=good),
        raised(parallel.explain, x, layer, cu_seqlens=torch.tensor([0, 3, 5])),
    ]
    return alone, alike


def test_what_is_refused():
    own = [
        r"TypeError: S4D: cu_seqlens must be a tensor, got list",
        r"TypeError: S4D: cu_seqlens must be one of int32, int64, got float32",
        r"ValueError: S4D: x must be \(total, d_model=6\), got \(5, 2\)",
        r"ValueError: S4D: cu_seqlens\[2\] must be >= cu_seqlens\[1\]=12, got 10",
        r"ValueError: parallel.fftconv: k must be \(channels=6, K\)",
    ]
    alike = [
        r"ValueError: S4D: cu_seqlens\[2\] must be the number of steps of all ranks, 10, got 5",
        r"ValueError: S4D: cu_seqlens\[0\] must be 0, got 1",
        r"ValueError: S4D: max_seqlen must be at least the length of every row, got 6 and 7 ",
        r"ValueError: S4D: max_seqlen must be None without cu_seqlens, got 6",
        r"ValueError: S4D: lengths must be None with cu_seqlens, which leaves no padding",
        r"ValueError: S4D: mask must be None with cu_seqlens, which leaves no padding",
        r"ValueError: S4D: x must be \(total, d_model=6\), got \(1, 5, 6\)",
        r"ValueError: S4D: rate must be a number under context parallelism",
        r"ValueError: LongConvKernel: rate must be 1 \(its taps have no time scale\), got 2.0",
        r"ValueError: ButterflyConv: x must have length <= l_max=7 in every row, got length=8",
        r"ValueError: parallel.fftconv: cu_seqlens\[2\] must be the number of steps of all ranks, 10, got",
        r"ValueError: parallel.fftconv: mode must be 'causal' with cu_seqlens, got 'circular'",
        r"ValueError: parallel.fftconv: max_seqlen must be None without cu_seqlens, got 3",
        r"TypeError: S4D: a layer under context parallelism has no step\(\) and no prefill\(\)",
        r"TypeError: LongConv: a layer under context parallelism has no step\(\) and no prefill",
        r"TypeError: Hyena: a layer under context parallelism has no step\(\) and no prefill",
        r"ValueError: S4D: cu_seqlens\[2\] must be the number of steps of all ranks, 10, got 5",
    ]
    (told, first), (mine, second) = run(2, invalid)
    for text, pattern, other in zip(mine, own, told, strict=True):
        assert re.match(pattern, text), text
        assert "rank 1 of the group has refused its arguments" in other, other
    for found in (first, second):
        for text, pattern in zip(found, alike, strict=True):
            assert re.match(pattern, text), text


def dropped(tie: bool, order: str):
    """Which outputs of the dropout between convolution and linear map are zero on this rank."""
    torch.manual_seed(0)
    layer = parallel.context_parallel(S4D(D, dropout=0.5, tie_dropout=tie), order=order)
    found = []
    layer.linear.register_forward_pre_hook(lambda module, args: found.append(args[0] == 0))
    torch.manual_seed(dist.get_rank())
    layer(torch.ones(10, D), cu_seqlens=offsets([3, 0, 11, 2, 4]))
    return found[0]


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_masks_of_activations(order):
    """Of whole channels there is one mask for every row, on whatever ranks its steps are."""
    shards, row = Shards((10, 10), order), torch.repeat_interleave(torch.tensor([3, 0, 11, 2, 4]))
    place = torch.cat([part(torch.arange(20), shards, rank, 0) for rank in range(2)]).argsort()
    tied, single = (torch.cat(run(2, dropped, tie, order))[place] for tie in (True, False))
    masks = torch.stack([tied[row == i][0] for i in (0, 2, 3, 4)])
    assert torch.equal(tied, masks[(row > 1).long() + (row > 2).long() + (row > 3).long()])
    assert len(masks.unique(dim=0)) > 1
    assert len(single.unique(dim=0)) > 4 and 0.3 < single.float().mean() < 0.7
    assert not torch.equal(*(part(single, shards, rank, 0) for rank in range(2)))


def with_options():
    """Given shards, a kernel for longer rows, other precisions, a rate, a generator, graphs between divided layers."""
    rank, x = dist.get_rank(), draw(20, D)
    shards, pack = Shards((8, 12)), offsets(LENGTHS)
    own = part(x, shards, rank, 0)
    plain = made("s4d")
    ours = parallel.context_parallel(copy.deepcopy(plain), shards=shards.sizes)
    for more in ({}, {"max_seqlen": 50}, {"rate": 0.5}):
        for rows in (LENGTHS, [20], [7, 13]):
            options = more | {"cu_seqlens": offsets(rows)}
            y = plain(x, **options)
            assert relative(ours(own, **options), part(y, shards, rank, 0)) < 1e-12
    dense = x.view(1, 20, D)
    assert relative(ours(own.unsqueeze(0)), part(plain(dense), shards, rank, 1)) < 1e-12

    # Filters of Hyena differ with max_seqlen at no step, those of dss_softmax at every one.
    softmax = made("s4d, dss_softmax")
    wanted = softmax(x, cu_seqlens=pack, max_seqlen=50)
    found = parallel.context_parallel(copy.deepcopy(softmax))(own, cu_seqlens=pack, max_seqlen=50)
    assert relative(found, part(wanted, shards, rank, 0)) < 1e-12

    half = S4D(D).bfloat16()
    wanted = half(x.bfloat16(), cu_seqlens=pack)
    half = parallel.context_parallel(half)
    found = half(own.bfloat16(), cu_seqlens=pack.to(torch.int32))
    assert found.dtype == torch.bfloat16
    assert relative(found, part(wanted, shards, rank, 0)) < 0.02

    u = x.mT
    generator = LongConv(D, l_max=30, kernel_dropout=0.0, heads=2).kernel.double()
    k = generator(9)
    wanted = fftconv(u, k, cu_seqlens=pack)
    wanted.square().sum().backward()
    first = [p.grad.clone() for p in generator.parameters()]
    generator.zero_grad()
    y = parallel.fftconv(part(u, shards, rank, -1), generator, cu_seqlens=pack)
    assert relative(y, part(wanted, shards, rank, -1)) < 1e-12
    y.square().sum().backward()
    for p, grad in zip(generator.parameters(), first, strict=True):
        assert relative(p.grad, grad) < 1e-12


def test_options():
    run(2, with_options)


def explained():
    """What short and long rows cost: short ones a halo, one long row all of it."""
    layer = parallel.context_parallel(LongConv(D, l_max=100))
    x = torch.randn(50, D)
    u, k = torch.randn(4, 50), torch.randn(4, 100)
    found = []
    for rows in ([10] * 10, [100]):
        pack = offsets(rows)
        by_layer = parallel.explain(x, layer, cu_seqlens=pack)
        by_operator = parallel.explain(u, k, cu_seqlens=pack)
        found.append((by_layer.method, by_layer.sent, by_operator.method, by_operator.sent))
    return found


def test_explanations():
    for short, long in run(2, explained):
        # Nine steps of 6, and of 4, channels in float32, from the first rank to the second.
        assert short == ("halo", (9 * 6 * 4, 0), "halo", (9 * 4 * 4, 0))
        assert long == ("a2a", (2 * 50 * 3 * 4,) * 2, "a2a", (2 * 50 * 2 * 4,) * 2)


def compiled():
    """A compiled model around divided layers, with packs of several kinds, whose longest row nobody names."""
    warnings.simplefilter("ignore")  # torch warns of its own modules
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), S4D(D), nn.Linear(D, D)).double()
    x, rank = draw(20, D), dist.get_rank()
    shards = Shards((8, 12))

    class Packed(nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.parts = parts

        def forward(self, x, pack):
            return self.parts[2](self.parts[1](self.parts[0](x), cu_seqlens=pack))

    plain = Packed(model)
    ours = torch.compile(parallel.context_parallel(copy.deepcopy(plain)), backend="aot_eager")
    for rows in (LENGTHS, [20], [7, 13]):
        wanted = plain(x, offsets(rows))
        found = ours(part(x, shards, rank, 0), offsets(rows))
        assert relative(found, part(wanted, shards, rank, 0)) < 1e-12
        found.sum().backward()


def test_compiled_models():
    run(2, compiled, timeout=200)


def nothing():
    """Packs without steps and without rows, and more ranks than channels."""
    rank = dist.get_rank()
    for method in ("a2a", "halo", "state"):
        layer = parallel.context_parallel(S4D(D), method=method)
        for pack in ([0], [0, 0, 0]):
            x = torch.randn(0, D, requires_grad=True)
            y = layer(x, cu_seqlens=torch.tensor(pack))
            y.sum().backward()
            assert y.shape == (0, D) and not layer.skip.grad.any()
    hyena = parallel.context_parallel(Hyena(D, l_max=9))
    assert hyena(torch.randn(0, D), cu_seqlens=torch.tensor([0, 0])).shape == (0, D)
    u, k, pack = draw(1, 20), draw(1, 7, seed=2), offsets(LENGTHS)
    shards = Shards(SIZES[3])
    for method in ("a2a", "halo"):
        y = parallel.fftconv(part(u, shards, rank, -1), k, cu_seqlens=pack, method=method)
        assert relative(y, part(fftconv(u, k, cu_seqlens=pack), shards, rank, -1)) < 1e-12


def test_nothing_to_convolve():
    run(3, nothing)
