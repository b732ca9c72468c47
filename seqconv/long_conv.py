"""LongConv: convolution with a free kernel as long as the sequence, regularised by squashing (arXiv 2302.06646)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqconv._check import check_flag, check_length, check_positive
from seqconv._layer import ConvLayer, KernelGenerator


def squash(k: Tensor, lam: float) -> Tensor:
    """Soft threshold sign(k) max(|k| - lam, 0) (paper, section 3.1). Taps below lam get no gradient."""
    return F.softshrink(k, lam)


class LongConvKernel(KernelGenerator):
    """Kernel generator of LongConv; LongConvKernel(...)(length) -> (heads, d_model, min(length, l_max)).

    k = dropout(squash(kernel[..., :length])).

    Parameter: kernel (heads, d_model, l_max): 0.02 N(0, 1) exp(-(j / l_max) r_i) at tap j of
    channel i, with decay rates r_i = floor(d_model / 2)^(i / d_model), geometric over the channels.
    Optimiser: min(lr, `lr` here), no weight decay.
    """

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        heads: int = 1,
        lam: float = 0.003,
        kernel_dropout: float = 0.2,
        lr: float = 1e-3,
    ):
        super().__init__()
        check_positive("LongConvKernel", d_model=d_model, l_max=l_max, heads=heads)
        if not lam >= 0:
            raise ValueError(f"LongConvKernel: lam must be >= 0, got {lam}")
        rate = float(d_model // 2) ** (torch.arange(d_model) / d_model)  # (h)
        decay = torch.exp(-rate.unsqueeze(-1) * torch.arange(l_max) / l_max)  # (h l)
        self.kernel = nn.Parameter(0.02 * torch.randn(heads, d_model, l_max) * decay)
        self.lam = lam
        self.dropout = nn.Dropout(kernel_dropout)
        self.overrides = {"kernel": {"lr": lr, "weight_decay": 0.0}}

    def forward(self, length: int) -> Tensor:
        check_length("LongConvKernel", length)
        # Cut first: a tap beyond the input must not wrap around to the future, nor take part in
        # anything else.
        return self.dropout(squash(self.kernel[..., :length], self.lam))


class LongConv(ConvLayer):
    """Long convolution layer, (batch, length, d_model) -> the same.

    y = GLU(W dropout(gelu(k * x + skip x)) + b), k from LongConvKernel. Inputs longer than l_max
    are convolved with the l_max taps there are.

    Args:
        d_model: channels.
        l_max: taps per kernel.
        heads: kernels per channel; the linear map takes heads * d_model inputs.
        bidirectional: add as many kernels for the future, shifted by one so that lag 0 belongs to
            the past's.
        lam: threshold of the squash, which zeroes the taps below it.
        kernel_dropout: of single taps, in training.
        activation: of the convolution: "gelu", "silu", "relu" or None.
        dropout: after the activation; tie_dropout: one mask per sample and channel for all times.
        postact: "glu", or None for a plain linear map.
        kernel_lr: learning rate that param_groups gives to the taps, or its own lr if that is
            smaller.

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
        heads: int = 1,
        bidirectional: bool = False,
        lam: float = 0.003,
        kernel_dropout: float = 0.2,
        kernel_lr: float = 1e-3,
        **block,
    ):
        check_flag("LongConv", bidirectional=bidirectional)
        check_positive("LongConv", d_model=d_model, l_max=l_max, heads=heads)
        options = {"l_max": l_max, "lam": lam, "kernel_dropout": kernel_dropout, "lr": kernel_lr}
        kernel = LongConvKernel(d_model, heads=heads * (1 + bidirectional), **options)
        super().__init__(d_model, kernel, heads=heads, bidirectional=bidirectional, **block)
