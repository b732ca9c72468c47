"""Layers with the attributes and the formulas of those of s4, safari, SGConv, HyenaDNA, vortex and fla.

The originals cannot be installed here. These were written for the tests, with transforms of as many points as there.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


def transformed(u, k, n):
    """u (batch, channels, length), k (..., channels, taps) of one sample -> (batch, ..., channels, length)."""
    k = torch.fft.rfft(k, n=n)
    spectrum = torch.fft.rfft(u, n=n)
    spectrum = spectrum.unsqueeze(1) if k.dim() == 3 else spectrum
    return torch.fft.irfft(spectrum * k, n=n)[..., : u.shape[-1]]


def drawn(*shape, scale=1.0):
    return nn.Parameter(scale * torch.randn(*shape))


def both_sides(k, length):
    past, future = k.chunk(2)
    return F.pad(past, (0, length)) + F.pad(future.flip(-1), (length, 0))


class S4D(nn.Module):
    def __init__(self, d=6, modes=4, transposed=True, act=None):
        super().__init__()
        self.h, self.transposed = d, transposed
        self.D, self.kernel = drawn(d), nn.Module()
        self.kernel.C = drawn(d, modes, 2)
        self.kernel.log_dt = drawn(d, scale=0.3)
        self.kernel.log_A_real = drawn(d, modes)
        self.kernel.A_imag = drawn(d, modes, scale=3.0)
        self.activation, self.dropout = act or nn.GELU(), nn.Dropout(0.2)
        self.output_linear = nn.Sequential(nn.Conv1d(d, 2 * d, 1), nn.GLU(dim=-2))

    def forward(self, u, **kwargs):
        u = u if self.transposed else u.mT
        kernel, length = self.kernel, u.shape[-1]
        A = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag)
        a = A * kernel.log_dt.exp().unsqueeze(-1)
        C = torch.view_as_complex(kernel.C) * (a.exp() - 1) / A
        steps = torch.arange(length, dtype=kernel.C.dtype)
        k = 2 * torch.einsum("hn,hnl->hl", C, (a.unsqueeze(-1) * steps).exp()).real
        y = transformed(u, k, 2 * length) + self.D.unsqueeze(-1) * u
        y = self.output_linear(self.dropout(self.activation(y)))
        return (y if self.transposed else y.mT), None


class Kernel(nn.Module):
    """Any kernel of s4 or safari; safari's has all its taps whatever L is."""

    def __init__(self, kernels, d, taps, cut):
        super().__init__()
        self.kernel, self.cut = drawn(kernels, d, taps, scale=0.3), cut

    def forward(self, L=None, rate=1.0, state=None):
        return (self.kernel[..., :L] if self.cut else self.kernel), None


class FFTConv(nn.Module):
    def __init__(self, d=6, L=None, channels=1, bidirectional=False, swap=False, transposed=True):
        super().__init__()
        self.d_model, self.L, self.channels = d, L, channels
        self.bidirectional, self.swap_channels, self.transposed = bidirectional, swap, transposed
        self.kernel = Kernel(channels * (1 + bidirectional), d, 50, True)
        self.D = drawn(channels, d)
        self.drop, self.drop_kernel, self.activation = nn.Identity(), nn.Identity(), nn.Tanh()

    def forward(self, x, state=None, rate=1.0, **kwargs):
        x = x if self.transposed else x.mT
        length = x.shape[-1]
        taps = length if self.L is None else min(length, round(self.L / rate))
        k, _ = self.kernel(L=taps, rate=rate, state=state)
        k = self.drop_kernel(both_sides(k, length) if self.bidirectional else k)
        y = transformed(x, k, taps + length) + self.D.unsqueeze(-1) * x.unsqueeze(1)
        y = self.drop((y.transpose(1, 2) if self.swap_channels else y).flatten(1, 2))
        y = y if self.transposed else y.mT
        return self.activation(y), "state" if state is not None else None


class LongConv(nn.Module):
    def __init__(self, d=6, L=40, channels=1, bidirectional=False, transposed=True, act=None):
        super().__init__()
        self.d_model = self.H = d
        self.L, self.channels, self.bidirectional = L, channels, bidirectional
        self.transposed, self.block_fft_conv = transposed, False
        self.kernel = Kernel(channels * (1 + bidirectional), d, L, False)
        self.D = drawn(channels, d)
        self.activation, self.dropout = act or nn.GELU(), nn.Dropout(0.2)
        linear = nn.Conv1d if transposed else nn.Linear
        self.output_linear = linear(channels * d, d, **({"kernel_size": 1} if transposed else {}))

    def forward(self, u, state=None, rate=1.0, lengths=None, **kwargs):
        u = u if self.transposed else u.mT
        length = u.shape[-1]
        if lengths is not None:
            u = u * (torch.arange(length) < lengths[:, None, None])
        taps = length if self.L is None else min(length, round(self.L / rate))
        k, _ = self.kernel(L=taps, rate=rate, state=state)
        k = both_sides(k, length) if self.bidirectional else k
        y = transformed(u, k, taps + length) + self.D.unsqueeze(-1) * u.unsqueeze(1)
        y = y.flatten(1, 2) if self.transposed else y.flatten(1, 2).mT
        return self.output_linear(self.dropout(self.activation(y))), None


