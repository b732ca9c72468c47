"""Batches of a split. Their order depends on (seed, epoch) alone, so that any position can be resumed."""

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

AHEAD = 2  # batches that are read while the model works


class Batch(NamedTuple):
    """Samples and their labels. x is padded, and `lengths` says where (None: nowhere); or x is a pack (total, ...), and
    cu_seqlens has the offsets of its rows."""

    x: Tensor
    lengths: Tensor | None
    labels: Tensor
    cu_seqlens: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the model takes."""
        return self.x, self.lengths, self.cu_seqlens

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device. The offsets stay on the CPU, where every layer reads them."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Batch(self.x.to(device), lengths, self.labels.to(device), self.cu_seqlens)

    def pinned(self) -> "Batch":
        lengths = None if self.lengths is None else self.lengths.pin_memory()
        return Batch(self.x.pin_memory(), lengths, self.labels.pin_memory(), self.cu_seqlens)


def tensors(split, indices: np.ndarray, pin: bool = False, packed: bool = False) -> Batch:
    """Returns these samples, padded to the longest of them or packed."""
    x, lengths, labels = split.batch(indices)
    offsets = None
    if packed:
        x = x[np.arange(x.shape[1]) < lengths[:, None]]
        offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))))
    x, lengths, labels = (torch.from_numpy(np.ascontiguousarray(a)) for a in (x, lengths, labels))
    if packed or bool((lengths == x.shape[1]).all()):
        lengths = None
    batch = Batch(x, lengths, labels, offsets)
    return batch.pinned() if pin else batch


def thinned(batch: Batch, rate: int) -> Batch:
    """Every so many-th step of padded samples, the first one included."""
    if rate == 1:
        return batch
    lengths = None if batch.lengths is None else -(-batch.lengths // rate)
    return batch._replace(x=batch.x[:, ::rate], lengths=lengths)


def ahead(split, order: Iterator[np.ndarray], pin: bool, packed: bool = False) -> Iterator[Batch]:
    """Yields the batches that `order` names. A thread reads each while its predecessors are used."""
    with ThreadPoolExecutor(1) as reader:
        waiting = deque()
        try:
            for indices in order:
                waiting.append(reader.submit(tensors, split, indices, pin, packed))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class TrainBatches:
    """Shuffled batches without end. Each pass over this object gives those of one evaluation period.

    batch: samples of all processes together, in `accumulate` parts. This process takes every world-th
    sample, starting with the rank-th. An incomplete last batch of an epoch is left out. The state is (seed,
    epoch, position), where the position counts parts of that epoch. `waited` sums the seconds of waiting for data.
    packed: samples are packed instead of padded. The order is the same.
    """

    def __init__(
        self,
        split,
        *,
        batch,
        period=1,
        seed,
        accumulate=1,
        rank=0,
        world=1,
        pin=False,
        packed=False,
    ):
        if batch > len(split):
            raise ValueError(f"--optim.batch must be at most {len(split)} samples, got {batch}")
        if batch % (accumulate * world):
            text = f"accumulate={accumulate} parts of {world} processes"
            raise ValueError(f"--optim.batch must be a multiple of {text}, got {batch}")
        self.split, self.seed, self.rank, self.world, self.pin = split, seed, rank, world, pin
        self.packed = packed
        self.part = batch // accumulate
        self.per_epoch = len(split) // batch * accumulate
        self.accumulate = accumulate
        self.set_period(period)
        self.done = 0  # parts handed out
        self.waited = 0.0

    def set_period(self, steps: int) -> None:
        self.period = steps * self.accumulate

    def __len__(self) -> int:
        return self.period

    def state_dict(self) -> dict:
        epoch, position = divmod(self.done, self.per_epoch)
        return {"seed": self.seed, "epoch": epoch, "position": position}

    def load_state_dict(self, state: dict) -> None:
        if state["seed"] != self.seed:
            raise ValueError(f"the order's seed was {state['seed']}, now {self.seed}")
        self.done = state["epoch"] * self.per_epoch + state["position"]

    def _order(self, start: int, stop: int) -> Iterator[np.ndarray]:
        epoch, order = -1, None
        for part in range(start, stop):
            if part // self.per_epoch != epoch:
                epoch = part // self.per_epoch
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.split))
            first = part % self.per_epoch * self.part
            yield order[first + self.rank : first + self.part : self.world]

    def __iter__(self) -> Iterator[Batch]:
        stop = (self.done // self.period + 1) * self.period
        source = ahead(self.split, self._order(self.done, stop), self.pin, self.packed)
        while self.done < stop:
            start = time.perf_counter()
            batch = next(source)
            self.waited += time.perf_counter() - start
            self.done += 1
            yield batch


class EvalBatches:
    """Every sample once, ordered by length. This process takes every world-th, starting with the rank-th."""

    def __init__(self, split, *, batch, rank=0, world=1, pin=False, packed=False):
        self.split, self.pin, self.packed = split, pin, packed
        lengths = np.asarray(split.lengths).reshape(len(split), -1).max(1)
        self.order = np.argsort(lengths, kind="stable")[rank::world]
        self.batch = max(1, batch // world)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, len(self.order), self.batch)
        order = (self.order[i : i + self.batch] for i in starts)
        return ahead(self.split, order, self.pin, self.packed)


def same(one, other) -> bool:
    """Compares labels, lengths and the first inputs of two splits: do they hold the same samples in the same order?"""
    if len(one) != len(other) or not np.array_equal(one.labels, other.labels):
        return False
    first = np.arange(min(8, len(one)))
    inputs = (split.batch(first)[0] for split in (one, other))
    return np.array_equal(one.lengths, other.lengths) and np.array_equal(*inputs)
