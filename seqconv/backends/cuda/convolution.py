"""The operator on a device as a sequence of kernel launches: plans, scratch memory and packed arguments.

Calls that differ in addresses only, which is nearly all of a model's, share a recipe (recipe.py); `_forward`
and `_backward` make it, from everything that plans and arguments depend on.

A device is anything with `limits`, `launch(kernel, grid, threads, shared, arguments)` that runs a kernel of
csrc/device (see kernels.py) on the tensors' memory, and `table(function, *arguments)` that keeps a table
(tables.py) there: the CUDA driver, or the tests' emulator.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from seqconv.backends.cuda import kernels
from seqconv.backends.cuda.layout import Layout
from seqconv.backends.cuda.plan import Limits, Plan, Problem, make_plan
from seqconv.backends.cuda.recipe import Operand, Recipe, geometries, operands
from seqconv.backends.pack import ABSENT, materialise, reach, zero_unreached

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
COMPLEX = 4  # dtype code of rows between the passes of a long transform
WORK_BYTES = 1 << 28  # of scratch for long rows, more only where one channel needs it
SKIP_THREADS = 256  # that add up the skip's gradient of one channel


def _rows(work: Operand, outer: int, lower: int) -> tuple:
    """Scratch (batch, heads, channels, n) of complex numbers as rows of `lower` points, `outer` to a channel."""
    batch, head, channel = (stride // 2 for stride in work.stride()[:3])
    return (work.data_ptr(), COMPLEX, batch, head, channel // outer, 1)


def _fast(dtype: torch.dtype) -> bool:
    """Whether products may be summed in fp16, as torch's own switches have it."""
    if dtype == torch.bfloat16:
        return bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
    if dtype == torch.float16:
        return bool(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)
    return True


def describe(u: Tensor, k: Tensor, k_rev: Tensor | None) -> Problem:
    return _describe(u, k, k_rev, _fast(u.dtype))


def _describe(u, k, k_rev, fast: bool) -> Problem:
    """Of tensors or of operands."""
    batch, channels, length = u.shape
    heads = 1 if k.dim() == 2 else k.shape[-3]
    taps, taps_rev = reach(length, k, k_rev)
    per_sample, element = k.dim() == 4, u.element_size()
    return Problem(batch, heads, channels, length, taps, taps_rev, per_sample, element, fast)


