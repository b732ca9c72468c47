"""Masks and lengths of layers: which steps of a batch are padding."""

import torch
from torch import Tensor

from seqconv.ops.checks import FLOATS, check_shape, check_tensor, require


def padding_of(function: str, x: Tensor, mask, lengths) -> Tensor:
    """Whether a step is padding, (batch, length), from the one of mask and lengths that is not None."""
    batch, length, _ = x.shape
    if lengths is not None:
        if mask is not None:
            raise ValueError(f"{function}: mask and lengths exclude each other, got both")
        check_tensor(
            function,
            "lengths",
            lengths,
            dtypes=(torch.int64, torch.int32),
            device=x.device,
            owner="x",
        )
        check_shape(function, "lengths", lengths, (("batch", batch),))
        valid = (lengths >= 0) & (lengths <= length)
        require(valid, f"{function}: lengths must be between 0 and length={length}", lengths)
        return torch.arange(length, device=x.device) >= lengths.unsqueeze(1)
    if isinstance(mask, Tensor) and mask.dtype not in (torch.bool, *FLOATS):
        text = f"{function}: mask must be bool (True is padding) or float with 0 and -inf, got {mask.dtype}"
        raise TypeError(
            f"{text}; of 1 where a step is kept and 0 at padding, mask == 0 is such a mask"
        )
    check_tensor(function, "mask", mask, device=x.device, owner="x", dtypes=(torch.bool, *FLOATS))
    check_shape(function, "mask", mask, (("batch", batch), ("length", length)))
    if mask.dtype == torch.bool:
        return mask
    padding = mask == -torch.inf
    text = f"{function}: mask must be bool (True is padding) or float with 0 and -inf only"
    require(padding | (mask == 0), text, mask)
    return padding


def extents(padding: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row of padding (batch, length) its first step that is not padding, and the number of steps from that to
    the last such; zeros for a row of padding alone."""
    place = torch.arange(padding.shape[1], device=padding.device)
    end = torch.where(padding, 0, place + 1).amax(1) if len(place) else padding.sum(1)
    first = torch.where(padding, len(place), place).amin(1).clamp(max=end) if len(place) else end
    return first, end - first


def shifted(x: Tensor, by: Tensor) -> Tensor:
    """x[..., t + by] of x (..., time), zero outside, for by (..., 1) of the same axes."""
    place = torch.arange(x.shape[-1], device=x.device) + by
    inside = (place >= 0) & (place < x.shape[-1])
    return torch.where(inside, x.gather(-1, place.clamp(0, max(x.shape[-1] - 1, 0))), 0.0)
