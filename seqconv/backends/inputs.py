"""The tensors of fftconv by name, for the inputs and for their gradients alike."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """u, pre_gate (batch, channels, length); k, k_rev (channels, K), (heads, channels, K) or (batch,
    heads, channels, K); skip and bias (channels,) or (heads, channels); post_gate as the output, (batch,
    channels, length), or (batch, heads, channels, length) where k has heads."""

    u: Tensor
    k: Tensor
    k_rev: Tensor | None
    skip: Tensor | None
    pre_gate: Tensor | None
    post_gate: Tensor | None
    bias: Tensor | None = None


IS_SIGNAL = Inputs(
    u=True, k=False, k_rev=False, skip=False, pre_gate=True, post_gate=True, bias=False
)
CHANNEL_AXIS = Inputs(u=-2, k=-2, k_rev=-2, skip=-1, pre_gate=-2, post_gate=-2, bias=-1)
