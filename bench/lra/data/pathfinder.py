"""Pathfinder images: are the two discs at the ends of one dashed curve? (Linsley et al. 2018; Kim et al. 2020)

Two target curves ("snakes") of `contour` dashes each and shorter distractors grow dash by dash on an empty window, and
none touches another. One disc marks the start of a target, the other the end of the same target (label 1) or of the
other one (label 0). The files are laid out like the released sets: imgs/BATCH/sample_I.png and metadata/BATCH.npy.

Our images differ from the released ones on purpose, so numbers on them are not numbers on the released ones:
- All snakes have the same contrast, so that brightness tells nothing.
- The first seed keeps `seed_distance` from the window's edge.
- A snake also keeps away from the newest dash of the other.
- The mask of a dash is that of a line longer by `margin`, so that no other snake slips through the gap behind it.
- Targets whose polylines share a point are drawn again.
- Values below 8 of 255 in the reduced picture of a dash or mask become 0, against the ripples of the filter.

Angles have finitely many values (degrees for seeds, then directions between pixels). So each dash is drawn once with
anti-aliasing and pasted afterwards.
"""

import math
import os
import shutil
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from bench import files
from bench.lra.data.cache import DataError, remove_abandoned, scratch
from bench.lra.data.snakes import (
    AA,
    FOLDERS,
    Settings,
    downsample,
    grow_distractors,
    grow_targets,
    pen,
)
from bench.lra.data.workers import in_order

__all__ = ["EASY", "FOLDERS", "SIZES", "Settings", "contact_sheet", "draw", "write"]

BATCH = 1000  # images per folder
SIZES = {
    32: Settings(32, 1, 2, 0.5, (1,), 7, 1.5, 1.0, 5),
    64: Settings(64, 1, 5, 1, (1,), 12, 2.5, 1.8, 5),
    128: Settings(128, 1, 5, 1.5, (2, 3), 20, 3, 1.8, 8),
    256: Settings(256, 22, 5, 2, (3,), 27, 5, 1.8, 7),
}
# A task of ours: short, smooth curves alone, which a processor learns in minutes. With the released sets'
# continuity of 1 and their distractors, small networks stay at chance for much longer.
EASY = replace(SIZES[32], contour=6, continuity=1.8, distractors=0)


@dataclass
class Drawing:
    """An image (size, size) uint8 and the geometry it was drawn from.

    A snake is a list of dashes. A dash is the (y, x) of its tail, where the snake came from, and of its head.
    """

    image: np.ndarray
    label: int
    margin: int
    targets: list[list]
    distractors: list[list]
    discs: tuple


@cache
def _marker(radius: float) -> Image.Image:
    n = 2 * math.ceil(radius) + 3
    fine = Image.new("1", (AA * n, AA * n))
    middle, r = AA * n / 2 - 0.5, radius * AA
    ImageDraw.Draw(fine).ellipse([middle - r, middle - r, middle + r, middle + r], fill=1)
    return Image.fromarray(downsample(np.asarray(fine)))


