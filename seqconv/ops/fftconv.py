"""The long convolution `fftconv`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv.backends.inputs import IS_SIGNAL, Inputs
from seqconv.ops import packed as packs
from seqconv.ops.checks import FLOATS, check_choice, check_flag, check_shape, check_tensor
from seqconv.ops.history import check_history, continued, continued_pack
from seqconv.ops.register import Operator
from seqconv.ops.transforms import composed, raw_bwd_vmap, raw_fwd_vmap

ACTIVATIONS = (None, "gelu", "silu", "relu")
MODES = ("causal", "circular")
LAYOUTS = ("bhl", "blh")
NARROW = tuple(d for d in FLOATS if d != torch.float64)
NARROW_WHY = " (no wider than float32 unless u is float64)"


def _empty(like: Tensor, shape, channels_last: bool) -> Tensor:
    """(batch, ..., channels, length); channels_last puts the channels innermost in memory."""
    if not channels_last:
        return like.new_empty(shape)
    strides, step = [1], 1
    for size in (*shape[-2:0:-1], shape[-1]):  # of channels, any heads, length; then batch
        step = step * max(size, 1)
        strides.append(step)
    channels_and_heads, length, batch = strides[:-2], strides[-2], strides[-1]
    return like.new_empty_strided(shape, (batch, *reversed(channels_and_heads), length))


def _empty_output(inputs: Inputs, channels_last: bool) -> Tensor:
    u, k = inputs[:2]
    if k.dim() > 2:
        batch, channels, length = u.shape
        return _empty(u, (batch, k.shape[-3], channels, length), channels_last)
    if channels_last:
        return _empty(u, u.shape, True)
    # in half of new_empty's time
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _empty_gradients(inputs: Inputs, channels_last: bool, wanted) -> Inputs:
    """One tensor per input; None where none is wanted."""
    grads = []
    for like, want, signal in zip(inputs, wanted, IS_SIGNAL, strict=True):
        if like is None or not want:
            grads.append(None)
        elif channels_last and signal:
            grads.append(_empty(like, like.shape, True))
        else:
            grads.append(torch.empty_like(like, memory_format=torch.contiguous_format))
    return Inputs(*grads)


def _forward(
    backend, inputs: Inputs, activation: str, channels_last: bool, exact_causal: bool
) -> Tensor:
    y = _empty_output(inputs, channels_last)
    if y.numel():
        if exact_causal:
            check_exact(inputs.k_rev)
            backend.fftconv_exact(y, inputs, activation)
        else:
            backend.fftconv(y, inputs, activation)
    return y


def _gradients(
    backend, dy, inputs: Inputs, activation, channels_last, exact_causal, wanted
) -> Inputs:
    grads = _empty_gradients(inputs, channels_last, wanted)
    if dy.numel():
        if exact_causal:
            check_exact(inputs.k_rev)
            backend.fftconv_exact_gradients(grads, dy, inputs, activation)
        else:
            backend.fftconv_gradients(grads, dy, inputs, activation)
        return grads
    return Inputs._make(grad if grad is None else grad.zero_() for grad in grads)


def _shardings(inputs: Inputs, activation: str, *rest, ranks: int) -> list[tuple]:
    samples = dict.fromkeys(("u", "pre_gate", "post_gate"), 0)
    if len(inputs.k.shape) == 4:
        samples |= {"k": 0, "k_rev": 0}
    return [(0, samples), *packs.ways_to_share(inputs, activation, 1)]


operator = Operator(
    "fftconv",
    Inputs,
    "str activation, bool channels_last, bool exact_causal",
    composed,
    forward=_forward,
    gradients=_gradients,
    empty=lambda inputs, activation, channels_last, *rest: _empty_output(inputs, channels_last),
    empty_gradients=lambda inputs, activation, channels_last, exact_causal, wanted: (
        _empty_gradients(inputs, channels_last, wanted)
    ),
    vmap=raw_fwd_vmap,
    gradients_vmap=raw_bwd_vmap,
    shardings=_shardings,
)


def fftconv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    *,
    k_rev: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    mode: str = "causal",
    layout: str = "bhl",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    history: Tensor | None = None,
    return_history: bool = False,
    exact_causal: bool = False,
) -> Tensor:
    """Depthwise convolution along time with a kernel as long as the sequence, gates, skip and activation fused.

        x = pre_gate * u
        v[t] = sum_{s<=t} k[t-s] x[s] + sum_{s>t} k_rev[s-t-1] x[s] + skip * x[t]
        y = post_gate * activation(v + bias)

    Args:
        u: (batch, channels, length), or (batch, length, channels) with layout="blh". float32,
            float64, bfloat16 or float16; any strides.
        k: (channels, K), K >= 0; tap 0 multiplies the present. (heads, channels, K) applies several
            kernels to one input; (batch, heads, channels, K) a kernel per sample, four axes even
            for one head. float32, or narrower, or u's dtype. K may be shorter or longer than
            length; taps beyond it never matter.
        skip: (channels,), or (heads, channels) where k has heads; dtypes as k.
        k_rev: taps for the future, with k's leading axes and a length of its own; its tap 0 is lag
            -1, so that lag 0 belongs to k alone. Makes the convolution two-sided.
        pre_gate: u's shape and dtype.
        post_gate: y's shape and u's dtype. Under autocast gates of another dtype are cast to u's.
        bias: (channels,), or (heads, channels) where k has heads; dtypes as k. Added to every output before the
            activation.
        activation: None, "gelu" (exact, by erf), "silu" or "relu".
        mode: "causal" as above; "circular" wraps the sequence: K <= length, no k_rev, and
            v[t] = sum_s k[(t-s) mod length] x[s] + skip * x[t].
        layout: "bhl", or "blh" for u and gates as (batch, length, channels); y the same.
        cu_seqlens: (rows + 1,), int32 or int64, on the CPU or u's device: packs rows of any lengths. u is then
            (channels, total), or (total, channels) with layout="blh", without an axis of samples, and row i has
            the steps [cu_seqlens[i], cu_seqlens[i + 1]). The first offset is 0, the last total, none is less than
            the one before. A row's kernel is k[row] where k has four axes. Not in circular mode.
        max_seqlen: no row is longer. None asks nothing. Offsets and max_seqlen are checked when the call
            is made, but not where the CUDA kernels read offsets from the GPU, with max_seqlen given: a check would
            wait for the GPU. Wrong ones give wrong numbers there, and no access outside of the tensors.
            Without max_seqlen a call waits until the GPU has handed the offsets over.
        history: (batch, channels, K - 1), or (batch, K - 1, channels) with layout="blh", in u's dtype: x at the K - 1
            steps before the first, with the gate already applied. Of packed rows (rows, ...). None: zeros. Not in
            circular mode.
        return_history: True returns the pair (y, history of the next call): the last K - 1 steps of x, those of
            `history` included. So a sequence may be given in pieces, and gradients pass from piece to piece.
        exact_causal: whether no output may have a trace of the future, as below; in causal mode without
            k_rev only.

    Returns:
        y in u's dtype: (batch, channels, length); with heads (batch, heads, channels, length).
        layout="blh": (batch, length, channels); with heads (batch, length, heads, channels).
        Packed: (channels, total), (heads, channels, total), (total, channels) or (total, heads, channels).
        Computed in float64 if u is float64, else in float32, whatever autocast says.

    Every tensor argument has a gradient, in its own dtype, and second derivatives; torch.func,
    forward-mode and torch.compile work. Saves its inputs only. Deterministic.

    Round-off: more than 32 taps go through an FFT, which mixes past and future in the last digits:
    changing a future input by delta moves an output by the order of eps * delta * |k|_2 *
    sqrt(length), and a NaN spoils its own row of (sample, channel). On a CPU the kernels sum up to 32
    taps directly, and these outputs see no future at all.

    With exact_causal=True an output has the same bits whatever u and the gates are at later times, NaN and inf
    included, and its gradient with respect to them is exactly zero. No transform holds an output together with
    a later input, which takes transforms on several levels, of blocks that grow eightfold from 64 steps on: at 16,384
    steps on a CPU 2 to 4 times as long. On the CPU kernels the bits do not depend on the length either, for the
    same k.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.

    Example:
        >>> u = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> fftconv(u, torch.tensor([[1.0, 10.0]]))
        tensor([[[ 1., 12., 23.]]])

    Cost: O(batch channels length log length), with exact_causal one log more. Source: arXiv 2302.06646,
    section 3; modulo x^n - i, which needs no zero padding; for exact_causal see csrc/cpu/exact.h.
    Twins: seqconv.reference.fftconv, seqconv.reference.fftconv_fft.
    """
    inputs = Inputs(u, k, k_rev, skip, pre_gate, post_gate, bias)
    if history is not None or return_history is not False:
        rows = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        options = {"activation": activation, "mode": mode, "exact_causal": exact_causal}
        return _continued(inputs, history, return_history, layout, rows, options)  # pyright: ignore
    if cu_seqlens is not None or max_seqlen is not None:
        packed = packed_inputs(
            inputs, activation, mode, layout, cu_seqlens, max_seqlen, exact_causal
        )
        longest = -1 if max_seqlen is None else max_seqlen
        y = packs.operator(packed, activation or "none", layout == "blh", longest)
        return y.movedim(-1, 0) if layout == "blh" else y
    check(inputs, activation, mode, layout)
    if exact_causal is not False:
        check_exact(k_rev, mode, exact_causal)
    if mode != "causal" or layout != "bhl" or pre_gate is not None or post_gate is not None:
        inputs = prepare(inputs, mode, layout)
    y = operator(inputs, activation or "none", layout == "blh", exact_causal)
    return y.movedim(-1, 1) if layout == "blh" else y


def packed_inputs(
    inputs: Inputs, activation, mode, layout, cu_seqlens, max_seqlen, exact_causal=False
) -> packs.PackedInputs:
    """What the operator of packed rows takes, once all but the values of the offsets is checked."""
    check_tensor("fftconv", "u", inputs.u)
    check_choice("fftconv", "activation", activation, ACTIVATIONS)
    check_choice("fftconv", "layout", layout, LAYOUTS)
    if cu_seqlens is None:
        raise ValueError(f"fftconv: max_seqlen must be None without cu_seqlens, got {max_seqlen}")
    check_choice("fftconv", "mode", mode, MODES)
    for name, value, wanted in (("mode", mode, "causal"), ("exact_causal", exact_causal, False)):
        if value is not wanted and value != wanted:
            raise ValueError(f"fftconv: {name} must be {wanted!r} with cu_seqlens, got {value!r}")
    return packs.prepare(inputs, cu_seqlens, max_seqlen, layout)


def _continued(inputs: Inputs, history, return_history, layout: str, rows: dict, options: dict):
    check_flag("fftconv", return_history=return_history)

    def call(inputs: Inputs, layout=layout, **rows) -> Tensor:
        return fftconv(**inputs._asdict(), layout=layout, **rows, **options)

    packed = any(value is not None for value in rows.values())
    if packed:
        count = packed_inputs(inputs, layout=layout, **rows, **options).cu_seqlens.shape[0] - 1
        axis, go_on = "rows", continued_pack
        if hasattr(inputs.u, "device_mesh"):
            text = "history must be None and return_history False with cu_seqlens and DTensors"
            raise ValueError(f"fftconv: {text}")
    else:
        check(inputs, options["activation"], options["mode"], layout)
        count, axis, go_on = inputs.u.shape[0], "batch", continued
    if options["mode"] == "circular":
        text = "history must be None and return_history False in circular mode, which has no first step"
        raise ValueError(f"fftconv: {text}")
    if history is not None:
        check_history(inputs, history, count, axis, layout)
    y, kept = go_on(call, inputs, history, layout, **(rows if packed else {}))
    return (y, kept) if return_history else y


_passed: set[tuple] = set()  # what has passed the checks, for calls that differ in values only
_KEPT = 4096


def check(inputs: Inputs, *options) -> None:
    """`_validate`, once for all calls with the same dtypes, shapes, devices and options."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        validate(*inputs, *options)
        return
    try:
        found = list(options)
        for t in inputs:
            if t is None:
                found.append(None)
            elif isinstance(t, Tensor):
                found.append((t.dtype, t.shape, t.device, t.layout))
            else:
                raise TypeError
        known = tuple(found)
        if known in _passed:
            return
    except (TypeError, RuntimeError):  # no tensors, symbols for sizes, nested ones
        known = None
    same = validate(*inputs, *options)
    if same and known is not None:
        if len(_passed) >= _KEPT:
            _passed.clear()
        _passed.add(known)


