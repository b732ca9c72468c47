"""The bytes that processes send to one another: counted where they go, and on paper for many GPUs."""

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bench.facts import length_name
from bench.files import markdown
from seqconv.parallel.call import reach_of
from seqconv.parallel.shards import Shards, chunk_sizes
from seqconv.parallel.traffic import Problem

# What the table on paper assumes.
D_MODEL, MODES, BYTES = 4096, 32, 2  # bfloat16
GPUS, LENGTHS, TAPS = (8, 64, 256, 1024), (1 << 20, 1 << 30), (128, 65536)
GIGABITS = 400  # a second, from each GPU


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends to others by all_to_all, all_gather and reduce_scatter in a group."""

    def __init__(self, group=None):
        super().__init__()
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("_c10d_functional::"):
            if "all_to_all" in name:
                t, _, splits = args[:3]
                self.sent += (sum(splits) - splits[self.rank]) * t.element_size()
            elif "all_gather" in name:
                self.sent += args[0].numel() * args[0].element_size() * (self.ranks - 1)
            elif "reduce_scatter" in name:
                size = args[0].numel() * args[0].element_size()
                self.sent += size // self.ranks * (self.ranks - 1)
        return func(*args, **(kwargs or {}))


def on_paper(gpus: int, length: int, taps: int) -> Problem:
    """The convolution of the table: one sample in bfloat16, causal, with the states of S4D."""
    shards = Shards(chunk_sizes(length, gpus))
    reach = reach_of(taps, 0, shards.length)
    return Problem(shards, 1, D_MODEL, 1, reach, False, BYTES, BYTES, MODES)


def sent(gpus: int, length: int) -> dict[str, int]:
    """The bytes that a rank in the middle of the sequence sends in one forward pass, by each way."""
    ways = {"a2a": ("a2a", TAPS[0])} | {f"halo, {t:,} taps": ("halo", t) for t in TAPS}
    ways |= {"state": ("state", TAPS[0])}
    return {
        name: on_paper(gpus, length, taps).bytes_of(method, gpus // 2)
        for name, (method, taps) in ways.items()
    }


def paper(gpus=GPUS, lengths=LENGTHS) -> str:
    """The table in Markdown, with what it assumes. Nothing in it is measured."""
    rows = []
    for length in lengths:
        for count in gpus:
            found = sent(count, length)
            a2a, *others = found
            best = [min(a2a, way, key=found.__getitem__).split(",")[0] for way in others]
            cells = [f"{n / 1e6:,.{int(n < 1e9)}f} MB, {seconds(n)}" for n in found.values()]
            rows.append([length_name(length), f"{count:,}", *cells, *best])
    kernels = [f"fewest: {taps:,} taps" for taps in TAPS]
    header = ["steps", "GPUs", *sent(2, 2), *kernels, "fewest: S4D"]
    return "\n\n".join([markdown(header, rows), assumed()])


def seconds(count: int) -> str:
    """The time in which a link carries these bytes, and nothing else."""
    milliseconds = 8e3 * count / (GIGABITS * 1e9)
    return f"{milliseconds:,.2f} ms" if milliseconds < 10 else f"{milliseconds:,.0f} ms"


def assumed() -> str:
    return (
        f"Each cell has the megabytes (10^6 bytes) that a GPU in the middle of the sequence sends in one forward pass "
        f"for one sample, d_model {D_MODEL}, bfloat16 and {MODES} modes of S4D, by the formula that "
        f"`seqconv.parallel.explain` shows. The time beside them is that of these bytes alone on a link that carries "
        f"{GIGABITS} Gbit/s from each GPU: an assumption, and no measurement. All-to-all ends at {D_MODEL:,} GPUs, "
        f"where each has one channel; with more of them the others have none, while halo and state go on."
    )
