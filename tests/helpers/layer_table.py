"""Every layer, by name, as the common tests make it: a new layer is a row here."""

import torch

from seqconv import S4D, ButterflyConv, Hyena, LongConv, SGConv
from seqconv.layers.base import KernelGenerator

D, LENGTH = 6, 50
LAYERS = {
    "s4d": lambda d_model=D, **options: S4D(d_model, **options),
    "long_conv": lambda d_model=D, **options: LongConv(
        d_model, **{"l_max": 80, "kernel_dropout": 0.0} | options
    ),
    "sgconv": lambda d_model=D, **options: SGConv(d_model, **{"l_max": 80} | options),
}
EVERY = LAYERS | {
    "hyena": lambda d_model=D, **options: Hyena(d_model, **{"l_max": 80} | options),
    "butterfly": lambda d_model=D, **options: ButterflyConv(
        d_model, **{"l_max": 80, "kernel_dropout": 0.0} | options
    ),
    "sgconv, power": lambda d_model=D, **options: SGConv(
        d_model, **{"l_max": 80, "decay": "power"} | options
    ),
    "s4d, real": lambda d_model=D, **options: S4D(
        d_model, **{"init": "real", "is_real": True} | options
    ),
}


def inputs(dtype=torch.float32, length=LENGTH):
    return torch.randn(2, length, D, dtype=dtype)


def relative(ours, wanted) -> float:
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


def generators(layer) -> dict[str, KernelGenerator]:
    return {name: m for name, m in layer.named_modules() if isinstance(m, KernelGenerator)}


def states(layer) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name, those too that are not in the state_dict."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
