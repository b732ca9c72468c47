"""The operator on a device as a sequence of kernel launches: plans, scratch memory and packed arguments.

A device is anything with `limits`, and `launch(kernel, grid, threads, shared, arguments)` that runs a kernel of
csrc/device (see kernels.py) on the tensors' memory: the CUDA driver, or the tests' emulator.
"""

import ctypes
import math
import struct
from dataclasses import replace

import torch
from torch import Tensor

from seqconv._cuda.plan import MAX_PASSES, Plan, Problem, make_plan
from seqconv._cuda.tables import SCALES, build, build_tensor, on_device
from seqconv._pack import (
    ABSENT,
    ACTIVATIONS,
    KERNEL,
    SIGNAL,
    SKIP,
    materialise,
    pack,
    reach,
    zero_unreached,
)

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
COMPLEX = 4  # dtype code of rows between the passes of a long transform
WORK_BYTES = 1 << 28  # of scratch for long rows, more only where one channel needs it

# The kernels' Args, field by field; tensors are six integers each.
_NUMBERS = (
    "batch heads channels length taps taps_rev per_sample activation n count radices tables row_threads slots groups "
    "blocks step lead outer lower columns order scale scales spectrum partial partial_skip parts work wide "
    "matrices partial_matrices matrix_channels"
).split()
_TENSORS = "u k k_rev skip pre_gate post_gate y dy du dk dk_rev dpre_gate dpost_gate".split()
_TABLES = {"k": KERNEL, "k_rev": KERNEL, "dk": KERNEL, "dk_rev": KERNEL, "skip": SKIP}


def arguments(**fields):
    """One flat array of 64-bit integers; tensors are packed, absent fields are zero."""
    values = []
    for name in _NUMBERS:
        value = fields.pop(name, 0)
        values.append(value.data_ptr() if isinstance(value, Tensor) else int(value or 0))
    for name in _TENSORS:
        value = fields.pop(name, None)
        values += value if isinstance(value, tuple) else pack(value, _TABLES.get(name, SIGNAL))
    assert not fields, f"unknown fields {sorted(fields)}"
    return (ctypes.c_int64 * len(values))(*values)


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
    matmul = torch.backends.cuda.matmul
    fast = {
        torch.bfloat16: matmul.allow_bf16_reduced_precision_reduction,
        torch.float16: matmul.allow_fp16_reduced_precision_reduction,
    }.get(u.dtype, True)
    per_sample, element = k.dim() == 4, u.element_size()
    return Problem(batch, heads, channels, length, taps, taps_rev, per_sample, element, bool(fast))


