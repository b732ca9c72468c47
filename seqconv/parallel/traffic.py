"""Which way a convolution over several processes takes, by the bytes that it moves."""

from dataclasses import dataclass
from functools import lru_cache

from seqconv.parallel.shards import Shards, chunk_sizes, halo

METHODS = ("auto", "a2a", "halo", "state")


@dataclass(frozen=True)
class Problem:
    """A convolution of (batch, channels, length) with heads kernels of `reach` = (lags of the past, of the future).

    sent and returned are the bytes of one number on the way to the convolution and back; modes is the size of a state
    in complex numbers, 0 where the kernel has none; directions is 2 for a two-sided one. whole says that every output
    reads the whole sequence, so that it must be put together.
    """

    shards: Shards
    batch: int
    channels: int
    heads: int
    reach: tuple[int, int]
    circular: bool
    sent: int
    returned: int
    modes: int = 0
    directions: int = 1
    whole: bool = False

    @property
    def channel_sizes(self) -> list[int]:
        return list(chunk_sizes(self.channels, self.shards.ranks))

    def bytes_of(self, method: str, rank: int) -> int:
        """The bytes that a rank sends to others in one forward pass. Backward sends as many gradients: all_to_all and
        halo each number once more, in the other direction, and the states of the ranks are summed."""
        shards, batch = self.shards, self.batch
        if method == "a2a":
            own = self.channel_sizes[rank]
            there = shards.sizes[rank] * (self.channels - own) * self.sent
            back = (shards.length - shards.sizes[rank]) * own * self.heads * self.returned
            return batch * (there + back)
        if method == "halo":
            steps = 0
            for r in range(shards.ranks):
                if r == rank:
                    continue
                for sides in halo(shards, r, *self.reach, self.circular):
                    steps += sum(n for side in sides for owner, _, n in side if owner == rank)
            return batch * self.channels * steps * self.sent
        segments = len(shards.segments(rank))
        state = segments * self.directions * batch * self.channels * self.modes * 16
        return state * (shards.ranks - 1)

    @lru_cache(maxsize=256)  # noqa: B019 (a problem is a few numbers, and every call forms an equal one)
    def total(self, method: str) -> int:
        """The bytes of all ranks."""
        ranks = range(self.shards.ranks)
        if method != "halo":
            return sum(self.bytes_of(method, rank) for rank in ranks)
        # What is received is as much, and one pass over the ranks finds it. Long kernels have too many pieces to keep.
        steps = sum(
            n
            for rank in ranks
            for sides in halo.__wrapped__(self.shards, rank, *self.reach, self.circular)
            for side in sides
            for owner, _, n in side
            if owner != rank
        )
        return self.batch * self.channels * steps * self.sent

    def ways(self) -> list[str]:
        """The methods that this convolution can take."""
        if self.whole:
            return ["a2a"]
        return ["a2a", "halo"] + (["state"] if self.modes and not self.circular else [])

    def choose(self, method: str) -> str:
        """The method itself, or the one that moves the fewest bytes over all ranks. "halo" counts only for kernels that
        reach no further than a shard: with longer ones a rank would hold and convolve most of the sequence."""
        if method != "auto":
            return method
        short = sum(self.reach) * self.shards.ranks <= self.shards.length
        ways = [way for way in self.ways() if way != "halo" or short]
        return min(ways, key=self.total)


@dataclass(frozen=True)
class Explanation:
    """How a convolution over several processes is carried out.

    Attributes:
        method: "a2a", "halo" or "state".
        sent: the bytes that each rank sends to the others in one forward pass; backward sends as many.
        others: the bytes that all ranks together would send by each method that there is.
        shards: the steps on each rank.
        channels: the channels of each rank between the two exchanges of "a2a"; all of them otherwise.
    """

    method: str
    sent: tuple[int, ...]
    others: dict[str, int]
    shards: tuple[int, ...]
    channels: tuple[int, ...]

    def __str__(self) -> str:
        way = {"a2a": "all-to-all, channels divided", "halo": "halo", "state": "states gathered"}
        beside = ", ".join(f"{name} {count:,}" for name, count in self.others.items())
        return (
            f"{way[self.method]} over {len(self.shards)} processes; in a forward pass each sends at most "
            f"{max(self.sent):,} bytes, all together {sum(self.sent):,} (by each method: {beside})"
        )


def explanation(problem: Problem, method: str) -> Explanation:
    ranks = range(problem.shards.ranks)
    method = problem.choose(method)
    channels = problem.channel_sizes if method == "a2a" else [problem.channels] * len(ranks)
    return Explanation(
        method,
        tuple(problem.bytes_of(method, rank) for rank in ranks),
        {name: problem.total(name) for name in problem.ways()},
        problem.shards.sizes,
        tuple(channels),
    )
