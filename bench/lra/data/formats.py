"""Readers of the released files of the Long Range Arena, CIFAR-10, IMDB and Speech Commands.

Each takes the folder that holds the files and returns a Source. Vocabularies are counted at once, and nothing else is
read before the parts are iterated. A damaged file raises a DataError that names it. Token ids: 0 padding, 1 unknown,
2 end of sequence, which every sequence gets after it is cut to l_max - 1.
"""

import io
import os
import pickle
import wave
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bench.lra.data.cache import DataError, Part, Source, read_text
from bench.lra.data.origin import visible

PAD, UNKNOWN, END = 0, 1, 2
LISTOPS_TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "X")
COMMANDS = 35
RATE = 16000  # samples per second of Speech Commands, which are a second long


def finish(ids: np.ndarray, l_max: int) -> np.ndarray:
    return np.append(ids[: l_max - 1], END)


def rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields line numbers and cells of a tab-separated file in which quotes mean nothing. It ignores a byte order mark
    at the beginning and blank lines at the end."""
    blank = 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    blank = blank or number
                elif blank:
                    raise DataError(f"{path}:{blank}: a blank line, and rows behind it")
                else:
                    yield number, line.rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None


def some(folder: Path, pattern: str) -> list[Path]:
    found = visible(folder, pattern)
    if not found:
        raise DataError(f"{folder} holds no {pattern}")
    return found


def listops(folder: Path) -> Source:
    """basic_{train,val,test}.tsv: a header, then an expression as a binary tree and its value."""
    l_max, ids = 2048, {token: i for i, token in enumerate(LISTOPS_TOKENS, END + 1)}
    ids["]"] = ids["X"]

    def read(path: Path):
        for number, cells in rows(path):
            if number == 1 and cells == ["Source", "Target"]:
                continue
            tokens = cells[0].replace("(", " ").replace(")", " ").split()
            if not tokens or len(cells) != 2 or cells[1] not in tuple("0123456789"):
                raise DataError(f"{path}:{number}: wanted an expression, a tab and a digit")
            try:
                sequence = np.array([ids[token] for token in tokens])
            except KeyError as error:
                raise DataError(f"{path}:{number}: unknown token {error}") from None
            yield int(cells[1]), (finish(sequence, l_max),)

    parts = {s: Part(read(folder / f"basic_{s}.tsv")) for s in ("train", "val", "test")}
    return Source("ListOps", 10, l_max, parts, vocab=END + 1 + len(LISTOPS_TOKENS))


class Characters:
    """Numbers the characters that occur at least `rarest` times, the commonest first."""

    def __init__(self, texts, rarest: int):
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        kept = sorted((c for c in counts if counts[c] >= rarest), key=lambda c: (-counts[c], c))
        self.size = END + 1 + len(kept)
        self.dtype = "uint8" if self.size <= 256 else "uint16"
        self._table = np.full(0x110000, UNKNOWN, np.uint16)
        for i, character in enumerate(kept, END + 1):
            self._table[ord(character)] = i

    def __call__(self, text: str) -> np.ndarray:
        points = text.encode("utf-32-le", "surrogatepass")
        return np.append(self._table[np.frombuffer(points, "<u4")], END)


def text(folder: Path) -> Source:
    """aclImdb/{train,test}/{neg,pos}/*.txt: reviews as characters. Rare ones (fewer than 15 in train) are unknown.

    There is no validation split. The test split is also used for validation, as in the published runs.
    """
    l_max = 4096
    files = {
        split: [
            (label, path)
            for label, name in enumerate(("neg", "pos"))
            for path in some(folder / split / name, "*.txt")
        ]
        for split in ("train", "test")
    }

    def read(path: Path) -> str:
        content = read_text(path)[: l_max - 1]
        if not content:
            raise DataError(f"{path} is empty")
        return content

    characters = Characters((read(path) for _, path in files["train"]), rarest=15)
    parts = {
        split: Part(((label, (characters(read(path)),)) for label, path in listed), len(listed))
        for split, listed in files.items()
    }
    return Source(
        "Text (IMDB, characters)",
        2,
        l_max,
        {"train": parts["train"], "val": "test", "test": parts["test"]},
        vocab=characters.size,
        dtype=characters.dtype,
        notes=["the validation split is the test split, as in the published runs"],
    )


def retrieval(folder: Path) -> Source:
    """new_aan_pairs.{train,eval,test}.tsv: label, two ids, two documents as Python prints bytes: b'...'.

    The characters are taken as they stand, prefix, quotes and escapes included, as in the published runs of S4.
    The files have no header, so the first row is a sample, unless someone has put names there.
    """
    l_max = 4000

    def read(path: Path):
        for number, cells in rows(path):
            if number == 1 and cells[0].strip().lower() == "label":
                continue
            if len(cells) != 5 or cells[0] not in ("0.0", "1.0", "0", "1"):
                raise DataError(
                    f"{path}:{number}: wanted label (0.0 or 1.0), id, id, document, document between tabs, "
                    f"got {len(cells)} cells, the first {cells[0][:20]!r}"
                )
            documents = cells[3:]
            for document in documents:
                if not (document[:2] in ("b'", 'b"') and document[1:2] == document[-1:]):
                    raise DataError(
                        f"{path}:{number}: a document must be a bytes literal b'...', "
                        f"got {document[:20]!r} ... {document[-5:]!r}"
                    )
            yield int(float(cells[0])), [document[: l_max - 1] for document in documents]

    paths = {
        "train": folder / "new_aan_pairs.train.tsv",
        "val": folder / "new_aan_pairs.eval.tsv",
        "test": folder / "new_aan_pairs.test.tsv",
    }
    characters = Characters(
        (document for _, pair in read(paths["train"]) for document in pair), rarest=1
    )
    parts = {
        split: Part((label, tuple(map(characters, pair))) for label, pair in read(path))
        for split, path in paths.items()
    }
    title = "Retrieval (AAN, characters)"
    return Source(title, 2, l_max, parts, vocab=characters.size, dtype=characters.dtype, pair=True)


class _Arrays(pickle.Unpickler):
    """Unpickles plain containers and numpy arrays. It refuses a pickle that names anything else."""

    reconstruct = np.empty(0).__reduce__()[0]

    def find_class(self, module: str, name: str):
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return self.reconstruct
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them in protocol 2
            return lambda string, _: string.encode("latin1")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR-10 file does")


def cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels (n, 3, 1024) uint8 and labels (n,) of one of the python pickles."""
    try:
        with open(path, "rb") as file:
            content = _Arrays(file, encoding="bytes").load()
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        pixels, labels = content["data"], np.array(content["labels"])
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
            raise ValueError(f"data is {pixels.dtype} {pixels.shape}, with {len(labels)} labels")
        if not ((labels >= 0) & (labels < 10)).all():
            raise ValueError("labels are not in 0..9")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        text = f"{path} is damaged or no CIFAR-10 batch: {str(reason) or 'it ends too early'}"
        raise DataError(text) from None
    return pixels.reshape(-1, 3, 1024), labels


def shuffled(n: int) -> np.ndarray:
    """Returns the order of torch's random_split with generator seed 42, by which the S4 code splits."""
    import torch

    return torch.randperm(n, generator=torch.Generator().manual_seed(42)).numpy()


def cifar(folder: Path, *, gray: bool) -> Source:
    """cifar-10-batches-py: pixels row by row, luminance or three colours. 10 % of train are for validation."""
    batches = [cifar_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    order = shuffled(len(labels))
    n_train = len(labels) - len(labels) // 10

    def part(pixels: np.ndarray, labels: np.ndarray) -> Part:
        images = pixels.transpose(0, 2, 1)  # n, 1024, 3
        if gray:
            images = np.stack(
                [np.asarray(Image.fromarray(i.reshape(32, 32, 3)).convert("L")) for i in images]
            ).reshape(len(images), -1, 1)
        samples = ((int(label), (image,)) for label, image in zip(labels, images, strict=True))
        return Part(samples, len(labels))

    parts = {
        "train": part(pixels[order[:n_train]], labels[order[:n_train]]),
        "val": part(pixels[order[n_train:]], labels[order[n_train:]]),
        "test": part(*cifar_batch(folder / "test_batch")),
    }
    mean, std = ((122.6,), (61.0,)) if gray else ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
    if not gray:
        mean, std = (tuple(255 * c for c in values) for values in (mean, std))
    title = "Image (CIFAR-10, gray)" if gray else "Sequential CIFAR-10 (RGB)"
    return Source(title, 10, 1024, parts, channels=1 if gray else 3, mean=mean, std=std)


def pathfinder(folder: Path, size: int) -> Source:
    """imgs/BATCH/*.png and metadata/BATCH.npy, which is text: folder, file, index, label, ...

    Pixels are read row by row and scaled to [-1, 1]. Empty files, of which the released sets have one, are skipped and
    named. So are lines that list an image again; with another label they are an error. The splits are 80, 10 and 10 %
    in the order of torch's random_split with seed 42.
    """
    first, again, notes = {}, [], []  # image -> label, and where it is listed
    metadata = sorted(
        (p for p in (folder / "metadata").glob("*.npy") if p.stem.isdigit()),
        key=lambda p: int(p.stem),
    )
    for path in metadata:
        try:
            lines = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"{path} is not text, which it should be despite its name") from None
        for number, line in enumerate(lines.rstrip().splitlines(), 1):
            cells = line.split()
            if len(cells) < 4 or cells[3] not in ("0", "1"):
                raise DataError(f"{path}:{number}: wanted folder, file, index, label (0 or 1), ...")
            image, label = os.path.normpath(folder / cells[0] / cells[1]), int(cells[3])
            if image in first:
                before, where = first[image]
                if before != label:
                    raise DataError(
                        f"{path}:{number}: {image} has label {label}, but {before} in {where}"
                    )
                again.append(f"{path}:{number}")
                continue
            first[image] = label, f"{path}:{number}"
    if again:
        # Kept, they would put an image into two of the splits.
        notes.append(f"dropped {len(again)} lines that list an image again, the first {again[0]}")
    listed = []
    for image, (label, where) in first.items():
        try:
            size_in_bytes = os.stat(image).st_size
        except OSError:
            raise DataError(f"{image} is missing; {where} lists it") from None
        if size_in_bytes:
            listed.append((image, label))
        else:
            notes.append(f"skipped {image}: it is empty")
    if len(listed) < 10:
        raise DataError(f"{folder}/metadata lists {len(listed)} images; wanted at least 10")

    def read(indices):
        for i in indices:
            path, label = listed[i]
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("L"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise DataError(f"{path} is damaged: {error}") from None
            if pixels.shape != (size, size):
                raise DataError(f"{path} must be {size} x {size} pixels, got {pixels.shape}")
            yield label, (pixels.reshape(-1, 1),)

    order, tenth = shuffled(len(listed)), len(listed) // 10
    cuts = np.split(order, [len(order) - 2 * tenth, len(order) - tenth])
    parts = {s: Part(read(c), len(c)) for s, c in zip(("train", "val", "test"), cuts, strict=True)}
    title = f"Pathfinder {size} x {size}"
    half = (127.5,)
    return Source(title, 2, size * size, parts, channels=1, mean=half, std=half, notes=notes)


def speech(folder: Path) -> Source:
    """WORD/*.wav at 16 kHz, 16 bits, mono. validation_list.txt and testing_list.txt name two of the splits.

    A sample is a second, 16,000 steps in [-1, 1), with zeros after shorter clips. All words are classes.
    """
    words = [p.name for p in visible(folder, "[!_]*") if p.is_dir()]
    if len(words) < 2:
        raise DataError(f"{folder} holds {len(words)} folders of words; wanted {COMMANDS}")
    lists = {}
    for split, name in (("val", "validation_list.txt"), ("test", "testing_list.txt")):
        lists[split] = set(read_text(folder / name).removeprefix("\ufeff").split())
    both = sorted(lists["val"] & lists["test"])
    if both:
        raise DataError(f"{folder / both[0]} and {len(both) - 1} others are in both lists")
    clips = [f"{word}/{p.name}" for word in words for p in some(folder / word, "*.wav")]
    unknown = sorted((lists["val"] | lists["test"]) - set(clips))
    if unknown:
        raise DataError(f"{folder / unknown[0]} is missing, and {len(unknown) - 1} others listed")

    def read(names: list[str]):
        for name in names:
            yield words.index(name.split("/")[0]), (read_wave(folder / name),)

    lists["train"] = set(clips) - lists["val"] - lists["test"]
    parts = {}
    for split in ("train", "val", "test"):
        names = [name for name in clips if name in lists[split]]
        parts[split] = Part(read(names), len(names))
    notes = [] if len(words) == COMMANDS else [f"{len(words)} words, the full set has {COMMANDS}"]
    return Source(
        "Speech Commands",
        len(words),
        RATE,
        parts,
        channels=1,
        dtype="int16",
        std=(32768.0,),
        notes=notes,
    )


def read_wave(path: Path) -> np.ndarray:
    try:
        with wave.open(io.BytesIO(path.read_bytes())) as file:
            layout = file.getframerate(), file.getsampwidth(), file.getnchannels()
            n = file.getnframes()
            frames = file.readframes(n)
    except (wave.Error, EOFError, RuntimeError) as error:  # RuntimeError: a chunk has no end
        raise DataError(
            f"{path} is damaged: {error or 'it ends too early, or a chunk does not'}"
        ) from None
    if layout != (RATE, 2, 1):
        raise DataError(f"{path} must be 16000 Hz, 2 bytes, 1 channel, got {layout}")
    if len(frames) != 2 * n or n == 0:
        raise DataError(f"{path} is truncated: {len(frames) // 2} of {n} samples")
    samples = np.frombuffer(frames, "<i2")[:RATE]
    return np.pad(samples, (0, RATE - len(samples))).reshape(-1, 1)
