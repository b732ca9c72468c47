"""Tensors as plain integers, the language of every kernel of the package."""

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2, "relu": 3}
ABSENT = (0, 0, 0, 0, 0, 0)

# Which axes of a tensor are batch, head, channel and time, by its number of axes.
SIGNAL = {3: (0, None, 1, 2), 4: (0, 1, 2, 3)}
KERNEL = {2: (None, None, 0, 1), 3: (None, 0, 1, 2), 4: (0, 1, 2, 3)}
STEP = {2: (0, None, 1, None), 3: (0, 1, 2, None)}
SKIP = {1: (None, None, 0, None), 2: (None, 0, 1, None)}


def laid_out(dtype: torch.dtype, stride: tuple[int, ...], table: dict) -> tuple[int, ...]:
    """Number of the dtype, and the strides of (batch, head, channel, time)."""
    axes = table[len(stride)]
    return (DTYPES[dtype], *[0 if axis is None else stride[axis] for axis in axes])


def pack(t: Tensor | None, table: dict) -> tuple[int, ...]:
    """Address, dtype, and the strides of (batch, head, channel, time); zeros for an absent tensor."""
    return ABSENT if t is None else (t.data_ptr(), *laid_out(t.dtype, t.stride(), table))


def alike(offsets: Tensor, device):
    """For every length that rows of a pack have, but 0: the rows, the length, and where their steps are, row by row."""
    steps = offsets.diff()
    for length in steps.unique().tolist():
        if length:
            rows = (steps == length).nonzero().flatten()
            place = offsets[rows].unsqueeze(1) + torch.arange(length)
            yield rows.to(device), length, place.flatten().to(device)


def dense_rows(inputs, rows: Tensor, length: int, place: Tensor):
    """The inputs of rows of one length, with an axis of samples; their steps are at `place`."""

    def samples(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return t[..., place].unflatten(-1, (len(rows), length)).movedim(-2, 0)

    def kernels(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dim() < 4 else t[rows]

    u, k, k_rev, skip, pre_gate, post_gate, bias = inputs
    signals = map(samples, (u, pre_gate, post_gate))
    u, pre_gate, post_gate = signals
    return type(inputs)(u, kernels(k), kernels(k_rev), skip, pre_gate, post_gate, bias)


def reach(length: int, k, k_rev) -> tuple[int, int]:
    """How many taps of k and k_rev meet an output at all."""
    return reached(length, k.shape[-1], 0 if k_rev is None else k_rev.shape[-1])


def reached(length: int, taps: int, taps_rev: int) -> tuple[int, int]:
    return min(taps, length), min(taps_rev, max(length - 1, 0))


def zero_unreached(dk: Tensor | None, dk_rev: Tensor | None, length: int) -> None:
    """The gradient of taps that meet no output."""
    for grad, last in ((dk, length), (dk_rev, length - 1)):
        if grad is not None and grad.shape[-1] > last:
            grad[..., last:] = 0
