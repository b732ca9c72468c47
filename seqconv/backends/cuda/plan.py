"""How a convolution is laid out on a device: a pure function of the problem and the device's limits.

Sizes and threads follow csrc/device. The times are a model (bytes over bandwidth, warp instructions over issue slots),
for choosing between plans and for `explain`; they are not measurements but lower bounds: the model takes every issue
slot as used, and leaves out what gates read and do, the skip's sum and the cache's traffic with the taps' gradient.
"""

import functools
import math
from dataclasses import dataclass, replace

from seqconv.backends.cuda.kernels import FIXED

RADICES = (2, 3, 4, 5, 8, 16)  # butterflies that exist
LAST = 16  # the last radix of every transform
INNER = 256  # points that the tensor cores keep in registers
MAX_THREADS = 512  # of a block: more would leave too few registers for 16 complex points
MAX_PASSES = 8  # the kernels take the radices as the bytes of one number
WIDE = 8  # numbers that the kernels read and write at once where a window's ends allow it
MAX_PARTS = 8  # partial sums of a kernel's gradient; more only where channels are too few to fill the device
# Relative L2 error of the tensor cores' fp16 operands, sums in fp16 (True, fast) or in float32, beside
# the rounding of the result itself; the tests hold it.
OPERAND_ERROR = {True: 1.5e-3, False: 8e-4}
LAUNCH = 3e-6  # seconds
# Instructions counted in sm_90's machine code, on the path of plain rows. Float32, for a point: the first
# and the last pass, the middle one there and back, reading and writing; then every other pass.
RADIX_ENDS, RADIX_PASS = 100, 49
# Tensor cores, for a tile of 256 points: reading and the inner 256 points, the first outer pass with
# writing, every other outer pass; and for every warp of a row, for each outer pass: addresses, matrices and
# twiddles. In kernels for any length and in those that know theirs. Sums in float32 cost more.
TENSOR_ANY, TENSOR_KNOWN, TENSOR_ACCURATE = (243, 266, 312, 500), (228, 205, 203, 260), 1.35
# Writing a tile where there is no outer pass; and what every warp of a row does besides.
TENSOR_WRITE, TENSOR_ROW = 150, 150
BUSY, FULL = 8, 16  # warps that keep a multiprocessor busy; as many as there are registers for


@dataclass(frozen=True)
class Limits:
    """What a plan has to know of a device."""

    shared: int = 232448  # bytes that one block may ask for
    shared_total: int = 233472  # bytes of one multiprocessor
    processors: int = 132
    clock: float = 1.755e9  # Hz
    bandwidth: float = 3.35e12  # bytes per second
    tensor_cores: bool = True  # for fp16 with m16n8k16: compute capability 8.0 and later

    @property
    def issue(self) -> float:
        """Warp instructions per second, of all multiprocessors."""
        return self.processors * 4 * self.clock


H100 = Limits()


@dataclass(frozen=True)
class Problem:
    """One call: rows are (batch, channels); element is u's size in bytes."""

    batch: int
    heads: int
    channels: int
    length: int
    taps: int
    taps_rev: int
    per_sample: bool
    element: int
    fast: bool = True  # 16-bit tensors: products may be summed in fp16

    @property
    def sets(self) -> int:
        return self.batch if self.per_sample else 1

    @property
    def taps_rows(self) -> int:
        return self.sets * self.heads * self.channels


