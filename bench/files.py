"""Files of results: whole or not there, one JSON object per line, tables in Markdown. Standard library only."""

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # these errors do not name the file


def atomically(path: Path, write: Callable) -> None:
    """Calls write(binary file) on a temporary neighbour, flushes it to the disk and renames it to `path`.

    An OSError names the path.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_text(path: Path, text: str) -> None:
    atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value, indent: int = 2) -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_csv(path: Path, rows: list[dict], columns: tuple[str, ...]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def append(path: Path, row: dict) -> None:
    """Adds a line of JSON. If a crash has cut the last line short, the new one still starts on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def read(paths: Iterable[Path]) -> list[dict]:
    """Returns every row of these files. Lines that a crash has cut short are dropped."""
    rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def replace_between(path: Path, name: str, text: str) -> None:
    """Rewrites what stands between <!-- name --> and <!-- end of name -->."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    whole = path.read_text()
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{path.name} must hold one {start} and one {end}")
    head, rest = whole.split(start)
    path.write_text(f"{head}{start}\n{text.strip()}\n{end}{rest.split(end)[1]}")
