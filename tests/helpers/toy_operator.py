"""A new operator as CONTRIBUTING says it is made: y[t] = scale sum_{s <= t} exp(log_decay (t - s)) x[s]."""

from typing import NamedTuple

import torch
from torch import Tensor

from seqconv.ops.register import Operator
from seqconv.ops.sharding import SUM


class Inputs(NamedTuple):
    x: Tensor  # (batch, channels, length)
    log_decay: Tensor  # (channels,)


def _definition(inputs: Inputs, scale: float) -> Tensor:
    steps = torch.arange(inputs.x.shape[-1], dtype=inputs.x.dtype, device=inputs.x.device)
    lag = steps.unsqueeze(-1) - steps
    table = torch.exp(inputs.log_decay[:, None, None] * lag.clamp(min=0)) * (lag >= 0)
    return scale * torch.einsum("hts,bhs->bht", table, inputs.x)


_SHARDINGS = [(0, {"x": 0}), (1, {"x": 1, "log_decay": 0}), (SUM, {"x": SUM})]

decayed_sum = Operator(
    "toy_decayed_sum",
    Inputs,
    "float scale",
    _definition,
    shardings=lambda *_, ranks: _SHARDINGS,
)