def standalone_long_conv(d=6, L=40, channels=2):
    """The LongConv of safari's standalone file, which has the same name."""

    class LongConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.H, self.L, self.channels, self.kernel_lam = d, 2 * L, channels, 0.05
            self.kernel, self.D = drawn(channels, d, 2 * L, scale=0.3), drawn(channels, d)
            self.kernel_drop, self.dropout = nn.Dropout(0.0), nn.Dropout(0.1)
            self.activation = nn.GELU()
            self.output_linear = nn.Sequential(nn.Linear(channels * d, 2 * d), nn.GLU())

        def forward(self, u):
            k = F.softshrink(self.kernel, self.kernel_lam)
            y = transformed(u, self.kernel_drop(k), 2 * u.shape[-1])
            y = (y + self.D.unsqueeze(-1) * u.unsqueeze(1)).flatten(1, 2)
            return self.output_linear(self.dropout(self.activation(y)).mT).mT

    return LongConv()


class GConv(nn.Module):
    def __init__(self, d=6, mode="cat_randn", heads=1, bidirectional=False, linear=False):
        super().__init__()
        self.h, self.mode, self.linear, self.bidirectional = d, mode, linear, bidirectional
        self.hyper, self.transposed, self.l_max = False, True, 64
        self.kernel_dim, self.num_scales, self.init_scale = 8, 3, 1
        kernels = heads * (1 + bidirectional)
        self.kernel_list = nn.ParameterList(drawn(kernels, d, 8) for _ in range(3))
        learnable = "learnable" in mode
        if learnable:
            self.decay = nn.Parameter(torch.rand(d))
        multiplier = torch.tensor(1.0) if learnable else torch.linspace(1, 2, d).reshape(1, -1, 1)
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("kernel_norm", torch.ones(kernels, d, 1))
        self.register_buffer("kernel_norm_initialized", torch.tensor(False))
        self.D, self.activation, self.dropout = drawn(heads, d), nn.GELU(), nn.Dropout(0.2)
        self.norm, self.output_linear = nn.Identity(), nn.Conv1d(heads * d, d, 1)

    def forward(self, u, return_kernel=False):
        length, parts, total = u.shape[-1], [], "sum" in self.mode
        for i, piece in enumerate(self.kernel_list):
            wider = 2 ** ((i if total else max(0, i - 1)) + self.init_scale)
            how = "nearest" if "nearest" in self.mode else "linear"
            piece = F.interpolate(piece, scale_factor=wider, mode=how)
            parts.append(piece * self.multiplier ** (2 - i))
        if total:
            k = sum(F.pad(p, (0, parts[-1].shape[-1] - p.shape[-1])) for p in parts)
        else:
            k = torch.cat(parts, -1)
        if "learnable" in self.mode:
            # The logarithm is float32 there, too.
            k = k * torch.exp(-self.decay.reshape(1, -1, 1) * (torch.arange(k.shape[-1]) + 1).log())
        if not self.kernel_norm_initialized:
            self.kernel_norm = k.norm(dim=-1, keepdim=True).detach()
            self.kernel_norm_initialized = torch.tensor(True)
        k = F.pad(k, (0, max(0, length - k.shape[-1])))[..., :length] / self.kernel_norm
        k = both_sides(k, length) if self.bidirectional else k
        y = (transformed(u, k, 2 * length) + self.D.unsqueeze(-1) * u.unsqueeze(1)).flatten(1, 2)
        if not self.linear:
            y = self.output_linear(self.norm(self.dropout(self.activation(y))))
        return (y, k) if return_kernel else (y, None)


class Filter(nn.Module):
    def __init__(self, out, l_max):
        super().__init__()
        self.bias, self.use_bias, self.l_max = drawn(out), True, l_max
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, out))

    def filter(self, L):
        return self.net(torch.linspace(-1, 1, self.l_max, dtype=self.bias.dtype)[:L, None])[None]


class HyenaOperator(nn.Module):
    """interleaved: as in the repositories of safari and HyenaDNA; otherwise as in their standalone files."""

    def __init__(self, d=6, l_max=40, order=2, interleaved=True, act=None, pair=False):
        super().__init__()
        self.d_model, self.l_max, self.order, self.interleaved = d, l_max, order, interleaved
        wide = (order + 1) * d
        self.in_proj, self.out_proj = nn.Linear(d, wide), nn.Linear(d, d)
        self.short_filter = nn.Conv1d(wide, wide, 3, padding=2, groups=wide)
        self.filter_fn, self.dropout = Filter(d * (order - 1), l_max), nn.Dropout(0.2)
        if interleaved:
            self.num_heads = self.num_blocks = self.inner_factor = 1
            self.activation, self.return_state = act or nn.Identity(), pair
            self.outer_mixing = self.post_order_ffn = self.jit_filter = False

    def forward(self, u, *args, **kwargs):
        steps, filters = min(u.shape[1], self.l_max), self.order - 1
        *x, v = self.short_filter(self.in_proj(u).mT)[..., :steps].split(self.d_model, dim=1)
        k, bias = self.filter_fn.filter(steps)[0].mT, self.filter_fn.bias
        for o, gate in enumerate(reversed(x[1:])):
            if self.interleaved:
                own, skip = k[o::filters], bias[o::filters]
            else:
                own, skip = k.chunk(filters)[o], bias.chunk(filters)[o]
            v = self.dropout(v * gate)
            v = transformed(v, own, 2 * steps) + v * skip.unsqueeze(-1)
        y = (v * x[0]).mT
        y = self.out_proj(self.activation(y) if self.interleaved else y)
        return (y, None) if getattr(self, "return_state", False) else y


