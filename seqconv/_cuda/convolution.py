"""The operator on a device as a sequence of kernel launches: plans, scratch memory and packed arguments.

A device is anything with `limits`, `launch(kernel, grid, threads, shared, arguments)` that runs a kernel of
csrc/device (see kernels.py) on the tensors' memory, and `table(function, *arguments)` that keeps a table
(tables.py) there: the CUDA driver, or the tests' emulator.
"""

import functools
import math
import struct
from dataclasses import replace

import torch
from torch import Tensor

from seqconv._cuda import kernels
from seqconv._cuda.arguments import arguments, fill
from seqconv._cuda.plan import MAX_PASSES, Plan, Problem, make_plan
from seqconv._cuda.tables import SCALES, build, build_tensor
from seqconv._pack import (
    ABSENT,
    ACTIVATIONS,
    materialise,
    reach,
    zero_unreached,
)

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
COMPLEX = 4  # dtype code of rows between the passes of a long transform
WORK_BYTES = 1 << 28  # of scratch for long rows, more only where one channel needs it


def _bits(x: float) -> int:
    """A float32 as an integer argument."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


def _rows(work: Tensor, outer: int, lower: int) -> tuple[int, ...]:
    """Scratch (batch, heads, channels, n) of complex numbers as rows of `lower` points, `outer` to a channel."""
    batch, head, channel = (stride // 2 for stride in work.stride()[:3])
    return (work.data_ptr(), COMPLEX, batch, head, channel // outer, 1)


def describe(u: Tensor, k: Tensor, k_rev: Tensor | None) -> Problem:
    batch, channels, length = u.shape
    heads = 1 if k.dim() == 2 else k.shape[-3]
    taps, taps_rev = reach(length, k, k_rev)
    fast = True
    if u.dtype == torch.bfloat16:
        fast = bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
    elif u.dtype == torch.float16:
        fast = bool(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)
    per_sample, element = k.dim() == 4, u.element_size()
    return Problem(batch, heads, channels, length, taps, taps_rev, per_sample, element, fast)


class _Layout:
    """What all calls of one plan share: for each kind of kernel its arguments but for tensors, the
    constants it needs, and its threads. Made once."""

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


_layout = functools.lru_cache(1024)(_Layout)


class _Call:
    """The launches of one call."""

    def __init__(
        self, device, problem: Problem, plan: Plan, like: Tensor, activation: str, backward=False
    ):
        self.device, self.problem, self.like = device, problem, like
        self.layout = _layout(problem, plan, activation, backward)
        # The taps' spectra have one scale, their gradients' inverse another.
        self.spectra = _layout(problem, plan, activation, False) if backward else self.layout
        self.suffix = SUFFIX[like.dtype]

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def run(self, kernel: str, launch: tuple[int, int, int], base, fields: dict) -> None:
        values, table = base
        fields["tables"] = self.device.table(*table)
        self.device.launch(kernel, *launch, arguments(values, **fields))

    def of_taps(self, kernel: str, base, pieces: int, **fields) -> None:
        """A kernel with one slot for each of the `pieces` of every kernel row."""
        slots, threads, shared = self.layout.taps_launch
        grid = -(-self.problem.kernel_rows * pieces // slots)
        self.run(kernel, (grid, threads, shared), base, fields)

    def of_rows(self, kernel: str, **fields) -> None:
        self.run(kernel, self.layout.rows_launch, self.layout.rows, fields)

    def of_columns(self, kernel: str, rows: int, **fields) -> None:
        """A pass over the columns of long rows."""
        at = self.layout
        launch = (rows * at.tiles, at.column_threads, at.columns_shared)
        self.run(kernel, launch, at.columns, fields)

    def work(self, heads: int, batch: int | None = None) -> Tensor:
        batch = self.problem.batch if batch is None else batch
        return self.empty(batch, heads, self.problem.channels, 2 * self.layout.n)

    def kernel(self, name: str) -> str:
        """The one made for this length, or else the one for any."""
        found = f"{self.layout.prefix}{name}_{self.suffix}{self.layout.mode}"
        fixed = f"{found}_{self.layout.n}"
        return fixed if fixed in kernels.KERNELS else found

    def spectrum(self, k: Tensor, k_rev, skip) -> dict:
        """The fields that hold it: (kernel row, n) complex in the order that the passes leave, and its scales."""
        at, rows = self.spectra, self.problem.kernel_rows
        given = {"k": k, "k_rev": k_rev, "skip": skip}
        out = {"spectrum": self.empty(rows, at.words)}
        if at.mode:
            out["scales"] = self.empty(rows)
        if at.outer == 1:
            self.of_taps("spectrum", at.taps, 1, **out, **given)
            return out
        if at.mode:
            self.of_taps("kernel_scales", at.column_taps, 1, **out, **given)
        work = self.work(self.problem.heads, self.problem.sets)
        self.of_columns("long_taps", rows, work=work, **given)
        pieces = _rows(work, at.outer, at.lower)
        self.of_taps("spectrum", at.taps, at.outer, **out, k=pieces)
        return out

    def convolve(self, spectrum: dict, u, pre_gate, **sink) -> None:
        """sink: y and post_gate, or dy, post_gate, wide and dpost_gate, as the kernels' Output takes them."""
        if not self.layout.long:
            self.of_rows(self.kernel("forward"), **spectrum, u=u, pre_gate=pre_gate, **sink)
            return
        batch, channels, heads = self.problem.batch, self.problem.channels, self.problem.heads
        x, v = self.work(1), self.work(heads)
        self.of_columns(
            f"long_input_{self.suffix}", batch * channels, work=x, u=u, pre_gate=pre_gate
        )
        rows = [_rows(t, self.layout.outer, self.layout.lower) for t in (x, v)]
        self.of_rows("forward_c32", **spectrum, u=rows[0], y=rows[1])
        self.of_columns(f"long_output_{self.suffix}", batch * heads * channels, work=v, **sink)

    def gradients(self, spectrum: dict, source: dict, du, dpre_gate, dk, dk_rev, skip: bool):
        """Gradients from u, pre_gate, dy, post_gate and wide in `source`; returns the skip's, (heads, channels)."""
        at, p = self.layout, self.problem
        with_dk, with_dx = (
            dk is not None or dk_rev is not None,
            du is not None or dpre_gate is not None,
        )
        partial = self.empty(at.parts, p.kernel_rows, 2 * at.n) if with_dk else None
        sums = {"partial": partial}
        sink = {"du": du, "dpre_gate": dpre_gate}
        taps = {"dk": dk, "dk_rev": dk_rev}
        rows = lambda t: _rows(t, at.outer, at.lower)  # noqa: E731
        if not at.long:
            sums["partial_skip"] = (
                self.empty(at.parts, p.sets, p.heads, p.channels, at.row_threads) if skip else None
            )
            aside = with_dk and at.aside
            work = self.empty(at.parts, p.kernel_rows, at.words) if aside else None
            self.of_rows(self.kernel("backward"), **spectrum, **sums, work=work, **source, **sink)
        else:
            x, dv = self.work(1), self.work(p.heads)
            dx = x if with_dx else None  # a row of x is read before its gradient is written
            signals = {name: source.get(name) for name in ("u", "pre_gate")}
            partial_skip = (
                self.empty(p.batch * at.tiles, 1, p.heads, p.channels, at.column_threads)
                if skip
                else None
            )
            self.of_columns(f"long_input_{self.suffix}", p.batch * p.channels, work=x, **signals)
            heads = p.batch * p.heads * p.channels
            self.of_columns(
                f"long_gradient_{self.suffix}", heads, work=dv, partial_skip=partial_skip, **source
            )
            inner = {"u": rows(x), "dy": rows(dv), "du": rows(dx) if with_dx else ABSENT}
            self.of_rows("backward_c32", **spectrum, **sums, **inner)
            sums["partial_skip"] = partial_skip
            if with_dx:
                name = f"long_input_gradient_{self.suffix}"
                self.of_columns(name, p.batch * p.channels, work=dx, **sink, **signals)
        if with_dk and at.outer == 1:
            self.of_taps("taps_gradient", at.taps, 1, partial=partial, **taps)
        elif with_dk:
            work = self.work(p.heads, p.sets)
            self.of_taps("taps_gradient", at.taps, at.outer, partial=partial, dk=rows(work))
            self.of_columns("long_taps_gradient", p.kernel_rows, work=work, **taps)
        # in float64: they may cancel
        return sums["partial_skip"].sum((0, 1, 4), dtype=torch.float64) if skip else None


