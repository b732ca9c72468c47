"""How a convolution is laid out on a device: a pure function of the problem and the device's limits.

Sizes and threads follow csrc/device. Of the plans that fit, the one with the smallest time by cost.py is taken.
"""

import functools
import math
from dataclasses import dataclass, replace

from seqconv.backends.cuda.cost import (
    FULL,
    KNOWN_SHARE,
    LAUNCH,
    RADIX_ENDS,
    RADIX_PASS,
    USED,
    half_row,
    instructions,
    seconds_of,
    signal_bytes,
)
from seqconv.backends.cuda.kernels import HALF_POINTS, KERNELS, HalfShape, half_shape
from seqconv.backends.cuda.lengths import (
    INNER,
    LAST,
    factor,
    outer_length,
    radix_bytes,
    sizes,
    split,
)
from seqconv.backends.cuda.problem import H100, Limits, Problem

MAX_THREADS = 512  # of a block; more would leave too few registers for 16 complex points
PIECE = 8  # the kernels read and write so many numbers at once where a window's ends allow it
MAX_PARTS = 8  # partial sums of the taps' gradient; there are more only where channels are too few to fill the device
# The relative L2 error of the tensor cores' fp16 operands and sums. The rounding of the result itself comes on top. The
# tests hold the kernels to it.
OPERAND_ERROR = 1.5e-3


@dataclass(frozen=True)
class Plan:
    """A transform of n points for every window of a row, and its place on the device.

    The engine "radix" computes in float32, and "half" on tensor cores with fp16 operands. n is outer * lower. Where
    outer > 1, the radix engine takes three passes over global memory, and the half engine takes them for the
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
    planes: int  # radix: rows of n points in shared memory for each slot
    row_threads: int
    slots: int
    groups: int  # blocks that share a channel; half: units of its rows
    taps_threads: int  # row_threads of the kernels that transform taps
    taps_slots: int  # and their slots
    moved: float  # bytes through the device's memory, as the model counts them
    work: float  # warp instructions, as the model counts them
    seconds: float  # by the model of cost.py
    form: str = ""  # half: of the kernels, a key of kernels.FORMS
    shape: HalfShape | None = None  # half: of the kernels
    blocks: int = 0  # half: of a launch at most

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
        """Whether x's spectra wait in global memory in backward, and dk's sums are there."""
        return self.shape is not None and self.shape.pair == 1

    @property
    def parts(self) -> int:
        return self.groups * self.slots

    @property
    def threads(self) -> int:
        return self.row_threads * self.slots

    @property
    def shared(self) -> int:
        """The bytes of shared memory that the kernels take which convolve."""
        if self.shape is not None:
            return self.shape.shared
        return self.slots * self.planes * radix_bytes(self.lower)

    @property
    def taps_shared(self) -> int:
        return self.taps_slots * max(radix_bytes(self.lower), 4 * self.taps_threads)

    @property
    def columns_shared(self) -> int:
        return radix_bytes(self.outer * self.columns)

    def __str__(self) -> str:
        where = "tensor cores" if self.engine == "half" else "float32"
        text = f"{where}, {self.n} points = {' x '.join(map(str, self.radices))}"
        if self.long:
            text += f" in three passes over global memory ({self.outer} x {self.lower})"
        if self.windows > 1:
            text += f", {self.windows} windows of {self.step}"
        text += f"; {self.slots} x {self.row_threads} threads and {self.shared} bytes a block"
        time = "simulated:" if self.engine == "half" else "lower bound:"
        return f"{text}; {time} {self.seconds * 1e6:.0f} us"


@functools.lru_cache(64)
def _largest(limits: Limits, planes: int) -> int:
    """The points of the longest float32 row that a block holds `planes` times."""
    n = limits.shared // planes // 8 // LAST * LAST
    while n and radix_bytes(n) * planes > limits.shared:
        n -= LAST
    return n


def _team(n: int) -> int:
    """The threads that share a float32 row of n points."""
    return min(MAX_THREADS, n // LAST)


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

    def cut(lengths, whole: int):
        """(n, step, lead) of one window for the whole row, or of windows whose transforms see the taps' reach."""
        yield from [(n, n, 0) for n in lengths if n >= problem.length][:whole]
        for n in lengths:
            if max(2 * (past + future), INNER) <= n < problem.length:
                yield n, (n - lead - future) // PIECE * PIECE, lead

    planes = 1 + backward + (problem.heads > 1)
    lengths = sizes(_largest(limits, planes))
    found = [one_pass(problem, limits, *window, planes, backward) for window in cut(lengths, 3)]
    if problem.length > (lengths[-1] if lengths else 0) or problem.length >= 4096:
        found += three_passes(problem, limits, planes, backward)
    if problem.element == 2 and problem.fast and limits.tensor_cores:
        for n, *window in cut(HALF_POINTS, 1):
            for form in _forms(problem, n, backward):
                shape = half_shape(backward, n, form)
                if shape and shape.shared <= limits.shared:
                    found.append(_half(problem, limits, form, shape, *window, backward))
                    break
    plans = [plan for plan in found if plan is not None]
    return min(plans, key=lambda p: p.seconds / (1 if p.engine == "half" else USED))


