"""The packed, memory-mapped form of a task: a file of all sequences of a split, end to end, and where each begins.

cache/NAME.CONTENT/meta.json  what Info says, normalisation, which file set each split uses, sizes of all files
          .../SPLIT.values    tokens (uint8 or uint16), or samples x channels (uint8, int16 or float32), as read
          .../SPLIT.offsets.npy  (sequences + 1,) int64, in steps; a pair is two sequences in a row
          .../SPLIT.labels.npy   (samples,) int64

CONTENT is a digest of the files that were read (origin.py). A cache is written beside its final place and renamed, so
it is whole or not there. It never changes: a cache of other files has another name. A process that has opened a cache
keeps it, even if it is deleted.
"""

import contextlib
import glob
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench import files

VERSION = 1
_HOST = platform.node().replace(".", "-") or "host"  # several machines may share a folder


class DataError(ValueError):
    """Data is absent, corrupt or in another layout. The message names the file and what was wanted."""


class Gone(DataError):
    """None of the files is there."""


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None


@dataclass(frozen=True)
class Info:
    """What a model must know of a task. majority is the share of the commonest class in the test split."""

    name: str
    title: str
    classes: int
    channels: int | None  # of continuous input
    vocab: int | None  # tokens, with padding (0)
    l_max: int
    pair: bool
    chance: float
    majority: float
    generated: bool
    notes: tuple[str, ...] = ()  # what was skipped or chosen while reading
    content: str = ""  # a digest of the files


@dataclass
class Part:
    """One split of a source. `samples` yields (label, sequences), with one sequence or the two of a pair."""

    samples: Iterator[tuple[int, tuple[np.ndarray, ...]]]
    total: int | None = None  # for the progress bar only


@dataclass
class Source:
    """A task as a reader offers it. `parts` maps each split to a Part, or to the name of the split that it repeats."""

    title: str
    classes: int
    l_max: int
    parts: dict[str, Part | str]
    channels: int | None = None
    vocab: int | None = None
    pair: bool = False
    dtype: str = "uint8"  # as stored
    mean: tuple[float, ...] = (0.0,)  # per channel: x = (stored - mean) / std
    std: tuple[float, ...] = (1.0,)
    notes: list[str] = field(default_factory=list)  # may grow while the parts are read


