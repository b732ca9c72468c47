"""bench.lra on tiny data sets made here, for the tests of bench.lra: python -m tests.helpers.lra_tiny fit digits ...

Every task's name takes a data set of the same kind: tokens of unequal length for text and listops, pairs
for retrieval, one real channel otherwise.
"""

import os
import sys
import time
import types
from dataclasses import dataclass

import numpy as np

CLASSES, LENGTH, VOCAB = 3, 40, 12


@dataclass(frozen=True)
class Info:
    name: str
    title: str
    classes: int
    channels: int | None
    vocab: int | None
    l_max: int
    pair: bool
    chance: float
    majority: float
    generated: bool
    notes: tuple[str, ...] = ()
    content: str = ""


class Split:
    """Real sequences whose label is the position of a bump, or tokens whose label is the commonest one."""

    delay = float(
        os.environ.get("LRA_TINY_DELAY", 0)
    )  # seconds a batch, to be interrupted in between

    def __init__(self, kind: str, count: int, seed: int):
        rng = np.random.default_rng(seed)
        self.kind = kind
        self.labels = rng.integers(0, CLASSES, count)
        shape = (count, 2) if kind == "pair" else (count,)
        low = LENGTH // 2 if kind != "real" else LENGTH
        self.lengths = rng.integers(low, LENGTH + 1, shape)
        if kind == "real":
            self.x = rng.normal(0, 0.3, (count, LENGTH, 1)).astype(np.float32)
            for i, label in enumerate(self.labels):
                self.x[i, 5 + 10 * label : 10 + 10 * label] += 1
        else:
            self.x = rng.integers(1, VOCAB, (*shape, LENGTH))
            marked = rng.random(self.x.shape) < 0.4
            labels = self.labels.reshape(-1, *(1,) * (self.x.ndim - 1))
            self.x = np.where(marked, 1 + labels, self.x)

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        time.sleep(self.delay)
        x, lengths = self.x[indices], self.lengths[indices]
        if self.kind == "pair":
            x = np.concatenate([x[:, 0], x[:, 1]])
            lengths = np.concatenate([lengths[:, 0], lengths[:, 1]])
        longest = lengths.max()
        x = x[:, :longest]
        if self.kind != "real":
            x = np.where(np.arange(longest) < lengths[:, None], x, 0)
        return x, lengths, self.labels[indices]


class DataError(ValueError):
    pass


def open_task(name, root, *, progress=True, seed=0):
    if name == "image":
        raise DataError(f"{root}/cifar-10-batches-py/data_batch_1 is missing")
    kinds = {"listops": "tokens", "text": "tokens", "retrieval": "pair"}
    kind = kinds.get(name, "real")
    sizes = {"train": int(os.environ.get("LRA_TINY_TRAIN", 120)), "val": 50, "test": 61}
    splits = {s: Split(kind, n, i) for i, (s, n) in enumerate(sizes.items())}
    majority = np.bincount(splits["test"].labels).max() / sizes["test"]
    channels, vocab = (1, None) if kind == "real" else (None, VOCAB)
    info = Info(
        name, name, CLASSES, channels, vocab, LENGTH, kind == "pair", 1 / 3, majority, "gen" in name
    )
    return info, splits


def install():
    module = types.ModuleType("bench.lra.data")
    module.open_task, module.DataError, module.Info = open_task, DataError, Info
    sys.modules["bench.lra.data"] = module
    import bench.lra
    import bench.lra.sweep

    bench.lra.data = module
    bench.lra.sweep.COMMAND = [sys.executable, "-m", "tests.helpers.lra_tiny"]


if __name__ == "__main__":
    install()
    from bench.lra.__main__ import main

    main()
