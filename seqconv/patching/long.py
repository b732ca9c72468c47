"""New forwards of the layers with one convolution: s4's, safari's LongConv, SGConv's, and fla's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv.ops.ssm import ssm_kernel
from seqconv.patching.rule import Rule, gelu, mixed, original, steps_last, wrapped


def _s4d(module, u: Tensor, **kwargs):
    """The minimal S4D of s4."""
    u = u if module.transposed else u.transpose(-1, -2)
    length, kernel = u.shape[-1], module.kernel
    A = torch.stack([-kernel.log_A_real.exp(), kernel.A_imag], -1)
    k = ssm_kernel(kernel.log_dt, A, kernel.C.unsqueeze(0), length)[0]
    k = k.to(kernel.C.dtype)
    fused = gelu(module.activation)
    y = wrapped(u, k, 2 * length, module.D, activation="gelu" if fused else None)
    y = module.output_linear(module.dropout(y if fused else module.activation(y)))
    return (y if module.transposed else y.transpose(-1, -2)), None


def _two_sided(module, k: Tensor, length: int) -> Tensor:
    """The kernel (heads, channels, taps) of a transform: with both sides, the second half from the end on."""
    if not module.bidirectional:
        return k
    past, future = k.chunk(2)
    return F.pad(past, (0, length)) + F.pad(future.flip(-1), (length, 0))


def _fftconv(module, x: Tensor, state=None, rate=1.0, **kwargs):
    """FFTConv of s4, whose kernel may be any."""
    if state is not None:
        return original(module, x, state=state, rate=rate, **kwargs)
    x = x if module.transposed else x.transpose(-1, -2)
    length = x.shape[-1]
    taps = length if module.L is None else min(length, round(module.L / rate))
    k, _ = module.kernel(L=taps, rate=rate, state=None)
    k = module.drop_kernel(_two_sided(module, k, length))
    y = wrapped(x, k, taps + length, module.D)
    y = module.drop(mixed(y.transpose(1, 2)) if module.swap_channels else mixed(y))
    return module.activation(y if module.transposed else y.transpose(-1, -2)), None


def _long_conv(module, u: Tensor, state=None, rate=1.0, lengths=None, **kwargs):
    """LongConv of safari."""
    u = u if module.transposed else u.transpose(-1, -2)
    length = u.shape[-1]
    if isinstance(lengths, int):
        lengths = None if lengths == length else torch.tensor([lengths], device=u.device)
    if lengths is not None:
        u = u * (torch.arange(length, device=u.device) < lengths.view(-1, 1, 1)).to(u.dtype)
    taps = length if module.L is None else min(length, round(module.L / rate))
    k, _ = module.kernel(L=taps, rate=rate, state=state)
    fused = gelu(module.activation)
    options = {"activation": "gelu" if fused else None}
    y = mixed(wrapped(u, _two_sided(module, k, length), taps + length, module.D, **options))
    y = y if module.transposed else y.transpose(-1, -2)
    y = module.dropout(y if fused else module.activation(y))
    return module.output_linear(y), None


def _standalone(module, u: Tensor):
    """LongConv of safari's standalone file."""
    k = module.kernel
    k = module.kernel_drop(F.relu(k.abs() - module.kernel_lam) * k.sign())
    fused = gelu(module.activation)
    options = {"activation": "gelu" if fused else None}
    y = mixed(wrapped(u, k, 2 * u.shape[-1], module.D, **options))
    y = module.dropout(y if fused else module.activation(y))
    return module.output_linear(y.transpose(-1, -2)).transpose(-1, -2)


def _gconv_kernel(module) -> Tensor:
    """(kernels, channels, taps) of all scales."""
    pieces, scales = [], module.num_scales
    nearest, total = "nearest" in module.mode, "sum" in module.mode
    for i, piece in enumerate(module.kernel_list):
        scale = 2 ** ((i if total else max(0, i - 1)) + module.init_scale)
        piece = F.interpolate(piece, scale_factor=scale, mode="nearest" if nearest else "linear")
        pieces.append(piece * module.multiplier ** (scales - i - 1))
    if total:
        taps = pieces[-1].shape[-1]
        k = torch.stack([F.pad(p, (0, taps - p.shape[-1])) for p in pieces]).sum(0)
    else:
        k = torch.cat(pieces, -1)
    if "learnable" in module.mode:
        time = torch.arange(k.shape[-1], device=k.device) + 1
        k = k * torch.exp(-module.decay.reshape(1, -1, 1) * time.log())
    return k