def check_exact(k_rev: Tensor | None, mode: str = "causal", exact_causal=True) -> None:
    if not isinstance(exact_causal, bool):
        kind = type(exact_causal).__name__
        raise TypeError(f"fftconv: exact_causal must be True or False, got {kind}")
    for what, two_sided in (("k_rev", k_rev is not None), ("mode='circular'", mode != "causal")):
        if two_sided:
            raise ValueError(
                f"fftconv: exact_causal must be False with {what}, whose outputs see the future, got True"
            )


def prepare(inputs: Inputs, mode: str, layout: str) -> Inputs:
    """What the operator takes: blh as a view, gates in u's dtype, and a circular kernel as a two-sided one."""
    u, k, k_rev, skip, pre_gate, post_gate, bias = inputs
    signals = [u, pre_gate, post_gate]
    for i, t in enumerate(signals):
        if t is not None:
            t = t if t.dtype == u.dtype else t.to(u.dtype)  # allowed under autocast
            signals[i] = t.movedim(1, -1) if layout == "blh" else t
    u, pre_gate, post_gate = signals
    if mode == "circular":
        # Tap j of a circular kernel is also lag j - length. In float32, so that its gradient is
        # rounded once.
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        k = F.pad(k, (0, u.shape[-1] - k.shape[-1]))
        k_rev = k[..., 1:].flip(-1)
    return Inputs(u, k, k_rev, skip, pre_gate, post_gate, bias)


