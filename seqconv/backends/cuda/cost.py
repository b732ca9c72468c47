"""The model of the time that a plan takes: bytes over bandwidth, and warp instructions over issue slots.

It serves to choose between plans, and `explain` shows its times. They are lower bounds and no measurements: the model
takes every issue slot as used, and leaves out what gates read and do, the skip's sum, and the cache's traffic with the
gradient of the taps.
"""

from seqconv.backends.cuda.kernels import FIXED
from seqconv.backends.cuda.lengths import INNER
from seqconv.backends.cuda.problem import Limits, Problem

LAUNCH = 3e-6  # seconds of a launch
# The instructions were counted in sm_90's machine code, on the path of plain rows. In float32 a point takes
# RADIX_ENDS for the first and the last pass, the middle one there and back, reading and writing, and RADIX_PASS for
# every other pass.
RADIX_ENDS, RADIX_PASS = 100, 49
# On tensor cores, four numbers count: for a tile of 256 points, reading and the inner 256 points, the first outer pass
# with writing, and every other outer pass; for a warp of a row, the addresses, matrices and twiddles of each outer
# pass. Kernels for any length take TENSOR_ANY, and those that know theirs TENSOR_KNOWN. Sums in float32 cost more.
TENSOR_ANY, TENSOR_KNOWN, TENSOR_ACCURATE = (243, 266, 312, 500), (228, 205, 203, 260), 1.35
# A tile is written for TENSOR_WRITE where there is no outer pass. Every warp of a row takes TENSOR_ROW besides.
TENSOR_WRITE, TENSOR_ROW = 150, 150
BUSY, FULL = (
    8,
    16,
)  # warps that keep a multiprocessor busy, and warps that its registers suffice for


def instructions(problem, engine: str, n: int, radices: tuple[int, ...], threads: int = 0) -> float:
    """The warp instructions of one transform there and back."""
    if engine == "radix":
        return n * (RADIX_ENDS + RADIX_PASS * (len(radices) - 2)) / 32
    outer = len(radices) - 2
    known = problem.fast and n in FIXED
    inner, first, other, setup = TENSOR_KNOWN if known else TENSOR_ANY
    tile = inner + (first + other * (outer - 1) if outer else TENSOR_WRITE)
    tiles = n / INNER * tile * (1 if problem.fast else TENSOR_ACCURATE)
    return tiles + threads / 32 * (TENSOR_ROW + setup * outer)


def seconds_of(
    limits: Limits, moved: float, work: float, blocks: int, warps: float, launches: int
) -> float:
    """The time of the slower of memory and instructions, plus a little of the other, since they overlap in part only.

    blocks counts all of them, and warps those that a busy multiprocessor has at a time.
    """
    busy = min(1.0, blocks / limits.processors)
    io, issue = moved / limits.bandwidth / busy, work / limits.issue / busy / min(1.0, warps / BUSY)
    return max(io, issue) + 0.1 * min(io, issue) + launches * LAUNCH


def signal_bytes(problem: Problem, backward: bool) -> float:
    """The bytes of u and y, or of u, dy and du."""
    each = 1 + problem.heads + (1 if backward else 0)
    return each * problem.element * problem.length * problem.batch * problem.channels
