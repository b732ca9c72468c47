"""The learned butterfly on a device: the transform of reference.butterfly, and its gradients, in float32.

As csrc/device/butterfly.cuh has it: n up to what a block holds of float32 numbers, a power of two of
passes of 16 points and at most one of fewer.
"""

import torch
from torch import Tensor

from seqconv.backends.cuda.arguments import arguments
from seqconv.backends.cuda.plan import RADICES, radix_bytes
from seqconv.backends.cuda.tables import build
from seqconv.backends.pack import materialise

THREADS = 256  # one for every element of the largest matrix


def _fields(
    device, x: Tensor, factors: dict[int, Tensor], radices: tuple[int, ...], groups: int
) -> dict:
    batch, channels, length = x.shape
    n = torch.Size(radices).numel()
    heads = factors[radices[0]].shape[0]
    # every radix has its place; those that do not occur are not read
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
        "n": n,
        "count": len(radices),
        "radices": sum(r << (8 * i) for i, r in enumerate(radices)),
        "tables": device.table(build, n, radices, len(radices), False),
        "matrices": torch.cat(parts, 1).contiguous(),
        "matrix_channels": channels // heads,
        "u": x,
    }


def _groups(batch: int, most: int) -> int:
    """Equal shares of the batch, none empty."""
    return -(-batch // -(-batch // most))


def _launch(device, kernel: str, fields: dict) -> None:
    grid = fields["channels"] * fields["groups"]
    device.launch(kernel, grid, THREADS, radix_bytes(fields["n"]), arguments(**fields))


def transform(device, x: Tensor, factors: dict[int, Tensor], radices: tuple[int, ...]) -> Tensor:
    """reference.butterfly."""
    x = materialise(x)
    fields = _fields(device, x, factors, radices, _groups(x.shape[0], 64))
    out = torch.empty(*x.shape[:2], fields["n"], 2, dtype=torch.float32, device=x.device)
    _launch(device, "butterfly", fields | {"work": out})
    return out


def gradients(
    device, dz: Tensor, x: Tensor, factors: dict[int, Tensor], radices: tuple[int, ...]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Of x, and of the factors: one sum for every share of the batch, at most 8, added in order."""
    x, dz = materialise(x), dz.contiguous()
    batch, channels, _ = x.shape
    fields = _fields(device, x, factors, radices, _groups(batch, 8))
    blocks = channels * fields["groups"]
    dx = torch.empty_like(x)
    sums = torch.zeros(blocks, fields["matrices"].shape[1], device=x.device)
    inputs = torch.empty(blocks, len(radices), fields["n"], 2, dtype=torch.float32, device=x.device)
    more = {"work": dz, "du": dx, "partial": inputs, "partial_matrices": sums}
    _launch(device, "butterfly_backward", fields | more)
    heads = fields["matrices"].shape[0]
    # (group, channel) blocks to the channels of each head
    sums = sums.reshape(fields["groups"], heads, channels // heads, -1).sum((0, 2))
    parts = sums.split([2 * r * r for r in RADICES], 1)
    return dx, {
        r: part.reshape(heads, r, r, 2).to(factors[r].dtype)
        for r, part in zip(RADICES, parts, strict=True)
        if r in factors
    }
