"""Runs a problem with a mistake in the kernels, and says what comes of it."""

from dataclasses import dataclass, replace
from functools import cache

import ptx_device
import torch
from accuracy import rel_l2
from cases import Case, double, oracle
from device_cases import FEW
from emulated import OnDevice
from judge import ROUNDING, STATED

from seqconv import fftconv, use_backend


@dataclass(frozen=True)
class Problem:
    """case: whose rows differ in size by powers of four, so that kernels have to bring them to one scale."""

    case: Case
    backward: bool = True

    def but(self, **changes) -> "Problem":
        return replace(self, case=replace(self.case, **changes))


@cache
def solved(case: Case):
    torch.manual_seed(3)
    tensors, (exact, definition) = case.tensors(), oracle(case)
    size = 4.0 ** (torch.arange(case.batch) // 6 % 3 - 1)
    tensors["u"] *= size.view(-1, 1, 1)
    shape = (case.batch, *[case.heads] * (case.heads is not None), case.channels, case.length)
    dy = torch.randn(shape).to(case.dtype)
    y64, grads64, _ = exact.with_gradients(definition, double(tensors), dy.double())
    return tensors, dy, [y64, *grads64.values()]


def outcome(problem: Problem, **device) -> str:
    """ "right", "wrong", or what the machine reports. Every row of y and du is judged alone."""
    case = problem.case
    tensors, dy, exact = solved(case)
    try:
        with use_backend(OnDevice(ptx_device.PtxDevice(FEW, **device))):
            if problem.backward:
                y, grads, _ = case.with_gradients(fftconv, tensors, dy)
                found = [y, *grads.values()]
            else:
                found = [case.run(fftconv, tensors)]
    except RuntimeError as error:
        assert ", block " in str(error), error
        return str(error)
    for value, expected in zip(found, exact[: len(found)], strict=True):
        allowed = 2 * STATED["fast"] + ROUNDING.get(value.dtype, 0)
        rows = zip(value, expected, strict=True) if value.dim() > 2 else [(value, expected)]
        if not all(rel_l2(one, wanted) <= allowed for one, wanted in rows):
            return "wrong"
    return "right"


def changed(before: str, after: str, several: bool = False):
    """A change of the source of kernels on tensor cores, and of no other kernel's, in one place or in several."""

    def change(kernel: str, source: str) -> str:
        if not kernel.startswith("half"):
            return source
        assert source.count(before) == 1 or (several and before in source), source.count(before)
        return source.replace(before, after)

    return change
