"""What all launches of one plan are told apart from tensors: arguments, threads and tables for each kind of kernel."""

from typing import NamedTuple

from seqconv.backends.cuda.half_tables import build as build_half
from seqconv.backends.cuda.half_tables import scales
from seqconv.backends.cuda.lengths import MAX_PASSES
from seqconv.backends.cuda.plan import Plan
from seqconv.backends.cuda.problem import Problem
from seqconv.backends.cuda.tables import build
from seqconv.backends.pack import ACTIVATIONS

ORDERS = {"radix": 0, "half": 1}  # how spectra are kept: enum Order of csrc/device/fftconv.cuh


class Base(NamedTuple):
    """What all launches of one kind have in common."""

    fields: dict  # of ConvolutionArgs
    n: int  # points of the transform
    radices: tuple[int, ...]
    table: tuple  # what makes the transform's constants: a function of tables.py and its arguments


class Layout:
    """What all calls of one plan share. For each kind of kernel these are its arguments apart from tensors, the
    constants that it needs, and its threads."""

    def __init__(self, problem: Problem, plan: Plan, activation: str, backward: bool):
        self.n, self.outer, self.lower, self.long = plan.n, plan.outer, plan.lower, plan.long
        self.parts, self.row_threads, self.aside = plan.parts, plan.row_threads, plan.aside
        self.half, self.form = plan.engine == "half", plan.form
        self.words = (1 if self.half else 2) * plan.n  # of a spectrum
        spectrum_scale, gradient_scale = self._scales(plan)
        fields = {
            "batch": problem.batch,
            "heads": problem.heads,
            "channels": problem.channels,
            "length": problem.length,
            "taps": problem.taps,
            "taps_rev": problem.taps_rev,
            "per_sample": problem.per_sample,
            "activation": ACTIVATIONS[activation],
            "windows": plan.windows,
            "step": plan.step,
            "lead": plan.lead,  # it reaches into the past of x in forward, and of dv in backward
            "row_threads": plan.row_threads,
            "slots": plan.slots,
            "groups": plan.groups,
            "parts": plan.parts,
            "outer": plan.outer,
            "lower": plan.lower,
            "columns": plan.columns,
            "order": ORDERS[plan.engine],
            "head": 0,
            "spectrum_scale": spectrum_scale,
            "gradient_scale": gradient_scale,
        }
        of_taps = {"row_threads": plan.taps_threads, "slots": plan.taps_slots}
        passes, outer = len(plan.radices), len(plan.outer_radices)
        if outer:
            # The passes over the columns come first, then the rows between them as convolutions of complex numbers.
            last = (plan.n, plan.outer_radices, outer, True)
            self.columns = self._radix(fields, *last)
            self.column_taps = self._radix(fields | of_taps, *last)
            inner = fields | {
                "channels": problem.channels * plan.outer,
                "length": plan.lower,
                "taps": plan.lower,
                "taps_rev": 0,
                "activation": 0,
                "step": plan.lower,
            }
            last = (plan.lower, plan.lower_radices, passes - outer - 1, False)
            self.rows, self.taps = self._radix(inner, *last), self._radix(inner | of_taps, *last)
            self.tiles = plan.lower // plan.columns
            widest = max(plan.outer_radices)
            self.column_threads = min(512, max(32, plan.outer * plan.columns // widest // 32 * 32))
        else:
            whole = (plan.n, plan.radices, passes - 1, True)
            self.rows = self._radix(fields, *whole)
            self.taps = self._radix(fields | of_taps, *whole)
        channels = problem.sets * problem.channels * (plan.outer if plan.long else 1)
        self.rows_launch = (channels * plan.groups, plan.threads, plan.shared)
        if self.half:
            table = (build_half, plan.n, plan.shape.whole_twiddles)
            self.rows = self._base(fields, plan.n, plan.radices, table)
            units = channels * plan.groups * (1 if backward else problem.heads)
            self.rows_launch = (min(units, plan.blocks), plan.threads, plan.shared)
        self.taps_launch = (plan.taps_slots, plan.taps_threads * plan.taps_slots, plan.taps_shared)
        self.columns_shared = plan.columns_shared

    @staticmethod
    def _scales(plan: Plan) -> tuple[float, float]:
        """What undoes the scale of the transforms, for the taps' spectra and for the inverse of their gradients."""
        if plan.engine == "radix":
            return 1 / plan.lower, 1 / plan.lower  # the outer passes carry the rest
        there, back = scales(plan.n)
        # The gradients' outer passes carry the rest.
        return 1 / (plan.n * there * back), 1 / (plan.lower * there * there)

    def _radix(self, fields, n: int, radices: tuple[int, ...], passes: int, twist: bool) -> Base:
        return self._base(fields, n, radices, (build, n, radices, passes, twist))

    def _base(self, fields: dict, n: int, radices: tuple[int, ...], table: tuple) -> Base:
        assert len(radices) <= MAX_PASSES
        return Base(fields, n, radices, table)