class _Call:
    """The launches of one call, written to its recipe."""

    def __init__(
        self, recipe: Recipe, problem: Problem, plan: Plan, u: Operand, activation, backward=False
    ):
        self.recipe, self.problem = recipe, problem
        self.layout = Layout(problem, plan, activation, backward)
        # The taps' spectra have one scale, their gradients' inverse another.
        self.spectra = Layout(problem, plan, activation, False) if backward else self.layout
        self.suffix = SUFFIX[u.dtype]
        self.empty = recipe.empty

    def run(self, kernel: str, launch: tuple[int, int, int], base, fields: dict) -> None:
        values, table = base
        self.recipe.launch(kernel, launch, values, fields | {"tables": self.recipe.table(*table)})

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

    def work(self, heads: int, batch: int | None = None) -> Operand:
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
        with self.recipe.reused():
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

    def partial_skip(self, parts: int, threads: int) -> Operand:
        """One number for every thread that sums up the skip's gradient: it belongs to one head and one channel."""
        return self.empty(parts, self.problem.heads, self.problem.channels, threads)

    def skip_gradient(self, partial: Operand, dskip: Operand) -> None:
        """The sum of the parts."""
        parts, heads, channels, threads = partial.shape
        if dskip.dim() == 1:  # of all heads, too
            parts, heads = parts * heads, 1
        launch = (heads * channels, SKIP_THREADS, 8 * SKIP_THREADS)
        told = {"parts": parts, "heads": heads, "channels": channels, "row_threads": threads}
        told |= {"partial_skip": partial, "dskip": dskip}
        self.recipe.launch("skip_gradient", launch, self.layout.rows[0], told)

    def gradients(self, spectrum: dict, source: dict, du, dpre_gate, dk, dk_rev, dskip) -> None:
        """Gradients from u, pre_gate, dy, post_gate and wide in `source`."""
        at, p = self.layout, self.problem
        with_dk, with_dx = (
            dk is not None or dk_rev is not None,
            du is not None or dpre_gate is not None,
        )
        partial = self.empty(at.parts, p.kernel_rows, 2 * at.n) if with_dk else None
        sink = {"du": du, "dpre_gate": dpre_gate}
        taps = {"dk": dk, "dk_rev": dk_rev}
        rows = lambda t: _rows(t, at.outer, at.lower)  # noqa: E731
        if not at.long:
            partial_skip = dskip and self.partial_skip(at.parts * p.sets, at.row_threads)
            sums = {"partial": partial, "partial_skip": partial_skip}
            aside = with_dk and at.aside
            work = self.empty(at.parts, p.kernel_rows, at.words) if aside else None
            self.of_rows(self.kernel("backward"), **spectrum, **sums, work=work, **source, **sink)
        else:
            x, dv = self.work(1), self.work(p.heads)
            dx = x if with_dx else None  # a row of x is read before its gradient is written
            signals = {name: source.get(name) for name in ("u", "pre_gate")}
            partial_skip = dskip and self.partial_skip(p.batch * at.tiles, at.column_threads)
            self.of_columns(f"long_input_{self.suffix}", p.batch * p.channels, work=x, **signals)
            heads = p.batch * p.heads * p.channels
            self.of_columns(
                f"long_gradient_{self.suffix}", heads, work=dv, partial_skip=partial_skip, **source
            )
            inner = {"u": rows(x), "dy": rows(dv), "du": rows(dx) if with_dx else ABSENT}
            self.of_rows("backward_c32", **spectrum, partial=partial, **inner)
            if with_dx:
                name = f"long_input_gradient_{self.suffix}"
                self.of_columns(name, p.batch * p.channels, work=dx, **sink, **signals)
        if dskip is not None:
            self.skip_gradient(partial_skip, dskip)
        if with_dk and at.outer == 1:
            self.of_taps("taps_gradient", at.taps, 1, partial=partial, **taps)
        elif with_dk:
            work = self.work(p.heads, p.sets)
            self.of_taps("taps_gradient", at.taps, at.outer, partial=partial, dk=rows(work))
            self.of_columns("long_taps_gradient", p.kernel_rows, work=work, **taps)


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


def _slices(problem: Problem, plans: list[Plan]):
    count = _channels_at_once(problem, plans)
    for start in range(0, problem.channels, count):
        yield start, min(count, problem.channels - start)


class _Prepared:
    """The recipes of a call for all of its channels, some at a time."""

    def __init__(self, tensors, axes, problem: Problem, plans: list[Plan], write):
        """axes: where each tensor has its channels. write(recipe, problem, *tensors) makes the launches for
        some channels."""

        @functools.cache
        def made(count: int):
            cut = [t and t.cut(axis, count) for t, axis in zip(tensors, axes, strict=True)]
            recipe = Recipe(len(tensors))
            write(recipe, replace(problem, channels=count), *cut)
            return recipe

        self.parts = [(start, made(count)) for start, count in _slices(problem, plans)]
        self.floats = max(recipe.bytes for _, recipe in self.parts) // 4
        # Bytes from one channel to the next.
        self.steps = [
            0 if t is None else t.strides[axis] * t.element_size()
            for t, axis in zip(tensors, axes, strict=True)
        ]

    def scratch(self, device: torch.device) -> Tensor:
        return torch.empty(self.floats, dtype=torch.float32, device=device)

    def run(self, device, tensors: list[Tensor | None]) -> None:
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        scratch = self.scratch(tensors[0].device)
        for start, recipe in self.parts:
            shifted = addresses
            if start:
                shifted = [a + start * b for a, b in zip(addresses, self.steps, strict=True)]
            recipe.run(device, scratch.data_ptr(), shifted)


