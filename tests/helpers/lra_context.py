"""bench.lra's model and its runs in several processes; the functions run in every rank."""

import copy
import os
import warnings

import torch
import torch.distributed as dist
from parallel_cases import relative
from processes import show_where

from bench.lra import options
from bench.lra.context import Context
from bench.lra.model import SequenceClassifier, loss_of

KERNELS = {
    "s4d": options.S4D(bidirectional=True),
    "sgconv": options.SGConv(),
    "long_conv": options.LongConv(kernel_dropout=0.0, lam=0.0),
    "butterfly": options.Butterfly(kernel_dropout=0.0, lam=0.0),
    "hyena": options.Hyena(),
}
CLASSES, VOCAB, D = 3, 7, 5


def batch_of(kind: str, rows: int, length: int):
    """x, lengths and labels: of tokens, of pairs of them, or of one real channel without padding."""
    g = torch.Generator().manual_seed(length)
    labels = torch.randint(CLASSES, (rows // 2 if kind == "pair" else rows,), generator=g)
    if kind == "real":
        return torch.randn(rows, length, 1, generator=g, dtype=torch.float64), None, labels
    lengths = torch.randint(1, length + 1, (rows,), generator=g)
    lengths[0], lengths[-1] = length, 1
    return torch.randint(1, VOCAB, (rows, length), generator=g), lengths, labels


def model_agrees(layer, norm, pool, prenorm, kind, lengths, bound=1e-11):
    """Logits, gradients and running statistics of steps in training, and logits in evaluation, are one process's."""
    torch.manual_seed(1)
    model = options.Model(2, D, norm, prenorm, 0.0, pool)
    inputs = {"channels": 1} if kind == "real" else {"vocab": VOCAB, "pair": kind == "pair"}
    sizes = {"classes": CLASSES, "l_max": max(lengths), **inputs}
    plain = SequenceClassifier(layer, model, KERNELS[layer], **sizes).double()
    ours, context = copy.deepcopy(plain), Context(dist.get_world_size())
    context.divide(ours)
    told = f"{layer}, {norm}, {pool}, prenorm {prenorm}, {kind}, {lengths}"

    def compare(found, wanted, what):
        error = relative(found, wanted)
        assert error < bound, f"{told}: {what} is {error:.1e} off"

    for length in lengths:
        x, n, labels = batch_of(kind, 4, length)
        for made, share in ((plain, 1), (ours, context.size)):
            made.zero_grad()
            made.logits = made(x, n)
            (loss_of(made.logits, labels) / share).backward()
        compare(ours.logits.detach(), plain.logits.detach(), "logits")
        # A bias before a batch norm has a gradient of round-off alone, so that the whole gradient is the scale.
        least = 1e-3 * torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
        for (path, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            error = (q.grad - p.grad).norm() / p.grad.norm().clamp(min=least)
            assert error < bound, f"{told}: the gradient of {path} is {error:.1e} off"
    for (path, p), q in zip(plain.named_buffers(), ours.buffers(), strict=True):
        compare(q.double(), p.double(), path)
    plain.eval(), ours.eval()
    with torch.no_grad():
        compare(ours(x, n), plain(x, n), "logits in evaluation")


def models_agree(cases):
    for case in cases:
        model_agrees(*case)


def fits(commands: list[list[str]]) -> list[int]:
    """Runs `fit` on tests/helpers/lra_tiny.py's data, as torchrun would, in fresh processes; the exit codes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # Each command's store is there beforehand, as torchrun's is. A port that is only chosen beforehand may be somebody
    # else's by the time it is wanted.
    address = "127.0.0.1"
    stores = [dist.TCPStore(address, 0, is_master=True) for _ in commands if rank == 0]
    ports = [[store.port for store in stores]]
    dist.broadcast_object_list(ports)
    dist.destroy_process_group()
    warnings.simplefilter("default")  # what Lightning warns of is no matter here
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    ranks |= {"MASTER_ADDR": address}
    ranks |= {"TORCHELASTIC_RUN_ID": "tests", "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    torch.use_deterministic_algorithms(False)
    from lra_tiny import install

    install()
    from bench.lra.__main__ import main

    codes = []
    for command, port in zip(commands, ports[0], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        show_where()  # Lightning has given the signal back to the system.
        try:
            main(["fit", *command])
            codes.append(0)
        except SystemExit as error:
            codes.append(error.code)
    if rank > 0:
        dist.TCPStore(address, ports[0][-1]).set(f"rank {rank} is done", "")
    else:  # The stores end with this process's last reference to them.
        stores[-1].wait([f"rank {other} is done" for other in range(1, world)])
    return codes
