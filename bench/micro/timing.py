"""What every microbenchmark shares: interleaved timing, errors, floors and peak memory."""

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 3, 5, 51
FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    ordered = sorted(values)
    half = len(ordered) // 2
    low, high = ordered[:half] or ordered, ordered[-half:] or ordered
    return median(low), median(ordered), median(high)


class Clock:
    """Returns the seconds of one call: by the wall clock on a CPU, by events behind a flushed cache on a GPU.

    On a GPU `ahead` is called before the first event. The work that it queues has to last until the call is queued.
    """

    def __init__(self, device: str, ahead: Callable[[], object] = lambda: None):
        self.cuda, self.ahead = device.startswith("cuda"), ahead
        if self.cuda:
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        self.flush.zero_()
        self.ahead()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def interleaved(
    functions: dict[str, Callable[[], object]],
    budget: float,
    clock: Clock,
    before: dict[str, Callable[[], object]] | None = None,
    agreed: Callable[[bool], bool] = bool,
) -> dict[str, list[float]]:
    """Returns the seconds per call of every function, measured in rounds A B C A B C ...

    WARM_UP rounds go first: the C library's heap needs a few before it stops growing. Rounds go on
    until `budget` seconds are spent, but there are at least MIN_ROUNDS and at most MAX_ROUNDS.
    Element i of every list comes from the same round. Where `before` has something for a function,
    it is called ahead of that function, untimed. `agreed` gets whether the time is over, and returns it: by it
    several processes end after the same round.
    """
    before = before or {}
    for _ in range(WARM_UP):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and agreed(time.perf_counter() - start > budget):
                break
            for name, function in functions.items():
                if name in before:
                    before[name]()
                seconds[name].append(clock(function))
    finally:
        gc.enable()
    return seconds


def worst_errors(
    results, exact, least_scale: dict[int, float] | None = None
) -> tuple[float, float]:
    """Returns the worst relative L2 error of the results, and the error of the worst element over the root mean
    square, which is taken to be at least least_scale[i] for result i."""
    l2 = peak = 0.0
    for i, (value, wanted) in enumerate(zip(results, exact, strict=True)):
        # NaN would pass every comparison below.
        difference = (value.double() - wanted).abs().nan_to_num(math.inf, math.inf)
        scale = max(wanted.square().mean().sqrt().item(), (least_scale or {}).get(i, 0.0))
        l2 = max(l2, difference.square().mean().sqrt().item() / scale)
        peak = max(peak, difference.max().item() / scale)
    return l2, peak


def ratios(baseline: list[float], other: list[float]) -> tuple[float, float, float]:
    """Returns the quartiles of baseline / other, round by round."""
    return quartiles([a / b for a, b in zip(baseline, other, strict=True)])


def summary(times: list[float], baseline: list[float] | None = None) -> dict:
    """Returns what a row says of a contender's times: their quartiles, and those of baseline / times."""
    low, middle, high = quartiles(times)
    row = {"q1": low, "median": middle, "q3": high, "rounds": len(times)}
    if baseline is not None:
        low, middle, high = ratios(baseline, times)
        row |= {"ratio_q1": low, "ratio": middle, "ratio_q3": high}
    return row


def within(error: tuple[float, ...], limits: tuple[float, ...], slack: float = 1.0) -> bool:
    return all(e <= slack * limit for e, limit in zip(error, limits, strict=True))


def seconds_per_byte(device: str, clock: Clock, size: int) -> float:
    """Returns the time of a copy per byte. It reads `size` bytes and writes as many; both are counted."""
    source = torch.ones(max(size, 4096), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, 0.1, clock)
    return median(times["copy"]) / (2 * source.numel())


def flops_per_second(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """Returns the rate of a matrix product, which comes nearest to a machine's peak of all programs."""
    n = 1024 if device == "cpu" else 8192
    a = torch.ones(n, n, dtype=dtype, device=device)
    out = torch.empty_like(a)
    times = interleaved({"mm": lambda: torch.mm(a, a, out=out)}, 0.3, clock)
    return 2 * n**3 / min(times["mm"])


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """Returns the memory that one call adds, its results included; None if this system cannot say.

    On a CPU it is the growth of the resident set. That is right only where freed memory goes back to the system,
    as it does with a low MALLOC_MMAP_THRESHOLD_.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        function()
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        result = function()
        peak = _status("VmHWM")
        del result
    except OSError:
        return None
    return max(0, peak - before)
