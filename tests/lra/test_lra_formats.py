"""The Long Range Arena's files: every reader on the real format, made here, whole, damaged and absent."""

import os
import pickle
import struct

import numpy as np
import pytest
from lra_files import (
    opened,
    write_aan,
    write_cifar,
    write_imdb,
    write_listops,
    write_pathfinder,
    write_speech,
)
from PIL import Image

from bench.lra import data
from bench.lra.data import DataError


def tokens(split, i: int) -> list[int]:
    x, lengths, _ = split.batch([i])
    return x[0, : lengths[0]].tolist()


# --- ListOps ---


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


@pytest.mark.parametrize(
    "row", ["( [MAX 3 ) 4\n", "[MAX 3 4 ]\t12\n", "[MOX 3 4 ]\t4\n", "[MA", "\t4\n"]
)
def test_damaged_listops_are_named(tmp_path, row):
    write_listops(tmp_path, "( ( ( [MAX 3 ) 4 ) ] )\t4\n" + row)
    with pytest.raises(DataError, match=r"basic_train\.tsv:3"):
        opened("listops", tmp_path)
    assert not list((tmp_path / "cache").iterdir())


# --- Text, retrieval ---


def test_imdb(tmp_path):
    write_imdb(tmp_path)
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
    with pytest.raises(DataError, match=r"neg/3_1\.txt is not UTF-8"):
        opened("text", tmp_path)


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


# --- what editors, file systems and half an extraction leave behind ---


@pytest.mark.parametrize("end", ["\n", "\n \n\n", "\r\n", ""])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_blank_lines_at_the_end_and_a_byte_order_mark_are_no_rows(tmp_path, end, mark):
    listops, aan, speech = write_listops(tmp_path, ""), write_aan(tmp_path), write_speech(tmp_path)
    images = write_pathfinder(tmp_path)
    rows = "( ( ( [MAX 3 ) 4 ) ] )\t4\n( ( ( [MIN 3 ) 4 ) ] )\t3"
    (listops / "basic_train.tsv").write_bytes(mark + ("Source\tTarget\n" + rows + end).encode())
    for path in (
        *aan.iterdir(),
        *(images / "metadata").iterdir(),
        speech / "validation_list.txt",
        speech / "testing_list.txt",
    ):
        path.write_bytes(mark + path.read_bytes().rstrip() + end.encode())
    for split in ("val", "test"):
        (listops / f"basic_{split}.tsv").write_bytes(mark + rows.encode() + end.encode())
    for name, sizes in (
        ("listops", [2, 2, 2]),
        ("retrieval", [1, 1, 1]),
        ("pathfinder", [20, 2, 2]),
        ("speech", [5, 2, 1]),
    ):
        splits = opened(name, tmp_path)[1]
        assert [len(splits[s]) for s in ("train", "val", "test")] == sizes, name
    assert tokens(opened("listops", tmp_path)[1]["test"], 0) == [14, 6, 7, 17, 2]


def test_a_blank_line_between_rows_is_named(tmp_path):
    row = "( ( ( [MAX 3 ) 4 ) ] )\t4\n"
    write_listops(tmp_path, row + "\n" + row)
    with pytest.raises(DataError, match=r"basic_train\.tsv:3: a blank line, and rows behind it"):
        opened("listops", tmp_path)


def test_hidden_files_are_no_samples(tmp_path):
    """macOS puts a ._NAME beside a NAME, which may hold nothing but ASCII, and .DS_Store into folders."""
    imdb, speech = write_imdb(tmp_path), write_speech(tmp_path)
    images = write_pathfinder(tmp_path)
    for path in [*imdb.rglob("*.txt"), *speech.rglob("*.wav"), *images.rglob("*.*")]:
        path.with_name(f"._{path.name}").write_text("Mac OS X ATTR")
        path.with_name(".DS_Store").write_text("Bud1")
    (speech / ".hidden").mkdir()
    for name, sizes in (("text", [30, 30]), ("speech", [5, 1]), ("pathfinder", [20, 2])):
        splits = opened(name, tmp_path)[1]
        assert [len(splits[s]) for s in ("train", "test")] == sizes, name
    vocab = opened("text", tmp_path)[0].vocab
    assert vocab == 3 + len(set("bad<br />ÿgood"))  # nothing of theirs was counted


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("label", ["neg", "pos"])
def test_a_text_set_with_one_label_is_refused(tmp_path, split, label):
    folder = write_imdb(tmp_path) / split / label
    for path in folder.iterdir():
        path.rename(path.with_suffix(".old"))
    with pytest.raises(DataError, match=rf"{split}/{label} holds no \*\.txt"):
        opened("text", tmp_path)


