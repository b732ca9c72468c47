"""Causal convolutions by cuFFTDx within one CUDA Tile kernel: NVIDIA's nvmath.tile.fft, a preview of 2026.

A block transforms two rows of a channel, one as the real and one as the imaginary part, multiplies them by the
kernel's spectrum and transforms them back. The transforms are not normalised.
"""

import cuda.tile as ct
import torch
from nvmath.tile import fft
from torch import Tensor

LONGEST = 16384  # cuFFTDx transforms at most 32,768 points in a block


@ct.kernel
def convolve(u, k, y, points: ct.Constant[int]):
    """u and y are (batch, channels, length), k is (1, channels, taps). What lies beyond them is loaded as zeros, which
    pads the rows, an odd batch, and the imaginary part of the kernel."""
    pair, channel = ct.bid(0), ct.bid(1)
    zero = ct.PaddingMode.ZERO
    x = ct.load(u, (pair, channel, 0), (2, 1, points), padding_mode=zero)
    h = ct.load(k, (0, channel, 0), (2, 1, points), padding_mode=zero)
    x = ct.permute(ct.reshape(ct.astype(x, ct.float32), (2, points)), (1, 0))
    h = ct.permute(ct.reshape(ct.astype(h, ct.float32), (2, points)), (1, 0))
    x, h = fft.fft(x, axis=0), fft.fft(h, axis=0)
    x_re, x_im = ct.extract(x, (0, 0), (points, 1)), ct.extract(x, (0, 1), (points, 1))
    h_re, h_im = ct.extract(h, (0, 0), (points, 1)), ct.extract(h, (0, 1), (points, 1))
    product = ct.cat((x_re * h_re - x_im * h_im, x_re * h_im + x_im * h_re), 1)
    rows = ct.permute(fft.ifft(product, axis=0) * (1.0 / points), (1, 0))
    ct.store(y, (pair, channel, 0), ct.astype(ct.reshape(rows, (2, 1, points)), y.dtype))


def causal(u: Tensor, k: Tensor) -> Tensor:
    """u (batch, channels, length), k (channels, taps), a length that is a power of two and not below the taps."""
    y = torch.empty_like(u)
    batch, channels, length = u.shape
    try:
        grid = (ct.cdiv(batch, 2), channels, 1)
        ct.launch(torch.cuda.current_stream(), grid, convolve, (u, k[None], y, 2 * length))
    except ct.TileError as error:
        raise RuntimeError(f"nvmath.tile: {error}") from error
    return y
