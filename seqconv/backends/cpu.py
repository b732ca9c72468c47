"""The CPU kernels: packs tensors into plain integers for seqconv._C and lends it torch's threads."""

import ctypes
import math
import os
import sys
import warnings
from array import array
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from seqconv.backends.inputs import IS_SIGNAL
from seqconv.backends.offsets import offsets_of
from seqconv.backends.pack import (
    ABSENT,
    ACTIVATIONS,
    DTYPES,
    KERNEL,
    SIGNAL,
    SKIP,
    STEP,
    laid_out,
    pack,
    reach,
    reached,
    zero_unreached,
)
from seqconv.backends.protocol import Explanation, Request

try:
    from seqconv import _C
except ImportError as error:
    _C = None
    _folder = Path(__file__).resolve().parents[2]
    _why = f"does not load ({error})" if find_spec("seqconv._C") else "is not installed"
    missing = f"the compiled extension seqconv._C {_why}"
    if (_folder / "setup.py").exists():
        missing = (
            f"the compiled extension seqconv._C {_why} in the source folder {_folder}, which Python took for the "
            f"package: pip install --editable '{_folder}' builds it there; or start Python in another folder"
        )
    text = f"seqconv: {missing}; fftconv takes torch.fft, slower: see python -m seqconv"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
else:
    missing = ""


def _lend_threads() -> bool:
    """Hands torch's stable C function torch_parallel_for to the extension; without it, it runs serially."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        function = ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return False
    _C.set_parallel_for(function)
    return True


threaded = _C is not None and _lend_threads()
if (
    _C is not None
    and os.environ.get("SEQCONV_CPU_ISA")
    and not _C.set_isa(os.environ["SEQCONV_CPU_ISA"])
):
    raise ValueError(
        f"SEQCONV_CPU_ISA={os.environ['SEQCONV_CPU_ISA']} does not run on this processor or is unknown"
    )

name = "cpu"
always = (
    frozenset()
    if missing
    else frozenset(("fftconv", "fftconv_packed", "ssm", "ssm_step", "stream"))
)


def compiler() -> str:
    return _C.compiler()


def set_isa(name: str) -> bool:
    """False if the processor cannot run it."""
    return _C.set_isa(name)


def isa() -> str:
    return _C.isa()


def method(length: int, taps: int, taps_rev: int, double: bool) -> tuple[int, int]:
    """Points of one transform (0: a direct sum) and how many of them cover a row."""
    return _C.method(length, taps, taps_rev, double)


def threads() -> int:
    return torch.get_num_threads() if threaded and not _C.forked() else 1


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
    threads = torch.get_num_threads() if threaded else 1  # a forked child takes one
    function(_layout(activation, every_tap, *known), threads, *addresses)


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
    threads = torch.get_num_threads() if threaded else 1
    function(layout, threads, *addresses, offsets.data_ptr())


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


# ---- the learned butterfly ----


def holds_butterfly(radices: tuple[int, ...]) -> bool:
    """Whether the kernels have such passes: of 16 points, and at most one, the last, of fewer."""
    last = radices[-1]
    return set(radices[:-1]) <= {16} and (last == 16 or (len(radices) > 1 and last in (2, 4, 8)))


@lru_cache(16)
def _twiddles(radices: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of every pass but the last exp(-2 pi i p j / (r s)), real parts (s, r), then imaginary ones."""
    s, parts = math.prod(radices), []
    for radix in radices[:-1]:
        s //= radix
        p, j = (torch.arange(m, dtype=torch.float64) for m in (radix, s))
        turn = j[:, None] * p * (-2 * math.pi / (radix * s))
        parts += [turn.cos().flatten(), turn.sin().flatten()]
    return torch.cat(parts or [torch.zeros(2 * s)]).to(dtype)  # of a single pass none is read


def _butterfly(x: Tensor, matrices: Tensor, radices, *rest) -> None:
    asked = torch.get_num_threads() if threaded else 1
    sizes = (*x.shape, matrices.shape[0], math.prod(radices), x.dtype == torch.float64, asked)
    twiddles = _twiddles(radices, matrices.dtype)  # alive until the call is over
    _C.butterfly(*sizes, *pack(x, SIGNAL), matrices.data_ptr(), twiddles.data_ptr(), *rest)