def _gconv(module, u: Tensor, return_kernel=False, **kwargs):
    """GConv of SGConv. Its first forward, which sets the kernel's norm, is the original one."""
    if return_kernel or not module.kernel_norm_initialized:
        return original(module, u, return_kernel=return_kernel, **kwargs)
    u = u if module.transposed else u.transpose(-1, -2)
    length = u.shape[-1]
    k = _gconv_kernel(module)[..., :length]
    k = F.pad(k, (0, length - k.shape[-1])) / module.kernel_norm
    k = _two_sided(module, k, length)
    fused = not module.linear and gelu(module.activation)
    y = mixed(wrapped(u, k, 2 * length, module.D, activation="gelu" if fused else None))
    if not module.linear:
        y = module.dropout(y if fused else module.activation(y))
    y = y if module.transposed else y.transpose(-1, -2)
    return (y if module.linear else module.output_linear(module.norm(y))), None


def _fla(module, x: Tensor, *args, **kwargs):
    """LongConvolution and ImplicitLongConvolution of fla: the input is added to the convolution."""
    length = x.shape[1]
    k = module.filter
    k = k if isinstance(k, Tensor) else k(length).squeeze(0)
    one = torch.ones(k.shape[0], dtype=k.dtype, device=k.device)
    return wrapped(x.transpose(1, 2), k, 2 * length, one).transpose(1, 2)


def _needs_plain_kernel(module) -> str | None:
    plain = all(hasattr(module.kernel, n) for n in ("log_dt", "log_A_real", "A_imag", "C"))
    return None if plain else "its kernel is not that of the minimal S4D"


def _needs_fft(module) -> str | None:
    return "block_fft_conv is on" if module.block_fft_conv else None


def _needs_norm(module) -> str | None:
    if module.hyper:
        return "hyper_act is on"
    return None if module.kernel_norm_initialized else "its kernel's norm is set by a first forward"


RULES = [
    Rule(
        "S4D",
        ("kernel", "D", "activation", "dropout", "output_linear", "transposed", "h"),
        "s4",
        _s4d,
        _needs_plain_kernel,
        steps_last,
        lambda m: (m.h, None),
    ),
    Rule(
        "FFTConv",
        ("kernel", "D", "L", "bidirectional", "swap_channels", "drop", "drop_kernel", "activation"),
        "s4",
        _fftconv,
        lambda m: None,
        steps_last,
        lambda m: (m.d_model, m.L),
    ),
    Rule(
        "LongConv",
        ("kernel", "D", "L", "bidirectional", "block_fft_conv", "activation", "output_linear"),
        "safari",
        _long_conv,
        _needs_fft,
        steps_last,
        lambda m: (m.d_model, m.L),
    ),
    Rule(
        "LongConv",
        ("kernel", "D", "L", "kernel_lam", "kernel_drop", "activation", "output_linear"),
        "safari, standalone",
        _standalone,
        lambda m: None,
        lambda m: 2,
        lambda m: (m.H, m.L // 2),
    ),
    Rule(
        "GConv",
        ("kernel_list", "multiplier", "kernel_norm", "kernel_norm_initialized", "num_scales", "D"),
        "SGConv",
        _gconv,
        _needs_norm,
        steps_last,
        lambda m: (m.h, m.l_max),
    ),
    *[
        Rule(
            name,
            ("filter", "hidden_size"),
            "fla",
            _fla,
            lambda m: None,
            lambda m: 1,
            lambda m: (
                m.hidden_size,
                m.pos_emb.seq_len if hasattr(m, "pos_emb") else m.filter.shape[1],
            ),
        )
        for name in ("LongConvolution", "ImplicitLongConvolution")
    ],
]
