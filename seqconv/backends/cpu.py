"""The CPU kernels as a backend, and those of fftconv: tensors as plain integers for seqconv._C."""

from array import array
from functools import lru_cache

import torch
from torch import Tensor

from seqconv.backends.cpu_models import (  # noqa: F401
    butterfly,
    butterfly_gradients,
    butterfly_product,
    butterfly_product_gradients,
    empty_in_huge_pages,
    glu,
    glu_gradients,
    holds_butterfly,
    s4d_modes,
    s4d_modes_gradients,
    ssm,
    ssm_gradients,
    ssm_step,
    stream_name,
    stream_spectra,
    stream_step,
)
from seqconv.backends.extension import (  # noqa: F401
    _C,
    compiler,
    isa,
    missing,
    same_bytes,
    same_items,
    set_isa,
    threaded,
    threads,
)
from seqconv.backends.inputs import IS_SIGNAL
from seqconv.backends.offsets import offsets_of
from seqconv.backends.pack import (
    ABSENT,
    ACTIVATIONS,
    KERNEL,
    SIGNAL,
    SKIP,
    laid_out,
    reach,
    reached,
    zero_unreached,
)
from seqconv.backends.protocol import Explanation, Request

name = "cpu"
always = (
    frozenset()
    if missing
    else frozenset(
        (
            *("fftconv", "fftconv_packed", "ssm", "s4d_kernel", "ssm_step", "stream"),
            *("butterfly_product", "glu"),
        )
    )
)


def method(length: int, taps: int, taps_rev: int, double: bool) -> tuple[int, int]:
    """Points of one transform (0: a direct sum) and how many of them cover a row."""
    return _C.method(length, taps, taps_rev, double)


def why_not(request: Request) -> str | None:
    if missing or request.operator in always:
        return missing or None
    if request.operator != "butterfly":
        return f"there is no CPU kernel for {request.operator}"
    radices = tuple(request.options[0])
    return None if holds_butterfly(radices) else f"there are no CPU kernels for passes of {radices}"


def _explain_packed(request: Request) -> Explanation:
    """The plan of the longest row, and how many rows have transforms of which size."""
    *dense, cu_seqlens = request.inputs
    u, k, k_rev = dense[:3]
    rows: dict[int, int] = {}
    longest, how = 0, (0, 1)
    for length in offsets_of(cu_seqlens, u.shape[-1]).diff().tolist():
        taps = reach(length, k, k_rev)
        found = method(length, *taps, u.dtype == torch.float64) if length else (0, 1)
        rows[found[0]] = rows.get(found[0], 0) + 1
        if length > longest:
            longest, how = length, found
    size, blocks = how
    parts = [
        f"{count} of {n} points" if n else f"{count} summed directly" for n, count in rows.items()
    ]
    plan = f"{sum(rows.values())} rows: {', '.join(parts)}"
    algorithm = "right-angle fft" if size else "direct sum"
    return Explanation("cpu", algorithm, size or None, blocks, isa(), threads(), None, plan)


def explain(request: Request) -> Explanation:
    if request.operator == "fftconv_packed":
        return _explain_packed(request)
    if request.operator != "fftconv":
        return Explanation("cpu", "matrix product", None, 1, isa(), threads(), None)
    u, k, k_rev, *_ = request.inputs
    length = u.shape[-1]
    if request.options[2:] == (True,):
        levels, size = _C.exact_method(length, k.shape[-1])
        several = "1 level" if levels == 1 else f"{levels} levels"
        algorithm = f"{several} of exactly causal tiles" if levels else "direct sum"
        return Explanation("cpu", algorithm, size or None, 1, isa(), threads(), None)
    size, blocks = method(max(length, 1), *reach(length, k, k_rev), u.dtype == torch.float64)
    algorithm = "direct sum" if size == 0 else "right-angle fft"
    return Explanation("cpu", algorithm, size or None, blocks, isa(), threads(), None)


# ---- fftconv ----

_INPUTS = (SIGNAL, KERNEL, KERNEL, SKIP, SIGNAL, SIGNAL, SKIP)  # see seqconv.backends.inputs
_TENSORS = (*_INPUTS, SIGNAL, *_INPUTS)  # and y or dy, and the gradients


def _per_head(skip: tuple | None) -> bool:
    return skip is not None and len(skip[1]) == 2


