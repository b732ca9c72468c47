"""The rows of a pack in groups, of which each has one plan.

The plan of a row depends on its own length, on the kernel and on the channels, and on no other row. So the bits of its
result do not depend on its company.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from seqconv.backends.cuda.kernels import KNOWN
from seqconv.backends.cuda.lengths import LAST
from seqconv.backends.cuda.plan import Plan, make_plan, one_pass, three_passes
from seqconv.backends.cuda.problem import Limits, Problem

USUAL = 16  # rows for which the way to transform them is chosen, however many there are


class Group(NamedTuple):
    count: int  # rows
    size: int  # the most steps that a row of this group may have in any pack
    longest: int  # steps of the longest row


@functools.lru_cache(64)
def sizes(longest: int) -> Tensor:
    """The sizes of groups, in ascending order, the last of them from `longest` on.

    Kernels that know their length have powers of two. Longer rows also have sizes between them, since a transform of
    twice the points is no cheaper for them.
    """
    found, power = [2 * LAST], 2 * LAST
    while found[-1] < longest:
        power *= 2
        if power > max(KNOWN):
            found.append(power // 4 * 3)
        found.append(power)
    return torch.tensor(found, device="cpu")


def size_of(longest: int) -> int:
    """The size of the group of a row of so many steps."""
    return int(next(size for size in sizes(longest).tolist() if size >= longest))


def grouped(offsets: Tensor) -> tuple[list[Group], Tensor]:
    """The groups of rows with steps, and the rows' numbers, group by group, behind those of empty rows.

    The offsets are on the host in int64.
    """
    steps = offsets.diff()
    known = sizes(int(steps.max()) if len(steps) else 0)
    which = torch.where(steps > 0, torch.bucketize(steps, known) + 1, 0)
    order = which.argsort(stable=True)
    counts = which.bincount(minlength=1).tolist()
    groups, begin = [], counts[0]
    for size, count in zip(known.tolist(), counts[1:], strict=False):
        if count:
            groups.append(Group(count, size, int(steps[order[begin : begin + count]].max())))
            begin += count
    return groups, order


@functools.lru_cache(4096)
def plan_of(problem: Problem, group: Group, limits: Limits, backward: bool = False) -> Plan:
    """The plan of a group, in float32. The batch and the length of the problem do not matter."""
    rows = replace(problem, batch=USUAL, length=group.size, fast=False)
    usual = make_plan(rows, limits, backward)
    rows = replace(rows, batch=group.count)
    if usual.long:
        plans = three_passes(rows, limits, usual.planes, backward)
        return next(plan for plan in plans if plan.lower == usual.lower)
    rows = replace(rows, length=group.longest)
    return one_pass(rows, limits, usual.n, usual.step, usual.lead, usual.planes, backward)
