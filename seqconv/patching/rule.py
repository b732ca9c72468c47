"""What patch knows of a class of another package, and the convolution that its transforms make."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqconv.ops.fftconv import fftconv


@dataclass(frozen=True)
class Rule:
    """A layer of another package is known by the name of its class and by attributes, so that the package need not be
    imported."""

    name: str  # of the class
    attributes: tuple[str, ...]
    package: str
    forward: Callable[..., Any]  # the new one, with the module as its first argument
    refuse: Callable[[Any], str | None]  # why this module must stay as it is
    axis: Callable[[Any], int]  # of the steps in the input: 1 or 2
    sizes: Callable[
        [Any], tuple[int, int | None]
    ]  # channels, and the longest input if there is one

    def knows(self, module: nn.Module) -> bool:
        named = type(module).__name__ == self.name
        return named and all(hasattr(module, name) for name in self.attributes)


def original(module: nn.Module, *args, **kwargs):
    """What the module's class computes."""
    return type(module).forward(module, *args, **kwargs)


def wrapped(u: Tensor, k: Tensor, n: int, skip: Tensor | None = None, **options) -> Tensor:
    """What transforms of n points make of u (batch, channels, length) and k (..., channels, taps), cropped to length.

    Taps beyond n - length wrap around to the future: these packages take n = 2 length, and some have longer kernels.
    """
    length = u.shape[-1]
    k, first = k[..., :n], n - length + 1
    future = None
    if k.shape[-1] > first:
        future = F.pad(k, (0, n - k.shape[-1]))[..., first:].flip(-1)
    return fftconv(u, k[..., :length], skip, k_rev=future, **options)


def gelu(activation) -> bool:
    return type(activation) is nn.GELU and activation.approximate == "none"


def idle(dropout) -> bool:
    """Whether the module passes its input on."""
    if isinstance(dropout, nn.Identity):
        return True
    return not dropout.training or getattr(dropout, "p", 1.0) == 0


def steps_last(module) -> int:
    return 2 if getattr(module, "transposed", True) else 1


def mixed(y: Tensor) -> Tensor:
    """(batch, heads, channels, length) -> (batch, heads channels, length)."""
    return y.flatten(1, 2)


def probe(rule: Rule, module: nn.Module, length: int | None, batch: int) -> Tensor:
    """A random input of the module."""
    channels, longest = rule.sizes(module)
    longest = 1024 if longest is None else longest
    length = min(longest, 1024) if length is None else length
    like = next(p for p in module.parameters() if p.is_floating_point())
    shape = (batch, length, channels) if rule.axis(module) == 1 else (batch, channels, length)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    return x.to(device=like.device, dtype=like.dtype)
