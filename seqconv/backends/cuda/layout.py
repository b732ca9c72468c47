"""What all launches of one plan are told, but for tensors: arguments, threads and tables of each kind of kernel."""

import math
import struct

from seqconv.backends.cuda.arguments import fill
from seqconv.backends.cuda.plan import MAX_PASSES, Plan, Problem
from seqconv.backends.cuda.tables import SCALES, build, build_tensor
from seqconv.backends.pack import ACTIVATIONS


def _bits(x: float) -> int:
    """A float32 as an integer argument."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


class Layout:
    """What all calls of one plan share: for each kind of kernel its arguments but for tensors, the
    constants it needs, and its threads."""

    def __init__(self, problem: Problem, plan: Plan, activation: str, backward: bool):
        self.n, self.outer, self.lower, self.long = plan.n, plan.outer, plan.lower, plan.long
        self.parts, self.row_threads = plan.parts, plan.row_threads
        self.aside = backward and plan.aside
        self.mode = ("_fast" if problem.fast else "_accurate") if plan.engine == "tensor" else ""
        self.prefix = "tensor_" if plan.engine == "tensor" else ""
        self.words = (1 if self.mode == "_fast" else 2) * plan.n  # of a spectrum
        fields = {
            "batch": problem.batch,
            "heads": problem.heads,
            "channels": problem.channels,
            "length": problem.length,
            "taps": problem.taps,
            "taps_rev": problem.taps_rev,
            "per_sample": problem.per_sample,
            "activation": ACTIVATIONS[activation],
            "row_threads": plan.row_threads,
            "slots": plan.slots,
            "groups": plan.groups,
            "parts": plan.parts,
            "blocks": plan.windows,
            "step": plan.step,
            "lead": plan.lead,  # into the past: of x in forward, of dv in backward
            "order": {"": 0, "_accurate": 1, "_fast": 2}[self.mode],
        }
        taps = {"row_threads": plan.taps_threads, "slots": plan.taps_slots}
        taps |= {"scale": self._scale(plan, gradient=backward)}
        passes, outer = len(plan.radices), len(plan.outer_radices)
        if outer:
            # The passes over the columns, and the rows between them as convolutions of complex numbers.
            of_columns = fields | {
                "outer": plan.outer,
                "lower": plan.lower,
                "columns": plan.columns,
            }
            self.columns = self._radix(of_columns, plan.n, plan.outer_radices, outer, True)
            self.column_taps = self._radix(
                of_columns | taps, plan.n, plan.outer_radices, outer, True
            )
            inner = fields | {
                "channels": problem.channels * plan.outer,
                "length": plan.lower,
                "taps": plan.lower,
                "taps_rev": 0,
                "activation": 0,
                "step": plan.lower,
                "outer": plan.outer,
            }
            last = (plan.lower, plan.lower_radices, passes - outer - 1, False)
            self.rows, self.taps = self._radix(inner, *last), self._radix(inner | taps, *last)
            self.tiles = plan.lower // plan.columns
            widest = max(plan.outer_radices)
            self.column_threads = min(512, max(32, plan.outer * plan.columns // widest // 32 * 32))
        else:
            whole = (plan.n, plan.radices, passes - 1, True)
            self.rows, self.taps = self._radix(fields, *whole), self._radix(fields | taps, *whole)
        if plan.engine == "tensor":
            table = (build_tensor, plan.n, plan.radices)
            self.rows = self._transform(fields, plan.n, plan.radices, table)
        channels = problem.sets * problem.channels * (plan.outer if plan.long else 1)
        self.rows_launch = (channels * plan.groups, plan.threads, plan.shared)
        self.taps_launch = (plan.taps_slots, plan.taps_threads * plan.taps_slots, plan.taps_shared)
        self.columns_shared = plan.columns_shared

    @staticmethod
    def _scale(plan: Plan, gradient: bool) -> int:
        """What undoes the scale of the transforms: of the taps' spectra, or of their gradients' inverse."""
        if plan.engine == "radix":
            return _bits(1 / plan.lower)  # the outer passes carry the rest
        there, back = (math.prod(SCALES[r][i] for r in plan.radices) for i in (0, 1))
        if gradient:  # whose outer passes carry the rest
            return _bits(1 / (plan.lower * there * there))
        return _bits(1 / (plan.n * there * back))

    def _radix(self, fields, n: int, radices: tuple[int, ...], passes: int, twist: bool):
        return self._transform(fields, n, radices, (build, n, radices, passes, twist))

    def _transform(self, fields: dict, n: int, radices: tuple[int, ...], table: tuple):
        assert len(radices) <= MAX_PASSES
        packed = sum(r << (8 * i) for i, r in enumerate(radices))
        fields = fields | {"n": n, "count": len(radices), "radices": packed}
        return fill(fields), table
