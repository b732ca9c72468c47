"""Which steps of a sequence each process of a group has."""

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

ORDERS = ("contiguous", "zigzag")


def chunk_sizes(length: int, count: int) -> tuple[int, ...]:
    """The sizes of torch.chunk(count), with zeros where it gives fewer."""
    size = -(-length // count)
    return tuple(max(min(size, length - i * size), 0) for i in range(count))


@dataclass(frozen=True)
class Shards:
    """The shards of one sequence: `sizes[r]` steps are on rank r.

    With order="contiguous" rank r has the steps after those of the ranks before it, and any sizes will do. With
    "zigzag" the sequence is cut as by torch.chunk into 2 ranks parts, and rank r has part r and then part 2 ranks - 1
    - r: causal attention balances its work so.
    """

    sizes: tuple[int, ...]
    order: str = "contiguous"

    def __post_init__(self):
        parts = chunk_sizes(self.length, 2 * self.ranks)
        pairs = tuple(a + b for a, b in zip(parts, reversed(parts), strict=True))[: self.ranks]
        if self.order == "zigzag" and pairs != self.sizes:
            text = f"sizes {list(pairs)} for a length of {self.length}, got {list(self.sizes)}"
            raise ValueError(f"parallel: shards in zigzag order must have {text}")

    @property
    def ranks(self) -> int:
        return len(self.sizes)

    @property
    def length(self) -> int:
        return sum(self.sizes)

    def segments(self, rank: int) -> list[tuple[int, int]]:
        """(start, size) of each run of neighbouring steps on a rank, in the order in which they lie there."""
        if self.order == "contiguous":
            return [(sum(self.sizes[:rank]), self.sizes[rank])]
        parts = chunk_sizes(self.length, 2 * self.ranks)
        places = rank, 2 * self.ranks - 1 - rank
        return [(sum(parts[:place]), parts[place]) for place in places]


def given(function: str, sizes, order: str) -> Shards | None:
    """The shards that a caller says there are, or None."""
    if sizes is None:
        return None
    if not isinstance(sizes, (tuple, list)) or any(type(n) is not int or n < 0 for n in sizes):
        text = f"must be the number of steps on each rank, got {sizes!r}"
        raise ValueError(f"{function}: shards {text}")
    return Shards(tuple(sizes), order)


@lru_cache(maxsize=256)
def owners(shards: Shards) -> tuple[tuple[int, int, int, int], ...]:
    """(start, size, rank, offset in the rank's shard) of every segment that is not empty, by start."""
    found = []
    for rank in range(shards.ranks):
        offset = 0
        for start, size in shards.segments(rank):
            if size:
                found.append((start, size, rank, offset))
            offset += size
    return tuple(sorted(found))


@lru_cache(maxsize=1 << 12)  # each call asks for every rank
def halo(shards: Shards, rank: int, left: int, right: int, circular: bool) -> tuple:
    """What a rank needs of the others around its segments: for each segment the pieces before it and those after it,
    each (owner, offset in the owner's shard, size), by time."""
    length, out = shards.length, []
    for start, size in shards.segments(rank):
        sides = []
        for first, last in ((start - left, start), (start + size, start + size + right)):
            if not size:
                first = last
            if circular:
                runs = _wrapped(first, last, length)
            else:
                runs = [(max(first, 0), min(last, length))]
            sides.append(tuple(piece for run in runs for piece in _pieces(shards, *run)))
        out.append(tuple(sides))
    return tuple(out)


def _wrapped(first: int, last: int, length: int) -> list[tuple[int, int]]:
    """The runs of steps first ... last - 1 of an endless repetition of the sequence, inside the sequence."""
    runs = []
    while first < last:
        begin = first % length
        size = min(last - first, length - begin)
        runs.append((begin, begin + size))
        first += size
    return runs


def _pieces(shards: Shards, first: int, last: int):
    """The pieces of steps first ... last - 1. It looks at no other segment, for there may be thousands."""
    found = owners(shards)
    for i in range(max(bisect_right(found, (first, math.inf)) - 1, 0), len(found)):
        start, size, rank, offset = found[i]
        if start >= last:
            break
        begin, end = max(first, start), min(last, start + size)
        if begin < end:
            yield rank, offset + begin - start, end - begin
