"""Packed rows on a device: each group of rows (groups.py) is launched as a dense call is (convolution.py).

Offsets on the host are grouped there and copied to the device without a wait. Offsets on the device are read by the
kernels alone, and all rows are one group, that of the longest row which the caller promises.
"""

import functools

import torch
from torch import Tensor

from seqconv.backends.cuda.convolution import AXES, KEPT, Call, Prepared
from seqconv.backends.cuda.groups import Group, grouped, plan_of, size_of
from seqconv.backends.cuda.kernels import KERNELS
from seqconv.backends.cuda.plan import Plan
from seqconv.backends.cuda.problem import Limits, Problem
from seqconv.backends.cuda.recipe import geometries, operands
from seqconv.backends.pack import reached, zero_unreached

MOST_STEPS = (1 << 31) - 1  # of a pack: the kernels count them in 32 bits
CAPTURED = (
    "fftconv: a CUDA graph cannot capture offsets that are on the CPU, because it would repeat those of the "
    "capture; give cu_seqlens on the GPU, and max_seqlen"
)
_SHARED = (
    "k",
    "k_rev",
    "skip",
    "bias",
)  # gradients are summed over rows, unless each row has its own


class _Pack:
    """The groups of a call, and for each of them what its kernels read of the rows: offsets, and the rows' numbers."""

    def __init__(self, device, offsets: Tensor, like: Tensor, longest: int | None):
        if longest is not None:
            count = len(offsets) - 1
            self.groups = [Group(count, size_of(longest), longest)] if count and longest else []
            self.tables = [(offsets, None)] * len(self.groups)
            return
        self.groups, order = grouped(offsets)
        table, rows = torch.cat([offsets, order]), len(order)
        if like.is_cuda:
            if device.table.capturing():
                raise RuntimeError(CAPTURED)
            # Only of pinned memory does a copy go on while the host does.
            table = table.pin_memory().to(like.device, non_blocking=True)
        counts = [group.count for group in self.groups]
        numbers = table[len(table) - sum(counts) :].split(counts)
        self.tables = [(table[: rows + 1], own) for own in numbers]

    def __iter__(self):
        return iter(zip(self.groups, self.tables, strict=True))


class _Call(Call):
    """The launches of one group. `pack` has what kernels read of the rows, and `taps` the taps that meet an output."""

    def __init__(self, recipe, problem, plan, u, activation, backward, pack: dict, taps: dict):
        super().__init__(recipe, problem, plan, u, activation, backward)
        self.pack, self.taps = pack, taps

    def run(self, kernel: str, launch, base, fields: dict) -> None:
        of_taps = "taps" in kernel or kernel == "spectrum"
        whole = self.layout.outer == 1 or kernel.startswith("long")  # else pieces of rows of taps
        if kernel.endswith("taps_gradient") and whole:
            fields = fields | self.taps
        of_rows = self.problem.per_sample and whole if of_taps else True
        if of_rows and f"packed_{kernel}" in KERNELS:
            kernel, fields = f"packed_{kernel}", fields | self.pack
        super().run(kernel, launch, base, fields)


def describe(u, k, k_rev, group: Group) -> Problem:
    """A group as a problem, of the kernels that compute in float32."""
    heads = 1 if k.dim() == 2 else k.shape[-3]
    taps = reached(group.size, k.shape[-1], 0 if k_rev is None else k_rev.shape[-1])
    return Problem(
        group.count,
        heads,
        u.shape[-2],
        group.size,
        *taps,
        k.dim() == 4,
        u.element_size(),
        fast=False,
        pieces=False,
        beside=None,
    )


def _told(group: Group, u, k, k_rev, offsets, rows) -> tuple[dict, dict]:
    """What the kernels read of the rows, and the taps that meet an output."""
    narrow = int(offsets.dtype == torch.int32)
    pack = {"length": u.shape[-1], "longest": group.longest, "narrow": narrow}
    taps = reached(group.longest, k.shape[-1], 0 if k_rev is None else k_rev.shape[-1])
    return (
        pack | {"offsets": offsets, "rows": rows},
        dict(zip(("taps", "taps_rev"), taps, strict=True)),
    )


@functools.lru_cache(KEPT)
def _forward(limits: Limits, activation: str, group: Group, *known) -> Prepared:
    """Prepares a call of y, the inputs, offsets and rows."""
    made = operands(known)
    _, u, k, k_rev, *_ = made
    problem = describe(u, k, k_rev, group)
    plan = plan_of(problem, group, limits)

    def write(recipe, problem, y, u, k, k_rev, skip, pre_gate, post_gate, bias, offsets, rows):
        told = _told(group, u, k, k_rev, offsets, rows)
        call = _Call(recipe, problem, plan, u, activation, False, *told)
        sink = {"y": y, "post_gate": post_gate, "bias": bias}
        call.convolve(call.spectrum(k, k_rev, skip), u, pre_gate, **sink)

    return Prepared(made, (-2, *AXES, None, None), problem, [plan], write)


