"""New forwards of the layers with gates: HyenaOperator of safari and HyenaDNA, and HyenaCascade of vortex."""

import torch
from torch import Tensor, nn

from seqconv.ops.fftconv import fftconv
from seqconv.ops.ssm import mode_sum, moments
from seqconv.patching.rule import Rule, idle, original


def _hyena(module, u: Tensor, *args, **kwargs):
    """HyenaOperator of safari, of HyenaDNA, of their standalone files and of the Hugging Face port."""
    steps, d, order = min(u.shape[-2], module.l_max), module.d_model, module.order
    short = module.short_filter
    u = fftconv(module.in_proj(u), short.weight.squeeze(1).flip(-1), bias=short.bias, layout="blh")
    *gates, v = u[:, :steps].split(d, dim=-1)
    k = module.filter_fn.filter(steps)
    k = (k[0] if isinstance(k, tuple) else k).squeeze(0).mT  # (filters channels, steps)
    skip = module.filter_fn.bias
    if hasattr(module, "num_heads"):  # in the repositories the filters are innermost
        k, skip = (t.unflatten(0, (d, order - 1)).transpose(0, 1) for t in (k, skip))
    else:
        k, skip = (t.unflatten(0, (order - 1, d)) for t in (k, skip))
    for o, gate in enumerate(reversed(gates[1:])):
        post_gate = gates[0] if o == order - 2 else None
        if idle(module.dropout):
            v = fftconv(v, k[o], skip[o], pre_gate=gate, post_gate=post_gate, layout="blh")
        else:
            v = module.dropout(v * gate)
            v = fftconv(v, k[o], skip[o], post_gate=post_gate, layout="blh")
    y = module.out_proj(module.activation(v) if hasattr(module, "activation") else v)
    return (y, None) if getattr(module, "return_state", False) else y


def _why_not_hyena(module) -> str | None:
    ones = ("num_heads", "inner_factor", "num_blocks")
    for name, wanted in [
        *[(name, 1) for name in ones],
        ("outer_mixing", False),
        ("post_order_ffn", False),
        ("jit_filter", False),
    ]:
        if getattr(module, name, wanted) != wanted:
            return f"{name} is {getattr(module, name)!r}"
    for name, wanted in (("use_bias", True), ("bidirectional", False)):
        if getattr(module.filter_fn, name, wanted) != wanted:
            return f"its filter's {name} is {getattr(module.filter_fn, name)!r}"
    short = module.short_filter
    causal = type(short) is nn.Conv1d and short.padding == (short.kernel_size[0] - 1,)
    if not causal or short.stride != (1,) or short.dilation != (1,) or short.weight.shape[1] != 1:
        return "its short filter is not a causal depthwise convolution"
    return None


def _cascade(module, u: Tensor, inference_params=None, padding_mask=None, *args, **kwargs):
    """HyenaCascade of vortex: x_2 (h * (x_1 v) + D x_1 v) after a short convolution. Of a sequence it also makes the
    states; its own steps go on from them."""
    cache, index = inference_params, getattr(module, "layer_idx", None)
    if cache is not None and index in cache.fir_state_dict:
        return original(module, u, cache, padding_mask, *args, **kwargs)
    length, d = u.shape[1], module.hidden_size
    weight = module.short_filter_weight.squeeze(1).flip(-1)
    z = fftconv(u.float(), weight.float(), layout="blh").to(u.dtype)
    if module.short_filter_bias is not None:
        z = z + module.short_filter_bias
    masked = isinstance(padding_mask, Tensor)
    z = z * padding_mask.unsqueeze(-1) if masked else z  # pyright: ignore
    if module.config.interleave:  # the three of a channel are neighbours
        z = z.unflatten(-1, (d, 3)).transpose(-1, -2).flatten(-2)
    if module.column_split_hyena:
        z = z.unflatten(-1, (module.num_attention_heads, 3, -1)).transpose(-2, -3).flatten(-3)
    post, pre, v = z.split(d, dim=-1)
    if module.hyena_flip_x1x2:
        post, pre = pre, post
    copies = d // module.hyena_filter_groups
    taps = module.fir_inner_filter_length
    if module.h is None:
        a, w = (t.double() for t in (module.log_poles.squeeze(-1), module.residues))
        a, w = (torch.stack([t, torch.zeros_like(t)], -1) for t in (a, w))
        k = mode_sum(a, w.unsqueeze(0), length, True)[0]
        if (
            cache is not None
        ):  # There a transform of (batch, channels, modes, 2 length) complex numbers.
            late = (pre * v).mT.flip(-1).float().contiguous()
            cache.state_dict[index] = moments(a, late)[..., 0].float()
    else:
        k = module.h.squeeze(1).float()
        k = k if taps >= 128 else k.flip(-1)  # A short one is a correlation there.
    k = k.repeat_interleave(copies, 0)
    skip = None if module.D is None else module.D.float()
    y = pre * v  # There it is rounded to u's dtype, too.
    if cache is not None:
        cache.fir_state_dict[index] = u.mT[..., 1 - module.short_filter_length :]
        if taps:
            cache.fir_inner_state_dict[index] = y.mT[..., 1 - taps :]
    gate = post
    if masked and taps:
        gate = post * padding_mask.unsqueeze(-1)  # pyright: ignore
    if module.h is None or taps >= 128:
        y = fftconv(y.float(), k, skip, layout="blh").to(u.dtype) * gate
    else:
        y = fftconv(y.float(), k, layout="blh").to(u.dtype) * gate
    return y, inference_params


def _why_not_cascade(module) -> str | None:
    if module.use_flashfft or module.use_flash_depthwise:
        return "it runs flash-fft-conv's kernels"
    if module.long_fir_threshold is not None:
        return "long_fir_threshold cuts its kernel"
    if module.h is None and module.hyena_filter_groups != module.hidden_size:
        return "its channels share poles"
    return None


RULES = [
    Rule(
        "HyenaOperator",
        (
            "in_proj",
            "out_proj",
            "short_filter",
            "filter_fn",
            "order",
            "l_max",
            "d_model",
            "dropout",
        ),
        "safari, HyenaDNA",
        _hyena,
        _why_not_hyena,
        lambda m: 1,
        lambda m: (m.d_model, m.l_max),
    ),
    Rule(
        "HyenaCascade",
        (
            "short_filter_weight",
            "hyena_filter_groups",
            "fir_inner_filter_length",
            "engine",
            "config",
        ),
        "vortex",
        _cascade,
        _why_not_cascade,
        lambda m: 1,
        lambda m: (3 * m.hidden_size, None),  # Its input has passed the projection to the three.
    ),
]
