"""Where the official sets may lie, in their released layouts, and the message where one is missing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from bench.lra.data import formats, origin
from bench.lra.data.cache import DataError, Gone, Source
from bench.lra.data.snakes import FOLDERS

_LISTOPS = ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")
_AAN = tuple(f"new_aan_pairs.{s}.tsv" for s in ("train", "eval", "test"))
_IMDB = tuple(f"{split}/{label}" for split in ("train", "test") for label in ("neg", "pos"))
_CIFAR = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_WORDS = ("validation_list.txt", "testing_list.txt")
_HARD = FOLDERS[14]
# The released archive holds two copies of some folders; the published runs read the inner one.
_ARCHIVE = ("lra_release/lra_release", "lra_release", "")
_RELEASE = ("lra_release.gz", "lra_release.tar.gz")


@dataclass(frozen=True)
class Located:
    """The parts of a folder that are read for a task."""

    folder: Path
    parts: tuple[str, ...]
    notes: list[str]

    def files(self) -> list[str]:
        return origin.files(self.folder, self.parts)


@dataclass(frozen=True)
class Files:
    """Where an official data set may lie below the root, and how it is read. The first place that exists is taken."""

    name: str
    wanted: tuple[str, ...]  # below one of the folders
    read: Callable[[Path], Source]
    sizes: tuple[int, int, int]  # of the released splits
    parents: tuple[str, ...] = ("",)
    parts: tuple[str, ...] | None = None  # what is read; by default what is wanted
    archives: tuple[str, ...] = ()  # as released
    inside: str = ""  # folder to unpack them in

    def find(self, root: Path) -> Located:
        places = [root / parent / self.name for parent in self.parents]
        there = {p: [name for name in self.wanted if (p / name).exists()] for p in places}
        whole = [p for p in places if len(there[p]) == len(self.wanted)]
        if not whole:
            folder = next((p for p in places if p.exists()), places[0])
            missing = [name for name in self.wanted if name not in there[folder]]
            others = "".join(f", or {p}" for p in places if p != folder)
            raise (DataError if any(there.values()) else Gone)(
                f"no data in {root}: wanted {folder}/ (or the same elsewhere{others}) with "
                f"{', '.join(self.wanted)}; missing there: {', '.join(missing)}. {self._hint(root)}"
            )
        copies = [f"of {len(whole)} copies read {whole[0]}, not {whole[1]}"] if whole[1:] else []
        return Located(whole[0], self.wanted if self.parts is None else self.parts, copies)

    def _hint(self, root: Path) -> str:
        archive = next((root / name for name in self.archives if (root / name).exists()), None)
        if archive is None:
            return (
                "It is the published set, which its authors give out; python -m bench.lra data make has "
                "generated ones"
            )
        into = quote(str(root / self.inside))
        made = f"mkdir -p {into} && " if self.inside else ""
        command = f"{made}tar -xzf {quote(str(archive))} -C {into}"
        return f"{archive} lies there, not (or not wholly) extracted: {command}"


def _pathfinder(size: int) -> Files:
    return Files(
        f"pathfinder{size}/{_HARD}",
        ("imgs", "metadata"),
        lambda folder: formats.pathfinder(folder, size),
        (160_000, 20_000, 20_000),
        _ARCHIVE,
        archives=_RELEASE,
    )


def _cifar(gray: bool) -> Files:
    return Files(
        "cifar-10-batches-py",
        _CIFAR,
        lambda folder: formats.cifar(folder, gray=gray),
        (45_000, 5_000, 10_000),
        archives=("cifar-10-python.tar.gz",),
    )


OFFICIAL = {
    "listops": Files(
        "listops-1000",
        _LISTOPS,
        formats.listops,
        (96_000, 2_000, 2_000),
        _ARCHIVE,
        archives=_RELEASE,
    ),
    "text": Files(
        "aclImdb", _IMDB, formats.text, (25_000, 25_000, 25_000), archives=("aclImdb_v1.tar.gz",)
    ),
    "retrieval": Files(
        "tsv_data", _AAN, formats.retrieval, (147_086, 18_090, 17_437), _ARCHIVE, archives=_RELEASE
    ),
    "image": _cifar(gray=True),
    "pathfinder": _pathfinder(32),
    "pathfinder64": _pathfinder(64),
    "pathx": _pathfinder(128),
    "path256": _pathfinder(256),
    "scifar": _cifar(gray=False),
    "speech": Files(
        "speech_commands",
        _WORDS,
        formats.speech,
        (84_843, 9_981, 11_005),
        parts=("",),
        archives=("speech_commands_v0.02.tar.gz",),
        inside="speech_commands",
    ),
}
