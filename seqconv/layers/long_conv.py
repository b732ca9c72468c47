"""LongConv: convolution with a free kernel as long as the sequence, regularised by squashing (arXiv 2302.06646)."""

import warnings
from functools import reduce
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqconv.layers.base import ConvLayer, KernelGenerator
from seqconv.layers.module import fill, kernel_dtype, whole
from seqconv.layers.options import Defaults, refuse
from seqconv.layers.streaming import StreamingLayer
from seqconv.ops.checks import (
    check_choice,
    check_flag,
    check_learning_rate,
    check_positive,
    check_probability,
)

_warned = False  # There is one warning per process, whatever the filters of warnings say.


def squash(k: Tensor, lam: float) -> Tensor:
    """Soft threshold sign(k) max(|k| - lam, 0) (paper, section 3.1). Taps below lam get no gradient."""
    return F.softshrink(k, lam)


def _correlate(x: Tensor, weights: Tensor) -> Tensor:
    """sum_i weights[i] x[..., j + i - w // 2] for an odd number w of weights, x zero outside."""
    reach, length = len(weights) // 2, x.shape[-1]
    x = F.pad(x, (reach, reach))
    parts = (weights[i] * x[..., i : i + length] for i in range(len(weights)))
    return reduce(torch.add, parts)


def _correlate_spectrum(k: Tensor, weights: Tensor) -> Tensor:
    """irfft(_correlate(rfft(k), weights), n), but by complex transforms: torch does not trace the real
    ones with n unknown.
    """
    n = k.shape[-1]
    f = torch.arange(n, device=k.device)
    half = 2 * f <= n
    count = half.to(k.dtype) + ((f > 0) & (2 * f < n))  # 2 where a conjugate is left out
    s = half * torch.fft.fft(torch.complex(k, torch.zeros_like(k)))
    return torch.fft.ifft(count * _correlate(s, weights)).real