def butterfly(z: Tensor, inputs, radices: tuple[int, ...]) -> None:
    matrices = inputs.matrices.to(z.dtype).contiguous()
    _butterfly(inputs.x, matrices, radices, z.data_ptr())


def butterfly_gradients(grads, dz: Tensor, inputs, radices: tuple[int, ...]) -> None:
    x, matrices = inputs.x, inputs.matrices
    dx, dmatrices = grads
    wide = torch.promote_types(x.dtype, torch.float32)
    dz, factors = (t.to(wide).contiguous() for t in (dz, matrices))
    sums = torch.empty_like(factors)
    _butterfly(x, factors, radices, dz.data_ptr(), *pack(dx, SIGNAL), sums.data_ptr())
    dmatrices.copy_(sums)


# ---- sums of exponentials ----


def _ssm(function_of: Tensor, inputs, *rest) -> None:
    a, w = inputs.a.contiguous(), inputs.w.contiguous()
    heads, channels, modes, _ = w.shape
    asked = torch.get_num_threads() if threaded else 1
    single = function_of.dtype == torch.float32
    sizes = (heads, channels, modes, function_of.shape[-1], single, asked)
    _C.ssm(*sizes, a.data_ptr(), w.data_ptr(), function_of.data_ptr(), *rest)


def ssm(k: Tensor, inputs) -> None:
    _ssm(k, inputs)


def ssm_gradients(grads, dk: Tensor, inputs) -> None:
    _ssm(dk, inputs, *dk.stride(), *[grad.data_ptr() for grad in grads])


def ssm_step(y: Tensor, inputs, activation: str) -> None:
    state, x, skip, power, input, output = inputs
    batch, channels = x.shape
    # One call with plain arguments: around one step even the unpacking of a tuple takes a part of the time.
    _C.ssm_step(
        batch,
        skip.shape[0],
        channels,
        state.shape[2],
        ACTIVATIONS[activation],
        torch.get_num_threads() if threaded else 1,
        state.data_ptr(),
        power.data_ptr(),
        input.data_ptr(),
        output.data_ptr(),
        y.data_ptr(),
        x.data_ptr(),
        DTYPES[x.dtype],
        *x.stride(),
        skip.data_ptr(),
        DTYPES[skip.dtype],
        *skip.stride(),
    )


# ---- streams ----


def empty_in_huge_pages(like: Tensor, shape) -> Tensor:
    """New memory, of large pages where the system has them: a step touches all rows, far apart, and would miss a
    small page's translation for each."""
    t = like.new_empty(shape)
    # Tensors of a graph and of torch.func's transforms have no address.
    if missing or torch.compiler.is_compiling() or type(t) is not Tensor or not t.is_cpu:
        return t
    if not torch._C._functorch.is_functorch_wrapped_tensor(t):  # pyright: ignore
        _C.prefer_huge_pages(t.data_ptr(), t.nbytes)
    return t


def stream_name() -> str:
    return f"cpu {isa()}"


def stream_spectra(k: Tensor, period: int) -> Tensor:
    heads, channels, count = k.shape
    double = k.dtype == torch.float64
    spectra = empty_in_huge_pages(k, (heads * channels * _C.stream_spectrum_size(period, double),))
    asked = torch.get_num_threads() if threaded else 1
    sizes = (heads, channels, count, period, double, asked)
    _C.stream_spectra(*sizes, k.data_ptr(), spectra.data_ptr())
    return spectra


def stream_step(y, u, pre_gate, post_gate, rings, taps, spectra, activation, spread) -> None:
    batch, heads, channels = y.shape
    inputs, sums, clock = rings
    _C.stream_step(
        batch,
        heads,
        channels,
        inputs.shape[1] * inputs.shape[3],
        inputs.dtype == torch.float64,
        spread,
        ACTIVATIONS[activation],
        torch.get_num_threads() if threaded else 1,
        *pack(u, STEP),
        *pack(pre_gate, STEP),
        *pack(post_gate, STEP),
        *pack(y, STEP),
        inputs.data_ptr(),
        sums.data_ptr(),
        clock.data_ptr(),
        taps.data_ptr(),
        spectra.data_ptr(),
    )


# ---- comparison: of memory by same_bytes(address, address, bytes, ...), and of dictionaries, pair by pair, by
# same_items(dict, dict, ...): whether they hold the same objects under the same names in the same order ----

if _C is not None:
    same_bytes, same_items = _C.same_bytes, _C.same_items