def _forms(problem: Problem, n: int, backward: bool):
    """The forms of kernels that serve a problem, the best first."""
    several = backward and problem.heads > 1  # dx is summed over heads
    if problem.pieces and problem.beside is not None and not several:
        beside = f"_{problem.beside}" * bool(problem.beside)
        if problem.length == n:
            yield beside
        yield f"_ragged{beside}"
    yield "_any"


def _balanced(units: int, rows: int, at_once: int, blocks: int, spent: float, most: int) -> int:
    """The groups into which the rows of each set of taps are cut so that the busiest block is done first.

    Blocks take whole units. Each costs what `spent` steps of rows cost on top of its rows.
    """

    def steps(groups: int) -> float:
        share = -(-rows // groups)
        return -(-units * groups // min(blocks, units * groups)) * (-(-share // at_once) + spent)

    tried = range(1, max(1, min(most, -(-rows // at_once), 2 * -(-blocks // units) + 8)) + 1)
    groups = min(tried, key=steps)
    return -(-rows // -(-rows // groups))  # no unit is without rows


def _half(problem, limits, form, shape: HalfShape, step, lead, backward) -> Plan | None:
    n, windows = shape.points, -(-problem.length // step)
    taps = _taps_of(problem, limits, n)
    if taps is None:
        return None
    rows = (1 if problem.per_sample else problem.batch) * windows
    resident = max(1, min(shape.blocks, limits.shared_total // (shape.shared + 1024)))
    blocks = limits.processors * resident
    units = max(1, problem.sets * problem.channels * (1 if backward else problem.heads))
    most = rows
    if backward:  # each group has sums of its own to write
        most = max(1, (MAX_PARTS if units >= blocks else rows // 2) // shape.slots)
    groups = _balanced(units, rows, shape.slots * shape.pair, blocks, 2 if backward else 0.5, most)
    launches = (3 if backward else 2) + bool(taps["outer_radices"]) * (3 if backward else 2)
    moved = signal_bytes(problem, backward) * (n / step if windows > 1 else 1)
    moved += 8 * n * problem.taps_rows
    moved += 16 * n * problem.taps_rows * groups * shape.slots if backward else 0
    if taps["outer_radices"]:  # the pieces go there and back
        moved += (32 if backward else 16) * n * problem.taps_rows
    turns = -(-units * groups // min(blocks, units * groups)) * -(-rows // groups)
    turns *= problem.heads if backward else 1
    cycles, of_row = half_row(f"half_{'backward' if backward else 'forward'}_{n}{form}")
    of_taps = problem.taps_rows * instructions(n, factor(n)) / 2
    beside = min(resident, -(-units * groups // limits.processors))  # blocks of a multiprocessor
    busy = turns * beside * cycles / limits.clock + of_taps / limits.issue
    return Plan(
        engine="half",
        n=n,
        **taps,
        windows=windows,
        step=step,
        lead=lead,
        planes=1,
        row_threads=32 * shape.warps,
        slots=shape.slots,
        groups=groups,
        moved=moved,
        work=of_taps + of_row * units * rows * (problem.heads if backward else 1),
        seconds=max(busy, moved / limits.bandwidth) + launches * LAUNCH,
        form=form,
        shape=shape,
        blocks=blocks,
    )


def _taps_of(problem: Problem, limits: Limits, n: int) -> dict | None:
    """How the taps are transformed, in float32 with either engine: in pieces where a whole row does not fit."""
    radices, outer_radices = factor(n), ()
    while radix_bytes(n // math.prod(outer_radices)) > limits.shared:
        outer_radices = radices[: len(outer_radices) + 1]
    outer = math.prod(outer_radices)
    if outer > 1 and n // outer < INNER:
        return None  # spectra are kept in tiles of 256
    taps_threads = _team(n // outer)
    return {
        "outer_radices": outer_radices,
        "lower_radices": radices[len(outer_radices) :],
        "columns": _columns(limits, outer, n // outer),
        "taps_threads": taps_threads,
        "taps_slots": _slots(
            limits, taps_threads, radix_bytes(n // outer), problem.taps_rows * outer
        ),
    }


def one_pass(problem, limits, n, step, lead, planes, backward) -> Plan:
    windows = -(-problem.length // step)
    rows = (1 if problem.per_sample else problem.batch) * windows
    row_threads, row_bytes = _team(n), planes * radix_bytes(n)
    slots = _slots(limits, row_threads, row_bytes, min(rows, MAX_PARTS) if backward else rows)
    groups = _groups(problem, limits, rows, slots, backward)
    taps = _taps_of(problem, limits, n)
    spectrum = 8 * n * problem.taps_rows
    moved = signal_bytes(problem, backward) * (n / step if windows > 1 else 1)
    moved += 2 * spectrum + (16 * n * problem.taps_rows * groups * slots if backward else 0)
    transforms = (1 + problem.heads) / 2 + (problem.heads / 2 if backward else 0)
    if known_kernel(problem, n, backward):
        transforms *= KNOWN_SHARE[backward]
    work = transforms * problem.batch * problem.channels * windows + problem.taps_rows / 2
    work *= instructions(n, factor(n))
    blocks = problem.sets * problem.channels * groups
    fit = min(limits.shared_total // (slots * row_bytes), FULL * 32 // (row_threads * slots))
    warps = max(1, min(fit, blocks / limits.processors)) * row_threads * slots / 32
    return Plan(
        engine="radix",
        n=n,
        **taps,
        windows=windows,
        step=step,
        lead=lead,
        planes=planes,
        row_threads=row_threads,
        slots=slots,
        groups=groups,
        moved=moved,
        work=work,
        seconds=seconds_of(limits, moved, work, blocks, warps, 3 if backward else 2),
    )


def known_kernel(problem: Problem, n: int, backward: bool) -> bool:
    """Whether a float32 kernel knows this length. Such kernels have one head."""
    return problem.heads == 1 and f"{'backward' if backward else 'forward'}_f32_{n}" in KERNELS


def _columns(limits: Limits, outer: int, lower: int) -> int:
    """The neighbours that a block of an outer pass takes, which fill sectors of memory where they fit."""
    columns = 128
    while columns > 16 and radix_bytes(outer * columns) > limits.shared // 4:
        columns //= 2
    while columns > 1 and (radix_bytes(outer * columns) > limits.shared or lower % columns):
        columns //= 2
    return columns


def three_passes(problem, limits, planes, backward) -> list[Plan]:
    found = []
    rows = 1 if problem.per_sample else problem.batch
    largest = _largest(limits, planes)
    for lower in (2**i for i in range(8, largest.bit_length())):
        outer = outer_length(-(-problem.length // lower))
        n, outer_radices, radices = outer * lower, split(outer), factor(lower)
        columns = _columns(limits, outer, lower)
        if radix_bytes(outer * columns) > limits.shared:
            continue
        inner = replace(problem, channels=problem.channels * outer)
        row_threads = _team(lower)
        slots = _slots(limits, row_threads, planes * radix_bytes(lower), min(rows, MAX_PARTS))
        groups = _groups(inner, limits, rows, slots, backward)
        taps_slots = _slots(limits, row_threads, radix_bytes(lower), inner.taps_rows)
        signals = problem.batch * problem.channels * (1 + problem.heads + backward)
        moved = signal_bytes(problem, backward) + 16 * n * signals + 48 * n * problem.taps_rows
        moved += 16 * n * problem.taps_rows * groups * slots if backward else 0
        work = outer * instructions(lower, radices)
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
    return outer * power(_largest(limits, 3))
