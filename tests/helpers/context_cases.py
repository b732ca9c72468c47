"""Layers whose sequences are divided among processes, against one process; the functions run in every rank."""

import copy
import warnings

import torch
import torch.distributed as dist
from layer_table import EVERY, D
from parallel_cases import part, relative
from torch import nn

from seqconv import S4D, ButterflyConv, Hyena, LongConv, SGConv, parallel
from seqconv.parallel.shards import Shards, chunk_sizes

MORE = {
    "s4d, two-sided": lambda **o: S4D(D, bidirectional=True, heads=2, **o),
    "s4d, shared sets": lambda **o: S4D(D, n_ssm=2, **o),
    "s4d, dss": lambda **o: S4D(D, discretization="dss", activation=None, **o),
    "s4d, dss_softmax": lambda **o: S4D(D, discretization="dss_softmax", **o),
    "long_conv, two-sided": lambda **o: LongConv(
        D, l_max=80, kernel_dropout=0.0, bidirectional=True
    ),
    "long_conv, short": lambda **o: LongConv(D, l_max=6, kernel_dropout=0.0, lam=0.0),
    "sgconv, two-sided": lambda **o: SGConv(D, l_max=80, bidirectional=True, heads=2),
    "hyena, three kernels": lambda **o: Hyena(D, l_max=80, order=4),
    "butterfly, three sets": lambda **o: ButterflyConv(
        D, l_max=80, kernel_dropout=0.0, butterfly_heads=3, heads=2
    ),
}
ALL = EVERY | MORE


def made(name):
    torch.manual_seed(3)
    with torch.device("cpu"):
        layer = ALL[name]().double()
    return layer


def masks(kind, batch, length):
    lengths = torch.arange(batch) * 3 % (length + 1)
    if kind == "lengths":
        return {"lengths": lengths}
    if kind == "mask":
        return {"mask": torch.arange(length) >= lengths.unsqueeze(1)}
    return {}


def layer_errors(name, sizes, order="contiguous", masked=None, bound=1e-12, **options):
    """The worst relative error of the output and of every gradient."""
    shards, rank = Shards(tuple(sizes), order), dist.get_rank()
    length = shards.length
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, length, D, generator=g, dtype=torch.float64)
    weight = torch.randn(3, length, D, generator=g, dtype=torch.float64)
    more = masks(masked, 3, length)
    plain = made(name)
    warnings.filterwarnings("ignore", message=".*taps .l_max.*")
    ours = parallel.context_parallel(copy.deepcopy(plain), order=order, **options)

    whole = x.clone().requires_grad_()
    y = plain(whole, **more)
    (y * weight).sum().backward()
    own = part(x, shards, rank, 1).clone().requires_grad_()
    z = ours(own, **more)
    (z * part(weight, shards, rank, 1)).sum().backward()

    errors = {"y": relative(z.detach(), part(y.detach(), shards, rank, 1))}
    errors["x"] = relative(own.grad, part(whole.grad, shards, rank, 1))
    for (path, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert q.grad is not None, path
        errors[path] = relative(q.grad, p.grad)
    for path, error in errors.items():
        assert error < bound, f"{name}, {sizes}, {order}, {options}: {path} is {error:.1e} off"
    return max(errors.values())


def run_layers(calls):
    return max(layer_errors(*args, **options) for args, options in calls)


class Model(nn.Module):
    """Embedding, three different layers with norms and dropout between them, and an output for each step."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Linear(2, D)
        self.layers = nn.ModuleList(
            [S4D(D), LongConv(D, l_max=80, kernel_dropout=0.0), Hyena(D, l_max=80)]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in self.layers)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(D, 3)

    def forward(self, x, lengths=None):
        x = self.embed(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + self.dropout(layer(norm(x), lengths=lengths))
        return self.out(x)


def chunk(x, ranks, rank, axis=1):
    sizes = chunk_sizes(x.shape[axis], ranks)
    return x.narrow(axis, sum(sizes[:rank]), sizes[rank])


def train(model, batches, losses, rate=0.1):
    """The parameters after a step of SGD for each list of (x, target), whose gradients are added."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for micro in batches:
        optimizer.zero_grad()
        for x, target, lengths in micro:
            losses(model(x, lengths), target).backward()
        optimizer.step()
    return model


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def model_trains(
    world, context, wrap, dtype=torch.float64, bound=1e-11, steps=2, micro=2, length=37
):
    """A model on data x context ranks against one process: parameters after steps of accumulated gradients."""
    data = world // context
    mesh = dist.init_device_mesh("cpu", (data, context), mesh_dim_names=("dp", "cp"))
    row, place = mesh["dp"].get_local_rank(), mesh["cp"].get_local_rank()
    g = torch.Generator().manual_seed(5)
    batch, double = 2 * data, {"generator": g, "dtype": dtype}
    batches = []
    for _ in range(steps):
        draws = range(micro)
        lengths = [torch.randint(length, (batch,), generator=g) for _ in draws]
        batches.append(
            [
                (
                    torch.randn(batch, length, 2, **double),
                    torch.randn(batch, length, 3, **double),
                    n,
                )
                for _, n in zip(draws, lengths, strict=True)
            ]
        )
    torch.manual_seed(7)
    plain = Model().to(dtype)
    ours = copy.deepcopy(plain)
    # Torch says so of every model whose last operation is a linear map.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    if wrap == "fsdp":
        for layer in ours.layers:
            parallel.fully_shard(layer, mesh=mesh)
        parallel.fully_shard(ours, mesh=mesh)
    if wrap == "fsdp, flat":
        parallel.fully_shard(ours, mesh=mesh._flatten("all"))
    ours = parallel.context_parallel(ours, mesh["cp"])
    if wrap == "ddp":
        ours = nn.parallel.DistributedDataParallel(ours, process_group=mesh["dp"].get_group())
    if wrap == "ddp of all":
        ours = nn.parallel.DistributedDataParallel(ours)

    def own(t, cut):
        t = t.chunk(data)[row]
        return chunk(t, context, place) if cut else t

    part_of = [[(own(x, True), own(t, True), own(n, False)) for x, t, n in m] for m in batches]
    squares = lambda y, t: (y - t).square().sum() / batch  # noqa: E731
    train(plain, batches, squares)
    train(ours, part_of, lambda y, t: squares(y, t) * data)  # data parallelism takes the mean
    found = dict(ours.named_parameters())
    for path, p in plain.named_parameters():
        q = whole(found.get(path, found.get(f"module.{path}")))
        error = relative(q.detach(), p.detach())
        assert error < bound, f"{wrap}: {path} is {error:.1e} off"
