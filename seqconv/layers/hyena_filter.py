"""The filter of Hyena: a kernel that is a small network's function of time (arXiv 2302.10866)."""

import json
import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqconv.layers.base import KernelGenerator, cut
from seqconv.layers.module import fill, kernel_dtype
from seqconv.layers.precision import full_precision
from seqconv.ops.checks import check_choice, check_learning_rate, check_positive
from seqconv.ops.register import Operator, exporting

FEATURES = ("whole", "spaced", "table")


class HyenaFilter(KernelGenerator):
    """Kernel generator of Hyena; HyenaFilter(...)(length) -> (heads, d_model, min(length, l_max)).

    k(t) = (exp(-t |delta|) + shift) (W_n sin(f (... sin(f (W_0 z(t) + b_0)) ...))) at t = l / (l_max - 1),
    with z(t) = (t, cos 2 pi t, cos 4 pi t, ..., -sin 2 pi t, ...) of emb_dim features, n = layers + 1, and
    delta over the channels linspace(ln(0.01) / 1.5, ln(0.01) / 0.3, d_model): the slowest falls to 1%
    after 1.5 l_max, the fastest after 0.3 l_max.

    With features="spaced" the waves of z are cos and -sin of 2 pi g l / l_max, with the turns g over
    linspace(1e-4, b - 1, b) for b = (emb_dim - 1) / 2, as in the reference implementation. With "table" z is a
    tensor, which begins as those.

    Parameters:
        linears: (width, emb_dim), `layers` times (width, width), with biases, and (heads d_model,
            width) without: torch's default.
        frequency (width,): f, shared by all the sines, initially the `frequency` here. The larger,
            the rougher the kernel.
        table (l_max, emb_dim): z, with features="table".
        deltas (heads, d_model): delta, with decay="free". It begins as the formula here.
    Optimiser: table and deltas take min(lr, `table_lr` here), the others min(lr, `lr` here), and none has weight
    decay. With a learning rate of 0 they are buffers.

    Source: arXiv 2302.10866, section 3.
    """

    shown = ("l_max", "emb_dim", "width", "layers")
    meaning = ("l_max", "emb_dim", "features", "decay", "shift")
    attributes: ClassVar = {"frequency": "initial_frequency"}

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
        features: str = "whole",
        decay: str = "fixed",
        shift: float = 0.0,
        lr: float = 1e-3,
        table_lr: float = 0.0,
    ):
        super().__init__()
        name = "HyenaFilter"
        check_positive(name, d_model=d_model, l_max=l_max, heads=heads, width=width)
        check_positive(name, emb_dim=emb_dim, layers=layers)
        check_learning_rate(name, lr=lr, table_lr=table_lr)
        check_choice(name, "features", features, FEATURES)
        check_choice(name, "decay", decay, ("fixed", "free"))
        if emb_dim % 2 == 0:
            raise ValueError(
                f"{name}: emb_dim must be odd (time, and pairs of waves), got {emb_dim}"
            )
        if not 0 < frequency < math.inf:
            raise ValueError(f"{name}: frequency must be positive, got {frequency}")
        if not -math.inf < shift < math.inf:
            raise ValueError(f"{name}: shift must be finite, got {shift}")
        self.d_model, self.l_max, self.heads = d_model, l_max, heads
        self.emb_dim, self.width, self.layers = emb_dim, width, layers
        self.features, self.decay, self.shift = features, decay, float(shift)
        sizes = [emb_dim] + [width] * (layers + 1)
        like: dict[str, Any] = {"dtype": kernel_dtype()}
        linears = [nn.Linear(a, b, **like) for a, b in pairwise(sizes)]
        last = nn.Linear(width, heads * d_model, bias=False, **like)
        self.linears = nn.ModuleList([*linears, last])
        self.initial_frequency = float(frequency)
        self.frequency = nn.Parameter(torch.empty(width, **like))
        self.override("linears", "frequency", lr=lr, weight_decay=0.0)
        shapes = {"table": (l_max, emb_dim)} if features == "table" else {}
        shapes |= {"deltas": (heads, d_model)} if decay == "free" else {}
        for tensor, shape in shapes.items():
            setattr(self, tensor, nn.Parameter(torch.empty(shape, **like)))
            self.override(tensor, lr=table_lr, weight_decay=0.0)
        self.reads = ("frequency", *shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the sines' frequency, table and deltas as at construction. The linear maps draw their own
        parameters."""
        values = {"frequency": torch.full((self.width,), self.initial_frequency)}
        if self.features == "table":
            values["table"] = time_features(self.l_max, self.l_max, self.emb_dim, "spaced")
        if self.decay == "free":
            values["deltas"] = decay_rates(self.d_model).expand(self.heads, self.d_model)
        fill(self, values)

    def set_extra_state(self, state: Tensor) -> None:
        there = json.loads(bytes(state.tolist()))
        if "l_max" in there:  # Earlier checkpoints hold no other options, because there were none.
            there = {"features": "whole", "decay": "fixed", "shift": 0.0} | there
        state = torch.tensor(list(json.dumps(there).encode()), dtype=torch.uint8, device="cpu")
        super().set_extra_state(state)

    @property
    def _options(self) -> tuple:
        return self.l_max, self.emb_dim, self.d_model, self.features, self.decay, self.shift

    def generate(self, tensors: list[Tensor], length: int, rate: float) -> Tensor:
        if torch.compiler.is_compiling() and not exporting():
            if all(type(linear) is nn.Linear and not _hooked(linear) for linear in self.linears):
                parts = [t for linear in self.linears for t in (linear.weight, linear.bias)]
                return _filter_op([*tensors, *parts], *self._options, length)
        return _filter(tensors, self.linears, self._options, length)

    def part(self, tensors: list[Tensor], length: int, rate: float, channels: slice) -> Tensor:
        last = self.linears[-1]
        if type(last) is not nn.Linear or _hooked(last):
            return self.generate(tensors, length, rate)[:, channels]
        # No other road for a rank without channels: gradients must come in the same order on all ranks.
        weight = cut(
            last.weight.unflatten(0, (self.heads, self.d_model)), 1, channels
        )  # (c h width)
        linears = [*self.linears[:-1], lambda h: torch.einsum("lw, chw -> lch", h, weight)]
        return _filter(tensors, linears, self._options, length, channels)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def time_features(length: int, l_max: int, emb_dim: int, features: str, **like: Any) -> Tensor:
    """z of the first steps by its formula, (length, emb_dim): time, cosines, sines."""
    like.setdefault("dtype", torch.float64)
    bands = (emb_dim - 1) // 2
    step = torch.arange(l_max, **like)[:length].unsqueeze(-1)
    t = step / max(l_max - 1, 1)
    if features == "whole":
        phase = 2 * math.pi * t * torch.arange(1, bands + 1, **like)
    else:
        phase = 2 * math.pi * (step / l_max) * torch.linspace(1e-4, bands - 1, bands, **like)
    return torch.cat([t, phase.cos(), -phase.sin()], dim=-1)


def decay_rates(d_model: int, **like: Any) -> Tensor:
    """|delta| by its formula, (d_model,)."""
    like.setdefault("dtype", torch.float64)
    slow, fast = (-math.log(0.01) / until for until in (1.5, 0.3))
    return torch.linspace(slow, fast, d_model, **like)


def _filter(tensors, linears, options: tuple, length, channels: slice = slice(None)) -> Tensor:
    l_max, emb_dim, d_model, features, decay, shift = options
    frequency, *rest = tensors
    stored = iter(rest)
    like: dict[str, Any] = {"dtype": frequency.dtype, "device": frequency.device}
    t = torch.arange(l_max, **like)[:length].unsqueeze(-1) / max(l_max - 1, 1)
    with full_precision(t.device):
        if features == "table":
            h = next(stored)[:length]
        else:
            h = time_features(length, l_max, emb_dim, features, **like)
        for linear in linears[:-1]:
            h = torch.sin(frequency * linear(h))
        h = linears[-1](h)
        h = h if h.dim() == 3 else h.unflatten(-1, (-1, d_model))  # (l c h)
    rates = next(stored).abs() if decay == "free" else decay_rates(d_model, **like).unsqueeze(0)
    window = torch.exp(-t.unsqueeze(-1) * cut(rates, 1, channels)) + shift  # (l c h) or (l 1 h)
    k = (h * window).movedim(0, -1)
    return k.contiguous()  # FSDP warns of views.


def _filter_of(tensors, *options) -> Tensor:
    *options, length = options
    own = 1 + (options[3] == "table") + (options[4] == "free")
    parts = tensors[own:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    linears = [lambda h, w=w, b=b: F.linear(h, w, b) for w, b in pairs]
    return _filter(tensors[:own], linears, tuple(options), length)


_filter_op = Operator(
    "hyena_filter",
    list,
    "int l_max, int emb_dim, int d_model, str features, str decay, float shift, SymInt length",
    _filter_of,
)
