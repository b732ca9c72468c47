"""What every layer shares: kernel generator -> fftconv -> GELU, dropout, linear and GLU."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqconv._check import FLOATS, check_shape, check_tensor
from seqconv.functional import fftconv

_HALF = (torch.bfloat16, torch.float16)


class KernelGenerator(nn.Module):
    """A module whose call with a length gives a kernel (heads, channels, length).

    `overrides` maps parameter names to the optimiser settings they ask for, which
    seqconv.param_groups collects. The parameters stay float32 when a model is cast to a half
    precision: rounding them changes the kernel by tens of percent.
    """

    overrides: dict[str, dict[str, float]]

    def _apply(self, fn, recurse=True):
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            if out.dtype not in _HALF:
                return out
            return (
                out.float()
                if out.is_meta or t.is_meta or t.dtype in _HALF
                else t.to(out.device).float()
            )

        return super()._apply(keep_precision, recurse)


class ConvLayer(nn.Module):
    """(batch, length, d_model) -> the same: y = GLU(W dropout(gelu(k * x + skip x)) + b).

    Parameters: the generator's; skip (heads, d_model) ~ N(0, 1); linear (2 d_model, heads d_model),
    torch's default. A two-sided layer's generator makes 2 heads kernels, the second half for the
    future.
    """

    def __init__(
        self,
        d_model: int,
        kernel: KernelGenerator,
        *,
        heads: int,
        bidirectional: bool,
        dropout: float,
    ):
        super().__init__()
        if not isinstance(bidirectional, bool):
            name = type(self).__name__
            raise ValueError(f"{name}: bidirectional must be True or False, got {bidirectional!r}")
        self.d_model = d_model
        self.heads = heads
        self.bidirectional = bidirectional
        self.kernel = kernel
        self.skip = nn.Parameter(torch.randn(heads, d_model))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(heads * d_model, 2 * d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (batch, length, d_model), in the layer's dtype unless under autocast. mask (batch, length)
        marks padding, by True or by -inf (0 elsewhere), as in torch's attention: x is read as zeros
        there. The output there is not zero: every layer needs the mask, and so does a mean.
        """
        name = type(self).__name__
        check_tensor(name, "x", x)
        if not torch.is_autocast_enabled(x.device.type):
            why = " (the layer's dtype) outside autocast"
            check_tensor(name, "x", x, dtypes=(self.linear.weight.dtype,), why=why)
        check_shape(name, "x", x, (("batch", None), ("length", None), ("d_model", self.d_model)))
        batch, length, _ = x.shape
        if mask is not None:
            check_tensor(name, "mask", mask, dtypes=(torch.bool, *FLOATS), device=x.device)
            check_shape(name, "mask", mask, (("batch", batch), ("length", length)))
            x = x.masked_fill(_padding(name, mask).unsqueeze(-1), 0.0)
        k, k_rev = self.kernel(length), None
        if self.bidirectional:
            k, k_rev = k[: self.heads], k[self.heads :]
        y = fftconv(x, k, self.skip, k_rev=k_rev, activation="gelu", layout="blh")
        return F.glu(self.linear(self.dropout(rearrange(y, "b l c h -> b l (c h)"))), dim=-1)

    def extra_repr(self) -> str:
        return f"{self.d_model}, heads={self.heads}, bidirectional={self.bidirectional}"


def _padding(function: str, mask: Tensor) -> Tensor:
    """mask as bool, True at padding."""
    if mask.dtype == torch.bool:
        return mask
    padding = mask == -torch.inf
    valid = (padding | (mask == 0)).all()
    text = f"{function}: mask must be bool (True is padding) or float with 0 and -inf only"
    if torch.compiler.is_compiling():
        torch._assert_async(valid, text)
    elif not valid:
        raise ValueError(text)
    return padding