class HyenaCascade(nn.Module):
    """taps: None for a sum of exponentials."""

    def __init__(self, d=8, taps=None, groups=None, interleave=True, split=False, flip=False):
        super().__init__()
        self.config, self.engine = SimpleNamespace(interleave=interleave), None
        self.hidden_size, self.num_attention_heads = d, 2
        self.hyena_filter_groups = groups = groups or d
        self.fir_inner_filter_length, self.column_split_hyena = taps, split
        self.hyena_flip_x1x2, self.long_fir_threshold = flip, None
        self.layer_idx, self.short_filter_length = 3, 3
        self.use_flashfft = self.use_flash_depthwise = False
        self.short_filter_weight = drawn(3 * d, 1, 3)
        self.short_filter_bias = drawn(3 * d) if split else None
        self.h = self.D = None
        if taps is None:
            self.log_poles = nn.Parameter(-torch.rand(d, 4, 1))
            self.residues = drawn(d, 4)
        else:
            self.h = drawn(groups, 1, taps, scale=0.3)
        if taps is None or taps >= 128:
            self.D = drawn(d)

    def forward(self, u, inference_params=None, padding_mask=None, *args, **kwargs):
        cache = inference_params
        if cache is not None and self.layer_idx in cache.fir_state_dict:
            return "a step", cache
        d, length = self.hidden_size, u.shape[1]
        z = F.conv1d(u.mT, self.short_filter_weight, padding=2, groups=3 * d)[..., :length]
        z = z if self.short_filter_bias is None else z + self.short_filter_bias[:, None]
        mask = 1.0 if padding_mask is None else padding_mask[:, None]
        z = z * mask
        if self.config.interleave:
            z = torch.cat([z[:, i::3] for i in range(3)], 1)
        if self.column_split_hyena:
            z = z.unflatten(1, (self.num_attention_heads, 3, -1))
            post, pre, v = (z[:, :, i].flatten(1, 2) for i in range(3))
        else:
            post, pre, v = z.split(d, dim=1)
        if self.hyena_flip_x1x2:
            post, pre = pre, post
        x, taps = pre * v, self.fir_inner_filter_length
        if cache is not None:
            cache.fir_state_dict[self.layer_idx] = u.mT[..., -2:]
            if taps:
                cache.fir_inner_state_dict[self.layer_idx] = x[..., 1 - taps :]
            else:
                state = 0
                for t in range(length):
                    state = self.log_poles[..., 0].exp() * state + x[..., t, None]
                cache.state_dict[self.layer_idx] = state
        if self.h is None:
            steps = torch.arange(length, dtype=u.dtype)
            k = (self.residues[..., None] * (self.log_poles * steps).exp()).sum(1)
            return ((transformed(x, k, 2 * length) + self.D[:, None] * x) * post).mT, cache
        h = self.h.repeat_interleave(d // len(self.h), 0)
        if taps >= 128:
            y = transformed(x, h[:, 0, :length], 2 * length) + self.D[:, None] * x
        else:
            y = F.conv1d(x, h, padding=taps - 1, groups=d)[..., :length]
        return (y * mask * post).mT, cache


class LongConvolution(nn.Module):
    def __init__(self, d=6, max_len=40):
        super().__init__()
        self.hidden_size, self.filter = d, drawn(d, max_len, scale=0.3)

    def forward(self, x, *args, **kwargs):
        u = x.mT
        return (transformed(u, self.filter, 2 * u.shape[-1]) + u).mT


class ImplicitLongConvolution(nn.Module):
    def __init__(self, d=6, max_len=40):
        super().__init__()
        self.hidden_size, self.max_len, self.mlp = d, max_len, nn.Linear(2, d)
        self.pos_emb = SimpleNamespace(seq_len=max_len)

    def filter(self, length):
        t = torch.arange(length, dtype=self.mlp.weight.dtype)
        t = 2 * math.pi * t / self.max_len
        return self.mlp(torch.stack([t.cos(), t.sin()], -1)).mT[None]

    def forward(self, x, *args, **kwargs):
        u = x.mT
        return (transformed(u, self.filter(u.shape[-1])[0], 2 * u.shape[-1]) + u).mT