def draw(settings: Settings, seed: int, index: int) -> Drawing:
    """Draws the index-th image of a seed."""
    rng = np.random.default_rng((seed, settings.size, settings.contour, index))
    tool = pen(settings, settings.margins[rng.integers(len(settings.margins))])
    label, origin = rng.integers(2, size=2).tolist()
    targets = grow_targets(tool, rng)
    distractors = grow_distractors(tool, targets[0].mine, rng)
    canvas = np.zeros_like(tool.blank[0])
    for snake in targets + distractors:
        for dash, _, head in snake.dashes:
            view = canvas[dash.at(head)]
            np.maximum(view, dash.image, out=view)
    window = slice(tool.rim, tool.rim + settings.size)
    image = Image.fromarray(canvas[window, window])

    def geometry(snakes: list) -> list[list]:
        return [
            [tuple((y - tool.rim, x - tool.rim) for y, x in ends) for _, *ends in snake.dashes]
            for snake in snakes
        ]

    ends = geometry(targets)
    discs = ends[origin][0][0], ends[origin if label else 1 - origin][-1][1]
    marker = _marker(settings.radius)
    for y, x in discs:
        layer = Image.new("L", image.size)
        layer.paste(marker, (x - marker.width // 2, y - marker.height // 2))
        image = ImageChops.lighter(image, layer)
    return Drawing(np.asarray(image), label, tool.margin, ends, geometry(distractors), discs)


def _write_batch(root: Path, settings: Settings, seed: int, batch: int, n: int) -> int:
    """Writes a folder of n images and then its metadata, each whole or not there."""
    images = root / "imgs" / str(batch)
    remove_abandoned(images)
    temporary = scratch(images)
    temporary.mkdir(parents=True)
    lines = []
    for i in range(n):
        drawing = draw(settings, seed, batch * BATCH + i)
        Image.fromarray(drawing.image).save(temporary / f"sample_{i}.png", compress_level=1)
        s, name = settings, f"sample_{i}.png"
        fields = (f"imgs/{batch}", name, i, drawing.label, s.continuity, s.contour, s.contour // 3)
        fields += (s.paddle, s.thickness, drawing.margin, 1)
        lines.append(" ".join(map(str, fields)) + "\n")
    shutil.rmtree(images, ignore_errors=True)
    os.rename(temporary, images)
    # The released files have this name, but they are text.
    files.write_text(root / "metadata" / f"{batch}.npy", "".join(lines))
    return n


def _finished(root: Path, batch: int, n: int) -> bool:
    try:
        lines = (root / "metadata" / f"{batch}.npy").read_text().count("\n")
        return lines == n and len(os.listdir(root / "imgs" / str(batch))) == n
    except OSError:
        return False


def write(folder: Path, settings: Settings, n: int, seed: int, workers: int, advance) -> None:
    """Writes n images below `folder`. Batches that are already there stay. The images depend on the seed alone."""
    root = folder / settings.folder
    (root / "metadata").mkdir(parents=True, exist_ok=True)
    (root / "imgs").mkdir(exist_ok=True)
    batches = {b: min(BATCH, n - b * BATCH) for b in range(math.ceil(n / BATCH))}
    extra = [
        p.name for p in (root / "imgs").iterdir() if p.name.isdigit() and int(p.name) >= n / BATCH
    ]
    if extra:
        raise DataError(
            f"{root} holds more than {n} images (imgs/{extra[0]}): delete it or ask for more"
        )
    todo = {b: size for b, size in batches.items() if not _finished(root, b, size)}
    done = n - sum(todo.values())
    tasks = [(root, settings, seed, b, m) for b, m in todo.items()]
    with closing(in_order(_write_batch, tasks, min(workers, max(1, len(tasks))))) as results:
        for made in results:
            done += made
            advance("images", done, n)


def contact_sheet(settings: Settings, seed: int, rows: int = 4, columns: int = 6) -> Image.Image:
    """Returns the first images of a seed in one picture: the connected ones above in green, the others below in red."""
    found: dict[int, list] = {1: [], 0: []}
    index = 0
    while min(map(len, found.values())) < rows * columns // 2:
        drawing = draw(settings, seed, index)
        found[drawing.label].append(drawing.image)
        index += 1
    zoom = max(1, 128 // settings.size)
    cell = settings.size * zoom + 6
    sheet = Image.new("RGB", (columns * cell, rows * cell))
    images = [(i, "green") for i in found[1][: rows * columns // 2]]
    images += [(i, "red") for i in found[0][: rows * columns // 2]]
    for place, (image, colour) in enumerate(images):
        tile = Image.new("RGB", (cell, cell), colour)
        side = (settings.size * zoom,) * 2
        tile.paste(Image.fromarray(image).resize(side, Image.Resampling.NEAREST), (3, 3))
        sheet.paste(tile, (place % columns * cell, place // columns * cell))
    return sheet
