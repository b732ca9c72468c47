"""Examines a task's data: sizes, lengths, labels, repeated samples, and whether a small CNN generalises on it."""

import hashlib
import time
from pathlib import Path

import numpy as np

from bench.lra.data import GENERATED, open_task
from bench.lra.data.cache import Info, Split
from bench.lra.report import levels

LEAK = 0.01  # of the test samples; some reviews of IMDB are in both of its released splits
# The released 128 x 128 set has been reported as broken: networks fit its train split and fail on the others.
CONVOLVED = ("pathfinder", "pathfinder64", "pathx", "path256")


def check(name: str, root: Path, *, progress: bool = True, seconds: float = 60) -> bool:
    """Prints what a task's data looks like and whether it is as released.

    Returns False if something is suspicious, or if a small CNN learns nothing of released images.
    """
    info, splits = open_task(name, root, progress=progress)
    print(f"{info.title}: {info.classes} classes, chance {info.chance:.1%}, ", end="")
    print(f"majority {info.majority:.1%} of the test split, up to {info.l_max} steps")
    good = True
    for note in info.notes:
        good &= not note.startswith("suspicious")
        print(note if note.startswith("suspicious") else f"note: {note}")
    for split, data in splits.items():
        print(describe(split, data, info))
    shared = repeated(splits["train"], splits["test"])
    if shared:
        leak = shared > LEAK * min(len(splits["test"]), 2000)
        good &= not leak
        suspicion = "suspicious: " * leak
        print(f"{suspicion}{shared} of the first 2,000 test samples are also in train")
    if name in CONVOLVED or (name in GENERATED and info.channels):
        sound = generalises(info, splits, seconds)
        good &= info.generated if sound is None else sound
    return good


def describe(split: str, data: Split, info: Info) -> str:
    shares = np.bincount(data.labels, minlength=info.classes) / len(data)
    lengths = data.lengths
    text = f"{split}: {len(data)} samples, length mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, "
    text += f"{lengths.min()}..{lengths.max()}; labels "
    return text + " ".join(f"{i}: {share:.1%}" for i, share in enumerate(shares))


def repeated(train: Split, test: Split, limit: int = 2000) -> int:
    """Counts those of the first test samples that occur in train too, of which at most 50,000 are examined."""

    def digests(split: Split, n: int) -> list[bytes]:
        return [hashlib.sha1(split.batch([i])[0].tobytes()).digest() for i in range(n)]

    seen = set(digests(train, min(len(train), 50_000)))
    return sum(d in seen for d in digests(test, min(len(test), limit)))


def generalises(info: Info, splits: dict[str, Split], seconds: float) -> bool | None:
    """Trains a small CNN on images and compares its accuracy on train and on test. None if it learns nothing.

    First the network sees each image once. Accuracy on train is counted before each step, on images that are new to
    the network, so that learning by heart does not count. If it learns there and not on test, the splits are not of
    one kind. If it learns nothing of a released set, it sees a few images again and again for as long: labels that do
    not belong to their images can only be learnt by heart. Easy curves take a minute on one core. 128 x 128 takes a
    GPU, or more than a minute.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)
    side, width, channels = round(info.l_max**0.5), 16, 1
    layers: list[nn.Module] = [nn.MaxPool2d(max(1, side // 64))]  # a maximum keeps the curves
    for stride in (2, 1, *[2, 1] * (3 if side > 32 else 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
        channels, width = width, min(64, width * stride)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(channels, 2)
    net = nn.Sequential(*layers, *head).to(device)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)

    def images(split: Split, indices):
        x, _, labels = split.batch(indices)
        x = torch.from_numpy(x.reshape(-1, 1, side, side)).to(device)
        return x, torch.from_numpy(labels).to(device)

    def train(batches, until: float) -> list[np.ndarray]:
        """Returns for each batch, until the time is over, which labels were right before its step."""
        net.train()
        hits = []
        for indices in batches:
            x, y = images(splits["train"], indices)
            scores = net(x)
            hits.append((scores.argmax(1) == y).cpu().numpy())
            optimizer.zero_grad()
            F.cross_entropy(scores, y).backward()
            optimizer.step()
            if time.monotonic() > until:
                break
        return hits

    def test() -> np.ndarray:
        net.eval()
        right: list[bool] = []
        n = min(len(splits["test"]), 2000)
        with torch.no_grad():
            for indices in np.array_split(np.arange(n), max(1, n // 100)):
                x, y = images(splits["test"], indices)
                right += (net(x).argmax(1) == y).tolist()
        return np.array(right)

    rng = np.random.default_rng(0)
    order = rng.permutation(len(splits["train"]))
    hits = train(np.array_split(order, max(1, len(order) // 32)), time.monotonic() + seconds)
    late = np.concatenate(hits[-max(1, len(hits) // 4) :])
    found = verdict(late, test(), sum(map(len, hits)), info.majority)
    if found is not None or info.generated:  # generated labels do belong to their images
        return found
    few, until, hits = order[:2000], time.monotonic() + seconds, []
    parts = max(1, len(few) // 32)
    while not hits or (time.monotonic() < until and np.concatenate(hits[-parts:]).mean() < 0.95):
        hits += train(np.array_split(rng.permutation(few), parts), until)
    late = np.concatenate(hits[-parts:])
    return verdict(late, test(), sum(map(len, hits)), info.majority, by_heart=len(few))


def verdict(
    train: np.ndarray, test: np.ndarray, seen: int, majority: float, by_heart: int = 0
) -> bool | None:
    """Prints the finding and returns what `generalises` does.

    by_heart: how many train images were seen again and again; 0 if each was new.
    """

    def above(right: np.ndarray) -> bool:  # by three standard errors
        return right.mean() > max(0.5, majority) + 1.5 / len(right) ** 0.5

    those = (
        f"of {by_heart} train images seen again and again" if by_heart else "of new train images"
    )
    numbers = (
        f"a small CNN, after {seen} images: {train.mean():.1%} {those}, {test.mean():.1%} of test "
    )
    numbers += f"({levels(0.5, majority, False)})"
    if above(train) and above(test):
        print(f"{numbers}: it generalises")
        return True
    if above(train) and not by_heart:
        print(f"suspicious: {numbers}: it learns train and fails on test; do not trust this copy")
        return False
    if by_heart and train.mean() >= 0.9:
        print(
            f"suspicious: {numbers}: learnt by heart, does not generalise; wrong labels look like that, and so do"
        )
        print("curves too hard for it: only more --seconds, or a GPU, can clear this copy")
        return False
    print(
        f"{numbers}: {'undecided' if by_heart else 'it has learnt nothing yet'}; give it more --seconds"
    )
    return None
