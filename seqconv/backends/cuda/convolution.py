"""The convolution on a device as a sequence of kernel launches: plans, scratch memory and packed arguments.

Calls that differ in addresses only share a recipe (recipe.py), and nearly all calls of a model do. `_forward` and
`_backward` make it from everything that plans and arguments depend on.

A device has `limits`, `launch(kernel, grid, threads, shared, arguments)`, which runs a kernel of csrc/device (see
kernels.py) on the tensors' memory, and `table(function, *arguments)`, which keeps a table (tables.py) there. The CUDA
driver is one, and the tests' emulator is another.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from seqconv.backends.cuda.arguments import transform
from seqconv.backends.cuda.layout import Base, Layout
from seqconv.backends.cuda.plan import MAX_PARTS, Plan, known_kernel, make_plan
from seqconv.backends.cuda.problem import Limits, Problem
from seqconv.backends.cuda.recipe import Operand, Recipe, geometries, offset, operands
from seqconv.backends.pack import ABSENT, reach, zero_unreached

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
COMPLEX = 4  # the dtype code of long rows between their passes
SCRATCH_BYTES = 1 << 28  # of a call with long rows; it takes more only where one channel needs more
SKIP_THREADS = 256  # they add up the gradient of one channel's skip or bias
BIAS_STEPS, BIAS_BLOCKS = (
    8192,
    1024,
)  # of a block that adds up a bias's gradient, and how many are enough


def _rows(long_rows: Operand, outer: int) -> tuple:
    """Long rows between their passes, (batch, heads, channels, n), as `outer` shorter rows for each channel."""
    batch, head, channel = (stride // 2 for stride in long_rows.stride()[:3])
    return (long_rows.data_ptr(), COMPLEX, batch, head, channel // outer, 1)


def _fast(dtype: torch.dtype) -> bool:
    """Whether torch's own switches allow fp16 operands and sums, and with them tensor cores."""
    if dtype == torch.bfloat16:
        return bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)
    if dtype == torch.float16:
        return bool(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)
    return True


def describe(
    u: Tensor,
    k: Tensor,
    k_rev: Tensor | None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    activation: str = "none",
    bias: Tensor | None = None,
) -> Problem:
    """Describes a call of fftconv as far as its plan depends on it. y is taken to be as u is."""
    made = operands(geometries([u, k, k_rev, pre_gate, post_gate], offset))
    u, k, k_rev, *gates = made
    beside = _beside(*gates, activation, bias is not None)
    return _describe(u, k, k_rev, _fast(u.dtype), [u, *gates], beside)


def _beside(pre_gate, post_gate, activation: str, bias: bool) -> str | None:
    """What a forward pass does beside the convolution, as far as kernels have been made for it.

    Those for gelu and for both gates also add a bias.
    """
    if pre_gate is None and post_gate is None:
        return {"none": None if bias else "", "gelu": "gelu"}.get(activation)
    return "gated" if pre_gate and post_gate and activation == "none" else None


def _describe(u, k, k_rev, fast: bool, signals: list, beside: str | None) -> Problem:
    """Describes a call by operands: signals are all rows that are read and written."""
    batch, channels, length = u.shape
    heads = 1 if k.dim() == 2 else k.shape[-3]
    taps, taps_rev = reach(length, k, k_rev)
    pieces = all(x is None or x.in_pieces() for x in signals)
    size = u.element_size()
    return Problem(
        batch, heads, channels, length, taps, taps_rev, k.dim() == 4, size, fast, pieces, beside
    )


