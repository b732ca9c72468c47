"""What a user writes in the place of seqconv.fftconv: torch.fft, torch's activations, and torch's autograd.

There are two layouts to write it in, and which one is faster differs from case to case: rows made contiguous first,
and a transform along the axis of time as it lies. Benchmarks take the faster of the two.
"""

import contextlib
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

PLACES = ("seqconv.layers.base.fftconv", "seqconv.layers.hyena.fftconv")  # what layers call
LAYOUTS = ("bhl", "blh")  # of the transforms
_ACTIVATIONS = {None: lambda v: v, "gelu": F.gelu, "silu": F.silu, "relu": F.relu}


def fftconv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    *,
    through: str,
    k_rev: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    layout: str = "bhl",
) -> Tensor:
    """seqconv.fftconv of these arguments, with the transforms in the layout `through`."""
    dtype, compute = (
        u.dtype,
        torch.promote_types(u.dtype, torch.float32),
    )  # torch.fft has no half precision
    given = (u, k, skip, k_rev, pre_gate, post_gate, bias)
    u, k, skip, k_rev, pre_gate, post_gate, bias = (
        t if t is None else t.to(compute) for t in given
    )
    time = 1 if through == "blh" else -1

    def turned(t: Tensor | None, axes: int = 3) -> Tensor | None:
        """A signal (batch, channels, length), or as `layout` has it, in the layout of the transforms."""
        if t is None or layout == through:
            return t
        return (t.movedim(1, -1) if layout == "blh" else t.movedim(-1, 1)).contiguous()

    heads = k.dim() == 3

    def beside(t: Tensor) -> Tensor:
        """A signal without heads beside one with them."""
        return t.unsqueeze(2 if through == "blh" else 1) if heads else t

    def of_channels(t: Tensor) -> Tensor:
        return t if through == "blh" else t.unsqueeze(-1)

    x = turned(u)
    if pre_gate is not None:
        x = x * turned(pre_gate)
    length = x.shape[time]
    taps = k[..., :length]
    later = None if k_rev is None else k_rev[..., : length - 1]
    longest = max(taps.shape[-1], 0 if later is None else later.shape[-1])
    n = (length + longest + 1) // 2 * 2
    if later is not None:
        ahead = F.pad(later.flip(-1), (n - later.shape[-1], 0))
        taps = F.pad(taps, (0, n - taps.shape[-1])) + ahead
    spectrum = torch.fft.rfft(taps, n)
    if through == "blh":
        spectrum = spectrum.movedim(-1, 0)
    product = beside(torch.fft.rfft(x, n, dim=time)) * spectrum
    v = torch.fft.irfft(product, n, dim=time).narrow(time, 0, length)
    if skip is not None:
        v = v + of_channels(skip) * beside(x)
    if bias is not None:
        v = v + of_channels(bias)
    y = _ACTIVATIONS[activation](v)
    if post_gate is not None:
        y = y * turned(post_gate)
    y = y.to(dtype)
    if layout == through:
        return y
    return y.movedim(-1, 1) if layout == "blh" else y.movedim(1, -1)


@contextlib.contextmanager
def in_layers(through: str):
    """In this block the layers call `fftconv` above, and torch's linear map and GLU one after the other."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("seqconv.layers.base.takes", lambda *_: False))
        for place in PLACES:
            stack.enter_context(mock.patch(place, partial(fftconv, through=through)))
        yield
