"""The filter of Hyena: a kernel that is a small network's function of time (arXiv 2302.10866)."""

import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqconv.layers.base import KernelGenerator, cut
from seqconv.layers.module import kernel_dtype
from seqconv.layers.precision import full_precision
from seqconv.ops.checks import check_learning_rate, check_positive
from seqconv.ops.register import Operator


class HyenaFilter(KernelGenerator):
    """Kernel generator of Hyena; HyenaFilter(...)(length) -> (heads, d_model, min(length, l_max)).

    k(t) = exp(-t |delta|) (W_n sin(f (... sin(f (W_0 z(t) + b_0)) ...))) at t = l / (l_max - 1), with
    z(t) = (t, cos 2 pi t, -sin 2 pi t, cos 4 pi t, ...) of emb_dim features, n = layers + 1, and
    delta over the channels linspace(ln(0.01) / 1.5, ln(0.01) / 0.3, d_model): the slowest falls to 1%
    after 1.5 l_max, the fastest after 0.3 l_max.

    Parameters:
        linears: (width, emb_dim), `layers` times (width, width), with biases, and (heads d_model,
            width) without: torch's default.
        frequency (width,): f, shared by all the sines, initially the `frequency` here. The larger,
            the rougher the kernel.
    Optimiser: all take min(lr, `lr` here) and no weight decay. With lr=0 they are buffers.

    Source: arXiv 2302.10866, section 3.
    """

    shown = ("l_max", "emb_dim", "width", "layers")
    meaning = ("l_max", "emb_dim")
    attributes: ClassVar = {"frequency": "initial_frequency"}
    reads = ("frequency",)

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        heads: int = 1,
        emb_dim: int = 3,
        width: int = 64,
        layers: int = 2,
        frequency: float = 1.0,
        lr: float = 1e-3,
    ):
        super().__init__()
        name = "HyenaFilter"
        check_positive(name, d_model=d_model, l_max=l_max, heads=heads, width=width)
        check_positive(name, emb_dim=emb_dim, layers=layers)
        check_learning_rate(name, lr=lr)
        if emb_dim % 2 == 0:
            raise ValueError(
                f"{name}: emb_dim must be odd (time, and pairs of waves), got {emb_dim}"
            )
        if not 0 < frequency < math.inf:
            raise ValueError(f"{name}: frequency must be positive, got {frequency}")
        self.d_model, self.l_max, self.heads = d_model, l_max, heads
        self.emb_dim, self.width, self.layers = emb_dim, width, layers
        sizes = [emb_dim] + [width] * (layers + 1)
        like: dict[str, Any] = {"dtype": kernel_dtype()}
        linears = [nn.Linear(a, b, **like) for a, b in pairwise(sizes)]
        last = nn.Linear(width, heads * d_model, bias=False, **like)
        self.linears = nn.ModuleList([*linears, last])
        self.initial_frequency = float(frequency)
        self.frequency = nn.Parameter(torch.empty(width, **like))
        self.override("linears", "frequency", lr=lr, weight_decay=0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the sines' frequency as at construction. The linear maps draw their own parameters."""
        with torch.no_grad():
            self.frequency.fill_(self.initial_frequency)

    def generate(self, tensors: list[Tensor], length: int, rate: float) -> Tensor:
        (frequency,) = tensors
        sizes = self.l_max, self.emb_dim, self.d_model
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            if all(type(linear) is nn.Linear and not _hooked(linear) for linear in self.linears):
                parts = [t for linear in self.linears for t in (linear.weight, linear.bias)]
                return _filter_op([frequency, *parts], *sizes, length)
        return _filter(frequency, self.linears, *sizes, length)

    def part(self, tensors: list[Tensor], length: int, rate: float, channels: slice) -> Tensor:
        last = self.linears[-1]
        if type(last) is not nn.Linear or _hooked(last):
            return self.generate(tensors, length, rate)[:, channels]
        # No other road for a rank without channels: gradients must come in the same order on all ranks.
        weight = cut(
            last.weight.unflatten(0, (self.heads, self.d_model)), 1, channels
        )  # (c h width)
        linears = [*self.linears[:-1], lambda h: torch.einsum("lw, chw -> lch", h, weight)]
        return _filter(
            tensors[0], linears, self.l_max, self.emb_dim, self.d_model, length, channels
        )


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _filter(
    frequency, linears, l_max, emb_dim, d_model, length, channels: slice = slice(None)
) -> Tensor:
    like: dict[str, Any] = {"dtype": frequency.dtype, "device": frequency.device}
    t = torch.arange(l_max, **like)[:length].unsqueeze(-1) / max(l_max - 1, 1)
    phase = 2 * math.pi * t * torch.arange(1, (emb_dim + 1) // 2, **like)
    with full_precision(t.device):
        h = torch.cat([t, phase.cos(), -phase.sin()], dim=-1)
        for linear in linears[:-1]:
            h = torch.sin(frequency * linear(h))
        h = linears[-1](h)
        h = h if h.dim() == 3 else h.unflatten(-1, (-1, d_model))  # (l c h)
    slow, fast = (-math.log(0.01) / until for until in (1.5, 0.3))
    decay = torch.exp(-t * torch.linspace(slow, fast, d_model, **like)[channels])  # (l h)
    k = (h * decay.unsqueeze(1)).movedim(0, -1)
    return k.contiguous()  # FSDP warns of views.


def _filter_of(tensors, *sizes) -> Tensor:
    frequency, *parts = tensors
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return _filter(frequency, [lambda h, w=w, b=b: F.linear(h, w, b) for w, b in pairs], *sizes)


_filter_op = Operator(
    "hyena_filter", list, "int l_max, int emb_dim, int d_model, SymInt length", _filter_of
)