class _Call:
    """What all launches of one call share."""

    def __init__(
        self, device, problem: Problem, plan: Plan, like: Tensor, activation: str, backward=False
    ):
        self.device, self.problem, self.plan, self.like = device, problem, plan, like
        self.suffix = SUFFIX[like.dtype]
        self.mode = ("_fast" if problem.fast else "_accurate") if plan.engine == "tensor" else ""
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
            "lead": self._lead(backward),
            "order": {"": 0, "_accurate": 1, "_fast": 2}[self.mode],
        }
        whole, outer = len(plan.radices), len(plan.outer_radices)
        if outer:
            # The passes over the columns, and the rows between them as convolutions of complex numbers.
            self.columns = fields | {
                "outer": plan.outer,
                "lower": plan.lower,
                "columns": plan.columns,
            }
            self.columns |= self._radix(plan.n, plan.outer_radices, outer, True)
            self.inner = fields | {
                "channels": problem.channels * plan.outer,
                "length": plan.lower,
                "taps": plan.lower,
                "taps_rev": 0,
                "activation": 0,
                "step": plan.lower,
                "outer": plan.outer,
            }
            self.inner |= self._radix(plan.lower, plan.lower_radices, whole - outer - 1, False)
        else:
            self.direct = fields | self._radix(plan.n, plan.radices, whole - 1, True)
        if plan.engine == "tensor":
            table = on_device(like.device, build_tensor, plan.n, plan.radices)
            self.rows = fields | self._transform(plan.n, plan.radices, table)
        else:
            self.rows = self.inner if outer else self.direct

    def _lead(self, backward: bool) -> int:
        """How far a window reaches into the past: of x in forward, of dv in backward."""
        if self.plan.windows == 1:
            return 0
        return self.problem.taps_rev if backward else max(self.problem.taps, 1) - 1

    def _radix(self, n: int, radices: tuple[int, ...], passes: int, twist: bool) -> dict:
        table = on_device(self.like.device, build, n, radices, passes, twist)
        return self._transform(n, radices, table)

    def _transform(self, n: int, radices: tuple[int, ...], table: Tensor) -> dict:
        assert len(radices) <= MAX_PASSES
        packed = sum(r << (8 * i) for i, r in enumerate(radices))
        return {"n": n, "count": len(radices), "radices": packed, "tables": table}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def run(self, kernel: str, grid: int, threads: int, shared: int, fields: dict) -> None:
        self.device.launch(kernel, grid, threads, shared, arguments(**fields))

    def of_taps(self, kernel: str, common: dict, pieces: int, **fields) -> None:
        """A kernel with one slot for each of the `pieces` of every kernel row."""
        p = self.plan
        grid = -(-self.problem.kernel_rows * pieces // p.taps_slots)
        threads = {"row_threads": p.taps_threads, "slots": p.taps_slots}
        scale = self.scale(gradient=kernel == "taps_gradient")
        fields = common | threads | {"scale": scale} | fields
        self.run(kernel, grid, p.taps_threads * p.taps_slots, p.taps_shared, fields)

    def of_rows(self, kernel: str, **fields) -> None:
        p = self.plan
        channels = self.problem.channels * (p.outer if p.long else 1)
        grid = self.problem.sets * channels * p.groups
        self.run(kernel, grid, p.threads, p.shared, self.rows | fields)

    def of_columns(self, kernel: str, rows: int, **fields) -> None:
        """A pass over the columns of long rows."""
        p = self.plan
        grid = rows * (p.lower // p.columns)
        self.run(kernel, grid, self.column_threads, p.columns_shared, self.columns | fields)

    def scale(self, gradient: bool) -> int:
        """What undoes the scale of the transforms: of the taps' spectra, or of their gradients' inverse."""
        p = self.plan
        if p.engine == "radix":
            return _bits(1 / p.lower)  # the outer passes carry the rest
        there, back = (math.prod(SCALES[r][i] for r in p.radices) for i in (0, 1))
        return _bits(1 / (p.n * there * (there if gradient else back)))

    @property
    def column_threads(self) -> int:
        widest = max(self.plan.outer_radices)
        return min(512, max(32, self.plan.outer * self.plan.columns // widest // 32 * 32))

    def work(self, heads: int, batch: int | None = None) -> Tensor:
        batch = self.problem.batch if batch is None else batch
        return self.empty(batch, heads, self.problem.channels, 2 * self.plan.n)

    def kernel(self, name: str) -> str:
        prefix = "tensor_" if self.plan.engine == "tensor" else ""
        return f"{prefix}{name}_{self.suffix}{self.mode}"

    def spectrum(self, k: Tensor, k_rev, skip) -> dict:
        """The fields that hold it: (kernel row, n) complex in the order that the passes leave, and its scales."""
        p, problem = self.plan, self.problem
        given = {"k": k, "k_rev": k_rev, "skip": skip}
        out = {
            "spectrum": self.empty(problem.kernel_rows, (1 if self.mode == "_fast" else 2) * p.n)
        }
        if p.engine == "tensor":
            out["scales"] = self.empty(problem.kernel_rows)
        if p.outer == 1:
            self.of_taps("spectrum", self.direct, 1, **out, **given)
            return out
        if p.engine == "tensor":
            self.of_taps("kernel_scales", self.columns, 1, **out, **given)
        work = self.work(problem.heads, problem.sets)
        self.of_columns("long_taps", problem.kernel_rows, work=work, **given)
        self.of_taps("spectrum", self.inner, p.outer, **out, k=_rows(work, p.outer, p.lower))
        return out

    def convolve(self, spectrum: dict, u, pre_gate, **sink) -> None:
        """sink: y and post_gate, or dy, post_gate, wide and dpost_gate, as the kernels' Output takes them."""
        if not self.plan.long:
            self.of_rows(self.kernel("forward"), **spectrum, u=u, pre_gate=pre_gate, **sink)
            return
        batch, channels, heads = self.problem.batch, self.problem.channels, self.problem.heads
        x, v = self.work(1), self.work(heads)
        self.of_columns(
            f"long_input_{self.suffix}", batch * channels, work=x, u=u, pre_gate=pre_gate
        )
        rows = [_rows(t, self.plan.outer, self.plan.lower) for t in (x, v)]
        self.of_rows("forward_c32", **spectrum, u=rows[0], y=rows[1])
        self.of_columns(f"long_output_{self.suffix}", batch * heads * channels, work=v, **sink)

    def gradients(self, spectrum: dict, source: dict, du, dpre_gate, dk, dk_rev, skip: bool):
        """Gradients from u, pre_gate, dy, post_gate and wide in `source`; returns the skip's, (heads, channels)."""
        plan, p = self.plan, self.problem
        with_dk, with_dx = (
            dk is not None or dk_rev is not None,
            du is not None or dpre_gate is not None,
        )
        partial = self.empty(plan.parts, p.kernel_rows, 2 * plan.n) if with_dk else None
        sums = {"partial": partial}
        sink = {"du": du, "dpre_gate": dpre_gate}
        taps = {"dk": dk, "dk_rev": dk_rev}
        if not plan.long:
            sums["partial_skip"] = (
                self.empty(plan.parts, p.sets, p.heads, p.channels, plan.row_threads)
                if skip
                else None
            )
            self.of_rows(self.kernel("backward"), **spectrum, **sums, **source, **sink)
            if with_dk:
                self.of_taps("taps_gradient", self.direct, 1, partial=partial, **taps)
        else:
            rows = lambda t: _rows(t, plan.outer, plan.lower)  # noqa: E731
            x, dv = self.work(1), self.work(p.heads)
            dx = x if with_dx else None  # a row of x is read before its gradient is written
            signals = {name: source.get(name) for name in ("u", "pre_gate")}
            tiles = plan.lower // plan.columns
            partial_skip = (
                self.empty(p.batch * tiles, 1, p.heads, p.channels, self.column_threads)
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
            if with_dk:
                work = self.work(p.heads, p.sets)
                self.of_taps(
                    "taps_gradient", self.inner, plan.outer, partial=partial, dk=rows(work)
                )
                self.of_columns("long_taps_gradient", p.kernel_rows, work=work, **taps)
        return sums["partial_skip"].sum((0, 1, 4)) if skip else None


def _channels_at_once(problem: Problem, plans: list[Plan]) -> int:
    """Channels of a call whose scratch for long rows stays within WORK_BYTES."""
    count = problem.channels
    for plan in plans:
        if plan.long:
            signals = 2 + 2 * problem.heads
            each = 8 * plan.n * (problem.batch * signals + 3 * problem.heads * problem.sets)
            count = max(1, min(count, WORK_BYTES // each))
    return count


def _cut(t: Tensor | None, axis: int, start: int, count: int) -> Tensor | None:
    return None if t is None else t.narrow(axis, start, count)


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
        call = _Call(device, replace(problem, channels=count), chosen, u, activation)
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
        _backward(device, replace(problem, channels=count), plans, wanted, *part, activation)


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
