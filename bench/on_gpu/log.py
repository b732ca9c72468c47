"""Lines for people and rows for programs. Both are on disk as soon as they are known."""

import math
import os
import time
from pathlib import Path

from bench.files import append, read

ROWS, TEXT = "results.jsonl", "log.txt"


class Log:
    """The log of one step. say() prints a line, which the runner keeps. row() adds a row to results.jsonl."""

    def __init__(self, folder: Path, step: str, seconds: float = math.inf):
        self.folder, self.step, self.end = folder, step, time.monotonic() + seconds

    def left(self) -> float:
        """Returns the seconds until the runner cuts the step."""
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def row(self, kind: str, **values) -> dict:
        row = {"kind": kind, "step": self.step, **values}
        append(self.folder / ROWS, row)
        return row

    def rows(self, kind: str) -> list[dict]:
        """Returns the rows of all steps so far, also those of earlier runs in the same folder."""
        return [row for row in rows_of(self.folder) if row["kind"] == kind]


def rows_of(folder: Path) -> list[dict]:
    path = folder / ROWS
    return read([path]) if path.exists() else []


class Console:
    """Prints to the terminal and to log.txt what the runner and its steps say, each line with the seconds so far."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.start = time.monotonic()
        self.file = open(folder / TEXT, "a", encoding="utf-8")

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __call__(self, text: str) -> None:
        line = f"[{self.seconds():6.1f}] {text}\n"
        self.file.write(line)
        self.file.flush()
        try:
            os.write(1, line.encode())
        except OSError:  # the terminal is gone; the file is not
            pass
