"""What was measured, as JSON lines, and the README's tables of it. Standard library only."""

import json
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("seqconv", "torch", "numpy", "scipy", "ducc0", "pyfftw", "pykeops")


def commit() -> str:
    """The last commit that changed what is measured, marked if there are changes on top of it."""

    def git(*words):
        command = ["git", *words, "--", "csrc", "seqconv"]
        try:
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:  # a bare machine has no git
            return ""
        return result.stdout.strip() if result.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("log", "-1", "--format=%h") or "unknown") + ("+changes" if changed else "")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def append(path: Path, row: dict) -> None:
    """Adds a line, after the end of one that a crash may have cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def read(paths: Iterable[Path]) -> list[dict]:
    """Every measurement; a last line cut short by a crash is dropped."""
    rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def same_run(rows: list[dict], like: dict | None = None) -> list[dict]:
    """Those measured on the same device and commit as `like`, or as the last one."""
    like = like or rows[-1]
    return [r for r in rows if all(r[key] == like[key] for key in ("device", "commit", "isa"))]


def length_name(length: int) -> str:
    if length >= 1 << 20 and length % (1 << 20) == 0:
        return f"{length >> 20}M"
    return f"{length >> 10}K" if length >= 1024 and length % 1024 == 0 else str(length)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def replace_between(path: Path, name: str, text: str) -> None:
    """Rewrites what stands between <!-- name --> and <!-- end of name -->."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    whole = path.read_text()
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{path.name}: one {start} and one {end} wanted")
    head, rest = whole.split(start)
    path.write_text(f"{head}{start}\n{text.strip()}\n{end}{rest.split(end)[1]}")
