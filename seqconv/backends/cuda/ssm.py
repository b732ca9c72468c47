"""Sums of exponentials on a device: k[c, h, l] = sum_n Re(w[c, h, n] exp(a[h, n] l)) and its gradients.

The kernels are those of csrc/device/ssm.cuh. a (h, n, 2) and w (c, h, n, 2) are contiguous float64 tensors whose last
axis holds real and imaginary parts. k and its gradient (c, h, length) are float32 and may have any strides. The order
of the sums is fixed on a device; devices with other numbers of multiprocessors have other orders.
"""

import torch
from torch import Tensor

from seqconv.backends.cuda.arguments import arguments

THREADS = 128
MODES = 32  # a block holds the tables of so many at a time
ROW, ROWS = 64, 32  # the positions of a row, and the rows of a tile
FORWARD_SHARED = 8 * MODES * (ROW + ROWS)
BACKWARD_SHARED = FORWARD_SHARED + 4 * ROW * ROWS
BLOCKS = 16  # a multiprocessor is given so many where the length suffices, which is several times what it holds


def _launch(device, kernel: str, grid: int, shared: int, fields: dict) -> None:
    device.launch(kernel, grid, THREADS, shared, arguments(kernel, **fields))


def _prepare(device, a: Tensor, heads: int, length: int) -> dict:
    """Computes the powers of every mode, and shares the tiles out so that no share is empty."""
    channels, modes, _ = a.shape
    digits = max(
        4, -(-(length - 1).bit_length() // 3)
    )  # of a position in base 8; a tile alone takes four
    tiles = -(-length // (ROW * ROWS))
    share = -(-tiles // min(tiles, -(-BLOCKS * device.limits.processors // channels)))
    fields = {
        "heads": heads,
        "channels": channels,
        "length": length,
        "groups": -(-tiles // share),
        "modes": modes,
        "digits": digits,
        "exponents": a,
        "powers": torch.empty(channels, modes, digits, 8, 2, dtype=torch.float32, device=a.device),
    }
    _launch(device, "ssm_powers", -(-channels * modes * digits // THREADS), 0, fields)
    return fields


def forward(device, k: Tensor, a: Tensor, w: Tensor) -> None:
    """Writes k."""
    heads, channels, length = k.shape
    if not k.numel():
        return
    fields = _prepare(device, a, heads, length) | {"k": k, "rounded_weights": w.float()}
    _launch(device, "ssm_forward", channels * fields["groups"], FORWARD_SHARED, fields)


def backward(device, da: Tensor, dw: Tensor, dk: Tensor, a: Tensor, w: Tensor) -> None:
    """Writes da and dw, contiguous: conj(sum_c w S_1) and conj(S_0), S_p = sum_l l^p dk[l] exp(a l)."""
    heads, channels, length = dk.shape
    if not dk.numel():
        da.zero_(), dw.zero_()
        return
    fields = _prepare(device, a, heads, length)
    blocks = channels * fields["groups"]
    sums = torch.empty(blocks, heads, a.shape[1], 4, dtype=torch.float64, device=a.device)
    fields |= {"dk": dk, "weights": w, "sums": sums, "dexponents": da, "dweights": dw}
    _launch(device, "ssm_backward", blocks, BACKWARD_SHARED, fields)
    _launch(device, "ssm_gradients", -(-channels * a.shape[1] // THREADS), 0, fields)
