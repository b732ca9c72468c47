"""Masks and lengths of layers: which steps of a batch are padding."""

import torch
from torch import Tensor

from seqconv.ops.checks import FLOATS, check_shape, check_tensor


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
        valid = ((lengths >= 0) & (lengths <= length)).all()
        require(valid, f"{function}: lengths must be between 0 and length={length}")
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
    require((padding | (mask == 0)).all(), text)
    return padding


def require(valid: Tensor, text: str) -> None:
    """Raises ValueError unless valid. In a compiled graph the check is made when the graph runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(valid, text)  # pyright: ignore
        return
    functorch = torch._C._functorch  # pyright: ignore
    while functorch.is_functorch_wrapped_tensor(valid):  # all samples of a vmap at once
        valid = functorch.get_unwrapped(valid)
    if not (valid.is_meta or valid.all()):
        raise ValueError(text)
