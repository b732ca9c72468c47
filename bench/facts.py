"""What a result was measured on, and how results name lengths and counts. Standard library only."""

import platform
import re
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("seqconv", "torch", "numpy", "scipy", "ducc0", "pyfftw", "pykeops")


def git(*words: str) -> str:
    """Returns what git prints about this repository; nothing where there is no git or no repository."""
    try:
        result = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def commit() -> str:
    """Returns the last commit that changed what is measured. "+changes" marks uncommitted changes to it."""
    measured = ("--", "csrc", "seqconv")
    changed = git("status", "--porcelain", "--untracked-files=no", *measured)
    return (git("log", "-1", "--format=%h", *measured) or "unknown") + (
        "+changes" if changed else ""
    )


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> dict[str, str]:
    """Returns the fields of /proc/cpuinfo; on other systems the "model name" alone."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", text, re.MULTILINE))
    return {"model name": platform.processor() or platform.machine()} | fields


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def same_run(rows: list[dict], like: dict | None = None) -> list[dict]:
    """Returns the rows measured on the same device and commit as `like`, or as the last row."""
    like = like or rows[-1]
    return [r for r in rows if all(r[key] == like[key] for key in ("device", "commit", "isa"))]


def length_name(length: int) -> str:
    if length >= 1 << 30 and length % (1 << 30) == 0:
        return f"{length >> 30}G"
    if length >= 1 << 20 and length % (1 << 20) == 0:
        return f"{length >> 20}M"
    return f"{length >> 10}K" if length >= 1024 and length % 1024 == 0 else str(length)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
