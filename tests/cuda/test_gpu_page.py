"""docs/gpu.md: which rows one launch convolves on which GPUs, and which tiles a block."""

import re
from pathlib import Path

import pytest

from seqconv.backends.cuda import kernels, stream
from seqconv.backends.cuda.lengths import sizes
from seqconv.backends.cuda.plan import _largest
from seqconv.backends.cuda.problem import Limits

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
ROWS = re.findall(r"^\| (\d+) KiB \| ([^|]*) \| (.*) \|$", PAGE.read_text(), re.M)
WHOLE = kernels.PIECES | kernels.WHOLE


def longest_kernel(limits: Limits, backward: bool, flags: int) -> int:
    """The points of the longest kernel of this form that fits."""
    shapes = [
        kernels.half_shape(backward, n, form)
        for n in kernels.HALF_POINTS
        for form, known in kernels.FORMS.items()
        if known == flags
    ]
    return max((s.points for s in shapes if s and s.shared <= limits.shared), default=0)


def longest_float32(limits: Limits, backward: bool) -> int:
    """The points of the longest row of which a block holds one in float32, or two."""
    return sizes(_largest(limits, 1 + backward))[-1]


def test_there_is_a_row_for_every_architecture():
    archs = {arch for _, archs, _ in ROWS for arch in archs.split(", ")}
    assert archs == {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}


@pytest.mark.parametrize("size, archs, cells", ROWS, ids=lambda value: value.split(",")[0])
def test_the_longest_rows_are_those_of_the_plans(size, archs, cells):
    limits = Limits(shared=int(size) * 1024, shared_total=(int(size) + 1) * 1024)
    half = [cells.split(" | ")[i] for i in (0, 1)]
    whole = [int(n.replace(",", "")) for n in cells.split(" | ")[2:]]
    for backward, stated in enumerate(half):
        if archs == "sm_75":
            assert stated == "none"
            continue
        found = [longest_kernel(limits, bool(backward), flags) for flags in (WHOLE, 0)]
        assert stated == f"{found[0]:,} (any: {found[1]:,})"
    for backward, stated in enumerate(whole):
        assert longest_float32(limits, bool(backward)) == stated


def test_the_largest_tiles_of_streams():
    page = " ".join(PAGE.read_text().split())
    stated = re.findall(r"([\d,]+)(?: points)? on ((?:sm_\d+(?:, | and )?)+)", page)
    found = {
        arch: int(n.replace(",", "")) for n, all in stated for arch in re.findall(r"sm_\d+", all)
    }
    wanted = {}
    for size, archs, _ in ROWS:
        limits = Limits(shared=int(size) * 1024, shared_total=(int(size) + 1) * 1024)
        wanted |= dict.fromkeys(archs.split(", "), stream.largest(limits, 1 << 20))
    assert found == wanted