class Call:
    """Writes the launches of one call to its recipe."""

    def __init__(self, recipe, problem: Problem, plan: Plan, u: Operand, activation, backward):
        self.recipe, self.problem = recipe, problem
        self.layout = Layout(problem, plan, activation, backward)
        self.suffix = SUFFIX[u.dtype]
        self.empty = recipe.empty

    def run(self, kernel: str, launch: tuple[int, int, int], base: Base, fields: dict) -> None:
        told = transform(base.n, base.radices, self.recipe.table(*base.table))
        self.recipe.launch(kernel, launch, base.fields | {"transform": told} | fields)

    def of_taps(self, kernel: str, base: Base, pieces: int, **fields) -> None:
        """Launches a kernel with one slot for each of the `pieces` of every row of taps."""
        slots, threads, shared = self.layout.taps_launch
        grid = -(-self.problem.taps_rows * pieces // slots)
        self.run(kernel, (grid, threads, shared), base, fields)

    def of_rows(self, kernel: str, **fields) -> None:
        self.run(kernel, self.layout.rows_launch, self.layout.rows, fields)

    def of_columns(self, kernel: str, rows: int, **fields) -> None:
        """Launches a pass over the columns of long rows."""
        at = self.layout
        launch = (rows * at.tiles, at.column_threads, at.columns_shared)
        self.run(kernel, launch, at.columns, fields)

    def long_rows(self, batch: int, heads: int) -> Operand:
        """Takes scratch memory for long rows between their passes."""
        return self.empty(batch, heads, self.problem.channels, 2 * self.layout.n)

    def kernel(self, name: str) -> str:
        """The name of the kernel of the plan."""
        at = self.layout
        if at.half:
            return f"half_{name}_{self.suffix}_{at.n}{at.form}"
        known = known_kernel(self.problem, at.n, name == "backward")
        return f"{name}_{self.suffix}" + (f"_{at.n}" if known else "")

    def spectrum(self, k: Tensor, k_rev, skip) -> dict:
        """Makes the taps' spectrum, complex (row of taps, n) in the order that the passes leave. Returns its fields."""
        at, p = self.layout, self.problem
        given = {"k": k, "k_rev": k_rev, "skip": skip}
        out = {"spectrum": self.empty(p.taps_rows, at.words)}
        if at.half:
            out["divisors"] = self.empty(p.taps_rows)
        if at.outer == 1:
            self.of_taps("spectrum", at.taps, 1, **out, **given)
            return out
        if at.half:
            self.of_taps("taps_divisors", at.column_taps, 1, **out, **given)
        with self.recipe.reused():
            rows = self.long_rows(p.sets, p.heads)
            self.of_columns("long_taps", p.taps_rows, long_rows=rows, **given)
            self.of_taps("spectrum", at.taps, at.outer, **out, k=_rows(rows, at.outer))
        return out

    def convolve(self, spectrum: dict, u, pre_gate, **sink) -> None:
        """Convolves. The sink holds y and post_gate, or dy, post_gate, dv and dpost_gate, for the kernels' Output."""
        if not self.layout.long:
            self.of_rows(self.kernel("forward"), **spectrum, u=u, pre_gate=pre_gate, **sink)
            return
        batch, channels, heads = self.problem.batch, self.problem.channels, self.problem.heads
        x, v = self.long_rows(batch, 1), self.long_rows(batch, heads)
        self.of_columns(
            f"long_input_{self.suffix}", batch * channels, long_rows=x, u=u, pre_gate=pre_gate
        )
        inner = {"u": _rows(x, self.layout.outer), "y": _rows(v, self.layout.outer)}
        self.of_rows("forward_c32", **spectrum, **inner)
        self.of_columns(f"long_output_{self.suffix}", batch * heads * channels, long_rows=v, **sink)

    def dskip_parts(self, parts: int, threads: int) -> Operand:
        """One number for every thread that sums up the skip's gradient; a thread serves one head and one channel."""
        return self.empty(parts, self.problem.heads, self.problem.channels, threads)

    def skip_gradient(self, dskip_parts: Operand, dskip: Operand) -> None:
        """Adds up the parts, for a bias too."""
        parts, heads, channels, threads = dskip_parts.shape
        if dskip.dim() == 1:  # one skip serves all heads, whose sums are parts as well
            parts, heads = parts * heads, 1
        launch = (heads * channels, SKIP_THREADS, 8 * SKIP_THREADS)
        told = {"parts": parts, "heads": heads, "channels": channels, "threads": threads}
        self.recipe.launch(
            "skip_gradient", launch, told | {"dskip_parts": dskip_parts, "dskip": dskip}
        )

    def bias_gradient(self, source: dict, dbias: Operand) -> None:
        """Adds up dv, which is dy times post_gate where `source` has none. It is read once more: the kernels that
        convolve have no registers left for it."""
        p, base = self.problem, self.layout.columns if self.layout.long else self.layout.rows
        rows, pieces = p.heads * p.channels, max(1, p.length // BIAS_STEPS)
        groups = min(p.batch, MAX_PARTS)
        parts = self.dskip_parts(groups * pieces, SKIP_THREADS)
        told = {name: source.get(name) for name in ("dy", "post_gate", "dv")}
        told |= {"groups": groups, "slots": pieces, "dskip_parts": parts}
        launch = (groups * pieces * rows, SKIP_THREADS, 0)
        self.run(f"bias_sums_{self.suffix}", launch, base, told)
        self.skip_gradient(parts, dbias)

    def gradients(self, spectrum: dict, source: dict, du, dpre_gate, dk, dk_rev, dskip) -> None:
        """Computes the gradients that are not None from u, pre_gate, dy, post_gate and dv in `source`."""
        at, p = self.layout, self.problem
        with_dk, with_dx = (
            dk is not None or dk_rev is not None,
            du is not None or dpre_gate is not None,
        )
        # Kernels on tensor cores sum up dk's spectrum in any case.
        summed = with_dk or at.half
        dk_parts = self.empty(at.parts, p.taps_rows, 2 * at.n) if summed else None
        sink = {"du": du, "dpre_gate": dpre_gate}
        taps = {"dk": dk, "dk_rev": dk_rev}
        if not at.long:
            dskip_parts = dskip and self.dskip_parts(at.parts * p.sets, at.row_threads)
            sums = {"dk_parts": dk_parts, "dskip_parts": dskip_parts}
            if at.aside:
                sums["x_spectra"] = self.empty(at.parts, p.taps_rows, at.words)
            heads = p.heads if at.half else 1  # the radix kernels take all heads at once
            if with_dx and heads > 1:
                sums["dx"] = self.empty(p.batch, p.channels, p.length)
            for head in range(heads):
                told = spectrum | sums | source | sink | ({"head": head} if heads > 1 else {})
                self.of_rows(self.kernel("backward"), **told)
        else:
            x, dv = self.long_rows(p.batch, 1), self.long_rows(p.batch, p.heads)
            dx = x if with_dx else None  # a row of x is read before its gradient is written
            signals = {name: source.get(name) for name in ("u", "pre_gate")}
            dskip_parts = dskip and self.dskip_parts(p.batch * at.tiles, at.column_threads)
            rows, head_rows = p.batch * p.channels, p.batch * p.heads * p.channels
            self.of_columns(f"long_input_{self.suffix}", rows, long_rows=x, **signals)
            given = {"long_rows": dv, "dskip_parts": dskip_parts, **source}
            self.of_columns(f"long_gradient_{self.suffix}", head_rows, **given)
            inner = {"u": _rows(x, at.outer), "dy": _rows(dv, at.outer)}
            inner["du"] = _rows(dx, at.outer) if with_dx else ABSENT
            self.of_rows("backward_c32", **spectrum, dk_parts=dk_parts, **inner)
            if with_dx:
                name = f"long_input_gradient_{self.suffix}"
                self.of_columns(name, rows, long_rows=dx, **sink, **signals)
        if dskip is not None:
            self.skip_gradient(dskip_parts, dskip)
        if with_dk and at.outer == 1:
            self.of_taps("taps_gradient", at.taps, 1, dk_parts=dk_parts, **taps)
        elif with_dk:
            rows = self.long_rows(p.sets, p.heads)
            inner = {"dk_parts": dk_parts, "dk": _rows(rows, at.outer)}
            self.of_taps("taps_gradient", at.taps, at.outer, **inner)
            self.of_columns("long_taps_gradient", p.taps_rows, long_rows=rows, **taps)


def _channels_at_once(problem: Problem, plans: list[Plan]) -> int:
    """How many channels a call takes at a time for its scratch memory to stay within SCRATCH_BYTES.

    plans: forward, and perhaps backward.
    """
    count = problem.channels
    for plan in plans:
        if plan.long:
            signals = 2 + 2 * problem.heads
            each = 8 * plan.n * (problem.batch * signals + 3 * problem.heads * problem.sets)
            count = max(1, min(count, SCRATCH_BYTES // each))
    for plan in plans[1:]:
        if plan.engine == "half" and (plan.outer > 1 or plan.aside):
            # These are the taps' spectra, the sums of their gradients, x's spectra, and the rows of the sums' inverse.
            each = plan.n * (4 + plan.parts * (8 + 4 * plan.aside) + 8)
            count = max(1, min(count, SCRATCH_BYTES // (each * problem.sets * problem.heads)))
    return count


def _slices(problem: Problem, plans: list[Plan]):
    count = _channels_at_once(problem, plans)
    for start in range(0, problem.channels, count):
        yield start, min(count, problem.channels - start)


class Prepared:
    """The recipes of a call for all of its channels, of which each recipe takes some."""

    def __init__(self, tensors, axes, problem: Problem, plans: list[Plan], write):
        """axes says where each tensor has its channels, or None. write(recipe, problem, *tensors) makes the launches
        for some of them."""
        placed = [*zip(tensors, axes, strict=True)]

        @functools.cache
        def made(count: int):
            cut = [t if None in (t, axis) else t.cut(axis, count) for t, axis in placed]
            recipe = Recipe(len(tensors))
            write(recipe, replace(problem, channels=count), *cut)
            return recipe

        self.parts = [(start, made(count)) for start, count in _slices(problem, plans)]
        self.floats = -(-max(recipe.bytes for _, recipe in self.parts) // 4)
        # These are bytes from one channel to the next.
        self.steps = [
            0 if None in (t, axis) else t.strides[axis] * t.element_size() for t, axis in placed
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


AXES = (
    -2,
    -2,
    -2,
    -1,
    -2,
    -2,
    -1,
)  # the inputs have their channels there
KEPT = 512  # so many kinds of calls are known at a time


@functools.lru_cache(KEPT)
def _forward(limits: Limits, activation: str, fast: bool, *known) -> Prepared:
    """Prepares a call of y and the inputs."""
    made = operands(known)
    y, u, k, k_rev, _, *gates, bias = made
    beside = _beside(*gates, activation, bias is not None)
    problem = _describe(u, k, k_rev, fast, [y, u, *gates], beside)
    plan = make_plan(problem, limits)

    def write(recipe, problem, y, u, k, k_rev, skip, pre_gate, post_gate, bias):
        call = Call(recipe, problem, plan, u, activation, backward=False)
        sink = {"y": y, "post_gate": post_gate, "bias": bias}
        call.convolve(call.spectrum(k, k_rev, skip), u, pre_gate, **sink)

    return Prepared(made, (-2, *AXES), problem, [plan], write)


@functools.lru_cache(KEPT)
def _backward(limits: Limits, activation: str, fast: bool, *known) -> Prepared:
    """Prepares a call of dy, the inputs and their gradients."""
    made = operands(known)
    dy, u, k, k_rev, _, pre_gate, post_gate, bias, du, *_, dpre_gate, dpost_gate, dbias = made
    linear = any(t is not None for t in made[8:13])
    # Where the pre-activation is needed, a forward pass of its own computes it. Everything behind it is linear.
    with_dv = activation != "none" and (linear or dbias is not None)
    gates = pre_gate, post_gate
    describe = functools.partial(_describe, u, k, k_rev, fast)
    if with_dv:
        # dv may be of u's dtype where the kernel multiplies dy with the slope before it rounds.
        slope = activation == "gelu" and gates == (None, None) and u.dtype == torch.bfloat16
        again = make_plan(describe([u, dy], "slope" if slope else None), limits)
        slope = "_slope" in again.form
    else:
        beside = _beside(pre_gate, dy, activation, bias is not None)
        again = make_plan(describe([u, pre_gate, dy, dpost_gate], beside), limits)
    if with_dv and not slope:
        beside = None  # dv is float32
    else:
        beside = {0: "", 2: "gated"}.get(2 - gates.count(None))
    grads = [du, dpre_gate]
    problem = describe([u, *gates, dy, *grads], beside)
    plan = make_plan(problem, limits, backward=True)

    def write(recipe, problem, dy, u, k, k_rev, skip, pre_gate, post_gate, bias, *grads):
        source = {"u": u, "pre_gate": pre_gate, "dy": dy, "post_gate": post_gate}
        du, dk, dk_rev, dskip, dpre_gate, dpost_gate, dbias = grads
        if with_dv or dpost_gate is not None:
            call = Call(recipe, problem, again, u, activation, backward=False)
            sink = {"y": dpost_gate, "post_gate": dy}  # dy times what came of the activation
            shape = (problem.batch, problem.heads, problem.channels, problem.length)
            if with_dv and slope:
                source["dy"] = sink["y"] = recipe.empty(*shape, dtype=u.dtype)
            elif with_dv:
                source["dv"] = recipe.empty(*shape)
                sink = {name: source.get(name) for name in ("dy", "post_gate", "dv")}
                sink["dpost_gate"] = dpost_gate
            with recipe.reused():
                call.convolve(call.spectrum(k, k_rev, skip), u, pre_gate, **sink, bias=bias)
        call = Call(recipe, problem, plan, u, "none", backward=True)
        if dbias is not None:
            with recipe.reused():
                call.bias_gradient(source, dbias)
        if linear:
            spectrum = call.spectrum(k, k_rev, skip)
            call.gradients(spectrum, source, du, dpre_gate, dk, dk_rev, dskip)

    return Prepared(made, (-2, *AXES, *AXES), problem, [again, plan], write)


def forward(device, y, u, k, k_rev, skip, pre_gate, post_gate, bias, activation) -> None:
    """Writes y; see seqconv.backends.inputs for the shapes."""
    if y.numel() == 0:
        return
    tensors = [y, u, k, k_rev, skip, pre_gate, post_gate, bias]
    prepared = _forward(device.limits, activation, _fast(u.dtype), *geometries(tensors))
    prepared.run(device, tensors)


def backward(device, grads, dy, u, k, k_rev, skip, pre_gate, post_gate, bias, activation) -> None:
    """Writes the gradients that are not None, in the order of the inputs."""
    if dy.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    zero_unreached(grads[1], grads[2], u.shape[-1])
    tensors = [dy, u, k, k_rev, skip, pre_gate, post_gate, bias, *grads]
    prepared = _backward(device.limits, activation, _fast(u.dtype), *geometries(tensors))
    prepared.run(device, tensors)
