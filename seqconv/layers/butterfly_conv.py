"""ButterflyConv: a long convolution whose forward Fourier transforms are learned (arXiv 2302.06646, section 3.4)."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from einops import rearrange
from torch import Tensor, nn

from seqconv import reference
from seqconv.backends.fallback import radix_sizes
from seqconv.layers.base import ConvLayer, KernelGenerator, sized
from seqconv.layers.long_conv import BLOCK, KERNEL, LongConvKernel
from seqconv.layers.module import fill, kernel_dtype
from seqconv.layers.options import Defaults, refuse
from seqconv.layers.packing import Pack, pad, unpadded
from seqconv.ops import butterfly
from seqconv.ops.checks import (
    check_choice,
    check_flag,
    check_learning_rate,
    check_positive,
    check_probability,
)
from seqconv.ops.fftconv import ACTIVATIONS


def radices(n: int) -> tuple[int, ...]:
    """A power of two as passes of 16 points and at most one, the last, of fewer: 2048 = 16 x 16 x 8."""
    bits = n.bit_length() - 1
    return (16,) * (bits // 4) + ((1 << bits % 4,) if bits % 4 else ())


def fourier(size: int, device=None) -> Tensor:
    """(size, size, 2) in float64: exp(-2 pi i p j / size) in row p and column j."""
    index = torch.arange(size, dtype=torch.float64, device=device)
    turn = torch.outer(index, index) % size * (-2 * math.pi / size)
    return torch.stack([turn.cos(), turn.sin()], -1)


class _Matrices(nn.ParameterDict):
    """The learned matrices, by size. They have a module of their own, because FSDP and Lightning call
    reset_parameters of the module that holds a parameter."""

    def __init__(self, sizes: Sequence[int], heads: int, additive: bool):
        like: dict[str, Any] = {"dtype": kernel_dtype()}
        super().__init__({str(m): torch.empty(heads, m, m, 2, **like) for m in sizes})
        self.additive = additive
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the matrices to Fourier matrices, or draws 0.01 N(0, 1) where they are added to those."""
        for size, matrix in self.items():
            like: dict[str, Any] = {"dtype": matrix.dtype, "device": matrix.device}
            if like["device"].type != "meta":
                exact = fourier(int(size), matrix.device).expand(matrix.shape)
                fill(
                    self,
                    {size: 0.01 * torch.randn(matrix.shape, **like) if self.additive else exact},
                )


class Butterfly(KernelGenerator):
    """A learned transform; Butterfly(n)(x) maps real x (batch, channels, length <= n), which it pads with
    zeros, to (batch, channels, n, 2): real and imaginary parts of n frequencies, at least in float32.

    The passes of a fast Fourier transform of n points, a power of two, with fixed twiddles and one
    learned matrix for every size of pass, which all passes of that size share: 16 points as often
    as possible, then what remains.

    Parameters: matrices.<m> (heads, m, m, 2), real and imaginary parts, for every size m that
    occurs: the Fourier matrix F_m, so that the transform begins as the exact one. additive: the
    matrix is F_m + dropout(matrices.<m>), and that begins as 0.01 N(0, 1). heads divide the
    channels evenly. They are float32 in half precision. activation: of real and imaginary parts after
    every pass, "gelu", "silu" or "relu"; no Fourier transform then, from the start.
    Optimiser: they take min(lr, `lr` here) and no weight decay. With lr=0 they are buffers.

    Source: arXiv 2302.06646, section 3.4. Twin: seqconv.reference.butterfly.
    """

    meaning = ("n", "additive", "activation")

    def __init__(
        self,
        n: int,
        *,
        heads: int = 1,
        additive: bool = False,
        activation: str | None = None,
        dropout: float = 0.0,
        lr: float = 1e-3,
    ):
        super().__init__()
        check_positive("Butterfly", n=n, heads=heads)
        check_flag("Butterfly", additive=additive)
        check_choice("Butterfly", "activation", activation, ACTIVATIONS)
        check_learning_rate("Butterfly", lr=lr)
        check_probability("Butterfly", dropout=dropout)
        if n < 2 or n & (n - 1):
            raise ValueError(f"Butterfly: n must be a power of two >= 2, got {n}")
        self.n, self.heads = n, heads
        self.radices = radices(n)
        self.additive, self.activation = additive, activation
        self.dropout = nn.Dropout(dropout)
        self.matrices = _Matrices(radix_sizes(self.radices), heads, additive)
        self.override("matrices", lr=lr, weight_decay=0.0)

    def forward(self, x: Tensor, sets: list[int] | None = None) -> Tensor:
        """The transform of x. sets names the set of matrices of each channel, where x has not all channels."""
        self.read()  # This refuses matrices in half precision.
        parts = []
        for matrix in self.matrices.values():
            learned = self.dropout(matrix)
            if self.additive:
                learned = learned + fourier(matrix.shape[1], matrix.device).to(matrix.dtype)
            parts.append(learned.flatten(1, 2) if not sets else learned[sets].flatten(1, 2))
        return butterfly.transform(x, torch.cat(parts, 1), self.radices, self.activation)

    def extra_repr(self) -> str:
        passes = " x ".join(map(str, self.radices))
        return f"{super().extra_repr()}, passes={passes}"


TRANSFORM = Defaults(Butterfly)


class NoSteps(TypeError, AttributeError):
    """A layer has no such method, for a reason: hasattr is False, and a call says why."""