def validate(u, k, k_rev, skip, pre_gate, post_gate, bias, activation, mode, layout) -> bool:
    """Whether the answer holds for all tensors alike: the dtypes that gates may have depend on autocast."""
    check_tensor("fftconv", "u", u)
    check_choice("fftconv", "activation", activation, ACTIVATIONS)
    check_choice("fftconv", "mode", mode, MODES)
    check_choice("fftconv", "layout", layout, LAYOUTS)
    axes = [("batch", None), ("channels", None), ("length", None)]
    check_shape("fftconv", "u", u, tuple(axes if layout == "bhl" else (axes[0], axes[2], axes[1])))
    batch, channels, length = u.shape
    if layout == "blh":
        length, channels = channels, length

    kernel_dtypes, why = (FLOATS, "") if u.dtype == torch.float64 else (NARROW, NARROW_WHY)
    check_tensor("fftconv", "k", k, dtypes=kernel_dtypes, device=u.device, why=why)
    b, c, taps, t = ("batch", batch), ("channels", channels), ("K", None), ("length", length)
    patterns = ((c, taps), (("heads", None), c, taps), (b, ("heads", None), c, taps))
    shape = f" for u as (batch, channels, length)={(batch, channels, length)} in layout {layout!r}"
    check_shape("fftconv", "k", k, *patterns, why=lambda: shape)
    heads = (("heads", k.shape[-3]),) if k.dim() > 2 else ()
    for name, value in (("skip", skip), ("bias", bias)):
        if value is not None:
            check_tensor("fftconv", name, value, dtypes=kernel_dtypes, device=u.device)
            check_shape("fftconv", name, value, *([(c,), (*heads, c)] if heads else [(c,)]))
    if k_rev is not None:
        check_tensor("fftconv", "k_rev", k_rev, dtypes=kernel_dtypes, device=u.device)
        leading = [b, *heads, c][-(k.dim() - 1) :]
        check_shape("fftconv", "k_rev", k_rev, (*leading, ("K_rev", None)))
    same = True
    for name, gate, several in (("pre_gate", pre_gate, ()), ("post_gate", post_gate, heads)):
        if gate is None:
            continue
        check_tensor("fftconv", name, gate, device=u.device)
        if gate.dtype != u.dtype:
            same = False
            if not torch.is_autocast_enabled(u.device.type):
                check_tensor("fftconv", name, gate, dtypes=(u.dtype,))
        pattern = (b, *several, c, t) if layout == "bhl" else (b, t, *several, c)
        check_shape("fftconv", name, gate, pattern)

    if mode == "circular":
        if k_rev is not None:
            raise ValueError("fftconv: k_rev must be None in circular mode, got a tensor")
        if k.shape[-1] > length:
            raise ValueError(
                f"fftconv: k must have K <= length={length} in circular mode, got K={k.shape[-1]}"
            )
    return same
