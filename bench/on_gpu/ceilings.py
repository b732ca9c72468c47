"""What limits every kernel here: a copy, the tensor cores' instruction, a launch, and the clock meanwhile."""

from functools import partial
from pathlib import Path
from statistics import median

import torch

from bench.micro.timing import Clock, flops_per_second
from bench.on_gpu.steps import RIGHT
from seqconv import fftconv
from seqconv.backends.cuda import kernels

MMA = ("mma_f16", "mma_f32")  # sums in fp16 and in float32
kernels.GUESTS.update(dict.fromkeys(MMA, (Path(__file__).parent / "mma.cu").read_text()))
SCHEDULERS = 4  # of a multiprocessor; each runs one warp at a time
LAUNCHES = 2  # of the smallest convolution: its kernel's spectrum and its rows, which take no time


def copy(machine, size: int) -> float:
    """Returns the bytes per second. Bytes that are read and bytes that are written both count."""
    source = torch.ones(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    seconds = machine.replays(lambda: target.copy_(source))
    return 2 * size / median(seconds() for _ in range(7))


def interval(machine, kernel: str, warps: int, blocks: int = 1, iterations: int = 20000) -> tuple:
    """Returns (cycles between two instructions of a scheduler with so many warps, clock in Hz meanwhile)."""
    threads, found = 32 * SCHEDULERS * warps, []
    for _ in range(3):
        times = machine.times_of_warps(kernel, blocks, threads, iterations)
        block = times[: threads // 32]  # the warps of one multiprocessor have the same clock
        cycles = max(t[1] for t in block) - min(t[0] for t in block)
        took = max(t[3] for t in block) - min(t[2] for t in block)
        found.append((cycles / (iterations * 8 * warps), cycles / max(took, 1) * 1e9))
    return min(found)


def run(machine, log) -> int:
    def ceiling(name: str, value: float, unit: str, scale: float = 1.0) -> None:
        log.row("ceiling", name=name, value=value)
        log.say(f"{name}: {value * scale:.4g} {unit}")

    ceiling("copy", copy(machine, 1 << (20 if machine.dry else 30)), "TB/s", 1e-12)
    u = torch.randn(1, 1, 256, device=machine.device, dtype=torch.bfloat16)
    k = torch.randn(1, 256, device=machine.device)
    small = machine.replays(partial(fftconv, u, k))
    ceiling("launch", median(small() for _ in range(7)) / LAUNCHES, "us", 1e6)
    for kernel in MMA:
        for warps in (1, 4):
            cycles, _ = interval(machine, kernel, warps)
            ceiling(f"{kernel}, {warps} warps", cycles, "cycles between two of a scheduler")
    # All multiprocessors at a time: this shows the clock under load.
    cycles, hertz = interval(machine, "mma_f16", 4, machine.facts()["processors"])
    ceiling("mma_f16, all multiprocessors", cycles, "cycles between two of a scheduler")
    ceiling("clock", hertz, "GHz under that load", 1e-9)
    rate = flops_per_second(machine.device, torch.bfloat16, Clock(machine.device))
    ceiling("matrix product, bfloat16", rate, "TFLOP/s", 1e-12)
    return RIGHT


STEPS = {"ceilings": run}