@dataclass(frozen=True)
class Plan:
    """A transform of n points for every window of a row, and its place on the device.

    engine "radix" computes in float32, "tensor" on tensor cores with fp16 operands. n = outer *
    lower: with outer > 1 the radix engine takes three passes over global memory, and the tensor
    engine computes its kernels' spectra and their gradients so. A row is cut into `windows` of `step`
    outputs each.
    """

    engine: str
    n: int
    outer_radices: tuple[int, ...]
    lower_radices: tuple[int, ...]
    columns: int  # of one block of the passes over `outer` points
    windows: int
    step: int
    lead: int  # of a window's points that lie before its first output
    planes: int  # rows of n points in shared memory for each slot
    row_threads: int
    slots: int
    groups: int  # blocks that share a channel
    taps_threads: int  # the same for the kernels that transform taps
    taps_slots: int
    moved: float  # bytes that the model counts, through the device's memory
    work: float  # and warp instructions
    seconds: float  # a lower bound, predicted from both

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
        """Whether, in backward, x's spectrum waits in global memory while dv has the only plane."""
        return self.engine == "tensor" and self.planes == 1

    @property
    def parts(self) -> int:
        return self.groups * self.slots

    @property
    def threads(self) -> int:
        return self.row_threads * self.slots

    @property
    def shared(self) -> int:
        """Bytes of shared memory of the kernels that convolve."""
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


