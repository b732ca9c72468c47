"""The generators of ListOps and of Pathfinder: statistics and invariants."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lra_files import opened
from PIL import Image, ImageDraw
from scipy import ndimage

from bench.lra import data
from bench.lra.data import DataError, listops, pathfinder

ROOT = Path(__file__).parents[2]


# --- the ListOps generator ---


def evaluate(source: str) -> int:
    """An independent reading of an expression."""
    stack: list = []
    for token in source.replace("(", " ").replace(")", " ").split():
        if token != "]":
            stack.append(int(token) if token.isdigit() else token)
            continue
        arguments = []
        while isinstance(stack[-1], int):
            arguments.append(stack.pop())
        assert 2 <= len(arguments) <= 10
        operator = stack.pop()
        stack.append(
            {
                "[MIN": min,
                "[MAX": max,
                "[SM": lambda a: sum(a) % 10,
                "[MED": lambda a: int(statistics.median(a)),
            }[operator](arguments)
        )
    (result,) = stack
    return result


def test_listops_values():
    examples = {
        "[MAX 2 9 [MIN 4 7 ] 0 ]": 9,
        "[SM 9 8 3 ]": 0,
        "[MED 1 2 ]": 1,
        "[MED 1 4 8 ]": 4,
    }
    for source, wanted in examples.items():
        assert evaluate(source) == wanted
    assert listops.value("[MED", [1, 2]) == 1 and listops.value("[MED", [8, 1, 4]) == 4
    assert listops.value("[SM", [9, 8, 3]) == 0
    assert listops.value("[MAX", [2, 9, listops.value("[MIN", [4, 7]), 0]) == 9


@pytest.mark.slow
def test_listops_statistics():
    kept, drawn = [], 0
    for index in range(8):
        samples, tries = listops.chunk(listops.FULL, 3, index)
        kept, drawn = kept + samples, drawn + tries
    lengths = [n for _, _, n in kept]
    shares = np.bincount([v for _, v, _ in kept], minlength=10) / len(kept)
    assert 0.074 < len(kept) / drawn < 0.089  # 8.2 %
    # 1,041 and 965 within 1 %; the standard errors of 2,000 samples are 9 and 13
    assert 1005 < statistics.mean(lengths) < 1077 and 915 < statistics.median(lengths) < 1040
    assert min(lengths) > 500 and max(lengths) < 2000
    assert 0.14 < shares[0] < 0.20 and 0.14 < shares[9] < 0.20
    assert ((shares[1:9] > 0.06) & (shares[1:9] < 0.11)).all()
    depths = []
    for source, target, length in kept[:300]:
        flat = [t for t in source.split() if t not in "()"]
        assert evaluate(source) == target and len(flat) == length
        level = np.cumsum([t.startswith("[") - (t == "]") for t in flat])
        depths.append(int(level.max()) + 1)
    assert set(depths) == {10}  # a digit in nine operators
    assert 135 < sum(s.count("[") for s, *_ in kept) / len(kept) < 165


def test_listops_are_written_as_released_and_read(tmp_path):
    folder = data.make("listops-short", tmp_path, n=600, seed=5, workers=2, progress=False)
    rows = []
    for split, n in (("train", 576), ("val", 12), ("test", 12)):
        header, *lines = (folder / f"listops-1000/basic_{split}.tsv").read_text().splitlines()
        assert header == "Source\tTarget" and len(lines) == n
        rows += lines
    assert len(set(rows)) == 600
    for row in rows[:100]:
        source, target = row.split("\t")
        assert evaluate(source) == int(target)
        assert 20 <= len(source.replace("(", "").replace(")", "").split()) <= 128
    info, splits = opened("listops-short", tmp_path)
    assert info.generated and "generated" in info.title and info.l_max == 129
    assert splits["test"].lengths.min() >= 21 and len(splits["train"]) == 576
    alone = data.make("listops-short", tmp_path / "b", n=600, seed=5, workers=1, progress=False)
    for path in (folder / "listops-1000").iterdir():
        assert path.read_bytes() == (alone / "listops-1000" / path.name).read_bytes()
    with pytest.raises(DataError, match="delete it or keep to that"):
        data.make("listops-short", tmp_path, n=600, seed=6, progress=False)
    with pytest.raises(DataError, match="not generated"):
        data.make("listops", tmp_path)
    data.make("listops-short", tmp_path, n=700, seed=5, workers=1, progress=False)
    assert len(opened("listops-short", tmp_path)[1]["train"]) == 700 - 28  # packed anew


# --- the Pathfinder generator ---


def test_pathfinder_parameters_are_the_released_generators():
    """Typed again from its source, with 14 dashes in targets and 4 in distractors for all sizes."""
    released = {  # padding, dash, thickness, margins, seed distance, disc, continuity, distractors
        32: (1, 2, 0.5, (1,), 7, 1.5, 1.0, 5),
        64: (1, 5, 1, (1,), 12, 2.5, 1.8, 5),
        128: (1, 5, 1.5, (2, 3), 20, 3, 1.8, 8),
        256: (22, 5, 2, (3,), 27, 5, 1.8, 7),
    }
    names = ("padding", "paddle", "thickness", "margins", "seed_distance", "radius")
    names += ("continuity", "distractors")
    assert pathfinder.SIZES.keys() == released.keys()
    for size, s in pathfinder.SIZES.items():
        assert tuple(getattr(s, name) for name in names) == released[size], size
        assert (s.size, s.contour, s.contour // 3) == (size, 14, 4)
    sets = {"pathfinder32-hard": 32, "pathfinder64-gen": 64, "pathx-gen": 128, "path256-gen": 256}
    for name, size in sets.items():
        assert data.GENERATED[name].settings == pathfinder.SIZES[size]


KINDS = {
    "easy": pathfinder.EASY,
    **{str(s.size): s for s in pathfinder.SIZES.values() if s.size != 64},
}


def traced(size: int, snakes: list, zoom: int = 8) -> tuple[np.ndarray, int]:
    """Components of snakes drawn as thin unbroken lines."""
    canvas = Image.new("L", (size * zoom,) * 2)
    for snake in snakes:
        points = [(zoom * x + zoom // 2, zoom * y + zoom // 2) for ends in snake for y, x in ends]
        ImageDraw.Draw(canvas).line(points, fill=255)
    return ndimage.label(np.asarray(canvas), np.ones((3, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_label_says_whether_the_discs_are_connected(kind):
    settings = KINDS[kind]
    labels = []
    for index in range({32: 150, 128: 12, 256: 12}[settings.size]):
        drawing = pathfinder.draw(settings, 1, index)
        components, n = traced(settings.size, drawing.targets)
        assert n == 2  # the targets never touch
        one, two = (components[8 * y + 4, 8 * x + 4] for y, x in drawing.discs)
        assert one and two and (one == two) == drawing.label
        labels.append(drawing.label)
        for snakes, dashes in (
            (drawing.targets, settings.contour),
            (drawing.distractors, settings.contour // 3),
        ):
            assert all(len(snake) == dashes for snake in snakes)
            for snake in snakes:
                for (y0, x0), (y1, x1) in snake:  # each dash is in the image
                    y, x = round((y0 + y1) / 2), round((x0 + x1) / 2)
                    around = drawing.image[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
                    assert around.max() > 100
        for y, x in drawing.discs:
            assert drawing.image[y, x] > 250
        assert len(drawing.distractors) <= settings.distractors
        assert drawing.image.dtype == np.uint8 and drawing.image.shape == (settings.size,) * 2
    if settings.size == 32:
        assert 0.35 < np.mean(labels) < 0.65


def test_brightness_tells_nothing():
    """Dashes of targets and of distractors have one distribution of peak brightness."""
    peaks = {"targets": [], "distractors": []}
    for index in range(200):
        drawing = pathfinder.draw(pathfinder.SIZES[32], 2, index)
        for kind in peaks:
            for snake in getattr(drawing, kind):
                for (y0, x0), (y1, x1) in snake:
                    y, x = sorted((y0, y1)), sorted((x0, x1))
                    patch = drawing.image[y[0] : y[1] + 1, x[0] : x[1] + 1]
                    peaks[kind].append(patch.max(initial=0))
    means = [np.mean(p) for p in peaks.values()]
    assert abs(means[0] - means[1]) < 10 and min(means) > 200


def test_numbers_of_pixels_and_discs_tell_little():
    drawings = [pathfinder.draw(pathfinder.SIZES[32], 3, index) for index in range(600)]
    labels = np.array([d.label for d in drawings])
    light = np.array([d.image.mean() for d in drawings])
    gap = light[labels == 1].mean() - light[labels == 0].mean()
    assert abs(gap) < 4 * light.std() / (len(light) / 4) ** 0.5 / 2**0.5


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_pathfinder_is_the_same_for_any_number_of_processes_and_after_a_kill(tmp_path, monkeypatch):
    settings = pathfinder.EASY
    command = [sys.executable, "-m", "bench.lra.data", "make", "pathfinder32-easy", "--n", "2500"]
    start = time.perf_counter()
    one = data.make("pathfinder32-easy", tmp_path / "a", n=2500, workers=2, progress=False)
    print(f"{2500 / (time.perf_counter() - start):.0f} images of 32 x 32 per second, 2 processes")
    process = subprocess.Popen(
        [*command, "--root", str(tmp_path / "b"), "--workers", "1"],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    two = tmp_path / "b/generated/pathfinder32-easy"
    first = two / settings.folder / "metadata"
    deadline = time.monotonic() + 60
    while not list(first.glob("*.npy")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # and its workers
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in first.glob("*.npy")}
    assert 1 <= len(done) < 3 and not json.loads((two / "generated.json").read_text())["whole"]
    with pytest.raises(DataError, match="no finished data"):
        opened("pathfinder32-easy", tmp_path / "b")
    data.make("pathfinder32-easy", tmp_path / "b", n=2500, workers=1, progress=False)
    assert sorted(files(one)) == sorted(files(two))
    assert files(one) == files(two)
    assert all(p.stat().st_mtime_ns == when for p, when in done.items())  # not made again
    assert len(list((one / settings.folder / "imgs").iterdir())) == 3
    info, splits = opened("pathfinder32-easy", tmp_path / "a")
    assert info.generated and [len(splits[s]) for s in splits] == [2000, 250, 250]
    x, _, labels = splits["train"].batch([0, 1])
    assert x.shape == (2, 1024, 1) and x.min() == -1 and x.max() == 1
    images = {}
    for i in range(2500):
        drawing = pathfinder.draw(settings, 0, i)
        images[drawing.image.tobytes()] = drawing.label
    for row, label in zip(x, labels, strict=True):
        assert images[np.rint(row * 127.5 + 127.5).astype(np.uint8).tobytes()] == label
    with pytest.raises(DataError, match="holds more than"):
        data.make("pathfinder32-easy", tmp_path / "a", n=1000, progress=False)


def test_seeds_and_indices_differ():
    images = {
        pathfinder.draw(pathfinder.EASY, seed, i).image.tobytes()
        for seed in (0, 1)
        for i in range(50)
    }
    assert len(images) == 100


def test_contact_sheet(tmp_path):
    sheet = pathfinder.contact_sheet(pathfinder.EASY, 0, rows=2, columns=3)
    assert sheet.size == (3 * 134, 2 * 134)
    pixels = np.asarray(sheet)
    assert pixels[0, 0].tolist() == [0, 128, 0] and pixels[134, 0].tolist() == [255, 0, 0]
    assert pixels[3:131, 3:131].max() == 255
