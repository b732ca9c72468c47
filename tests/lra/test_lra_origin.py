"""The Long Range Arena's cache and the files behind it: whatever changes is packed anew, and nothing else is."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

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

from bench.lra import data
from bench.lra.data import DataError, cache, origin

ROOT = Path(__file__).parents[2]
ROW, OTHER = "( ( ( [MAX 3 ) 4 ) ] )\t4\n", "( ( ( [MAX 3 ) 5 ) ] )\t5\n"
SETS = {
    "listops": lambda root: write_listops(root, ROW),
    "text": write_imdb,
    "retrieval": write_aan,
    "image": write_cifar,
    "pathfinder": write_pathfinder,
    "speech": write_speech,
}


@pytest.fixture
def packed(monkeypatch):
    """The names of the sets that have been packed since."""
    names, pack = [], data.pack

    def counted(source, folder, name, **options):
        names.append(name)
        pack(source, folder, name, **options)

    monkeypatch.setattr(data, "pack", counted)
    return names


def in_place(path: Path, content: bytes | None = None) -> None:
    """Other bytes, the same size and times of writing, as after a repair that sets them back."""
    s = path.stat()
    old = path.read_bytes()
    path.write_bytes(content or old[:-2] + bytes([old[-2] ^ 1]) + old[-1:])
    assert path.stat().st_size == s.st_size
    os.utime(path, ns=(s.st_atime_ns, s.st_mtime_ns))


def a_file(name: str, root: Path) -> Path:
    located = data._locate(name, root)
    return located.folder / located.files()[-1]


def swapped(path: Path) -> None:
    """The folder of a copy in the place of the folder, one file of it another."""
    copy = path.parent.with_name("copy")
    shutil.copytree(path.parent, copy)
    in_place(copy / path.name)
    shutil.rmtree(path.parent)
    copy.rename(path.parent)


CHANGES = {
    "bytes": in_place,
    "size": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "removed": Path.unlink,
    "added": lambda path: path.with_name("new" + path.suffix).write_bytes(path.read_bytes()),
    "swapped": swapped,
}
ONE_BY_ONE = (
    "text",
    "pathfinder",
    "speech",
)  # a file more is another sample; others have fixed names


@pytest.mark.parametrize(
    "name, change", [(n, c) for n in SETS for c in CHANGES if c != "added" or n in ONE_BY_ONE]
)
def test_a_changed_set_is_packed_anew(tmp_path, packed, capsys, name, change):
    SETS[name](tmp_path)
    opened(name, tmp_path)
    CHANGES[change](a_file(name, tmp_path))
    try:
        opened(name, tmp_path)
        assert packed == [name, name]
    except DataError as error:  # damaged by the change, which is seen as well
        assert str(tmp_path) in str(error)
    said = capsys.readouterr().err
    assert "has changed since it was packed: packed anew" in said or "removed" in change
    assert len(list((tmp_path / "cache").glob(f"{name}.*"))) == 1


@pytest.mark.parametrize("name", SETS)
def test_an_unchanged_set_is_packed_once(tmp_path, packed, capsys, monkeypatch, name):
    SETS[name](tmp_path / "a")
    opened(name, tmp_path / "a")
    path = a_file(name, tmp_path / "a")
    for hidden in (".DS_Store", f"._{path.name}"):  # no sample, no change
        path.with_name(hidden).write_bytes(b"\0\5\x16\7")
    opened(name, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")  # with its cache
    opened(name, tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    a_file(name, tmp_path / "c").touch()
    opened(name, tmp_path / "c")
    assert packed == [name]
    # The copy has been looked at once; the next time a glance is enough.
    monkeypatch.setattr(origin, "content", None)
    opened(name, tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    opened(name, Path("c"))
    assert capsys.readouterr().err == ""


def test_the_new_samples_are_seen_and_who_reads_the_old_ones_keeps_them(tmp_path):
    folder = write_listops(tmp_path, ROW)
    info, before = opened("listops", tmp_path)
    for split in ("train", "val", "test"):
        in_place(folder / f"basic_{split}.tsv", ("Source\tTarget\n" + OTHER).encode())
    changed, after = opened("listops", tmp_path)
    assert changed.content != info.content != ""
    for split in ("train", "val", "test"):
        assert before[split].labels.tolist() == [4] and after[split].labels.tolist() == [5]
        assert before[split].batch([0])[0].tolist() == [[14, 6, 7, 17, 2]]
        assert after[split].batch([0])[0].tolist() == [[14, 6, 8, 17, 2]]


def test_a_better_copy_elsewhere_is_read(tmp_path, packed):
    """The inner of two copies comes first, also when it is unpacked later."""
    write_listops(tmp_path, ROW)
    assert opened("listops", tmp_path)[1]["test"].labels.tolist() == [4]
    inner = write_listops(tmp_path, OTHER, inner=True)
    info, splits = opened("listops", tmp_path)
    assert splits["test"].labels.tolist() == [5] and "of 2 copies" in info.notes[0]
    shutil.rmtree(inner)
    assert opened("listops", tmp_path)[1]["test"].labels.tolist() == [4]
    assert packed == ["listops"] * 3


def test_where_the_files_are_gone_the_cache_is_read_with_a_word(tmp_path, packed):
    folder = write_cifar(tmp_path)
    opened("image", tmp_path)
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match="missing there: data_batch_4"):
        opened("image", tmp_path)
    shutil.rmtree(folder)
    info, splits = opened("image", tmp_path)
    assert len(splits["test"]) == 4 and packed == ["image"]
    assert "is read, which was packed earlier: no data in" in info.notes[0]


def test_a_cache_of_an_earlier_version_is_packed_anew(tmp_path, packed, capsys):
    write_listops(tmp_path, ROW)
    opened("listops", tmp_path)
    (folder,) = (tmp_path / "cache").iterdir()
    meta = cache.read_meta(folder) | {"origin": str(tmp_path)}
    cache.files.write_json(folder / "meta.json", meta)
    folder.rename(tmp_path / "cache/listops")
    opened("listops", tmp_path)
    assert packed == ["listops"] * 2 and "packed anew" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


def test_a_generated_set_and_a_package_are_looked_at_too(tmp_path, packed, monkeypatch):
    folder = data.make("listops-short", tmp_path, n=60, workers=1, progress=False)
    opened("listops-short", tmp_path)
    opened("listops-short", tmp_path)
    path = folder / "listops-1000/basic_test.tsv"
    old = path.read_bytes()
    in_place(path, old[:-2] + (b"2\n" if old[-2:] == b"1\n" else b"1\n"))
    opened("listops-short", tmp_path)
    assert packed == ["listops-short"] * 2
    for name in ("GunPoint_TRAIN.ts", "GunPoint_TEST.ts"):
        (tmp_path / name).write_text("@classLabel true 1 2\n@data\n1,2:1\n3,4:2\n")
    found = lambda package, version, path, what: tmp_path / Path(path).name  # noqa: E731
    monkeypatch.setattr(data.packaged, "find", found)
    opened("ucr:GunPoint", tmp_path)
    opened("ucr:GunPoint", tmp_path)
    (tmp_path / "GunPoint_TEST.ts").write_text("@classLabel true 1 2\n@data\n1,2:2\n")
    assert opened("ucr:GunPoint", tmp_path)[1]["test"].labels.tolist() == [1]
    assert packed[2:] == ["ucr:GunPoint"] * 2


# --- while others write, or nobody can ---


def test_what_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    folder = write_listops(tmp_path, ROW)
    read = data._read

    def late(*arguments):
        source = read(*arguments)
        (folder / "basic_val.tsv").write_text("Source\tTarget\n" + OTHER + OTHER)
        return source

    monkeypatch.setattr(data, "_read", late)
    with pytest.raises(DataError, match="files of listops changed while they were read"):
        opened("listops", tmp_path)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    assert opened("listops", tmp_path)[1]["val"].labels.tolist() == [5, 5]


OPEN = """
import sys
from pathlib import Path
from bench.lra import data
splits = data.open_task("listops", Path(sys.argv[1]), progress=False)[1]
print({len(s) for s in splits.values()}, {len(s.batch(range(len(s)))[0]) for s in splits.values()})
"""


@pytest.mark.slow
def test_processes_share_a_set_that_changes(tmp_path):
    folder = write_listops(tmp_path, ROW * 3000)
    for rows in (3000, 3001, 3002):
        for split in ("train", "val", "test"):
            (folder / f"basic_{split}.tsv").write_text("Source\tTarget\n" + ROW * rows)
        command = [sys.executable, "-c", OPEN, str(tmp_path)]
        several = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
        for process in several:
            assert process.communicate(timeout=120)[0].decode().strip() == f"{{{rows}}} {{{rows}}}"
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_killed_packing_of_a_changed_set_is_done_again(tmp_path, packed):
    folder = write_listops(tmp_path, ROW)
    opened("listops", tmp_path)
    (folder / "basic_test.tsv").write_text("Source\tTarget\n" + OTHER)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = cache.scratch(tmp_path / "cache/listops.0123").with_suffix(f".{dead.pid}")
    (left / "half").mkdir(parents=True)
    of_another_machine = left.with_name(f".listops.0123.elsewhere.{dead.pid}")
    of_another_machine.mkdir()
    assert opened("listops", tmp_path)[1]["test"].labels.tolist() == [5]
    assert not left.exists() and of_another_machine.exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    folder = write_listops(tmp_path, ROW)
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(DataError, match=r"listops cannot be packed into .*cache: "):
        opened("listops", tmp_path)
    (tmp_path / "cache").unlink()
    opened("listops", tmp_path)

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(arguments[0]))

    # What is packed already needs no writing.
    monkeypatch.setattr(cache.files, "write_json", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    (folder / "basic_val.tsv").touch()
    for _ in range(2):
        assert opened("listops", tmp_path)[1]["val"].labels.tolist() == [4]
    (folder / "basic_val.tsv").write_text("Source\tTarget\n" + OTHER)
    with pytest.raises(DataError, match=r"cannot be packed into .*Permission denied"):
        opened("listops", tmp_path)


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a file that grows beyond it is a full disk
"""


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    write_listops(
        tmp_path, "[MAX " + "1 " * 1500 + "]\t1\n" + 100 * ("[MAX " + "1 " * 1500 + "]\t1\n")
    )
    done = subprocess.run(
        [sys.executable, "-c", FULL + OPEN, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert "listops cannot be packed into" in done.stderr and "too large" in done.stderr
    assert not list((tmp_path / "cache").iterdir())


def test_links_and_unreadable_files_are_named(tmp_path):
    folder = write_imdb(tmp_path)
    (folder / "test/pos/x.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot be packed.*x\.txt"):
        opened("text", tmp_path)
    (folder / "test/pos/x.txt").unlink()
    (folder / "test/pos/x.txt").mkdir()  # a folder under a file's name
    with pytest.raises(DataError, match=r"x\.txt"):
        opened("text", tmp_path)


# --- archives that nobody has extracted ---


@pytest.mark.parametrize(
    "name, archive",
    [
        ("listops", "lra_release.gz"),
        ("retrieval", "lra_release.gz"),
        ("pathfinder", "lra_release.gz"),
        ("text", "aclImdb_v1.tar.gz"),
        ("image", "cifar-10-python.tar.gz"),
        ("speech", "speech_commands_v0.02.tar.gz"),
    ],
)
def test_the_command_that_extracts_an_archive_is_said(tmp_path, name, archive):
    made, root = tmp_path / "made", tmp_path / "the data"
    SETS[name](made)
    root.mkdir()
    with tarfile.open(root / archive, "w:gz") as file:
        # Speech Commands is released without a folder around it.
        for path in (made / "speech_commands" if name == "speech" else made).iterdir():
            file.add(path, path.name)
    with pytest.raises(DataError, match=r"lies there, not .* extracted: ") as error:
        opened(name, root)
    command = str(error.value).rpartition("extracted: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert len(opened(name, root)[1]["test"])


def test_a_quick_look_at_many_files_is_quick(tmp_path):
    for batch in range(5):
        (tmp_path / str(batch)).mkdir()
        for i in range(1000):
            (tmp_path / str(batch) / f"{i}.png").write_bytes(b"x")
    before = np.sum(os.times()[:2])
    names = origin.files(tmp_path, ("",))
    origin.quick(tmp_path, names)
    seconds = np.sum(os.times()[:2]) - before
    assert len(names) == 5000 and seconds < 1, seconds
