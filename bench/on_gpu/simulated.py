"""Simulated times beside measured ones. `make gpu` simulates the kernels, as a machine with a GPU may lack the
disassembler that this takes."""

import json
from collections.abc import Sequence
from pathlib import Path

from bench.files import write_json
from bench.on_gpu.runner import CARRIED

NAME = "simulated.json"
ARCH = "sm_90"  # of the device that the model knows, an H100
ALLOWED = 1.15  # factor between a measured and a simulated time


def make(arch: str, path: Path) -> str:
    """Writes the simulated times of all kernels that are described. Returns a sentence on what was done."""
    from bench.model import kernels
    from bench.model.code import disassembler_reason
    from bench.model.estimate import count, estimate
    from seqconv.backends.cuda.kernels import names

    described = [name for name in names(arch) if kernels.describe(name)] if arch == ARCH else []
    reason = disassembler_reason()
    if arch != ARCH:
        return f"No times are simulated for {arch}, since the model knows {ARCH} only."
    if reason:
        return f"No times are simulated: {reason}"
    write_json(path, [estimate(count(name, arch)) for name in described])
    return f"Times are simulated for {len(described)} kernels."


def known(path: Path | None = None) -> dict[str, dict]:
    """Returns what make() wrote, by the kernels' names; nothing where it was not carried."""
    path = path or CARRIED / NAME
    return {row["kernel"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def seconds(
    launched: Sequence[str], rows: int, interval: float | None, of: dict[str, dict]
) -> float | None:
    """Returns the simulated time of a call for so many rows; None unless all of its kernels for rows are known.

    interval: the measured cycles between two tensor core instructions. The nearest simulated one is taken; the least
        where nothing was measured.
    """
    mine = [name for name in launched if "forward" in name or "backward" in name]
    if not mine or any(name not in of for name in mine):
        return None
    total = 0.0
    for name in mine:
        times = {int(cycles): time for cycles, time in of[name]["simulated"].items()}
        wanted = min(times) if interval is None else interval
        total += (
            times[min(times, key=lambda cycles: abs(cycles - wanted))] * rows / of[name]["rows"]
        )
    return total


def wrong(rows: Sequence[dict]) -> list[dict]:
    """Returns the rows whose measured and simulated times differ by more than a factor of ALLOWED."""
    both = [row for row in rows if row.get("simulated") and row["median"]]
    return [r for r in both if not 1 / ALLOWED <= r["median"] / r["simulated"] <= ALLOWED]
