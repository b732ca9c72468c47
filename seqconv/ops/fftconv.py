"""The package's one operator, `fftconv`, and `explain`, which says how a call of it is carried out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv import reference
from seqconv.backends import cpu, cuda
from seqconv.backends.explanation import Explanation
from seqconv.ops import operators, transforms
from seqconv.ops.checks import FLOATS, check_choice, check_shape, check_tensor

ACTIVATIONS = (None, "gelu", "silu", "relu")
MODES = ("causal", "circular")
LAYOUTS = ("bhl", "blh")
NARROW = tuple(d for d in FLOATS if d != torch.float64)
NARROW_WHY = " (no wider than float32 unless u is float64)"


def fftconv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    *,
    k_rev: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    activation: str | None = None,
    mode: str = "causal",
    layout: str = "bhl",
) -> Tensor:
    """Depthwise convolution along time with a kernel as long as the sequence, gates, skip and activation fused.

        x = pre_gate * u
        v[t] = sum_{s<=t} k[t-s] x[s] + sum_{s>t} k_rev[s-t-1] x[s] + skip * x[t]
        y = post_gate * activation(v)

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
        activation: None, "gelu" (exact, by erf), "silu" or "relu".
        mode: "causal" as above; "circular" wraps the sequence: K <= length, no k_rev, and
            v[t] = sum_s k[(t-s) mod length] x[s] + skip * x[t].
        layout: "bhl", or "blh" for u and gates as (batch, length, channels); y the same.

    Returns:
        y in u's dtype: (batch, channels, length); with heads (batch, heads, channels, length).
        layout="blh": (batch, length, channels); with heads (batch, length, heads, channels).
        Computed in float64 if u is float64, else in float32, whatever autocast says.

    Every tensor argument has a gradient, in its own dtype, and second derivatives; torch.func,
    forward-mode and torch.compile work. Saves its inputs only. Deterministic.

    Round-off: more than 32 taps go through an FFT, which mixes past and future in the last digits:
    changing a future input by delta moves an output by the order of eps * delta * |k|_2 *
    sqrt(length), and a NaN spoils its own row of (sample, channel). Up to 32 taps are summed
    directly and see no future at all.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.

    Example:
        >>> u = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> fftconv(u, torch.tensor([[1.0, 10.0]]))
        tensor([[[ 1., 12., 23.]]])

    Cost: O(batch channels length log length). Source: arXiv 2302.06646, section 3; modulo x^n - i,
    which needs no zero padding. Twins: seqconv.reference.fftconv, seqconv.reference.fftconv_fft.
    """
    tensors = _validate(u, k, skip, k_rev, pre_gate, post_gate, activation, mode, layout)
    y = transforms.apply(*tensors, activation or "none", layout == "blh")
    return y.movedim(-1, 1) if layout == "blh" else y


def _validate(u, k, skip, k_rev, pre_gate, post_gate, activation, mode, layout):
    """Checks everything, then rewrites blh as a view and circular as two-sided."""
    check_tensor("fftconv", "u", u)
    check_choice("fftconv", "activation", activation, ACTIVATIONS)
    check_choice("fftconv", "mode", mode, MODES)
    check_choice("fftconv", "layout", layout, LAYOUTS)
    axes = [("batch", None), ("channels", None), ("length", None)]
    check_shape("fftconv", "u", u, tuple(axes if layout == "bhl" else (axes[0], axes[2], axes[1])))
    if layout == "blh":
        u = u.movedim(1, -1)
    batch, channels, length = u.shape

    kernel_dtypes, why = (FLOATS, "") if u.dtype == torch.float64 else (NARROW, NARROW_WHY)
    check_tensor("fftconv", "k", k, dtypes=kernel_dtypes, device=u.device, why=why)
    c, taps, heads = ("channels", channels), ("K", None), ("heads", None)
    per_sample = (("batch", batch), heads, c, taps)
    given = lambda: f" for u as (batch, channels, length)={tuple(u.shape)} in layout {layout!r}"  # noqa: E731
    check_shape("fftconv", "k", k, (c, taps), (heads, c, taps), per_sample, why=given)
    has_heads = k.dim() > 2
    heads = ("heads", k.shape[-3] if has_heads else None)
    if skip is not None:
        check_tensor("fftconv", "skip", skip, dtypes=kernel_dtypes, device=u.device)
        check_shape("fftconv", "skip", skip, *([(c,), (heads, c)] if has_heads else [(c,)]))
    if k_rev is not None:
        check_tensor("fftconv", "k_rev", k_rev, dtypes=kernel_dtypes, device=u.device)
        leading = [("batch", batch), heads, c][-(k.dim() - 1) :]
        check_shape("fftconv", "k_rev", k_rev, (*leading, ("K_rev", None)))
    pre_gate = _validate_gate("pre_gate", pre_gate, u, (), layout)
    post_gate = _validate_gate("post_gate", post_gate, u, (heads,) if has_heads else (), layout)

    if mode == "circular":
        if k_rev is not None:
            raise ValueError("fftconv: k_rev must be None in circular mode, got a tensor")
        if k.shape[-1] > length:
            raise ValueError(
                f"fftconv: k must have K <= length={length} in circular mode, got K={k.shape[-1]}"
            )
        # Tap j of a circular kernel is also lag j - length. In float32, so that its gradient is
        # rounded once.
        k = F.pad(k.to(torch.promote_types(k.dtype, torch.float32)), (0, length - k.shape[-1]))
        k_rev = k[..., 1:].flip(-1)
    return u, k, k_rev, skip, pre_gate, post_gate


def _validate_gate(name, gate, u, heads, layout):
    if gate is None:
        return None
    check_tensor("fftconv", name, gate, device=u.device)
    if gate.dtype != u.dtype:
        if not torch.is_autocast_enabled(u.device.type):
            check_tensor("fftconv", name, gate, dtypes=(u.dtype,))
        gate = gate.to(u.dtype)
    b, c, t = ("batch", u.shape[0]), ("channels", u.shape[1]), ("length", u.shape[2])
    check_shape("fftconv", name, gate, (b, *heads, c, t) if layout == "bhl" else (b, t, *heads, c))
    return gate.movedim(1, -1) if layout == "blh" else gate


def explain(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    *,
    k_rev: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    activation: str | None = None,
    mode: str = "causal",
    layout: str = "bhl",
) -> Explanation:
    """Which backend and plan `fftconv` takes for these arguments, and why not a faster one. Computes nothing.

    On a GPU the plan ends with a lower bound of the time. It is the planner's model, not a measurement: it takes
    every issue slot as used and leaves out what gates read, the skip's sum and the taps' gradient in the cache.

    Example:
        >>> explain(torch.zeros(1, 4, 1000), torch.zeros(4, 1000)).fallback is None
        True
    """
    u, k, k_rev, *_ = _validate(u, k, skip, k_rev, pre_gate, post_gate, activation, mode, layout)
    reason = operators.fallback_reason(u.device, u.dtype, u.shape[-1])
    length = u.shape[-1]
    taps = min(k.shape[-1], length)
    taps_rev = 0 if k_rev is None else min(k_rev.shape[-1], max(length - 1, 0))
    if reason is not None:
        n = reference.fft_size(length, taps, taps_rev)
        return Explanation("reference", "torch.fft", n, 1, None, torch.get_num_threads(), reason)
    if u.device.type == "cuda" and u.numel():
        plan, arch = cuda.explain(u, k, k_rev)
        return Explanation(
            "cuda", "right-angle fft", plan.n, plan.windows, arch, plan.threads, None, str(plan)
        )
    size, blocks = cpu.method(max(length, 1), taps, taps_rev, u.dtype == torch.float64)
    algorithm = "direct sum" if size == 0 else "right-angle fft"
    return Explanation("cpu", algorithm, size or None, blocks, cpu.isa(), cpu.threads(), None)