def radix_bytes(n: int) -> int:
    """A row of complex float32 in shared memory, one element wider every 16."""
    return 8 * (n + n // 16 + 1)


def tensor_bytes(n: int) -> int:
    """A row of complex fp16 in shared memory, 16 bytes wider every 256 and every 4096."""
    return 4 * n + 16 * (n // 256 + n // 4096)


def _split(m: int) -> tuple[int, ...] | None:
    """m as a product of radices, few and ascending but for the 16s at the end; None if there is none."""
    odd = []
    for radix in (5, 3):
        while m % radix == 0:
            m, odd = m // radix, [radix, *odd]
    if m < 1 or m & (m - 1):
        return None
    twos = m.bit_length() - 1
    small = [2 ** (twos % 4)] if twos % 4 else []
    return (*sorted(small + odd), *[16] * (twos // 4))


@functools.lru_cache(4096)
def factor(n: int) -> tuple[int, ...] | None:
    """The passes of a transform of n points, 16 last; None if there are none. At least two passes."""
    found = _split(n // LAST) if n % LAST == 0 and n >= 2 * LAST else None
    return None if found is None else (*found, LAST)


@functools.lru_cache(64)
def sizes(limit: int) -> tuple[int, ...]:
    """Every transform length up to limit, ascending."""
    powers = lambda base: [base**i for i in range(limit.bit_length()) if base**i <= limit]  # noqa: E731
    found = {LAST * a * b * c for a in powers(2) for b in powers(3) for c in powers(5)}
    return tuple(sorted(n for n in found if 2 * LAST <= n <= limit))


@functools.lru_cache(64)
def _largest(limits: Limits, engine: str, planes: int) -> int:
    """Points of the longest row that a block holds `planes` times."""
    room = radix_bytes if engine == "radix" else tensor_bytes
    unit = LAST if engine == "radix" else INNER
    spare = 0 if engine == "radix" else 64  # for the largest elements, one number a warp
    n = limits.shared // planes // 4 // unit * unit
    while n and room(n) * planes + spare > limits.shared:
        n -= unit
    return n


def _teams(n: int, engine: str) -> tuple[int, ...]:
    """Threads that may share a row of n points. Few warps with many tiles each have less to set up."""
    if engine == "radix":
        return (min(MAX_THREADS, n // LAST),)
    tiles, most = n // INNER, MAX_THREADS // 32
    warps = {-(-tiles // rounds) for rounds in (1, 2, 4) if tiles <= rounds * most}
    return tuple(32 * w for w in sorted(warps or {-(-tiles // -(-tiles // most))}))


def _slots(limits: Limits, row_threads: int, row_bytes: int, rows: int) -> int:
    """Rows that a block takes at a time: 256 threads, a quarter of a multiprocessor's memory."""
    room = min(limits.shared_total // 4, limits.shared) // row_bytes
    return max(1, min(rows, 256 // row_threads, room))


def _groups(problem: Problem, limits: Limits, rows: int, slots: int, backward: bool) -> int:
    """Blocks for each channel: enough to fill the device, few where each has sums of its own to write."""
    steps = -(-rows // slots)
    across = max(1, problem.sets * problem.channels)
    groups = min(steps, -(-4 * limits.processors // across))
    if backward:
        most = MAX_PARTS if across * MAX_PARTS >= limits.processors else max(MAX_PARTS, rows // 2)
        groups = min(groups, max(1, most // slots))
    else:
        groups = max(groups, -(-steps // 8))
    return -(-rows // -(-rows // groups))  # none without rows


def _instructions(
    problem, engine: str, n: int, radices: tuple[int, ...], threads: int = 0
) -> float:
    """Warp instructions of one transform there and back."""
    if engine == "radix":
        return n * (RADIX_ENDS + RADIX_PASS * (len(radices) - 2)) / 32
    outer = len(radices) - 2
    known = problem.fast and n in FIXED
    inner, first, other, setup = TENSOR_KNOWN if known else TENSOR_ANY
    tile = inner + (first + other * (outer - 1) if outer else TENSOR_WRITE)
    tiles = n / INNER * tile * (1 if problem.fast else TENSOR_ACCURATE)
    return tiles + threads / 32 * (TENSOR_ROW + setup * outer)


def _seconds(
    limits: Limits, moved: float, work: float, blocks: int, warps: float, launches: int
) -> float:
    """The slower of memory and instructions, plus a little of the other, since they overlap in part only.

    `blocks` of them, and `warps` that a multiprocessor at work has at a time.
    """
    busy = min(1.0, blocks / limits.processors)
    io, issue = moved / limits.bandwidth / busy, work / limits.issue / busy / min(1.0, warps / BUSY)
    return max(io, issue) + 0.1 * min(io, issue) + launches * LAUNCH


@functools.lru_cache(4096)
def make_plan(problem: Problem, limits: Limits = H100, backward: bool = False) -> Plan:
    """The plan of the smallest predicted time. Every problem of 1 to `longest(limits)` steps has one."""
    past, future = max(problem.taps, 1) - 1, problem.taps_rev
    if backward:  # of the gradient, which is convolved with the kernel turned round
        past, future = future, past
    lead = -(-past // WIDE) * WIDE
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
        # One window of the whole row, or windows whose transforms see the taps' reach around them.
        whole = [n for n in all_sizes if n >= problem.length][:3]
        windows = [(n, n, 0) for n in whole]
        for n in all_sizes:
            step = (n - lead - future) // WIDE * WIDE
            if max(2 * (past + future), INNER) <= n < problem.length:
                windows.append((n, step, lead))
        for window in windows:
            for team in _teams(window[0], engine):
                found.append(_one_pass(problem, limits, engine, *window, team, planes, backward))
        if engine == "radix" and (not whole or problem.length >= 4096):
            found += _three_passes(problem, limits, planes, backward)
    return min((p for p in found if p is not None), key=lambda p: p.seconds)


def _signal_bytes(problem: Problem, backward: bool) -> float:
    """u and y, or u, dy and du."""
    each = 1 + problem.heads + (1 if backward else 0)
    return each * problem.element * problem.length * problem.batch * problem.channels


def _one_pass(problem, limits, engine, n, step, lead, row_threads, planes, backward) -> Plan | None:
    windows = -(-problem.length // step)
    rows = (1 if problem.per_sample else problem.batch) * windows
    radices = factor(n)
    row_bytes = planes * (radix_bytes(n) if engine == "radix" else tensor_bytes(n))
    slots = _slots(limits, row_threads, row_bytes, min(rows, MAX_PARTS) if backward else rows)
    groups = _groups(problem, limits, rows, slots, backward)
    # The taps' transforms are float32 in either case, and in pieces where that does not fit.
    outer_radices: tuple[int, ...] = ()
    while radix_bytes(n // math.prod(outer_radices)) > limits.shared:
        outer_radices = radices[: len(outer_radices) + 1]
    outer = math.prod(outer_radices)
    if outer > 1 and n // outer < INNER:
        return None  # the spectra's order has tiles of 256
    columns = _columns(limits, outer, n // outer)
    (taps_threads,) = _teams(n // outer, "radix")
    taps_slots = _slots(limits, taps_threads, radix_bytes(n // outer), problem.taps_rows * outer)

    launches = (3 if backward else 2) + bool(outer_radices) * (3 if backward else 2)
    spectrum = (4 if engine == "tensor" and problem.fast else 8) * n * problem.taps_rows
    moved = _signal_bytes(problem, backward) * (n / step if windows > 1 else 1)
    moved += 2 * spectrum + (16 * n * problem.taps_rows * groups * slots if backward else 0)
    if outer_radices:  # the pieces, there and back
        moved += (32 if backward else 16) * n * problem.taps_rows
    if backward and planes == 1:  # spectra of x; most of them stay in the cache
        moved += (8 if problem.fast else 16) * n * windows * problem.batch * problem.channels
    transforms = (1 + problem.heads) / 2 + (problem.heads / 2 if backward else 0)
    work = transforms * _instructions(problem, engine, n, radices, row_threads)
    work *= problem.batch * problem.channels * windows
    work += problem.taps_rows * _instructions(problem, "radix", n, radices) / 2
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
        seconds=_seconds(limits, moved, work, blocks, warps, launches),
    )


def _columns(limits: Limits, outer: int, lower: int) -> int:
    """Neighbours that a block of an outer pass takes: full sectors of memory where they fit."""
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
        outer = _outer(-(-problem.length // lower))
        n, outer_radices, radices = outer * lower, _split(outer), factor(lower)
        columns = _columns(limits, outer, lower)
        if radix_bytes(outer * columns) > limits.shared:
            continue
        inner = replace(problem, channels=problem.channels * outer)
        (row_threads,) = _teams(lower, "radix")
        slots = _slots(limits, row_threads, planes * radix_bytes(lower), min(rows, MAX_PARTS))
        groups = _groups(inner, limits, rows, slots, backward)
        taps_slots = _slots(limits, row_threads, radix_bytes(lower), inner.taps_rows)
        signals = problem.batch * problem.channels * (1 + problem.heads + backward)
        moved = _signal_bytes(problem, backward) + 16 * n * signals + 48 * n * problem.taps_rows
        moved += 16 * n * problem.taps_rows * groups * slots if backward else 0
        work = outer * _instructions(problem, "radix", lower, radices)
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
                seconds=_seconds(
                    limits, moved, work, limits.processors, FULL, 8 if backward else 5
                ),
            )
        )
    return found


@functools.lru_cache(1024)
def _outer(least: int) -> int:
    """The smallest outer length from `least` on that the radices give."""
    fits = lambda m: len(_split(m) or range(99)) <= MAX_PASSES  # noqa: E731
    return next(m for m in range(max(least, 2), 2 * least + 3) if fits(m))


@functools.lru_cache(64)
def longest(limits: Limits) -> int:
    """Steps of a row that every kind of call can take: gradients with several heads need most memory."""
    power = lambda n: 1 << (n.bit_length() - 1)  # noqa: E731
    outer = power(limits.shared // 9)  # one column at a time
    return outer * power(_largest(limits, "radix", 3))


def torch_fft_seconds(problem: Problem, limits: Limits = H100, backward: bool = False) -> float:
    """The torch.fft formulation by the same model: float32, about 84 bytes of traffic for every input
    sample (padding, rfft, product, irfft, crop), three times that in backward, and ten launches,
    three more to put the taps of the future in place.
    """
    samples = problem.batch * problem.channels * problem.length
    launches = 13 if problem.taps_rev else 10
    traffic = 84 * samples * (1 + problem.heads) / 2 + 48 * problem.taps_rows * problem.length
    return (3 if backward else 1) * (traffic / limits.bandwidth + launches * LAUNCH)