class ButterflyConv(ConvLayer):
    """Long convolution layer with learned transforms, (batch, length, d_model) -> the same, length <= l_max.

    v = Re ifft(T x * S k)[:length] + skip x,   y = GLU(W dropout(gelu(v)) + b)

    k (heads, d_model, l_max) from LongConvKernel. T and S are two Butterfly transforms of n points,
    the power of two >= 2 l_max, so that nothing wraps; the inverse is the exact one. Before training it is
    LongConv to round-off: causal, a convolution. Once its matrices are learned it is neither: every
    output sees every input, the product no longer means a sum over lags, and the imaginary part
    that arises is dropped. Hence it has no step-by-step form, and none for the future
    (bidirectional). With additive=True it begins beside the exact one, with dft_activation far from it.

    Every input is padded to n, whatever its length, and all l_max taps are used: an input with zeros
    behind it gives the same outputs. Learned transforms of another length would have other matrices.

    Parameters: those of LongConv, and of T (`input_transform`) and S (`kernel_transform`): 2 (sum of
    m^2 over the sizes m that occur) numbers each, for every one of butterfly_heads. l_max = 1024: n
    = 16 x 16 x 8, 1280 in both. Optimiser: taps as LongConv's; matrices min(lr, dft_lr), no weight decay.

    Args:
        d_model: the number of channels.
        l_max: the number of taps of each kernel, and the length of the longest input. A longer input raises
            ValueError.
        heads: the number of kernels per channel. The linear map takes heads * d_model inputs.
        butterfly_heads: the number of sets of matrices. Each serves d_model / butterfly_heads neighbouring
            channels.
        additive: True learns what is added to the Fourier matrices instead of the matrices.
        dft_activation: the function of the real and imaginary parts after every pass of both transforms, "gelu",
            "silu" or "relu". The transforms are matrix products of torch then.
        dft_dropout: the probability of dropout of single elements of the learned matrices, in training.
        dft_lr, kernel_lr: the learning rates that param_groups gives to matrices and taps, unless its own
            lr is smaller. With 0 they are buffers.
        init, lam, smooth, smooth_window, kernel_dropout: the options of the taps, as in LongConv.
        activation, dropout, tie_dropout, postact: as in LongConv.

    Cost: kernels of its own on a CPU from l_max = 5 on, and on CUDA, float32 or narrower, while a
    block's memory holds n complex numbers (l_max <= 8192 on an H100); matrix products of torch
    elsewhere. Memory batch d_model n complex numbers for the spectrum, and on CUDA heads times that for
    the product, which a CPU makes and transforms some channels at a time.

    Source: arXiv 2302.06646, section 3.4. Example:
        >>> layer = ButterflyConv(8, l_max=100)
        >>> layer(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    shown = ("l_max", "heads")
    causal = False  # pyright: ignore  # once its transforms are learned

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        heads: int = KERNEL.heads,
        butterfly_heads: int = TRANSFORM.heads,
        additive: bool = TRANSFORM.additive,
        dft_activation: str | None = TRANSFORM.activation,
        dft_dropout: float = TRANSFORM.dropout,
        dft_lr: float = TRANSFORM.lr,
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
        refuse(self, ButterflyConv, unknown)
        sizes = {"d_model": d_model, "l_max": l_max, "heads": heads}
        check_positive("ButterflyConv", **sizes, butterfly_heads=butterfly_heads)
        check_flag("ButterflyConv", additive=additive)
        check_choice("ButterflyConv", "dft_activation", dft_activation, ACTIVATIONS)
        if d_model % butterfly_heads:
            text = f"must divide d_model={d_model}, got {butterfly_heads}"
            raise ValueError(f"ButterflyConv: butterfly_heads {text}")
        kernel = LongConvKernel(d_model, **KERNEL.among(options, lr=kernel_lr))
        super().__init__(d_model, kernel, bidirectional=False, **BLOCK.among(options))
        self.l_max = l_max
        n = 1 << (2 * l_max - 1).bit_length()
        own: dict[str, Any] = {
            "heads": butterfly_heads,
            "additive": additive,
            "activation": dft_activation,
        }
        own |= {"dropout": dft_dropout, "lr": dft_lr}
        self.input_transform = Butterfly(n, **own)
        self.kernel_transform = Butterfly(n, **own)

    def _convolve(self, x: Tensor, rate: float, pack: Pack | None = None) -> Tensor:
        if pack is not None:  # Every row is padded to the transforms' length in any case.
            rows, lengths = pad(x, pack.cu_seqlens, pack.longest)
            return unpadded(self._convolve(rows, rate), lengths)
        x, length = sized(x)
        if length > self.l_max:
            text = f"must have length <= l_max={self.l_max}, got length={length}"
            raise ValueError(f"ButterflyConv: x {text}")
        u = rearrange(x, "b l h -> b h l")
        y = self._transformed(u, lambda: self._kernel(self.l_max, rate), length)
        return rearrange(y, "b c h l -> b l c h")

    def _transformed(self, u: Tensor, make, length: int, channels: slice = slice(None)) -> Tensor:
        """activation(v), (batch, heads, channels, length), of u (batch, channels, length) and make(), the kernel of
        these channels. It is made after the transform of u: in this order dropout draws its numbers."""
        sets = range(self.d_model)[channels]
        size = self.d_model // self.input_transform.heads
        some = (
            None if len(sets) == self.d_model or size == self.d_model else [c // size for c in sets]
        )
        u_f = self.input_transform(u, some)  # (b h n 2)
        k_f = self.kernel_transform(make(), some)  # (c h n 2)
        v = butterfly.product(butterfly.Spectra(u_f, k_f), length)
        v = v + self.skip[:, channels].to(v.dtype).unsqueeze(-1) * u.unsqueeze(1)
        return reference.activate(v, self.activation).to(u.dtype)

    def __getattr__(self, name: str):
        if name in ("init_state", "step", "prefill"):
            text = "every output sees every input once the matrices are trained, the future too, so that it has no"
            raise NoSteps(f"ButterflyConv: {text} {name}; a LongConv with its taps has")
        return super().__getattr__(name)
