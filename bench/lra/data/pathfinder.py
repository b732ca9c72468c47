"""Pathfinder images: are the two discs the ends of one dashed curve? (Linsley et al. 2018; Kim et al. 2020)

Two target curves ("snakes") of `contour` dashes each and shorter distractors grow dash by dash on an empty window,
none touching another; one disc marks the start of a target, the other the end of the same (label 1) or of the other
target (label 0). Written in the layout of the released sets: imgs/BATCH/sample_I.png and metadata/BATCH.npy.

Ours differs from the released sets on purpose: all snakes have the same contrast, so that brightness tells nothing;
the first seed keeps `seed_distance` from the window's edge; a snake also keeps off the newest dash of the other.
Numbers on these images are not numbers on the released ones.

Angles have finitely many values (degrees for seeds, then directions between pixels), so each dash is drawn once with
anti-aliasing and pasted afterwards.
"""

import bisect
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from bench.lra.data.cache import DataError, remove_abandoned

AA = 2  # dashes are drawn this many times finer
BATCH = 1000  # images per folder
TOUCHING = 459  # 1.8 x 255: masks that sum to as much overlap
FOLDERS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}


@dataclass(frozen=True)
class Settings:
    size: int
    padding: int
    paddle: int  # length of a dash
    thickness: float
    margins: tuple[int, ...]  # free pixels at each side of a dash; one is drawn for each image
    seed_distance: int
    radius: float  # of the discs
    continuity: float  # larger: straighter
    distractors: int
    contour: int = 14  # dashes of a target

    @property
    def folder(self) -> Path:
        return Path(f"pathfinder{self.size}") / FOLDERS[self.contour]


SIZES = {
    32: Settings(32, 1, 2, 0.5, (1,), 7, 1.5, 1.0, 5),
    64: Settings(64, 1, 5, 1, (1,), 12, 2.5, 1.8, 5),
    128: Settings(128, 1, 5, 1.5, (2, 3), 20, 3, 1.8, 8),
    256: Settings(256, 22, 5, 2, (3,), 27, 5, 1.8, 7),
}
# Ours: short and smooth curves alone, which a processor learns in minutes; with the released sets'
# continuity of 1 and their distractors small networks stay at chance for much longer.
EASY = replace(SIZES[32], contour=6, continuity=1.8, distractors=0)


def _disc(radius: float) -> np.ndarray:
    r = math.floor(radius)
    y, x = np.mgrid[-r : r + 1, -r : r + 1]
    return y * y + x * x <= radius * radius


