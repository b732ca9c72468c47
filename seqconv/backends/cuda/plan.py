"""How a convolution is laid out on a device: a pure function of the problem and the device's limits.

Sizes and threads follow csrc/device. Of the plans that fit, the one with the smallest time by cost.py is taken.
"""

import functools
import math
from dataclasses import dataclass, replace

from seqconv.backends.cuda.cost import (
    FULL,
    RADIX_ENDS,
    RADIX_PASS,
    instructions,
    seconds_of,
    signal_bytes,
)
from seqconv.backends.cuda.lengths import (
    INNER,
    LAST,
    factor,
    outer_length,
    radix_bytes,
    sizes,
    split,
    tensor_bytes,
)
from seqconv.backends.cuda.problem import H100, Limits, Problem

MAX_THREADS = 512  # of a block; more would leave too few registers for 16 complex points
PIECE = 8  # the kernels read and write so many numbers at once where a window's ends allow it
MAX_PARTS = 8  # partial sums of the taps' gradient; there are more only where channels are too few to fill the device
# The relative L2 error of the tensor cores' fp16 operands, where sums are fp16 (True, fast) or float32. The rounding of
# the result itself comes on top. The tests hold both to it.
OPERAND_ERROR = {True: 1.5e-3, False: 8e-4}


@dataclass(frozen=True)
class Plan:
    """A transform of n points for every window of a row, and its place on the device.

    The engine "radix" computes in float32, and "tensor" on tensor cores with fp16 operands. n is outer * lower. Where
    outer > 1, the radix engine takes three passes over global memory, and the tensor engine takes them for the
    spectra of the taps and for their gradients. A row is cut into `windows` of `step` outputs each.
    """

    engine: str
    n: int
    outer_radices: tuple[int, ...]
    lower_radices: tuple[int, ...]
    columns: int  # which one block of the passes over `outer` points takes
    windows: int
    step: int
    lead: int  # points of a window that lie before its first output
    planes: int  # rows of n points in shared memory for each slot
    row_threads: int
    slots: int
    groups: int  # blocks that share a channel
    taps_threads: int  # row_threads of the kernels that transform taps
    taps_slots: int  # and their slots
    moved: float  # bytes through the device's memory, as the model counts them
    work: float  # warp instructions, as the model counts them
    seconds: float  # the lower bound that the model predicts from both

    @property
    def radices(self) -> tuple[int, ...]:
        return self.outer_radices + self.lower_radices

    @property
    def outer(self) -> int:
        return math.prod(self.outer_radices)

    @property
    def lower(self) -> int:
        return self.n // self.outer

    @property
    def long(self) -> bool:
        return self.engine == "radix" and self.outer > 1

    @property
    def aside(self) -> bool:
        """Whether x's spectrum waits in global memory in backward, while dv has the only plane."""
        return self.engine == "tensor" and self.planes == 1

    @property
    def parts(self) -> int:
        return self.groups * self.slots

    @property
    def threads(self) -> int:
        return self.row_threads * self.slots

    @property
    def shared(self) -> int:
        """The bytes of shared memory that the kernels take which convolve."""
        if self.engine == "tensor":
            return self.slots * (self.planes * tensor_bytes(self.n) + self.row_threads // 8)
        return self.slots * self.planes * radix_bytes(self.lower)

    @property
    def taps_shared(self) -> int:
        return self.taps_slots * max(radix_bytes(self.lower), 4 * self.taps_threads)

    @property
    def columns_shared(self) -> int:
        return radix_bytes(self.outer * self.columns)

    def __str__(self) -> str:
        where = "tensor cores" if self.engine == "tensor" else "float32"
        text = f"{where}, {self.n} points = {' x '.join(map(str, self.radices))}"
        if self.long:
            text += f" in three passes over global memory ({self.outer} x {self.lower})"
        if self.windows > 1:
            text += f", {self.windows} windows of {self.step}"
        text += f"; {self.slots} x {self.row_threads} threads and {self.shared} bytes a block"
        return f"{text}; predicted lower bound {self.seconds * 1e6:.0f} us"


@functools.lru_cache(64)
def _largest(limits: Limits, engine: str, planes: int) -> int:
    """The points of the longest row that a block holds `planes` times."""
    room = radix_bytes if engine == "radix" else tensor_bytes
    unit = LAST if engine == "radix" else INNER
    spare = (
        0 if engine == "radix" else 64
    )  # each warp keeps the largest element that it has seen there
    n = limits.shared // planes // 4 // unit * unit
    while n and room(n) * planes + spare > limits.shared:
        n -= unit
    return n


def _teams(n: int, engine: str) -> tuple[int, ...]:
    """The numbers of threads that may share a row of n points. Few warps with many tiles each have less to set up."""
    if engine == "radix":
        return (min(MAX_THREADS, n // LAST),)
    tiles, most = n // INNER, MAX_THREADS // 32
    warps = {-(-tiles // rounds) for rounds in (1, 2, 4) if tiles <= rounds * most}
    return tuple(32 * w for w in sorted(warps or {-(-tiles // -(-tiles // most))}))


def _slots(limits: Limits, row_threads: int, row_bytes: int, rows: int) -> int:
    """The rows that a block takes at a time: those of 256 threads and a quarter of a multiprocessor's memory."""
    room = min(limits.shared_total // 4, limits.shared) // row_bytes
    return max(1, min(rows, 256 // row_threads, room))


def _groups(problem: Problem, limits: Limits, rows: int, slots: int, backward: bool) -> int:
    """The blocks for each channel: enough to fill the device, and few where each has sums of its own to write."""
    steps = -(-rows // slots)
    across = max(1, problem.sets * problem.channels)
    groups = min(steps, -(-4 * limits.processors // across))
    if backward:
        most = MAX_PARTS if across * MAX_PARTS >= limits.processors else max(MAX_PARTS, rows // 2)
        groups = min(groups, max(1, most // slots))
    else:
        groups = max(groups, -(-steps // 8))
    return -(-rows // -(-rows // groups))  # no block is without rows


@functools.lru_cache(4096)
def make_plan(problem: Problem, limits: Limits = H100, backward: bool = False) -> Plan:
    """The plan with the smallest predicted time. Every problem of 1 to `longest(limits)` steps has one."""
    past, future = max(problem.taps, 1) - 1, problem.taps_rev
    if backward:  # the gradient is convolved with the taps turned round
        past, future = future, past
    lead = -(-past // PIECE) * PIECE
    found = []
    usual = 1 + backward + (problem.heads > 1)
    engines = [("radix", usual)]
    if problem.element == 2 and limits.tensor_cores and not (backward and problem.heads > 1):
        engines.append(("tensor", usual))
        if backward:
            engines.append(("tensor", 1))  # x's spectrum waits in global memory
    for engine, planes in engines:
        unit = LAST if engine == "radix" else INNER
        all_sizes = [n for n in sizes(_largest(limits, engine, planes)) if n % unit == 0]
        # A plan has one window of the whole row, or windows whose transforms see the taps' reach around them.
        whole = [n for n in all_sizes if n >= problem.length][:3]
        windows = [(n, n, 0) for n in whole]
        for n in all_sizes:
            step = (n - lead - future) // PIECE * PIECE
            if max(2 * (past + future), INNER) <= n < problem.length:
                windows.append((n, step, lead))
        for window in windows:
            for team in _teams(window[0], engine):
                found.append(_one_pass(problem, limits, engine, *window, team, planes, backward))
        if engine == "radix" and (not whole or problem.length >= 4096):
            found += _three_passes(problem, limits, planes, backward)
    return min((p for p in found if p is not None), key=lambda p: p.seconds)


def _one_pass(problem, limits, engine, n, step, lead, row_threads, planes, backward) -> Plan | None:
    windows = -(-problem.length // step)
    rows = (1 if problem.per_sample else problem.batch) * windows
    radices = factor(n)
    row_bytes = planes * (radix_bytes(n) if engine == "radix" else tensor_bytes(n))
    slots = _slots(limits, row_threads, row_bytes, min(rows, MAX_PARTS) if backward else rows)
    groups = _groups(problem, limits, rows, slots, backward)
    # The taps' transforms are float32 with either engine, and are made in pieces where a whole one does not fit.
    outer_radices: tuple[int, ...] = ()
    while radix_bytes(n // math.prod(outer_radices)) > limits.shared:
        outer_radices = radices[: len(outer_radices) + 1]
    outer = math.prod(outer_radices)
    if outer > 1 and n // outer < INNER:
        return None  # spectra are kept in tiles of 256
    columns = _columns(limits, outer, n // outer)
    (taps_threads,) = _teams(n // outer, "radix")
    taps_slots = _slots(limits, taps_threads, radix_bytes(n // outer), problem.taps_rows * outer)

    launches = (3 if backward else 2) + bool(outer_radices) * (3 if backward else 2)
    spectrum = (4 if engine == "tensor" and problem.fast else 8) * n * problem.taps_rows
    moved = signal_bytes(problem, backward) * (n / step if windows > 1 else 1)
    moved += 2 * spectrum + (16 * n * problem.taps_rows * groups * slots if backward else 0)
    if outer_radices:  # the pieces go there and back
        moved += (32 if backward else 16) * n * problem.taps_rows
    if backward and planes == 1:  # these are spectra of x, most of which stay in the cache
        moved += (8 if problem.fast else 16) * n * windows * problem.batch * problem.channels
    transforms = (1 + problem.heads) / 2 + (problem.heads / 2 if backward else 0)
    work = transforms * instructions(problem, engine, n, radices, row_threads)
    work *= problem.batch * problem.channels * windows
    work += problem.taps_rows * instructions(problem, "radix", n, radices) / 2
    blocks = problem.sets * problem.channels * groups
    fit = min(limits.shared_total // (slots * row_bytes), FULL * 32 // (row_threads * slots))
    warps = max(1, min(fit, blocks / limits.processors)) * row_threads * slots / 32
    return Plan(
        engine=engine,
        n=n,
        outer_radices=outer_radices,
        lower_radices=radices[len(outer_radices) :],
        columns=columns,
        windows=windows,
        step=step,
        lead=lead,
        planes=planes,
        row_threads=row_threads,
        slots=slots,
        groups=groups,
        taps_threads=taps_threads,
        taps_slots=taps_slots,
        moved=moved,
        work=work,
        seconds=seconds_of(limits, moved, work, blocks, warps, launches),
    )


def _columns(limits: Limits, outer: int, lower: int) -> int:
    """The neighbours that a block of an outer pass takes, which fill sectors of memory where they fit."""
    columns = 128
    while columns > 16 and radix_bytes(outer * columns) > limits.shared // 4:
        columns //= 2
    while columns > 1 and (radix_bytes(outer * columns) > limits.shared or lower % columns):
        columns //= 2
    return columns


def _three_passes(problem, limits, planes, backward) -> list[Plan]:
    found = []
    rows = 1 if problem.per_sample else problem.batch
    largest = _largest(limits, "radix", planes)
    for lower in (2**i for i in range(8, largest.bit_length())):
        outer = outer_length(-(-problem.length // lower))
        n, outer_radices, radices = outer * lower, split(outer), factor(lower)
        columns = _columns(limits, outer, lower)
        if radix_bytes(outer * columns) > limits.shared:
            continue
        inner = replace(problem, channels=problem.channels * outer)
        (row_threads,) = _teams(lower, "radix")
        slots = _slots(limits, row_threads, planes * radix_bytes(lower), min(rows, MAX_PARTS))
        groups = _groups(inner, limits, rows, slots, backward)
        taps_slots = _slots(limits, row_threads, radix_bytes(lower), inner.taps_rows)
        signals = problem.batch * problem.channels * (1 + problem.heads + backward)
        moved = signal_bytes(problem, backward) + 16 * n * signals + 48 * n * problem.taps_rows
        moved += 16 * n * problem.taps_rows * groups * slots if backward else 0
        work = outer * instructions(problem, "radix", lower, radices)
        work += n * (RADIX_ENDS + RADIX_PASS * (len(outer_radices) - 1)) / 32
        work *= (signals + problem.taps_rows) / 2
        found.append(
            Plan(
                engine="radix",
                n=n,
                outer_radices=outer_radices,
                lower_radices=radices,
                columns=columns,
                windows=1,
                step=n,
                lead=0,
                planes=planes,
                row_threads=row_threads,
                slots=slots,
                groups=groups,
                taps_threads=row_threads,
                taps_slots=taps_slots,
                moved=moved,
                work=work,
                seconds=seconds_of(
                    limits, moved, work, limits.processors, FULL, 8 if backward else 5
                ),
            )
        )
    return found


@functools.lru_cache(64)
def longest(limits: Limits) -> int:
    """The longest row that every kind of call can take. Gradients with several heads need the most memory."""
    power = lambda n: 1 << (n.bit_length() - 1)  # noqa: E731
    outer = power(limits.shared // 9)  # a block takes one column at a time
    return outer * power(_largest(limits, "radix", 3))
