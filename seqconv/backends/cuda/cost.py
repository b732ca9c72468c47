"""The model of the time that a plan takes, which serves to choose between plans. `explain` shows its times.

Kernels on tensor cores have simulated times. Those that compute in float32 have a lower bound: bytes over bandwidth,
and warp instructions over issue slots, as if every slot were used.
"""

from seqconv.backends.cuda.problem import Limits, Problem
from seqconv.backends.cuda.simulated import ROWS

LAUNCH = 3e-6  # seconds of a launch
# The instructions were counted in sm_90's machine code, on the path of plain rows. In float32 a point takes
# RADIX_ENDS for the first and the last pass, the middle one there and back, reading and writing, and RADIX_PASS for
# every other pass.
RADIX_ENDS, RADIX_PASS = 100, 49
# Kernels that know their length take these shares of them, forward and backward.
KNOWN_SHARE = (0.54, 0.66)
USED = 0.7  # of the issue slots, as simulated kernels do: so much a lower bound counts beside a simulated time
BUSY, FULL = (
    8,
    16,
)  # warps that keep a multiprocessor busy, and warps that its registers suffice for
# Kernels for any rows, and for rows that are not whole, take so many times the cycles of those for whole rows. These
# are ratios of their instructions on contiguous rows.
ANY, RAGGED = 2.2, 1.15


def half_row(name: str) -> tuple[float, float]:
    """Simulated cycles of a multiprocessor, and warp instructions, for a row by half_forward_4096 or a like name."""
    plain = name.replace("_any", "").replace("_ragged", "")
    factor = ANY if "_any" in name else RAGGED if "_ragged" in name else 1
    cycles, instructions = ROWS[plain]
    return factor * cycles, factor * instructions


def instructions(n: int, radices: tuple[int, ...]) -> float:
    """The warp instructions of one float32 transform there and back, by the kernels for any length."""
    return n * (RADIX_ENDS + RADIX_PASS * (len(radices) - 2)) / 32


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
    """The bytes of u and y, or of u, dy and du, and of gates and their gradients where the problem has both."""
    each = 1 + problem.heads + (1 if backward else 0)
    each += {"gated": 3 if backward else 2, "slope": 1}.get(problem.beside, 0)
    return each * problem.element * problem.length * problem.batch * problem.channels
