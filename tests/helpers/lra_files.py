"""Files of the Long Range Arena's formats, small, for the tests of its data."""

import struct
import wave
from pathlib import Path

import numpy as np
from PIL import Image

from bench.lra import data


def opened(name: str, root: Path):
    return data.open_task(name, root, progress=False)


def write_listops(root: Path, rows: str, inner: bool = False) -> Path:
    folder = root / "lra_release" / ("lra_release" if inner else "") / "listops-1000"
    folder.mkdir(parents=True)
    for split in ("train", "val", "test"):
        (folder / f"basic_{split}.tsv").write_text("Source\tTarget\n" + rows)
    return folder


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
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = rng.integers(0, 256, (4, 3072)).astype(np.uint8)
        pixels[0] = np.repeat([255, 0, 0], 1024)  # red
        (folder / name).write_bytes(python2_pickle(pixels, [i, 1, 2, 3]))
    return folder


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


def write_imdb(root: Path) -> Path:
    for split in ("train", "test"):
        for label, review in (("neg", "bad<br />ÿ"), ("pos", "good" * 2000)):
            folder = root / "aclImdb" / split / label
            folder.mkdir(parents=True)
            for i in range(15):
                (folder / f"{i}_1.txt").write_text(review if i else review + "\u4e2d")
    return root / "aclImdb"


def write_aan(root: Path, row: str = "", header: str = "") -> Path:
    folder = root / "lra_release/lra_release/tsv_data"
    folder.mkdir(parents=True)
    good = '1.0\tP1\tP2\tb\'one \\n "two"\'\tb"it\'s"\n'
    for split in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{split}.tsv").write_text(header + good + row)
    return folder


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