@lru_cache(4096)
def _layout(activation: str, every_tap: bool, *known) -> bytes:
    """The first argument of _C.forward or _C.backward. `known` has everything of each tensor but where it lies."""
    (dtype, (batch, channels, length), _), (_, k, _), k_rev, skip, _, _, bias, *_ = known
    flags = (len(k) == 4) + 2 * _per_head(skip) + 4 * _per_head(bias)
    taps = reached(length, k[-1], 0 if k_rev is None else k_rev[1][-1])
    taps = (k[-1], 0) if every_tap else taps
    numbers = [batch, 1 if len(k) == 2 else k[-3], channels, length, *taps]
    numbers += [flags, dtype == torch.float64, ACTIVATIONS[activation]]
    for one, table in zip(known, _TENSORS, strict=False):
        numbers += ABSENT[1:] if one is None else laid_out(one[0], one[2], table)
    return array("q", numbers).tobytes()


def _call(function, tensors: tuple, activation: str, every_tap: bool = False) -> None:
    """One loop over the tensors: around a short row Python's work takes longer than the kernel."""
    known, addresses = [], []
    for t in tensors:
        if t is None:
            known.append(None)
            addresses.append(0)
        else:
            known.append((t.dtype, t.shape, t.stride()))
            addresses.append(t.data_ptr())
    function(
        _layout(activation, every_tap, *known),
        torch.get_num_threads() if threaded else 1,
        *addresses,
    )


def fftconv(y: Tensor, inputs, activation: str) -> None:
    _call(_C.forward, (*inputs, y), activation)


def fftconv_gradients(grads, dy: Tensor, inputs, activation: str) -> None:
    length = dy.shape[-1]
    if inputs.k.shape[-1] > length or inputs.k_rev is not None:
        zero_unreached(grads.k, grads.k_rev, length)
    _call(_C.backward, (*inputs, dy, *grads), activation)


# Of packed signals, (channels, total) or (heads, channels, total), the axes are those of a kernel.
_PACKED_INPUTS = (KERNEL, KERNEL, KERNEL, SKIP, KERNEL, KERNEL, SKIP)
_PACKED_TENSORS = (*_PACKED_INPUTS, KERNEL, *_PACKED_INPUTS)


@lru_cache(4096)
def _packed_layout(activation: str, *known) -> bytes:
    """As _layout. The number of rows comes with them."""
    rows, (dtype, (channels, total), _), (_, k, _), k_rev, skip, _, _, bias, *_ = known
    flags = (len(k) == 4) + 2 * _per_head(skip) + 4 * _per_head(bias)
    numbers = [rows, 1 if len(k) == 2 else k[-3], channels, total, k[-1]]
    numbers += [0 if k_rev is None else k_rev[1][-1], flags, dtype == torch.float64]
    numbers.append(ACTIVATIONS[activation])
    for one, table in zip(known[1:], _PACKED_TENSORS, strict=False):
        numbers += ABSENT[1:] if one is None else laid_out(one[0], one[2], table)
    return array("q", numbers).tobytes()


def _call_packed(function, tensors: tuple, offsets: Tensor, activation: str) -> None:
    known = [None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    layout = _packed_layout(activation, len(offsets) - 1, *known)
    function(layout, torch.get_num_threads() if threaded else 1, *addresses, offsets.data_ptr())


def reads_offsets(offsets: Tensor) -> bool:
    return False  # they are checked, and then on the host


def fftconv_packed(y: Tensor, inputs, offsets: Tensor, activation: str) -> None:
    _call_packed(_C.forward_packed, (*inputs, y), offsets, activation)


def fftconv_packed_gradients(grads, dy: Tensor, inputs, offsets: Tensor, activation: str) -> None:
    # Those of kernels, skip and bias are summed up over groups of rows, in the precision of the sums.
    wide = torch.promote_types(dy.dtype, torch.float32)
    found = [
        g if g is None or signal else g.new_zeros(g.shape, dtype=wide)
        for g, signal in zip(grads, IS_SIGNAL, strict=True)
    ]
    _call_packed(_C.backward_packed, (*inputs, dy, *found), offsets, activation)
    for grad, value in zip(grads, found, strict=True):
        if grad is not value:
            grad.copy_(value)


def _like(t: Tensor | None) -> Tensor | None:
    """t, or new memory of its kind where time is not innermost: the exact kernels take channels one by one."""
    return t if t is None or t.stride(-1) == 1 else t.new_empty(t.shape)


def _time_innermost(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def fftconv_exact(y: Tensor, inputs, activation: str) -> None:
    inputs, v = map(_time_innermost, inputs), _like(y)
    _call(_C.exact_forward, (*inputs, v), activation, every_tap=True)
    if v is not y:
        y.copy_(v)


def fftconv_exact_gradients(grads, dy: Tensor, inputs, activation: str) -> None:
    inputs, found = map(_time_innermost, (*inputs, dy)), [*map(_like, grads)]
    zero_unreached(found[1], None, dy.shape[-1])
    _call(_C.exact_backward, (*inputs, *found), activation, every_tap=True)
    for grad, value in zip(grads, found, strict=True):
        if value is not grad:
            grad.copy_(value)