def _dilate(image: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Maximum over a neighbourhood; `shape` is odd-sized and centred."""
    r = len(shape) // 2
    padded = np.pad(image, r)
    h, w = image.shape
    return np.max([padded[y : y + h, x : x + w] for y, x in np.argwhere(shape)], axis=0)


def _downsample(fine: np.ndarray) -> np.ndarray:
    """A fine drawing (0, 1) as the patch (0..255) whose brightest pixel is 255."""
    image = Image.fromarray(fine.astype(np.uint8) * 255)
    small = np.asarray(image.resize((len(fine) // AA,) * 2, Image.Resampling.LANCZOS), float)
    small *= 255 / small.max()
    return np.where(small < 8, 0, np.round(small)).astype(np.uint8)  # no ripples around the dash


class Dash:
    """What one dash puts on a window: brightness, the space that it wants, and that dilated by the margin.

    The patches are cut to the box of what is not 0, which begins `corner` away from the dash's head.
    """

    def __init__(self, image: np.ndarray, mask: np.ndarray, wide: np.ndarray):
        (y0, x0), (y1, x1) = (f(np.argwhere(wide), axis=0) for f in (np.min, np.max))
        box = slice(y0, y1 + 1), slice(x0, x1 + 1)
        self.corner = int(y0) - len(wide) // 2, int(x0) - len(wide) // 2
        self.shape = int(y1 - y0) + 1, int(x1 - x0) + 1
        self.image, self.space = image[box], np.stack((mask[box], wide[box]))
        self.footprint = mask[box] > 0
        # what is taken may be at most this for the dash to fit
        self.limit = np.minimum(TOUCHING - 1 - mask[box].astype(int), 255).astype(np.uint8)

    def at(self, head: tuple[int, int]) -> tuple[slice, slice]:
        y, x = head[0] + self.corner[0], head[1] + self.corner[1]
        return slice(y, y + self.shape[0]), slice(x, x + self.shape[1])


class Pen:
    """Everything that depends on settings and margin only, drawn when first wanted."""

    def __init__(self, settings: Settings, margin: int):
        self.settings, self.margin, s = settings, margin, settings
        self.dashes: dict[float, Dash] = {}
        self.turns: dict[float, list] = {}
        self.seeds: dict[int, np.ndarray] = {}
        # as far as a patch, or the circle of the next heads, reaches beyond the window
        self.rim = 2 * s.paddle + 4 * margin + math.ceil(s.thickness) + 2
        radius = s.paddle + margin
        steps = math.ceil(2 * math.pi * radius)
        angles = np.arange(steps) * (2 * math.pi / steps)
        points = radius * np.stack((np.sin(angles), np.cos(angles)), 1)
        self.circle = np.unique(np.floor(points).astype(int), axis=0)
        self.directions = np.arctan2(self.circle[:, 0], self.circle[:, 1])
        self.blank = self._space(s.padding)

    def _space(self, border: int) -> np.ndarray:
        """(2, height, width): what is taken, and that dilated, in a window that holds nothing but a border."""
        full, edge = self.settings.size + 2 * self.rim, self.rim + border
        taken = np.full((full, full), 255, np.uint8)
        taken[edge:-edge, edge:-edge] = 0
        return np.stack((taken, _dilate(taken, _disc(self.margin))))

    def dash(self, angle: float) -> Dash:
        """The dash whose head points in this direction."""
        key = round(angle % (2 * math.pi), 9)
        if key not in self.dashes:
            n = AA * (2 * self.rim + 1)
            middle, width = n // 2, int(self.settings.thickness * AA)

            def line(length: int) -> np.ndarray:
                canvas = Image.new("1", (n, n))
                y, x = (middle - AA * length * f(angle) for f in (math.sin, math.cos))
                ImageDraw.Draw(canvas).line([(middle, middle), (x, y)], fill=1, width=width)
                return np.asarray(canvas)

            # The mask reaches into the gap behind the dash: no other snake may slip through it.
            long = line(self.settings.paddle + self.margin)
            mask = _downsample(_dilate(long, _disc(self.margin * AA)))
            wide = _dilate(mask, _disc(self.margin))
            self.dashes[key] = Dash(_downsample(line(self.settings.paddle)), mask, wide)
        return self.dashes[key]

    def turn(self, angle: float) -> list[tuple[int, int, float, float]]:
        """Where the next head may be after a dash in this direction: (y, x, direction, weight)."""
        key = round(angle, 9)
        if key not in self.turns:
            turned = np.abs((self.directions - angle + math.pi) % (2 * math.pi) - math.pi)
            bent = np.minimum(self.settings.continuity * turned, math.pi / 2)
            rows = zip(*self.circle.T.tolist(), self.directions, np.cos(bent) ** 2, strict=True)
            self.turns[key] = [(y, x, float(d), float(w)) for y, x, d, w in rows if w > 1e-9]
        return self.turns[key]

    def first_heads(self, degrees: int) -> np.ndarray:
        """Where the first seed may end: far enough from the window's edge for the second one and its own mask."""
        if degrees not in self.seeds:
            s = self.settings
            empty = self._space(max(s.padding, s.seed_distance))
            self.seeds[degrees] = self.free(empty[0], self.dash(math.radians(degrees)))
        return self.seeds[degrees]

    def free(self, taken: np.ndarray, dash: Dash) -> np.ndarray:
        """(n, 2) pixels at which the dash's head could be without touching anything taken."""
        size = self.settings.size
        y0, x0 = self.rim + dash.corner[0], self.rim + dash.corner[1]
        blocked = np.zeros((size, size), bool)
        for y, x in np.argwhere(dash.footprint):
            blocked |= taken[y0 + y : y0 + y + size, x0 + x : x0 + x + size] > 0
        return np.argwhere(~blocked) + self.rim


@cache
def pen(settings: Settings, margin: int) -> Pen:
    return Pen(settings, margin)


def _move(point, angle: float, distance: float) -> tuple[int, int]:
    y, x = point
    return math.ceil(y + distance * math.sin(angle)), math.ceil(x + distance * math.cos(angle))


def _pick(points: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    y, x = points[rng.integers(len(points))]
    return int(y), int(x)


class Snake:
    """Grows in the space `mine`, which holds all masks but that of its own newest dash: the next one comes near it.

    `other` is the same for a snake that grows beside it. Pixels count from the corner of the rim.
    """

    def __init__(self, pen: Pen, mine: np.ndarray, other: np.ndarray | None = None):
        self.pen, self.mine, self.other = pen, mine, other
        self.dashes: list[tuple] = []  # (Dash, tail, head), in growing order

    def seed(self, tail: tuple[int, int], head: tuple[int, int], angle: float) -> bool:
        pen, s = self.pen, self.pen.settings
        self.angle, self.pivot = angle, _move(head, angle + math.pi, s.paddle + pen.margin)
        points = (*tail, *head, *self.pivot)
        inside = all(pen.rim <= c < pen.rim + s.size for c in points)
        if inside:
            self._add(pen.dash(angle), tail, head)
        return inside

    def _add(self, dash: Dash, tail, head) -> None:
        if self.other is not None:
            _block(self.other, dash, head)
        if self.dashes:
            self.finish()
        self.dashes.append((dash, tail, head))

    def finish(self) -> None:
        """Gives the newest dash its space too."""
        dash, _, head = self.dashes[-1]
        _block(self.mine, dash, head)

    def points(self) -> np.ndarray:
        return np.array([point for _, *ends in self.dashes for point in ends])

    def extend(self, rng: np.random.Generator) -> bool:
        pen, s, near = self.pen, self.pen.settings, self.mine[1]
        y0, x0 = _move(self.pivot, self.angle, s.paddle + 2 * pen.margin)
        turns, cumulative, total = pen.turn(self.angle), [], 0.0
        for y, x, _, weight in turns:
            total += weight * (255 - near.item(y0 + y, x0 + x))
            cumulative.append(total)
        if total < 255 * 1e-4:
            return False
        for _ in range(3):
            chosen = bisect.bisect_right(cumulative, rng.random() * total)
            y, x, angle, _ = turns[min(chosen, len(turns) - 1)]
            head, dash = (y0 + y, x0 + x), pen.dash(angle)
            if not (self.mine[(0, *dash.at(head))] > dash.limit).any():
                self._add(dash, _move(head, angle + math.pi, s.paddle), head)
                self.pivot, self.angle = (y0, x0), angle
                return True
        return False


def _touch(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two polylines of integer points, (n, 2) and (m, 2), share a point."""

    def side(p, q, r):  # of the line p q on which r lies
        return np.sign((q - p)[..., 0] * (r - p)[..., 1] - (q - p)[..., 1] * (r - p)[..., 0])

    p, q, r, s = a[:-1, None], a[1:, None], b[None, :-1], b[None, 1:]
    crossing = (side(p, q, r) * side(p, q, s) <= 0) & (side(r, s, p) * side(r, s, q) <= 0)
    boxes = np.minimum(p, q) <= np.maximum(r, s), np.minimum(r, s) <= np.maximum(p, q)
    return bool((crossing & boxes[0].all(-1) & boxes[1].all(-1)).any())


def _block(space: np.ndarray, dash: Dash, head) -> None:
    y, x = dash.at(head)
    view = space[:, y, x]
    np.maximum(view, dash.space, out=view)


def _targets(pen: Pen, rng: np.random.Generator) -> list[Snake]:
    s = pen.settings
    while True:
        degrees, toward, turned = rng.integers(-180, 180, 3).tolist()
        heads = pen.first_heads(degrees)
        if not len(heads):
            continue
        spaces = pen.blank.copy(), pen.blank.copy()
        one, two = Snake(pen, *spaces), Snake(pen, *spaces[::-1])
        angle, angle2, phi = map(math.radians, (degrees, turned, toward))
        head = _pick(heads, rng)
        tail = _move(head, angle + math.pi, s.paddle)
        tail2 = (
            round(tail[0] + s.seed_distance * math.sin(phi)),
            round(tail[1] + s.seed_distance * math.cos(phi)),
        )
        if not one.seed(tail, head, angle):
            continue
        if not two.seed(tail2, _move(tail2, angle2, s.paddle), angle2):
            continue
        if all(snake.extend(rng) for _ in range(s.contour - 1) for snake in (one, two)):
            if not _touch(one.points(), two.points()):
                one.finish()
                two.finish()
                return [one, two]


def _place(pen: Pen, taken: np.ndarray, dash: Dash, rng: np.random.Generator):
    """A head for the dash, uniform among the free ones; None if there is none."""
    for y, x in (rng.integers(pen.settings.size, size=(40, 2)) + pen.rim).tolist():
        if not taken[dash.at((y, x))][dash.footprint].any():
            return y, x
    heads = pen.free(taken, dash)  # few or none: look at all
    return _pick(heads, rng) if len(heads) else None


def _distractors(pen: Pen, space: np.ndarray, rng: np.random.Generator) -> list[Snake]:
    """Short snakes where there is room for them beside what `space` holds."""
    s, placed = pen.settings, []
    for _ in range(s.distractors):
        if (space[0] == 0).sum() < 0.01 * s.size**2:
            break
        for _ in range(5):
            angle = math.radians(rng.integers(-180, 180))
            head = _place(pen, space[0], pen.dash(angle), rng)
            if head is None:
                continue
            attempt = space.copy()
            snake = Snake(pen, attempt)
            if snake.seed(_move(head, angle + math.pi, s.paddle), head, angle) and all(
                snake.extend(rng) for _ in range(s.contour // 3 - 1)
            ):
                snake.finish()
                placed.append(snake)
                space = attempt
                break
    return placed


@dataclass
class Drawing:
    """An image (size, size) uint8 and the geometry it was drawn from.

    A snake is a list of dashes, each the (y, x) of its end where the snake came from and of its other end.
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
    return Image.fromarray(_downsample(np.asarray(fine)))


def draw(settings: Settings, seed: int, index: int) -> Drawing:
    """The index-th image of a seed."""
    rng = np.random.default_rng((seed, settings.size, settings.contour, index))
    tool = pen(settings, settings.margins[rng.integers(len(settings.margins))])
    label, origin = rng.integers(2, size=2).tolist()
    targets = _targets(tool, rng)
    distractors = _distractors(tool, targets[0].mine, rng)
    canvas = np.zeros_like(tool.blank[0])
    for snake in targets + distractors:
        for dash, _, head in snake.dashes:
            view = canvas[dash.at(head)]
            np.maximum(view, dash.image, out=view)
    window = slice(tool.rim, tool.rim + settings.size)
    image = Image.fromarray(canvas[window, window])

    def geometry(snakes: list[Snake]) -> list[list]:
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
    """A folder of n images and its metadata, each whole or not there; the metadata last."""
    images = root / "imgs" / str(batch)
    remove_abandoned(images)
    temporary = images.with_name(f".{batch}.{os.getpid()}")
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
    metadata = root / "metadata" / f"{batch}.npy"  # text, whatever its name says
    metadata.with_suffix(".tmp").write_text("".join(lines))
    os.replace(metadata.with_suffix(".tmp"), metadata)
    return n


def _finished(root: Path, batch: int, n: int) -> bool:
    try:
        lines = (root / "metadata" / f"{batch}.npy").read_text().count("\n")
        return lines == n and len(os.listdir(root / "imgs" / str(batch))) == n
    except OSError:
        return False


def write(folder: Path, settings: Settings, n: int, seed: int, workers: int, advance) -> None:
    """n images below `folder`; batches that are there already stay. The images depend on the seed alone."""
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
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            futures = [
                pool.submit(_write_batch, root, settings, seed, b, m) for b, m in todo.items()
            ]
            for future in as_completed(futures):
                done += future.result()
                advance("images", done, n)
        finally:
            pool.shutdown(cancel_futures=True)


def contact_sheet(settings: Settings, seed: int, rows: int = 4, columns: int = 6) -> Image.Image:
    """The first images of a seed, each class in its own half, framed green (connected) or red."""
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
