"""torch's depthwise convolution layer by fftconv: a replacement of it, and its weights as taps."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqconv.ops.checks import check_choice, check_positive, check_shape, check_tensor
from seqconv.ops.fftconv import fftconv


def _taps(weight: Tensor, dilation: int, left: int) -> tuple[Tensor, Tensor | None]:
    """k and k_rev of v[t] = sum_j weight[j] x[t - left + dilation j], weight (..., taps)."""
    reach = dilation * (weight.shape[-1] - 1)
    weight = F.pad(weight.unsqueeze(-1), (0, dilation - 1)).flatten(-2)[..., : reach + 1]
    k = F.pad(weight[..., : left + 1].flip(-1), (max(left - reach, 0), 0))
    return k, weight[..., left + 1 :] if left < reach else None


class Conv1d(nn.Conv1d):
    """nn.Conv1d with groups=in_channels, computed by fftconv: the faster than torch's, the more taps there are.

    The arguments, parameters, initial distributions, shapes and state_dict (weight, bias) are nn.Conv1d's, and
    the results for every option, length and number of taps too, up to round-off:

        y[c, t] = bias[c] + sum_j weight[c, 0, j] x[c // m, stride t + dilation j - left]

    where m is out_channels / in_channels and x is continued by `padding_mode`. What torch refuses raises torch's
    error. Every output is computed before stride picks among them, and taps apart cost as much as the
    dilation (taps - 1) + 1 taps that they span.

    Args:
        in_channels, out_channels, kernel_size, ..., padding_mode, device, dtype: of nn.Conv1d, but groups must be
            in_channels, and has no other default than nn.Conv1d's 1.

    x is (batch, in_channels, length) or (in_channels, length), in the weight's dtype: float32, float64, bfloat16 or
    float16. Under autocast it is cast to autocast's dtype, as torch does; the sums stay in float32. Round-off is
    fftconv's: from 33 spanned taps on it is relative to a row's norm, so that a NaN spoils its whole row and a
    very large sample the digits of small ones far from it, which torch's direct sums keep.

    Raises:
        ValueError: groups is not in_channels, or x has another shape or device.
        TypeError: x is not a tensor in the weight's dtype.

    Source: torch.nn.Conv1d's contract. Example:
        >>> conv = nn.Conv1d(8, 8, 129, groups=8, dilation=2, padding="same")
        >>> fast, x = Conv1d.from_torch(conv), torch.randn(2, 8, 500)
        >>> torch.allclose(fast(x), conv(x), atol=1e-5)
        True
    """

    @functools.wraps(nn.Conv1d.__init__)
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.groups != self.in_channels:
            wanted = f"in_channels={self.in_channels} (depthwise)"
            raise ValueError(f"Conv1d: groups must be {wanted}, got {self.groups}")

    @classmethod
    def from_torch(cls, conv: nn.Conv1d) -> "Conv1d":
        """A Conv1d that computes what conv does, with conv's own parameters: not copies of them.

        Raises:
            TypeError: conv is not an nn.Conv1d itself, or has hooks or parametrizations (weight_norm, for
                one): they can be registered on the result.
            ValueError: conv's groups are not its in_channels.
        """
        if type(conv) is not nn.Conv1d:
            got = f"{type(conv).__module__}.{type(conv).__qualname__}"
            raise TypeError(
                f"Conv1d.from_torch: conv must be a torch.nn.Conv1d without parametrizations, got {got}; "
                "remove them, convert, and register them on the result"
            )
        hooked = [n for n, v in vars(conv).items() if "hooks" in n and n[0] == "_" and v]
        if hooked:
            text = f"Conv1d.from_torch: conv must have no hooks, got {', '.join(hooked)}"
            raise TypeError(
                f"{text}; remove weight_norm or pruning, convert, and apply it to the result"
            )
        options: dict[str, Any] = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
        }
        options |= {"groups": conv.groups, "padding_mode": conv.padding_mode, "device": "meta"}
        options |= {"kernel_size": conv.kernel_size, "bias": conv.bias is not None}
        new = cls(conv.in_channels, conv.out_channels, **options)  # pyright: ignore
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = input
        check_tensor("Conv1d", "x", x, device=weight.device, owner="the layer")
        autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        if autocast and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif not autocast:
            why = " (the layer's dtype) outside autocast"
            check_tensor("Conv1d", "x", x, dtypes=(weight.dtype,), why=why)
        axes = (("batch", None), ("in_channels", self.in_channels), ("length", None))
        check_shape("Conv1d", "x", x, axes, axes[1:])

        (stride,), (dilation,), (taps,) = self.stride, self.dilation, self.kernel_size
        left, right = self._reversed_padding_repeated_twice
        outputs = x.shape[-1] + left + right - dilation * (taps - 1)
        sizes = (x.shape[-1], outputs, stride, dilation, taps)
        if min(sizes) < 1 or min(left, right) < 0:
            return super()._conv_forward(input, weight, bias)  # which raises torch's error
        if self.padding_mode != "zeros":
            x = F.pad(x, (left, right), mode=self.padding_mode)
            left = right = 0
        x = F.pad(x, (0, max(outputs - x.shape[-1], 0)))

        k, k_rev = _taps(
            rearrange(weight, "(c m) 1 k -> m c k", m=self._multiplier), dilation, left
        )
        if bias is not None:
            bias = rearrange(bias, "(c m) -> m c", m=self._multiplier)
        x = x if x.dim() == 3 else x.unsqueeze(0)
        y = fftconv(x, k, k_rev=k_rev, bias=bias)[..., :outputs:stride]
        y = rearrange(y, "b m c t -> b (c m) t")
        return (y if input.dim() == 3 else y.squeeze(0)).contiguous()

    @property
    def _multiplier(self) -> int:
        return self.out_channels // self.in_channels


def conv1d_taps(
    conv: nn.Conv1d | Tensor, padding: str | None = None, *, dilation: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """k and k_rev with which fftconv computes a depthwise nn.Conv1d of stride 1.

    y = fftconv(u, k, k_rev=k_rev, bias=bias). A convolution layer correlates, so k is the weight read backwards.
    seqconv.nn.Conv1d does all of it.

    Args:
        conv: nn.Conv1d(channels, channels, taps, groups=channels), with any dilation; or its weight alone,
            (channels, 1, taps), with padding ("causal" if None) and dilation, which has no default then: a
            weight does not show it.
        padding: "causal" for inputs padded by reach = dilation (taps - 1) zeros on the left, or outputs of
            padding=reach cut to the input's length: k_rev is None. "same" for padding="same", or
            padding=reach / 2. None takes what conv has: "same", or "causal" if its padding is 0 or reach.
        dilation: of a weight alone; conv has its own.

    Returns:
        k (channels, reach + 1) and None; for "same" k (channels, reach // 2 + 1) and k_rev
        (channels, reach - reach // 2), or None where that is 0. Views of the weight where they can be: gradients
        reach it.

    Raises:
        ValueError: an argument is not one of those above, conv has another stride, padding or padding_mode,
            or its padding contradicts the argument.
        TypeError: conv is neither nn.Conv1d nor a tensor; dilation is given beside an nn.Conv1d, or is not
            beside a weight.

    Example:
        >>> conv = torch.nn.Conv1d(8, 8, 5, groups=8, padding="same", bias=False)
        >>> k, k_rev = conv1d_taps(conv)
        >>> k.shape, k_rev.shape
        (torch.Size([8, 3]), torch.Size([8, 2]))
    """
    name = "conv1d_taps"
    check_choice(name, "padding", padding, (None, "causal", "same"))
    weight: Any = conv
    if isinstance(conv, nn.Conv1d):
        if dilation is not None:
            raise TypeError(f"{name}: dilation must be None beside an nn.Conv1d, got {dilation!r}")
        padding, dilation, weight = _padding_of(conv, padding), conv.dilation[0], conv.weight
    elif isinstance(conv, nn.Module):
        raise TypeError(f"{name}: conv must be an nn.Conv1d or a weight, got {type(conv).__name__}")
    check_tensor(name, "weight", weight)
    if dilation is None:
        raise TypeError(f"{name}: dilation must be given beside a weight alone, got None")
    check_positive(name, dilation=dilation)
    pattern = (("channels", None), ("per group", 1), ("taps", None))
    check_shape(name, "weight", weight, pattern, why=lambda: " (depthwise)")
    reach = dilation * (weight.shape[-1] - 1)
    return _taps(weight.squeeze(1), dilation, reach // 2 if padding == "same" else reach)


def _padding_of(conv: nn.Conv1d, asked: str | None) -> str:
    """ "causal" or "same", or an error if conv is neither or not what was asked for."""
    name, elsewhere = "conv1d_taps", "seqconv.nn.Conv1d.from_torch(conv) takes any"
    if conv.stride != (1,):
        raise ValueError(f"{name}: conv's stride must be 1, got {conv.stride[0]}; {elsewhere}")
    if conv.padding_mode != "zeros" and conv.padding not in ("valid", (0,)):
        got = f"{conv.padding_mode!r}; {elsewhere}"
        raise ValueError(f"{name}: conv's padding_mode must be 'zeros', got {got}")
    if not conv.in_channels == conv.out_channels == conv.groups:
        wanted = "in_channels = out_channels = groups (depthwise)"
        got = f"{conv.in_channels}, {conv.out_channels}, {conv.groups}"
        raise ValueError(f"{name}: conv must have {wanted}, got {got}")
    reach = conv.dilation[0] * (conv.kernel_size[0] - 1)
    fits = []
    if conv.padding == "same" or conv.padding == (reach / 2,):
        fits.append("same")
    if conv.padding in ("valid", (0,), (reach,)) or reach == 0:
        fits.append("causal")
    if not fits or asked not in (None, *fits):
        wanted = {"same": f"'same' or {reach / 2:g}", "causal": f"0 or {reach}"}
        wanted = " or ".join(wanted.values()) if asked is None else wanted[asked]
        asked = "" if asked is None else f" for padding={asked!r}"
        got = f"{conv.padding!r}; {elsewhere}"
        raise ValueError(f"{name}: conv's padding must be {wanted}{asked}, got {got}")
    return asked or fits[0]