class LongConvKernel(KernelGenerator):
    """Kernel generator of LongConv; LongConvKernel(...)(length) -> (heads, d_model, min(length, l_max)).

    k = dropout(squash(smooth(kernel[..., :length]))), with squash(k) = sign(k) max(|k| - lam, 0) and
    w = smooth_window, odd, in

        smooth=None:        smooth(k) = k
        smooth="time":      smooth(k)[j] = sum_{|i| <= w // 2} k[j + i] / w, k zero outside
        smooth="frequency": smooth(k) = irfft(s), s[f] = sum_{|i| <= w // 2} exp(-i^2 / 2) rfft(k)[f + i],
                            rfft(k) zero outside

    The last is nearly a product with a window over time, which is highest, 2.5, at both ends of k.

    Parameter: kernel (heads, d_model, l_max), at tap j of channel i initially
        init="double_exp": 0.02 N(0, 1) exp(-(j / l_max) r_i), with decay rates
            r_i = floor(d_model / 2)^(i / d_model), geometric over the channels
        init="random": 0.002 N(0, 1)
    Buffer, not in the state_dict: weights (smooth_window,), where there is smoothing.
    Optimiser: the taps take min(lr, `lr` here) and no weight decay. With lr=0 they are a buffer.

    A tap that squashing zeroes gets no gradient, and without weight decay or smoothing it never
    moves again: with init="random" that is 38% of all taps at lam=0.001, 68% at 0.002, 87% at 0.003
    and 95% at 0.004. Smoothing lets living neighbours revive them. A kernel of which more than 90%
    starts dead gives a UserWarning, once per process.

    Source: arXiv 2302.06646, section 3.
    """

    lam: float
    weights: Tensor
    shown = ("l_max", "init", "lam")
    reads = ("kernel",)
    channel_axes: ClassVar = {"kernel": 1}

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        heads: int = 1,
        init: str = "double_exp",
        lam: float = 0.003,
        smooth: str | None = None,
        smooth_window: int = 7,
        kernel_dropout: float = 0.2,
        lr: float = 1e-3,
    ):
        super().__init__()
        name = "LongConvKernel"
        check_positive(name, d_model=d_model, l_max=l_max, heads=heads, smooth_window=smooth_window)
        check_choice(name, "init", init, ("double_exp", "random"))
        check_choice(name, "smooth", smooth, (None, "time", "frequency"))
        check_learning_rate(name, lr=lr)
        if smooth_window % 2 == 0:
            raise ValueError(f"{name}: smooth_window must be odd, got {smooth_window}")
        check_probability(name, kernel_dropout=kernel_dropout)
        if not lam >= 0:
            raise ValueError(f"{name}: lam must be >= 0, got {lam}")
        self.d_model, self.l_max, self.heads = d_model, l_max, heads
        self.init, self.lam = init, lam
        self.smooth, self.smooth_window = smooth, smooth_window
        like: dict[str, Any] = {"dtype": kernel_dtype()}
        self.kernel = nn.Parameter(torch.empty(heads, d_model, l_max, **like))
        weights = None if smooth is None else torch.empty(smooth_window, **like)
        self.register_buffer("weights", weights, persistent=False)
        self.dropout = nn.Dropout(kernel_dropout)
        self.override("kernel", lr=lr, weight_decay=0.0)
        self.reset_parameters()

    def meant(self) -> dict:
        window = {} if self.smooth is None else {"smooth_window": self.smooth_window}
        return {"lam": self.lam, "smooth": self.smooth} | window

    def reset_parameters(self) -> None:
        """Draws the taps anew, as at construction, and fills in the smoothing's weights."""
        like: dict[str, Any] = {"dtype": self.kernel.dtype, "device": self.kernel.device}
        _, d_model, l_max = self.kernel.shape
        if like["device"].type == "meta":
            return
        scale = torch.tensor(0.002, **like)
        if self.init == "double_exp":
            rate = float(d_model // 2) ** (torch.arange(d_model, **like) / d_model)  # (h)
            scale = 0.02 * torch.exp(-rate.unsqueeze(-1) * torch.arange(l_max, **like) / l_max)
        fill(self, {"kernel": torch.randn(self.kernel.shape, **like) * scale})
        if self.smooth is not None:
            place = torch.arange(self.smooth_window, **like) - self.smooth_window // 2
            flat = torch.full_like(place, 1 / self.smooth_window)
            fill(self, {"weights": flat if self.smooth == "time" else torch.exp(-0.5 * place**2)})
        self._warn_of_dead_taps()

    def _squashed(self, taps: Tensor, length: int) -> Tensor:
        # The taps are cut first: a tap beyond the input must not wrap around to the future, nor take part
        # in anything else.
        k = taps[..., :length]
        if self.smooth == "time":
            k = _correlate(k, self.weights)
        elif self.smooth == "frequency" and k.shape[-1]:
            k = _correlate_spectrum(k, self.weights)
        return squash(k, self.lam)

    def _warn_of_dead_taps(self) -> None:
        global _warned
        if _warned:
            return
        with torch.no_grad():
            (taps,) = self.read()
            k = self._squashed(whole(taps), self.l_max)
            dead = (k == 0).float().mean().item()
        if dead > 0.9:
            _warned = True
            warnings.warn(
                f"LongConvKernel: lam={self.lam} squashes {dead:.0%} of the taps to zero from the start. "
                "They get no gradient and will never move, unless smoothing lets living neighbours revive "
                "them; take a smaller lam or init='double_exp'.",
                stacklevel=5,  # the caller of the layer
            )

    def generate(self, tensors: list[Tensor], length: int, rate: float) -> Tensor:
        (taps,) = tensors
        return self.dropout(self._squashed(taps, length))


KERNEL, BLOCK = Defaults(LongConvKernel), Defaults(ConvLayer)


class LongConv(StreamingLayer):
    """Long convolution layer, (batch, length, d_model) -> the same.

    y = GLU(W dropout(gelu(k * x + skip x)) + b), k = dropout(sign(p) max(|p| - lam, 0)), from
    LongConvKernel. Inputs longer than l_max are convolved with the l_max taps there are.

    Parameters: p = kernel.kernel (heads, d_model, l_max), twice the heads if bidirectional; at tap j
    of channel i 0.02 N(0, 1) exp(-(j / l_max) r_i), r_i = floor(d_model / 2)^(i / d_model), or 0.002
    N(0, 1) with init="random"; min(lr, kernel_lr), no weight decay. skip (heads, d_model) ~ N(0, 1);
    linear, weight (2 d_model, heads d_model) and bias, torch's default; trained like any weight.

    Args:
        d_model: the number of channels.
        l_max: the number of taps of each kernel.
        heads: the number of kernels per channel. The linear map takes heads * d_model inputs.
        bidirectional: True adds as many kernels for the future. They are shifted by one, because lag 0
            belongs to the kernels for the past.
        init: how the taps begin: "double_exp" (they decay, at different speeds in different channels) or "random".
        lam: the threshold of the squash, which sets the taps below it to zero.
        smooth: the average before the squash: None, "time" (over neighbouring taps) or "frequency"
            (over neighbouring frequencies). smooth_window: the odd number of those that are averaged.
        kernel_dropout: the probability of dropout of single taps, in training. Unless it is 0, training
            passes are random.
        activation: the function after the convolution: "gelu", "silu", "relu" or None.
        dropout: the probability of dropout after the activation. tie_dropout: True draws one mask per sample
            and channel for all times.
        postact: "glu", or None for a plain linear map.
        kernel_lr: the learning rate that param_groups gives to the taps, unless its own lr is smaller. With
            0 they are a buffer.

    The taps stay float32 under .to(bfloat16) and .half().

    Source: arXiv 2302.06646, section 3. Example:
        >>> layer = LongConv(8, l_max=100)
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
        init: str = KERNEL.init,
        lam: float = KERNEL.lam,
        smooth: str | None = KERNEL.smooth,
        smooth_window: int = KERNEL.smooth_window,
        kernel_dropout: float = KERNEL.kernel_dropout,
        kernel_lr: float = KERNEL.lr,
        activation: str | None = BLOCK.activation,
        dropout: float = BLOCK.dropout,
        tie_dropout: bool = BLOCK.tie_dropout,
        postact: str | None = BLOCK.postact,
        **unknown: NoReturn,
    ):
        options = locals()
        refuse(self, LongConv, unknown)
        check_flag("LongConv", bidirectional=bidirectional)
        check_positive("LongConv", d_model=d_model, l_max=l_max, heads=heads)
        directions = heads * (1 + bidirectional)
        kernel = LongConvKernel(d_model, **KERNEL.among(options, heads=directions, lr=kernel_lr))
        super().__init__(d_model, kernel, **BLOCK.among(options))