class Split:
    """An opened split. No sample is read before `batch` asks for it. It is cheap to pickle."""

    def __init__(self, folder: Path, part: str):
        self.folder, self.part = folder, part
        meta = read_meta(folder)
        self._dtype, self._channels = np.dtype(meta["dtype"]), meta["info"]["channels"]
        self._pair = meta["info"]["pair"]
        # All dtypes are scaled in float32, by one multiplication and one addition.
        self._scale = np.float32(1) / np.asarray(meta["std"], np.float32)
        self._shift = -np.asarray(meta["mean"], np.float32) * self._scale
        self.labels = np.load(folder / f"{part}.labels.npy")
        self._offsets = np.load(folder / f"{part}.offsets.npy")
        lengths = np.diff(self._offsets)
        self.lengths = lengths.reshape(-1, 2) if self._pair else lengths
        values = np.memmap(folder / f"{part}.values", self._dtype, mode="r")
        self._values = values.reshape(-1, self._channels) if self._channels else values

    def __reduce__(self):
        return Split, (self.folder, self.part)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (x, lengths, labels) of samples, padded to the longest of them.

        x is (b, l) int64 tokens padded with 0, or (b, l, channels) float32, normalised and then padded with 0.
        lengths and labels are (b,) int64. With pairs x and lengths have 2 b rows: all first documents come first.
        """
        indices = np.asarray(indices)
        if ((indices < 0) | (indices >= len(self))).any():
            raise IndexError(f"batch: indices must be in 0..{len(self) - 1}, got {indices}")
        rows = np.concatenate((2 * indices, 2 * indices + 1)) if self._pair else indices
        starts = self._offsets[rows]
        lengths = self._offsets[rows + 1] - starts
        shape = (len(rows), lengths.max(initial=0), *self._values.shape[1:])
        x = np.zeros(shape, np.float32 if self._channels else np.int64)
        for row, start, length in zip(x, starts, lengths, strict=True):
            part = self._values[start : start + length]
            if self._channels:
                np.multiply(part, self._scale, out=row[:length])
                row[:length] += self._shift
            else:
                row[:length] = part
        return x, lengths, self.labels[indices]


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def open_cache(folder: Path) -> tuple[Info, dict[str, Split]]:
    try:
        meta = read_meta(folder)
        sizes = {name: (folder / name).stat().st_size for name in meta["sizes"]}
        if meta["version"] != VERSION or sizes != meta["sizes"]:
            raise ValueError
        info = Info(**meta["info"] | {"notes": tuple(meta["info"]["notes"])})
        return info, {split: Split(folder, part) for split, part in meta["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{folder} is damaged or of another version: delete it, and it is made again"
        ) from None


def versions(parent: Path, stem: str) -> list[Path]:
    """Returns the caches of a task, the newest last. Earlier versions of this code named them without a digest."""
    dated = []
    for path in (parent / stem, *parent.glob(f"{glob.escape(stem)}.*")):
        with contextlib.suppress(OSError):  # it is no cache, or has just been deleted
            dated.append(((path / "meta.json").stat().st_mtime_ns, path))
    return [path for _, path in sorted(dated)]


def recorded(folder: Path) -> dict:
    """Returns the digests that a cache was packed with, or {}."""
    try:
        origin = read_meta(folder)["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return origin if isinstance(origin, dict) else {}


def record(folder: Path, **digests: str) -> None:
    """Records how the files look now, if the folder can be written."""
    meta = read_meta(folder)
    meta["origin"] |= digests
    with contextlib.suppress(OSError):
        files.write_json(folder / "meta.json", meta)


def pack(
    source: Source,
    folder: Path,
    name: str,
    *,
    generated: bool,
    origin: dict,
    progress: bool,
    unchanged: Callable[[], bool] = lambda: True,
) -> None:
    """Reads the whole source and leaves its cache in `folder`. After an error, or if the source has changed
    meanwhile, nothing is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    temporary = scratch(folder)
    temporary.mkdir()
    try:
        with bar(name, progress) as advance:
            for split, part in source.parts.items():
                if isinstance(part, Part):
                    _write(source, part, temporary / split, split, advance)
        tests = source.parts["test"]
        labels = np.load(temporary / f"{tests if isinstance(tests, str) else 'test'}.labels.npy")
        info = {
            "name": name,
            "title": source.title,
            "classes": source.classes,
            "channels": source.channels,
            "vocab": source.vocab,
            "l_max": source.l_max,
            "pair": source.pair,
            "chance": 1 / source.classes,
            "majority": float(np.bincount(labels).max() / len(labels)),
            "generated": generated,
            "notes": source.notes,
        }
        meta = {
            "version": VERSION,
            "info": info,
            "origin": origin,
            "dtype": source.dtype,
            "mean": source.mean,
            "std": source.std,
            "splits": {s: p if isinstance(p, str) else s for s, p in source.parts.items()},
            "sizes": {p.name: p.stat().st_size for p in sorted(temporary.iterdir())},
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        for path in temporary.iterdir():  # the files reach the disk before the name
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if not unchanged():
            raise DataError(f"the files of {name} changed while they were read: start again")
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its cache is as good
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(source: Source, part: Part, stem: Path, split: str, advance) -> None:
    labels, offsets, dtype = [], [0], np.dtype(source.dtype)
    with open(f"{stem}.values", "wb") as file:
        for label, sequences in part.samples:
            for sequence in sequences:
                file.write(np.ascontiguousarray(sequence, dtype).data)
                offsets.append(offsets[-1] + len(sequence))
            labels.append(label)
            advance(split, len(labels), part.total)
    if not labels:
        raise DataError(f"{source.title}: the {split} split has no samples")
    np.save(f"{stem}.labels.npy", np.array(labels, np.int64))
    np.save(f"{stem}.offsets.npy", np.array(offsets, np.int64))


def scratch(folder: Path) -> Path:
    """Returns where this process writes what will be `folder`."""
    return folder.with_name(f".{folder.name}.{_HOST}.{os.getpid()}")


def remove_abandoned(folder: Path) -> None:
    """Deletes what processes of this machine left unfinished beside `folder` when they ended."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        *_, host, pid = path.name.split(".")
        if host == _HOST and pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:  # a zombie has been killed, but nobody has waited for it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


class bar:
    """A progress bar on standard error: `with bar(title, shown) as advance: advance(what, done, total)`."""

    def __init__(self, title: str, shown: bool):
        self.title, self.shown = title, shown

    def __enter__(self):
        if not self.shown:
            return lambda what, done, total: None
        from rich.console import Console

        from bench.terminal import progress

        self._progress = progress(Console(stderr=True))
        self._progress.start()
        tasks = {}

        def advance(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = self._progress.add_task(f"{self.title} {what}", total=total)
            if done % 64 == 0 or done == total:
                self._progress.update(tasks[what], completed=done)

        return advance

    def __exit__(self, *exception):
        if self.shown:
            self._progress.stop()