def test_a_set_unlike_the_released_one_is_noted(tmp_path):
    folder = write_imdb(tmp_path)
    for i in range(40):
        (folder / f"train/neg/{100 + i}_1.txt").write_text("bad")
    notes = opened("text", tmp_path)[0].notes
    assert (
        notes[-1] == "suspicious: (70, 30, 30) samples; the released set has (25000, 25000, 25000)"
    )
    images = write_pathfinder(tmp_path, 32, 30)
    for path in (images / "metadata").iterdir():
        path.write_text(path.read_text().replace(" 1 1.8", " 0 1.8"))
    notes = opened("pathfinder", tmp_path)[0].notes
    assert "suspicious: train has no sample of 1 of 2 classes" in notes


# --- CIFAR-10 ---


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


def test_an_image_is_in_one_split_however_often_it_is_listed(tmp_path):
    folder = write_pathfinder(tmp_path)
    metadata = folder / "metadata"
    lines = (metadata / "9.npy").read_text().splitlines(keepends=True)
    again = lines[3].replace("imgs/9 ", "imgs/./9/ ")
    (metadata / "10.npy").write_text((metadata / "10.npy").read_text() + again)
    (metadata / "11.npy").write_text("".join(lines))  # a whole file once more
    info, splits = opened("pathfinder", tmp_path)
    assert "dropped 13 lines that list an image again, the first" in info.notes[0]
    assert "10.npy:13" in info.notes[0]
    every = [mark for split in splits.values() for mark in marks(split)]
    assert sorted(every) == sorted([*range(90, 102), *range(100, 112)])
    (metadata / "11.npy").write_text(lines[0].replace(" 0 1.8", " 1 1.8"))
    with pytest.raises(
        DataError, match=r"11\.npy:1: .*sample_0\.png has label 1, but 0 in .*9\.npy:1"
    ):
        opened("pathfinder", tmp_path)


# --- Speech Commands ---


def test_speech(tmp_path):
    write_speech(tmp_path)
    info, splits = opened("speech", tmp_path)
    assert (info.classes, info.channels, info.l_max) == (2, 1, 16000)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [5, 2, 1]
    x, lengths, labels = splits["test"].batch([0])
    assert x.shape == (1, 16000, 1) and lengths.tolist() == [16000] and labels.tolist() == [0]
    assert (x[0, :9000] == -0.5).all() and (x[0, 9000:] == 0).all()
    assert splits["train"].labels.tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("fault", ["truncated", "garbage", "rate", "chunk", "listed", "list"])
def test_damaged_speech_is_named(tmp_path, fault):
    path = write_speech(tmp_path) / "yes/a_nohash_2.wav"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:20000])
    elif fault == "garbage":
        path.write_bytes(b"RIFF")
    elif fault == "rate":
        path.write_bytes(path.read_bytes().replace(struct.pack("<I", 16000), b"\x40\x1f\0\0", 1))
    elif fault == "chunk":
        path.write_bytes(path.read_bytes().replace(b"fmt \x10\0", b"fmt \x10\xff", 1))
    elif fault == "listed":
        path = tmp_path / "speech_commands/no/a_nohash_1.wav"
        path.unlink()
    else:
        path = tmp_path / "speech_commands/testing_list.txt"
        path.write_bytes(b"no/\xff.wav\n")
    with pytest.raises(DataError, match=path.name):
        opened("speech", tmp_path)


def test_a_clip_in_both_lists_and_a_word_without_clips_are_named(tmp_path):
    folder = write_speech(tmp_path)
    (folder / "testing_list.txt").write_text("no/a_nohash_0.wav\nno/a_nohash_1.wav\n")
    with pytest.raises(DataError, match=r"no/a_nohash_1\.wav and 0 others are in both lists"):
        opened("speech", tmp_path)
    (folder / "testing_list.txt").write_text("no/a_nohash_0.wav\n")
    (folder / "maybe").mkdir()
    with pytest.raises(DataError, match=r"maybe holds no \*\.wav"):
        opened("speech", tmp_path)


# --- absent data ---


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
    with pytest.raises(DataError, match=r"unknown task 'wikipedia'; there are listops"):
        opened("wikipedia", tmp_path)
