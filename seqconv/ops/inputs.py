"""The tensors of fftconv by name, for the inputs and for their gradients alike."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """u, pre_gate (batch, channels, length); k, k_rev (channels, K), (heads, channels, K) or (batch,
    heads, channels, K); skip (channels,) or (heads, channels); post_gate as the output, (batch,
    channels, length), or (batch, heads, channels, length) where k has heads."""

    u: Tensor
    k: Tensor
    k_rev: Tensor | None
    skip: Tensor | None
    pre_gate: Tensor | None
    post_gate: Tensor | None


IS_SIGNAL = Inputs(u=True, k=False, k_rev=False, skip=False, pre_gate=True, post_gate=True)
CHANNEL_AXIS = Inputs(u=-2, k=-2, k_rev=-2, skip=-1, pre_gate=-2, post_gate=-2)


def _empty(like: Tensor, shape, channels_last: bool) -> Tensor:
    """(batch, ..., channels, length); channels_last puts the channels innermost in memory."""
    if not channels_last:
        return like.new_empty(shape)
    strides, step = [1], 1
    for size in (*shape[-2:0:-1], shape[-1]):  # of channels, any heads, length; then batch
        step = step * max(size, 1)
        strides.append(step)
    channels_and_heads, length, batch = strides[:-2], strides[-2], strides[-1]
    return like.new_empty_strided(shape, (batch, *reversed(channels_and_heads), length))


def empty_output(inputs: Inputs, channels_last: bool) -> Tensor:
    u, k = inputs[:2]
    if k.dim() > 2:
        batch, channels, length = u.shape
        return _empty(u, (batch, k.shape[-3], channels, length), channels_last)
    if channels_last:
        return _empty(u, u.shape, True)
    # in half of new_empty's time
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def empty_gradients(inputs: Inputs, channels_last: bool, wanted) -> Inputs:
    """One tensor per input; None where none is wanted."""
    grads = []
    for like, want, signal in zip(inputs, wanted, IS_SIGNAL, strict=True):
        if like is None or not want:
            grads.append(None)
        elif channels_last and signal:
            grads.append(_empty(like, like.shape, True))
        else:
            grads.append(torch.empty_like(like, memory_format=torch.contiguous_format))
    return Inputs(*grads)