_AXES = (-2, -2, -2, -1, -2, -2)  # of the channels of u, k, k_rev, skip, pre_gate, post_gate
_KEPT = 512  # kinds of calls that are known at a time


@functools.lru_cache(_KEPT)
def _forward(limits: Limits, activation: str, fast: bool, *known) -> _Prepared:
    """Of y, u, k, k_rev, skip, pre_gate, post_gate."""
    made = operands(known)
    problem = _describe(*made[1:4], fast)
    plan = make_plan(problem, limits)

    def write(recipe, problem, y, u, k, k_rev, skip, pre_gate, post_gate):
        call = _Call(recipe, problem, plan, u, activation)
        call.convolve(call.spectrum(k, k_rev, skip), u, pre_gate, y=y, post_gate=post_gate)

    return _Prepared(made, (-2, *_AXES), problem, [plan], write)


@functools.lru_cache(_KEPT)
def _backward(limits: Limits, activation: str, fast: bool, *known) -> _Prepared:
    """Of dy, u, k, k_rev, skip, pre_gate, post_gate, and the gradients of the latter six."""
    made = operands(known)
    problem = _describe(*made[1:4], fast)
    # The pre-activation, where it is needed, comes from a forward pass of its own; then everything is linear.
    plans = [make_plan(problem, limits, backward=backward) for backward in (False, True)]

    def write(recipe, problem, *tensors):
        _write_backward(recipe, problem, plans, activation, *tensors)

    return _Prepared(made, (-2, *_AXES, *_AXES), problem, plans, write)


def _write_backward(recipe, problem, plans, activation, dy, u, k, k_rev, skip, *rest):
    pre_gate, post_gate, du, dk, dk_rev, dskip, dpre_gate, dpost_gate = rest
    linear = any(t is not None for t in (du, dk, dk_rev, dskip, dpre_gate))
    source = {"u": u, "pre_gate": pre_gate, "dy": dy, "post_gate": post_gate}
    if (activation != "none" and linear) or dpost_gate is not None:
        call = _Call(recipe, problem, plans[0], u, activation)
        if activation != "none" and linear:
            shape = (problem.batch, problem.heads, problem.channels, problem.length)
            source["wide"] = recipe.empty(*shape)
        sink = {name: source.get(name) for name in ("dy", "post_gate", "wide")}
        with recipe.reused():
            spectrum = call.spectrum(k, k_rev, skip)
            call.convolve(spectrum, u, pre_gate, dpost_gate=dpost_gate, **sink)
    if not linear:
        return
    call = _Call(recipe, problem, plans[1], u, "none", backward=True)
    spectrum = call.spectrum(k, k_rev, skip)
    call.gradients(spectrum, source, du, dpre_gate, dk, dk_rev, dskip)


def forward(device, y, u, k, k_rev, skip, pre_gate, post_gate, activation) -> None:
    """Writes y; see seqconv.ops.operators for the shapes."""
    if y.numel() == 0:
        return
    inputs = (u, k, k_rev, skip, pre_gate, post_gate)
    tensors = [y, *[t if t is None else materialise(t) for t in inputs]]
    prepared = _forward(device.limits, activation, _fast(u.dtype), *geometries(tensors))
    prepared.run(device, tensors)


def backward(device, grads, dy, u, k, k_rev, skip, pre_gate, post_gate, activation) -> None:
    """Writes the gradients that are not None, in the order of the inputs."""
    if dy.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    zero_unreached(grads[1], grads[2], u.shape[-1])
    inputs = (dy, u, k, k_rev, skip, pre_gate, post_gate)
    tensors = [*[t if t is None else materialise(t) for t in inputs], *grads]
    prepared = _backward(device.limits, activation, _fast(u.dtype), *geometries(tensors))
    prepared.run(device, tensors)
