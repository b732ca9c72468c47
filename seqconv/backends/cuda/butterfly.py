"""The learned butterfly on a device: the transform of reference.butterfly and its gradients, in float32.

The kernels are those of csrc/device/butterfly.cuh. n is a power of two. Its passes have 16 points each, except for at
most one that has fewer. A block must hold n complex numbers.
"""

import math

import torch
from torch import Tensor

from seqconv.backends.cuda.arguments import arguments
from seqconv.backends.cuda.arguments import transform as transform_words
from seqconv.backends.cuda.lengths import RADICES, radix_bytes
from seqconv.backends.cuda.tables import build

THREADS = 256  # there is one for every element of the largest matrix


def _fields(
    device, x: Tensor, factors: dict[int, Tensor], radices: tuple[int, ...], groups: int
) -> dict:
    batch, channels, length = x.shape
    n = math.prod(radices)
    table = device.table(build, n, radices, len(radices), False)
    heads = factors[radices[0]].shape[0]
    # Every radix has its place; the matrices of those that do not occur are not read.
    parts = [
        factors[r].float().reshape(heads, -1)
        if r in factors
        else x.new_zeros(heads, 2 * r * r, dtype=torch.float32)
        for r in RADICES
    ]
    return {
        "batch": batch,
        "channels": channels,
        "length": length,
        "groups": groups,
        "head_channels": channels // heads,
        "transform": transform_words(n, radices, table),
        "matrices": torch.cat(parts, 1).contiguous(),
        "x": x,
    }


def _groups(batch: int, most: int) -> int:
    """The number of equal shares of the batch, at most `most` and none of them empty."""
    return -(-batch // -(-batch // most))


def _launch(device, kernel: str, fields: dict) -> None:
    grid = fields["channels"] * fields["groups"]
    shared = radix_bytes(fields["transform"][0])
    device.launch(kernel, grid, THREADS, shared, arguments(kernel, **fields))


def transform(device, x: Tensor, factors: dict[int, Tensor], radices: tuple[int, ...]) -> Tensor:
    """The transform of every row of x, as reference.butterfly defines it."""
    fields = _fields(device, x, factors, radices, _groups(x.shape[0], 64))
    shape = (*x.shape[:2], math.prod(radices), 2)
    spectrum = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(device, "butterfly", fields | {"spectrum": spectrum})
    return spectrum


def gradients(
    device, dz: Tensor, x: Tensor, factors: dict[int, Tensor], radices: tuple[int, ...]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The gradients of x and of the factors. The latter are sums over at most 8 shares of the batch, added in order."""
    dz = dz.contiguous()
    batch, channels, _ = x.shape
    fields = _fields(device, x, factors, radices, _groups(batch, 8))
    blocks = channels * fields["groups"]
    dx = torch.empty_like(x)
    numbers = {"dtype": torch.float32, "device": x.device}
    sums = torch.zeros(blocks, fields["matrices"].shape[1], **numbers)
    inputs = torch.empty(blocks, len(radices), math.prod(radices), 2, **numbers)
    more = {"dspectrum": dz, "dx": dx, "pass_inputs": inputs, "dmatrices_parts": sums}
    _launch(device, "butterfly_backward", fields | more)
    heads = fields["matrices"].shape[0]
    # The blocks are (group, channel); their channels are those of each head.
    sums = sums.reshape(fields["groups"], heads, channels // heads, -1).sum((0, 2))
    parts = sums.split([2 * r * r for r in RADICES], 1)
    return dx, {
        r: part.reshape(heads, r, r, 2).to(factors[r].dtype)
        for r, part in zip(RADICES, parts, strict=True)
        if r in factors
    }