def _channels_at_once(problem: Problem, plans: list[Plan]) -> int:
    """Channels of a call, planned forward and perhaps backward, whose scratch for long rows stays within WORK_BYTES."""
    count = problem.channels
    for plan in plans:
        if plan.long:
            signals = 2 + 2 * problem.heads
            each = 8 * plan.n * (problem.batch * signals + 3 * problem.heads * problem.sets)
            count = max(1, min(count, WORK_BYTES // each))
    for plan in plans[1:]:
        if plan.engine == "tensor" and plan.outer > 1:
            # Spectra of the taps, sums of their gradients, x put aside, and the rows that the sums come back in.
            words = plan.n * (1 if problem.fast else 2)
            each = 4 * words + plan.parts * (8 * plan.n + 4 * words * plan.aside) + 8 * plan.n
            count = max(1, min(count, WORK_BYTES // (each * problem.sets * problem.heads)))
    return count


def _cut(t: Tensor | None, axis: int, start: int, count: int) -> Tensor | None:
    return t if t is None or t.shape[axis] == count else t.narrow(axis, start, count)


def _of_channels(problem: Problem, count: int) -> Problem:
    return problem if count == problem.channels else replace(problem, channels=count)


def _slices(problem: Problem, plans: list[Plan]):
    count = _channels_at_once(problem, plans)
    for start in range(0, problem.channels, count):
        yield start, min(count, problem.channels - start)


def forward(device, y, u, k, k_rev, skip, pre_gate, post_gate, activation) -> None:
    """Writes y; see seqconv._ops for the shapes."""
    if y.numel() == 0:
        return
    u, k, k_rev, skip, pre_gate, post_gate = map(
        materialise, (u, k, k_rev, skip, pre_gate, post_gate)
    )
    problem = describe(u, k, k_rev)
    chosen = make_plan(problem, device.limits)
    for start, count in _slices(problem, [chosen]):
        part = [_cut(t, -2, start, count) for t in (y, u, k, k_rev, pre_gate, post_gate)]
        y_, u_, k_, k_rev_, pre_, post_ = part
        call = _Call(device, _of_channels(problem, count), chosen, u, activation)
        spectrum = call.spectrum(k_, k_rev_, _cut(skip, -1, start, count))
        call.convolve(spectrum, u_, pre_, y=y_, post_gate=post_)


def backward(device, grads, dy, u, k, k_rev, skip, pre_gate, post_gate, activation) -> None:
    """Writes the gradients that are not None, in the order of the inputs."""
    if dy.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    zero_unreached(grads[1], grads[2], u.shape[-1])
    inputs = [materialise(t) for t in (dy, u, k, k_rev, skip, pre_gate, post_gate)]
    problem = describe(inputs[1], inputs[2], inputs[3])
    # The pre-activation, where it is needed, comes from a forward pass of its own; then everything is linear.
    plans = [make_plan(problem, device.limits, backward=backward) for backward in (False, True)]
    for start, count in _slices(problem, plans):
        axes = (-2, -2, -2, -2, -1, -2, -2)
        part = [_cut(t, axis, start, count) for t, axis in zip(inputs, axes, strict=True)]
        wanted = [_cut(t, axis, start, count) for t, axis in zip(grads, axes[1:], strict=True)]
        _backward(device, _of_channels(problem, count), plans, wanted, *part, activation)


def _backward(
    device, problem, plans, grads, dy, u, k, k_rev, skip, pre_gate, post_gate, activation
):
    du, dk, dk_rev, dskip, dpre_gate, dpost_gate = grads
    linear = any(t is not None for t in (du, dk, dk_rev, dskip, dpre_gate))
    source = {"u": u, "pre_gate": pre_gate, "dy": dy, "post_gate": post_gate}
    if (activation != "none" and linear) or dpost_gate is not None:
        call = _Call(device, problem, plans[0], u, activation)
        if activation != "none" and linear:
            source["wide"] = call.empty(
                problem.batch, problem.heads, problem.channels, problem.length
            )
        sink = {name: source.get(name) for name in ("dy", "post_gate", "wide")}
        call.convolve(call.spectrum(k, k_rev, skip), u, pre_gate, dpost_gate=dpost_gate, **sink)
    if not linear:
        return
    call = _Call(device, problem, plans[1], u, "none", backward=True)
    spectrum = call.spectrum(k, k_rev, skip)
    sums = call.gradients(spectrum, source, du, dpre_gate, dk, dk_rev, dskip is not None)
    if dskip is not None:
        dskip.copy_(sums if dskip.dim() == 2 else sums.sum(0))
