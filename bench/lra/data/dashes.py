"""Pathfinder's dashes. Each is drawn once for each direction, with anti-aliasing, and has a space that it takes."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

AA = 2  # how many times finer dashes are drawn
TOUCHING = 459  # 1.8 x 255: masks overlap if they sum to as much
FOLDERS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}


@dataclass(frozen=True)
class Settings:
    size: int
    padding: int
    paddle: int  # length of a dash
    thickness: float
    margins: tuple[
        int, ...
    ]  # free pixels at each side of a dash, one of which is drawn for each image
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
