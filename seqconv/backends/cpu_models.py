"""The CPU kernels of state space models, learned butterflies and streams: tensors as plain integers for seqconv._C."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from seqconv.backends.extension import _C, isa, missing, threaded
from seqconv.backends.pack import ACTIVATIONS, DTYPES, SIGNAL, STEP, pack

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
    sizes = (
        *x.shape,
        matrices.shape[0],
        math.prod(radices),
        x.dtype == torch.float64,
        torch.get_num_threads() if threaded else 1,
    )
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


_TILE = 1 << 19  # numbers of a half spectrum that are transformed while they are in the caches
_NARROWEST = (
    8  # channels of a tile: v has channels last, and lines of memory shall be written in few parts
)


def _channels(batch: int, heads: int, channels: int, n: int) -> list[slice]:
    """Some channels after the other."""
    step = max(_TILE // (batch * heads * n), _NARROWEST)
    return [slice(i, min(i + step, channels)) for i in range(0, channels, step)]


def _real_part(half: Tensor, tensors, own: slice, *grads: Tensor | None) -> None:
    """half (batch, heads, channels of `own`, n / 2 + 1), complex, and u and k, of whose channels these are some."""
    u = tensors[0]
    n, double = u.shape[2], u.dtype == torch.float64
    sizes = (*half.shape[:3], n, double, torch.get_num_threads() if threaded else 1)
    given = []
    for t in tensors:
        given += [t[:, own].data_ptr(), t.stride(0)]
    found = [0 if t is None else t[:, own].data_ptr() for t in grads]
    _C.real_part(*sizes, *given, half.data_ptr(), *found)


def butterfly_product(v: Tensor, inputs) -> None:
    """Half of a Hermitian spectrum has the same real part as the product, and costs half a transform."""
    tensors = [t.contiguous() for t in inputs]
    batch, heads, channels, length = v.shape
    u = tensors[0]
    n, kind = u.shape[2], torch.complex128 if u.dtype == torch.float64 else torch.complex64
    for own in _channels(batch, heads, channels, n):
        half = u.new_empty(batch, heads, own.stop - own.start, n // 2 + 1, dtype=kind)
        _real_part(half, tensors, own)
        v[:, :, own] = torch.fft.irfft(half, n)[..., :length]


def butterfly_product_gradients(grads, dv: Tensor, inputs) -> None:
    tensors = [t.contiguous() for t in inputs]
    batch, heads, channels, _ = dv.shape
    n = tensors[0].shape[2]
    for own in _channels(batch, heads, channels, n):
        half = torch.fft.rfft(dv[:, :, own].to(tensors[0].dtype), n)
        _real_part(half.contiguous(), tensors, own, *grads)


# ---- sums of exponentials ----


def _ssm(function_of: Tensor, inputs, *rest) -> None:
    a, w = inputs.a.contiguous(), inputs.w.contiguous()
    heads, channels, modes, _ = w.shape
    single = function_of.dtype == torch.float32
    sizes = (
        heads,
        channels,
        modes,
        function_of.shape[-1],
        single,
        torch.get_num_threads() if threaded else 1,
    )
    _C.ssm(*sizes, a.data_ptr(), w.data_ptr(), function_of.data_ptr(), *rest)


def ssm(k: Tensor, inputs) -> None:
    _ssm(k, inputs)


def ssm_gradients(grads, dk: Tensor, inputs) -> None:
    _ssm(dk, inputs, *dk.stride(), *[grad.data_ptr() for grad in grads])


_WIDE = (torch.float32, torch.float64)
_POSITIVE = {"exp": 0, "relu": 1, "softplus": 2, "sigmoid": 3, "none": 4}  # csrc/cpu/modes.h


def _modes(a: Tensor, w: Tensor, inputs, options, *grads: Tensor | None) -> None:
    (discretization, dt_transform, real, imag), copies, dt_sinh, bandlimit, rate = options
    heads, channels, modes, _ = w.shape
    no_imaginary_parts = inputs.inv_A_imag is None
    numbers = []
    # Hooks on saved tensors may return narrower ones.
    tensors = [
        t if t is None or (t.dtype in _WIDE and t.is_contiguous()) else t.double().contiguous()
        for t in inputs
    ]
    for t in tensors:
        numbers += (0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype])
    found = []
    for g in grads:
        found += (0, 0) if g is None else (g.data_ptr(), DTYPES[g.dtype])
    _C.modes(
        heads,
        channels,
        modes,
        channels // copies,
        _POSITIVE[real],
        _POSITIVE[imag],
        discretization == "bilinear",
        no_imaginary_parts,
        dt_transform == "softplus",
        dt_sinh,
        inputs.inv_dt.dim() == 1,
        torch.get_num_threads() if threaded else 1,
        1.0 if discretization == "dss" else 2.0,
        rate,
        math.inf if bandlimit is None else bandlimit / 2,
        *numbers,
        a.data_ptr(),
        w.data_ptr(),
        *found,
    )


def s4d_modes(a: Tensor, w: Tensor, inputs, options) -> bool:
    _modes(a, w, inputs, options)
    return True


def s4d_modes_gradients(grads, da: Tensor, dw: Tensor, inputs, options) -> None:
    found = [g if g is None or g.dtype in _WIDE else g.double() for g in grads]
    _modes(da, dw, inputs, options, *found)
    for grad, value in zip(grads, found, strict=True):
        if value is not grad:
            grad.copy_(value)


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


# ---- gated linear units, of float32 in contiguous rows ----


def glu(y: Tensor, z: Tensor, bias: Tensor | None) -> None:
    """y (rows, channels) <- GLU of z + bias, (rows, 2 channels)."""
    at = 0 if bias is None else bias.data_ptr()
    _C.glu(*y.shape, torch.get_num_threads() if threaded else 1, z.data_ptr(), at, y.data_ptr())


def glu_gradients(dz: Tensor, dbias: Tensor | None, dy: Tensor, z: Tensor, bias) -> None:
    """Writes dz, and adds its sum over the rows to dbias, which is float64. Rows of dy may lie apart."""
    at, to = (0 if t is None else t.data_ptr() for t in (bias, dbias))
    given = dy.data_ptr(), dy.stride(0), dz.data_ptr(), to
    _C.glu(*dy.shape, torch.get_num_threads() if threaded else 1, z.data_ptr(), at, *given)


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
    sizes = (heads, channels, count, period, double, torch.get_num_threads() if threaded else 1)
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
