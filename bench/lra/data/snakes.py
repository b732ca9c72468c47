"""Pathfinder's curves: two targets that grow dash by dash beside each other, and distractors. None touches another."""

import bisect
import math

import numpy as np

from bench.lra.data.dashes import Dash, Pen


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
