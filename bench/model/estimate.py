"""Counts what a kernel's machine code runs for a row, and simulates how long its rows take."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.model import classes, kernels
from bench.model.code import Instruction, compiled
from bench.model.simulator import Device, simulate

BATCH, CHANNELS = 64, 768
ROWS = BATCH * CHANNELS
INTERVALS = (4, 6)  # cycles between two tensor core instructions, which no document gives


@dataclass(frozen=True)
class Count:
    """What a kernel takes. Warp instructions are those of all warps for one row."""

    kernel: str
    arch: str
    instructions: float
    by_class: dict[str, float]
    registers: int
    spills: int
    shared: int  # bytes of a block
    described: kernels.Described
    path: tuple[Instruction, ...]

    def floor(self, rows: int = ROWS, device: Device | None = None) -> float:
        """The seconds in which a copy moves as many bytes."""
        moved = self.described.points * self.described.traffic * rows
        return moved / (device or Device()).bandwidth

    def simulated(self, rows: int = ROWS, device: Device | None = None) -> float:
        """The simulated seconds of so many rows on all multiprocessors, and not less than the memory's floor."""
        device, of = device or Device(), self.described
        memory = of.points * of.traffic * of.rows
        cycles = simulate(self.path, of.residents, device, memory) / of.rows
        return max(device.seconds(cycles, rows), self.floor(rows, device))


def count(kernel: str, arch: str = "sm_90") -> Count:
    """Compiles a kernel and counts it. ValueError where nothing describes it, or its loops are not as described."""
    described = kernels.describe(kernel)
    if described is None:
        raise ValueError(f"kernel: bench.model.kernels does not describe {kernel!r}")
    code = compiled(kernel, arch)
    try:
        path = described.path(code.instructions)
    except ValueError as error:
        raise ValueError(f"{kernel} for {arch}: {error}") from None
    of_row = described.warps / described.rows
    return Count(
        kernel,
        arch,
        len(path) * of_row,
        {kind: number * of_row for kind, number in classes.count(path).items()},
        code.registers,
        code.spills,
        code.shared + described.shared,
        described,
        tuple(path),
    )


def estimate(counted: Count, intervals: Iterable[int] = INTERVALS, rows: int = ROWS) -> dict:
    """Returns a row of the table and of its JSON. Times are in seconds, simulated for each interval of HMMA."""
    return {
        "kernel": counted.kernel,
        "arch": counted.arch,
        "points": counted.described.points,
        "rows": rows,
        "instructions": counted.instructions,
        "by_class": {k: counted.by_class[k] for k in classes.ORDER if k in counted.by_class},
        "registers": counted.registers,
        "spills": counted.spills,
        "shared": counted.shared,
        "floor": counted.floor(rows),
        "simulated": {str(h): counted.simulated(rows, Device(hmma=h)) for h in intervals},
    }