@functools.lru_cache(KEPT)
def _backward(limits: Limits, activation: str, group: Group, *known) -> Prepared:
    """Prepares a call of dy, the inputs, their gradients, offsets and rows."""
    made = operands(known)
    _, u, k, k_rev, *_ = made
    problem = describe(u, k, k_rev, group)
    again, plan = plan_of(problem, group, limits), plan_of(problem, group, limits, True)
    linear, with_dbias = any(t is not None for t in made[8:13]), made[14] is not None
    # Where the pre-activation is needed, a forward pass of its own computes it. Everything behind it is linear.
    with_dv = activation != "none" and (linear or with_dbias)

    def write(recipe, problem, dy, u, k, k_rev, skip, pre_gate, post_gate, bias, *others):
        du, dk, dk_rev, dskip, dpre_gate, dpost_gate, dbias, offsets, rows = others
        told = _told(group, u, k, k_rev, offsets, rows)
        source = {"u": u, "pre_gate": pre_gate, "dy": dy, "post_gate": post_gate}
        if with_dv:
            source["dv"] = recipe.empty(problem.heads, problem.channels, u.shape[-1])
            sink = {name: source[name] for name in ("dy", "post_gate", "dv")}
            sink["dpost_gate"] = dpost_gate
        else:
            sink = {"y": dpost_gate, "post_gate": dy}
        if with_dv or dpost_gate is not None:
            call = _Call(recipe, problem, again, u, activation, False, *told)
            with recipe.reused():
                call.convolve(call.spectrum(k, k_rev, skip), u, pre_gate, **sink, bias=bias)
        call = _Call(recipe, problem, plan, u, "none", True, *told)
        if dbias is not None:
            with recipe.reused():
                call.bias_gradient(source, dbias)
        if linear:
            spectrum = call.spectrum(k, k_rev, skip)
            call.gradients(spectrum, source, du, dpre_gate, dk, dk_rev, dskip)

    axes = (-2, *AXES, *AXES, None, None)
    return Prepared(made, axes, problem, [again, plan], write)


def forward(device, y, inputs, offsets: Tensor, activation: str, longest: int | None) -> None:
    """Writes y; see seqconv.ops.packed for the shapes."""
    pack = _Pack(device, offsets, y, longest)
    if not pack.groups:
        y.zero_()
    for group, tables in pack:
        tensors = [y, *inputs, *tables]
        prepared = _forward(device.limits, activation, group, *geometries(tensors))
        prepared.run(device, tensors)


def backward(device, grads, dy, inputs, offsets, activation: str, longest: int | None) -> None:
    """Writes the gradients that are not None, in the order of the inputs."""
    pack = _Pack(device, offsets, dy, longest)
    if not pack.groups:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    own = {} if inputs.k.dim() < 4 else {"k": grads.k, "k_rev": grads.k_rev}
    for grad in own.values():
        if grad is not None:
            grad.zero_()
    shared = {name: getattr(grads, name) for name in _SHARED if name not in own}
    shared = {name: grad for name, grad in shared.items() if grad is not None}
    if len(pack.groups) == 1:
        zero_unreached(shared.get("k"), shared.get("k_rev"), pack.groups[0].longest)
        _of_group(device, grads, dy, inputs, activation, *next(iter(pack)))
        return
    sums = {name: torch.zeros_like(g, dtype=torch.float32) for name, g in shared.items()}
    for group, tables in pack:  # in the order of their sizes, whatever the order of the rows
        parts = _parts(sums, group)
        _of_group(device, grads._replace(**parts), dy, inputs, activation, group, tables)
        for name, part in parts.items():
            sums[name][..., : part.shape[-1]] += part
    for name, total in sums.items():
        shared[name].copy_(total)


def _parts(sums: dict, group: Group) -> dict:
    """Memory for what one group adds to gradients that all rows share: of taps that meet an output."""
    most = {"k": group.longest, "k_rev": group.longest - 1}
    counts = {name: min(s.shape[-1], most.get(name, s.shape[-1])) for name, s in sums.items()}
    return {name: s.new_empty(*s.shape[:-1], counts[name]) for name, s in sums.items()}


def _of_group(device, grads, dy, inputs, activation: str, group: Group, tables) -> None:
    tensors = [dy, *inputs, *grads, *tables]
    prepared = _backward(device.limits, activation, group, *geometries(tensors))
    prepared.run(device, tensors)


def plan_of_longest(limits: Limits, u, k, k_rev, rows: int, longest: int) -> Plan:
    """The plan of the group of the longest row, if all rows were in it."""
    group = Group(rows, size_of(longest), longest)
    return plan_of(describe(u, k, k_rev, group), group, limits)
