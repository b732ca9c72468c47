"""Pathfinder's curves: two targets that grow dash by dash beside each other, and distractors. None touches another.

A dash is drawn once for each direction, with anti-aliasing, and has a space that it takes.
"""

import bisect
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# ---- dashes ----

AA = 2  # how many times finer dashes are drawn
TOUCHING = 459  # 1.8 x 255: masks overlap if they sum to as much
FOLDERS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}


@dataclass(frozen=True)
class Settings:
    size: int
    padding: int
    paddle: int  # length of a dash
    thickness: float
    margins: tuple[int, ...]  # free pixels at each side of a dash; one of them for each image
    seed_distance: int
    radius: float  # of the discs
    continuity: float  # larger: straighter
    distractors: int
    contour: int = 14  # dashes of a target

    @property
    def folder(self) -> Path:
        return Path(f"pathfinder{self.size}") / FOLDERS[self.contour]


def _disc(radius: float) -> np.ndarray:
    r = math.floor(radius)
    y, x = np.mgrid[-r : r + 1, -r : r + 1]
    return y * y + x * x <= radius * radius


def _dilate(image: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Returns the maximum over a neighbourhood. `shape` is odd-sized and centred."""
    r = len(shape) // 2
    padded = np.pad(image, r)
    h, w = image.shape
    return np.max([padded[y : y + h, x : x + w] for y, x in np.argwhere(shape)], axis=0)


def downsample(fine: np.ndarray) -> np.ndarray:
    """Reduces a fine drawing (0, 1) to a patch (0..255) whose brightest pixel is 255."""
    image = Image.fromarray(fine.astype(np.uint8) * 255)
    small = np.asarray(image.resize((len(fine) // AA,) * 2, Image.Resampling.LANCZOS), float)
    small *= 255 / small.max()
    return np.where(small < 8, 0, np.round(small)).astype(np.uint8)  # no ripples around the dash


class Dash:
    """What one dash puts on a window: its brightness, the space that it takes, and that space dilated by the margin.

    The patches are cut to the box of what is not 0. The box begins `corner` away from the dash's head.
    """

    def __init__(self, image: np.ndarray, mask: np.ndarray, wide: np.ndarray):
        (y0, x0), (y1, x1) = (f(np.argwhere(wide), axis=0) for f in (np.min, np.max))
        box = slice(y0, y1 + 1), slice(x0, x1 + 1)
        self.corner = int(y0) - len(wide) // 2, int(x0) - len(wide) // 2
        self.shape = int(y1 - y0) + 1, int(x1 - x0) + 1
        self.image, self.space = image[box], np.stack((mask[box], wide[box]))
        self.footprint = mask[box] > 0
        # The dash fits where the taken space is at most this.
        self.limit = np.minimum(TOUCHING - 1 - mask[box].astype(int), 255).astype(np.uint8)

    def at(self, head: tuple[int, int]) -> tuple[slice, slice]:
        y, x = head[0] + self.corner[0], head[1] + self.corner[1]
        return slice(y, y + self.shape[0]), slice(x, x + self.shape[1])


class Pen:
    """Everything that depends on settings and margin only. It is drawn at its first use."""

    def __init__(self, settings: Settings, margin: int):
        self.settings, self.margin, s = settings, margin, settings
        self.dashes: dict[float, Dash] = {}
        self.turns: dict[float, list] = {}
        self.seeds: dict[int, np.ndarray] = {}
        # Patches, and the circle of the next heads, reach as far beyond the window.
        self.rim = 2 * s.paddle + 4 * margin + math.ceil(s.thickness) + 2
        radius = s.paddle + margin
        steps = math.ceil(2 * math.pi * radius)
        angles = np.arange(steps) * (2 * math.pi / steps)
        points = radius * np.stack((np.sin(angles), np.cos(angles)), 1)
        self.circle = np.unique(np.floor(points).astype(int), axis=0)
        self.directions = np.arctan2(self.circle[:, 0], self.circle[:, 1])
        self.blank = self._space(s.padding)

    def _space(self, border: int) -> np.ndarray:
        """Returns (2, height, width): the taken space and that dilated, in a window that holds only a border."""
        full, edge = self.settings.size + 2 * self.rim, self.rim + border
        taken = np.full((full, full), 255, np.uint8)
        taken[edge:-edge, edge:-edge] = 0
        return np.stack((taken, _dilate(taken, _disc(self.margin))))

    def dash(self, angle: float) -> Dash:
        """Returns the dash whose head points in this direction."""
        key = round(angle % (2 * math.pi), 9)
        if key not in self.dashes:
            n = AA * (2 * self.rim + 1)
            middle, width = n // 2, int(self.settings.thickness * AA)

            def line(length: int) -> np.ndarray:
                canvas = Image.new("1", (n, n))
                y, x = (middle - AA * length * f(angle) for f in (math.sin, math.cos))
                ImageDraw.Draw(canvas).line([(middle, middle), (x, y)], fill=1, width=width)
                return np.asarray(canvas)

            # The mask reaches into the gap behind the dash, so that no other snake slips through.
            long = line(self.settings.paddle + self.margin)
            mask = downsample(_dilate(long, _disc(self.margin * AA)))
            wide = _dilate(mask, _disc(self.margin))
            self.dashes[key] = Dash(downsample(line(self.settings.paddle)), mask, wide)
        return self.dashes[key]

    def turn(self, angle: float) -> list[tuple[int, int, float, float]]:
        """Returns where the next head may be after a dash in this direction: (y, x, direction, weight) each."""
        key = round(angle, 9)
        if key not in self.turns:
            turned = np.abs((self.directions - angle + math.pi) % (2 * math.pi) - math.pi)
            bent = np.minimum(self.settings.continuity * turned, math.pi / 2)
            rows = zip(*self.circle.T.tolist(), self.directions, np.cos(bent) ** 2, strict=True)
            self.turns[key] = [(y, x, float(d), float(w)) for y, x, d, w in rows if w > 1e-9]
        return self.turns[key]

    def first_heads(self, degrees: int) -> np.ndarray:
        """Returns where the first seed may end: far enough from the edge for the second seed and for its own mask."""
        if degrees not in self.seeds:
            s = self.settings
            empty = self._space(max(s.padding, s.seed_distance))
            self.seeds[degrees] = self.free(empty[0], self.dash(math.radians(degrees)))
        return self.seeds[degrees]

    def free(self, taken: np.ndarray, dash: Dash) -> np.ndarray:
        """Returns (n, 2) pixels at which the dash's head touches nothing that is taken."""
        size = self.settings.size
        y0, x0 = self.rim + dash.corner[0], self.rim + dash.corner[1]
        blocked = np.zeros((size, size), bool)
        for y, x in np.argwhere(dash.footprint):
            blocked |= taken[y0 + y : y0 + y + size, x0 + x : x0 + x + size] > 0
        return np.argwhere(~blocked) + self.rim


@cache
def pen(settings: Settings, margin: int) -> Pen:
    return Pen(settings, margin)


# ---- curves ----


def _move(point, angle: float, distance: float) -> tuple[int, int]:
    y, x = point
    return math.ceil(y + distance * math.sin(angle)), math.ceil(x + distance * math.cos(angle))


def _pick(points: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    y, x = points[rng.integers(len(points))]
    return int(y), int(x)


class Snake:
    """A curve that grows in the space `mine`.

    `mine` holds all masks but that of the snake's own newest dash, since the next dash comes near it. `other` is the
    same for a snake that grows beside it. Pixels count from the corner of the rim.
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
        """Takes the space of the newest dash as well."""
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
    """Decides whether two polylines of integer points, (n, 2) and (m, 2), share a point."""

    def side(p, q, r):  # on which side of the line p q does r lie?
        return np.sign((q - p)[..., 0] * (r - p)[..., 1] - (q - p)[..., 1] * (r - p)[..., 0])

    p, q, r, s = a[:-1, None], a[1:, None], b[None, :-1], b[None, 1:]
    crossing = (side(p, q, r) * side(p, q, s) <= 0) & (side(r, s, p) * side(r, s, q) <= 0)
    boxes = np.minimum(p, q) <= np.maximum(r, s), np.minimum(r, s) <= np.maximum(p, q)
    return bool((crossing & boxes[0].all(-1) & boxes[1].all(-1)).any())


def _block(space: np.ndarray, dash: Dash, head) -> None:
    y, x = dash.at(head)
    view = space[:, y, x]
    np.maximum(view, dash.space, out=view)


def grow_targets(pen: Pen, rng: np.random.Generator) -> list[Snake]:
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
    """Draws a head for the dash, uniformly among the free ones. None if there is none."""
    for y, x in (rng.integers(pen.settings.size, size=(40, 2)) + pen.rim).tolist():
        if not taken[dash.at((y, x))][dash.footprint].any():
            return y, x
    heads = pen.free(taken, dash)  # there are few or none, so all are examined
    return _pick(heads, rng) if len(heads) else None


def grow_distractors(pen: Pen, space: np.ndarray, rng: np.random.Generator) -> list[Snake]:
    """Grows short snakes where there is room for them beside what `space` holds."""
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
