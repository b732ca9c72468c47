"""SGConv: convolution with few weights a scale, coarser and smaller with the lag (arXiv 2210.09298)."""

import math
from functools import reduce
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqconv.layers.base import ConvLayer, KernelGenerator
from seqconv.layers.module import fill, kernel_dtype, whole
from seqconv.layers.options import Defaults, refuse
from seqconv.layers.precision import full_precision
from seqconv.layers.streaming import StreamingLayer
from seqconv.ops.checks import check_choice, check_flag, check_learning_rate, check_positive
from seqconv.ops.register import Operator, exporting
from seqconv.ops.sharding import SUM


class SGConvKernel(KernelGenerator):
    """Kernel generator of SGConv; SGConvKernel(...)(length) -> (heads, d_model, min(length, taps)).

    k = combine_i(m^-i upsample(pieces[i])) / norm, i < S = n_scales. With d = kernel_dim and
    s = init_scale piece i is stretched by 2^(s + max(i - 1, 0)) and the stretched pieces follow one
    another (combine="cat"), or it is stretched by 2^(s + i) and they all start at lag 0 and are
    added ("sum"). Both have taps = 2^(S - 1 + s) d; unless n_scales is given, S is the smallest for
    which that is at least l_max. upsample="linear" interpolates between the d weights, put at the
    centres of the stretches and constant beyond the outermost; "nearest" repeats each.

    decay="geometric": m is linspace(decay_min, decay_max, d_model) over the channels, fixed.
    "power": instead tap l is multiplied by (l + 1)^-p, p learned; "power_fixed": by a fixed one.

    Parameters:
        pieces (n_scales, heads, d_model, kernel_dim): init="randn": N(0, 1). "cos": cos(2 pi c j / (d - 1))
            at weight j, with c a random permutation of the channels for each scale.
        decay (d_model,): p, uniform in [decay_min, decay_max], with decay="power" only.
    Buffers: norm (heads, d_model, 1), the L2 norm of all taps at construction, so that k starts with
    norm 1; decay, where it is not learned. Both are in the state_dict.
    Optimiser: all take min(lr, `lr` here), and weight decay like any weight. With lr=0 they are buffers.

    The taps are samples of a function k(t) of real t >= 0, which is the formula above with l = t. With a rate r
    the kernel is r k(r l), for inputs that are sampled 1 / r times as often: it gives the same output at the same
    times, up to the error of the sum. That error is of second order in the step, because lag 0, where the sum over
    lags has its edge, gets (1 + r) / 2 k(0) instead. With two_sided=True, the second half of the
    heads is for the future: its tap l is lag -(l + 1), so that it is sampled at t = r (l + 1) - 1.

    The reference implementation's mode string says the same in one word: "nearest" in it is
    upsample="nearest", "sum" or "cat" combine, "randn" or "cos" init, and "learnable" decay="power",
    or with "fixed" "power_fixed"; cat_randn is the default here.

    Source: arXiv 2210.09298, section 3.
    """

    shown = ("l_max", "kernel_dim", "n_scales", "init", "decay")
    meaning = ("init_scale", "upsample", "combine", "decay", "two_sided")
    attributes: ClassVar = {"decay": "law"}
    reads = ("pieces", "decay", "norm")
    channel_axes: ClassVar = {"pieces": 2, "decay": 0, "norm": 1}
    resamples = True

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        heads: int = 1,
        kernel_dim: int = 32,
        n_scales: int | None = None,
        init_scale: int = 0,
        upsample: str = "linear",
        combine: str = "cat",
        init: str = "randn",
        decay: str = "geometric",
        decay_min: float = 2.0,
        decay_max: float = 2.0,
        two_sided: bool = False,
        lr: float = 1e-3,
    ):
        super().__init__()
        name = "SGConvKernel"
        sizes = {"d_model": d_model, "l_max": l_max, "heads": heads, "kernel_dim": kernel_dim}
        check_positive(name, **sizes)
        check_choice(name, "upsample", upsample, ("linear", "nearest"))
        check_choice(name, "combine", combine, ("cat", "sum"))
        check_choice(name, "init", init, ("randn", "cos"))
        check_choice(name, "decay", decay, ("geometric", "power", "power_fixed"))
        check_flag(name, two_sided=two_sided)
        check_learning_rate(name, lr=lr)
        if not isinstance(init_scale, int) or isinstance(init_scale, bool) or init_scale < 0:
            raise ValueError(f"{name}: init_scale must be an integer >= 0, got {init_scale!r}")
        if two_sided and heads % 2:
            raise ValueError(f"{name}: heads must be even with two_sided=True, got {heads}")
        if not (0 <= decay_min <= decay_max < math.inf and (decay_min or decay != "geometric")):
            wanted = "0 < decay_min (0 too for a power) <= decay_max < inf wanted"
            raise ValueError(f"{name}: {wanted}, got decay_min={decay_min}, decay_max={decay_max}")
        if n_scales is None:  # 1 + ceil(log2(l_max / kernel_dim)) - init_scale, in integers
            n_scales = max(1, 1 + (-(-l_max // kernel_dim) - 1).bit_length() - init_scale)
        check_positive(name, n_scales=n_scales)
        self.d_model, self.l_max, self.heads = d_model, l_max, heads
        self.kernel_dim, self.n_scales = kernel_dim, n_scales
        self.upsample, self.combine, self.law = upsample, combine, decay
        self.init, self.decay_min, self.decay_max = init, decay_min, decay_max
        self.init_scale, self.two_sided = init_scale, two_sided
        self.taps = kernel_dim << (n_scales - 1 + init_scale)
        like: dict[str, Any] = {"dtype": kernel_dtype()}
        self.pieces = nn.Parameter(torch.empty(n_scales, heads, d_model, kernel_dim, **like))
        p = torch.empty(d_model, **like)
        self.decay = nn.Parameter(p) if decay == "power" else nn.Buffer(p)
        self.norm = nn.Buffer(torch.empty(heads, d_model, 1, **like))
        self.override("pieces", "decay", lr=lr)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and decay anew, as at construction, and sets norm to the new kernel's."""
        like: dict[str, Any] = {"dtype": self.pieces.dtype, "device": self.pieces.device}
        n_scales, heads, d_model, kernel_dim = self.pieces.shape
        if like["device"].type == "meta":
            return
        pieces = torch.randn(self.pieces.shape, **like)
        if self.init == "cos":
            turns = [torch.randperm(d_model, device=like["device"]) for _ in range(n_scales)]
            place = torch.arange(kernel_dim, **like) / max(kernel_dim - 1, 1)
            waves = torch.cos(2 * math.pi * torch.stack(turns).unsqueeze(-1) * place)  # (s h d)
            pieces = waves.unsqueeze(1).repeat(1, heads, 1, 1)
        ends = self.decay_min, self.decay_max
        if self.law == "geometric":
            decay = torch.linspace(*ends, d_model, **like)
        else:
            decay = torch.empty(d_model, **like).uniform_(*ends)
        fill(self, {"pieces": pieces, "decay": decay})
        with torch.no_grad():
            options = self.upsample, self.combine, self.law, self.init_scale
            k = _sample(whole(self.pieces), 1.0, 0, self.taps, whole(self.decay), *options)
            fill(self, {"norm": k.norm(dim=-1, keepdim=True)})

    def generate(self, tensors: list[Tensor], length: int, rate: float) -> Tensor:
        if not torch.compiler.is_compiling() and rate > 1 and not self.init_scale:
            self.warn_once(
                "rate",
                f"rate={rate} leaves out taps, which wants a kernel that is smooth from tap to tap. With "
                "init_scale=0 nothing keeps the first two pieces so; init_scale >= 1 does.",
            )
        count = math.ceil((self.taps - 0.5) / rate)
        if not torch.compiler.is_compiling():  # where the taps' number would tie graphs to a length
            count = max(min(count, length), 1)
        options = [self.upsample, self.combine, self.law]
        arguments = (Parts(*tensors), options, self.init_scale, self.two_sided, rate, count)
        compiled = torch.compiler.is_compiling() and not exporting()
        k = (_taps_op if compiled else _taps)(*arguments)
        return (
            k if count == length else k[..., :length]
        )  # A view is made only where one is needed, because FSDP warns of views.


class Parts(NamedTuple):
    """pieces (n_scales, heads, d_model, kernel_dim), decay (d_model,), norm (heads, d_model, 1)."""

    pieces: Tensor
    decay: Tensor
    norm: Tensor


def _taps(tensors, options, init_scale, two_sided, rate, count) -> Tensor:
    """(heads, d_model, count): the kernel."""
    pieces, decay, norm = tensors
    how: tuple[Any, ...] = (decay, *options, init_scale)
    if two_sided:
        halves = pieces.chunk(2, dim=1)
        k = torch.cat([_sample(w, rate, i, count, *how) for i, w in enumerate(halves)])
    else:
        k = _sample(pieces, rate, 0, count, *how)
    k = k / norm
    if rate != 1:
        edge = _sample(pieces, 1.0, 0, 1, *how) / norm
        if two_sided:  # what past and future differ by
            past, future = edge.chunk(2)
            edge = torch.cat([past - future, torch.zeros_like(future)])
        k = rate * k + F.pad((1 - rate) / 2 * edge, (0, count - 1))
    return k


def _sample(pieces, rate, lag, count, decay, upsample, combine, law, init_scale) -> Tensor:
    """(heads, d_model, count): k(t) norm at t = rate (l + lag) - lag, l < count."""
    like: dict[str, Any] = {"dtype": torch.float64, "device": pieces.device}
    t = (rate * (torch.arange(count, **like) + lag) - lag).clamp(min=0)
    d = pieces.shape[-1]
    knots = torch.arange(d, device=pieces.device).unsqueeze(-1)
    parts = []
    for i, piece in enumerate(pieces):
        if combine == "cat":
            stretch = 1 << (init_scale + max(i - 1, 0))
            start = d * stretch if i else 0
        else:
            stretch, start = 1 << (init_scale + i), 0
        # The taps whose t is in this piece, which begins half a tap before its first one's.
        ends = (math.ceil((end + lag - 0.5) / rate) - lag for end in (start, start + d * stretch))
        first, last = (min(max(end, 0), count) for end in ends)
        first = first if start else 0
        place = (t[first:last] - start + 0.5) / stretch  # in 0 .. d
        if upsample == "linear":
            place = (place - 0.5).clamp(0, d - 1).to(piece.dtype)
            weights = (1 - (place - knots).abs()).clamp(min=0)  # (d taps): hats
        else:
            weights = (place.floor() == knots).to(piece.dtype)
        with full_precision(piece.device):
            part = piece @ weights
        if law == "geometric":
            part = part * (decay**-i).unsqueeze(-1)
        parts.append(part)
    if combine == "cat":
        k = torch.cat(parts, dim=-1)
        k = F.pad(k, (0, count - k.shape[-1]))
    else:
        k = reduce(torch.add, (F.pad(part, (0, count - part.shape[-1])) for part in parts))
    if law != "geometric":
        k = k * torch.exp(-decay.unsqueeze(-1) * torch.log1p(t).to(k.dtype))
    return k


def _shardings(tensors, options, init_scale, two_sided, *rest, ranks: int) -> list[tuple]:
    rows = [(1, {"pieces": 2, "decay": 0, "norm": 1}), (SUM, {"pieces": SUM})]
    return rows if two_sided else [*rows, (0, {"pieces": 1, "norm": 0})]


_taps_op = Operator(
    "sgconv_taps",
    Parts,
    "str[] options, int init_scale, bool two_sided, float rate, int count",
    _taps,
    shardings=_shardings,
)


KERNEL, BLOCK = Defaults(SGConvKernel), Defaults(ConvLayer)


class SGConv(StreamingLayer):
    """Structured global convolution layer, (batch, length, d_model) -> the same.

    y = GLU(W dropout(gelu(k * x + skip x)) + b), k from SGConvKernel: w_i = pieces[i], kernel_dim weights
    each, stretched by whole factors, with s = init_scale and channel c's m_c = linspace(decay_min, decay_max):

        combine="cat"  k = concatenation over i of m_c^-i stretch(w_i, 2^(s + max(i - 1, 0))) / norm
        "sum"          k[l] = sum over i of m_c^-i stretch(w_i, 2^(s + i))[l] / norm, all from lag 0 on
        decay="power", "power_fixed": (l + 1)^-p_c at tap l in the place of m_c^-i

    norm is the L2 norm that k without it has at construction, constant since. stretch interpolates (or
    repeats: upsample="nearest"). Inputs longer than the kernel are convolved with the taps there are.

    Parameters: kernel.pieces (n_scales, heads, d_model, kernel_dim), with twice the heads if bidirectional, begin as
    N(0, 1). With decay="power" there is kernel.decay, p (d_model,), which begins uniform in [decay_min, decay_max].
    Both take min(lr, kernel_lr), with weight decay. skip (heads, d_model) begins as N(0, 1); the weight (2 d_model,
    heads d_model) and bias of linear begin as torch's. These are trained like any weight.

    Args:
        d_model: the number of channels.
        l_max: the least number of taps of a kernel.
        heads: the number of kernels per channel. The linear map takes heads * d_model inputs.
        bidirectional: True adds as many kernels for the future. They are shifted by one, because lag 0
            belongs to the kernels for the past.
        kernel_dim: the number of weights per scale. Published results on Long Range Arena have 1 or 2 for
            tokens, 32 for pixels and 64 for Path-X; for text, 1 to 64 are within a percent of one another. The
            default is the number for pixels, which leaves the nearest 64 lags free.
        n_scales: the number of the kernel's pieces, by default as many as l_max needs. init_scale: the
            logarithm to base 2 of the first piece's stretch.
        upsample, combine, decay, decay_min, decay_max: as above. init: how the weights begin, "randn" or
            "cos", which are waves of a random number of periods (SGConvKernel).
        activation: the function after the convolution: "gelu", "silu", "relu" or None.
        dropout: the probability of dropout after the activation. tie_dropout: True draws one mask per sample
            and channel for all times.
        postact: "glu", or None for a plain linear map.
        kernel_lr: the learning rate that param_groups gives to the kernel's weights, with weight decay, unless
            its own lr is smaller. With 0 they are buffers.

    The kernel's weights stay float32 under .to(bfloat16) and .half(). layer(x, rate=0.5) takes inputs that are
    sampled twice as often as those of training. A rate above 1 leaves taps out. It needs a kernel
    that is smooth from tap to tap, and the first two pieces are smooth only with init_scale > 0.

    Source: arXiv 2210.09298, section 3. Example:
        >>> layer = SGConv(8, l_max=100)
        >>> layer(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        heads: int = KERNEL.heads,
        bidirectional: bool = False,
        kernel_dim: int = KERNEL.kernel_dim,
        n_scales: int | None = KERNEL.n_scales,
        init_scale: int = KERNEL.init_scale,
        upsample: str = KERNEL.upsample,
        combine: str = KERNEL.combine,
        init: str = KERNEL.init,
        decay: str = KERNEL.decay,
        decay_min: float = KERNEL.decay_min,
        decay_max: float = KERNEL.decay_max,
        kernel_lr: float = KERNEL.lr,
        activation: str | None = BLOCK.activation,
        dropout: float = BLOCK.dropout,
        tie_dropout: bool = BLOCK.tie_dropout,
        postact: str | None = BLOCK.postact,
        **unknown: NoReturn,
    ):
        options = locals()
        refuse(self, SGConv, unknown)
        check_flag("SGConv", bidirectional=bidirectional)
        check_positive("SGConv", d_model=d_model, l_max=l_max, heads=heads)
        own = {"heads": heads * (1 + bidirectional), "two_sided": bidirectional, "lr": kernel_lr}
        kernel = SGConvKernel(d_model, **KERNEL.among(options, **own))
        super().__init__(d_model, kernel, **BLOCK.among(options))
