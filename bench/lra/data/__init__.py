"""The tasks' data: official files, small real sets from packages, and generated sets. They are packed on first use.

python -m bench.lra data make|check TASK [--root data]
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench import files
from bench.lra import recipes
from bench.lra.data import formats, listops, origin, packaged, pathfinder
from bench.lra.data.cache import (
    DataError,
    Gone,
    Info,
    Source,
    Split,
    bar,
    open_cache,
    pack,
    record,
    recorded,
    remove_abandoned,
    versions,
)
from bench.lra.data.official import OFFICIAL, Located

__all__ = ["TASKS", "DataError", "Info", "Split", "known", "make", "open_task"]


@dataclass(frozen=True)
class Generated:
    """A generated set: its default number of samples, and their kind."""

    samples: int
    settings: listops.Settings | pathfinder.Settings


GENERATED = {
    "listops-gen": Generated(100_000, listops.FULL),
    "listops-short": Generated(100_000, listops.SHORT),
    "pathfinder32-easy": Generated(50_000, pathfinder.EASY),
    "pathfinder32-hard": Generated(200_000, pathfinder.SIZES[32]),
    "pathfinder64-gen": Generated(200_000, pathfinder.SIZES[64]),
    "pathx-gen": Generated(200_000, pathfinder.SIZES[128]),
    "path256-gen": Generated(200_000, pathfinder.SIZES[256]),
}
PACKAGED = {"mnist5k": packaged.mnist5k, "digits": packaged.digits, "r8": packaged.r8}
TASKS = (*OFFICIAL, *PACKAGED, *(f"ucr:{name}" for name in packaged.UCR), *GENERATED)


def known(name: str) -> None:
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}{recipes.suggest(name, TASKS)}")


def _locate(name: str, root: Path) -> Located:
    if name in OFFICIAL:
        return OFFICIAL[name].find(root)
    if name in packaged.FILES:
        paths = packaged.located(name)
        return Located(paths[0].parent, tuple(path.name for path in paths), [])
    folder, settings = root / "generated" / name, GENERATED[name].settings
    if not _recorded(folder).get("whole"):
        begun = folder.exists()
        raise (DataError if begun else Gone)(
            f"no {'finished ' * begun}data in {folder}: python -m bench.lra data make {name}"
        )
    made = "listops-1000" if isinstance(settings, listops.Settings) else settings.folder
    return Located(folder, ("generated.json", made), [])


def _read(name: str, folder: Path, seed: int) -> Source:
    """Returns the source of a task whose files lie in the folder."""
    if name in PACKAGED:
        return PACKAGED[name](seed)
    if name.startswith("ucr:"):
        return packaged.ucr(name.removeprefix("ucr:"))
    if name in OFFICIAL:
        return OFFICIAL[name].read(folder)
    settings = GENERATED[name].settings
    if isinstance(settings, listops.Settings):
        source = formats.listops(folder / "listops-1000")
        source.l_max = settings.longest + 1
    else:
        source = formats.pathfinder(folder / settings.folder, settings.size)
        source.title += f", {settings.contour} dashes"
    source.title += " (generated)"
    return source


def _recorded(folder: Path) -> dict:
    """Returns what `make` has recorded of a generated set, or {}."""
    try:
        return json.loads((folder / "generated.json").read_text())
    except (OSError, ValueError):
        return {}


def open_task(
    name: str, root: Path, *, progress: bool = True, seed: int = 0
) -> tuple[Info, dict[str, Split]]:
    """Returns the splits "train", "val" and "test" of a task.

    The task is packed into root/cache on first use. If its files have changed since, it is packed again, with a
    message on standard error.

    seed: decides which samples of a packaged task are held out. The other tasks have a fixed split.

    Raises:
        DataError: the files are absent (the message says which are wanted where), one of them is damaged, or the
            cache cannot be written.
    """
    known(name)
    root, own = Path(root), seed if name in PACKAGED else 0
    stem = name.replace(":", "-") + (f"-seed{own}" if own else "")
    try:
        located = _locate(name, root)
    except Gone as gone:
        kept = versions(root / "cache", stem)
        if not kept:
            raise
        return _noted(kept[-1], [f"{kept[-1]} is read, which was packed earlier: {gone}"])
    for _ in range(9):  # another process may delete what this one has just chosen
        try:
            folder = _packed(name, root / "cache", stem, located, own, progress)
        except OSError as error:
            raise DataError(f"{name} cannot be packed into {root / 'cache'}: {error}") from None
        try:
            return _noted(folder, located.notes)
        except DataError:
            if folder.exists():
                raise
    raise DataError(f"other processes keep changing {root / 'cache'}")


def _packed(name: str, cache: Path, stem: str, located: Located, seed: int, progress: bool) -> Path:
    """Returns the cache that holds what the files hold now."""
    folder, names = located.folder, located.files()
    quick, kept = origin.quick(folder, names), versions(cache, stem)
    for version in kept:
        if recorded(version).get("quick") == quick:
            return version
    with bar(name, progress and len(names) > 1000) as advance:
        content = origin.content(folder, names, advance)
    digests = {"quick": quick, "content": content}
    target = cache / f"{stem}.{content[:16]}"
    if target.exists():  # the files were copied or touched, or are again what they were
        if recorded(target).get("content") == content:
            record(target, **digests)
        return target
    if kept:
        print(f"{folder} has changed since it was packed: packed anew", file=sys.stderr)
    remove_abandoned(cache / stem)
    pack(
        _read(name, folder, seed),
        target,
        name,
        generated=name in GENERATED,
        origin=digests,
        progress=progress,
        unchanged=lambda: origin.quick(folder, located.files()) == quick,
    )
    for version in kept:
        shutil.rmtree(version, ignore_errors=True)
    return target


def _noted(folder: Path, more: list[str]) -> tuple[Info, dict[str, Split]]:
    """Opens a cache and notes what one must know of the samples before believing a result."""
    info, splits = open_cache(folder)
    notes = [*more, *info.notes]
    sizes = tuple(len(splits[s]) for s in ("train", "val", "test"))
    if info.name in OFFICIAL and sizes != OFFICIAL[info.name].sizes:
        notes.append(
            f"suspicious: {sizes} samples; the released set has {OFFICIAL[info.name].sizes}"
        )
    for split, data in splits.items():
        absent = info.classes - len(np.unique(data.labels))
        if absent and len(data) >= 20 * info.classes:
            notes.append(f"suspicious: {split} has no sample of {absent} of {info.classes} classes")
    content = recorded(folder).get("content", "")
    return replace(info, notes=tuple(notes), content=content), splits


def make(
    name: str,
    root: Path,
    *,
    n: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Generates a set below root/generated/NAME, in the official layout. Goes on where it was stopped.

    n: number of samples of all splits together. workers: processes, by default one for each core. The samples
    depend on n and the seed alone.
    """
    known(name)
    if name not in GENERATED:
        raise DataError(f"{name} is not generated; these are: {', '.join(GENERATED)}")
    settings = GENERATED[name].settings
    n = GENERATED[name].samples if n is None else n
    if n < 10:
        raise DataError(f"n must be at least 10, got {n}")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise DataError(f"workers must be at least 1, got {workers}")
    if seed < 0:
        raise DataError(f"seed must be >= 0, got {seed}")
    folder = Path(root) / "generated" / name
    wanted, found = {"seed": seed, "settings": repr(settings)}, _recorded(folder)
    other = [key for key in wanted if found and found.get(key) != wanted[key]]
    if other:
        was, now = (
            ", ".join(f"{key} {facts.get(key)}" for key in other) for facts in (found, wanted)
        )
        raise DataError(f"{folder} was made with {was}, now {now}: delete it or keep to that")
    if found.get("whole") and found["n"] == n:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "generated.json"
        files.write_json(record, wanted | {"n": n, "whole": False}, indent=1)
        with bar(name, progress) as advance:
            if isinstance(settings, listops.Settings):
                listops.write(folder / "listops-1000", settings, n, seed, workers, advance)
            else:
                pathfinder.contact_sheet(settings, seed).save(folder / "contact.png")
                pathfinder.write(folder, settings, n, seed, workers, advance)
        files.write_json(record, wanted | {"n": n, "whole": True}, indent=1)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}; the same command goes on") from None
    return folder
