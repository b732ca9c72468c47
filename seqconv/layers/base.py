"""What every layer shares: kernel generator -> fftconv -> GELU, dropout, linear and GLU."""

import contextlib
import functools
import inspect

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqconv.layers.module import Described, KernelGenerator
from seqconv.layers.options import hint
from seqconv.ops.checks import (
    FLOATS,
    check_choice,
    check_flag,
    check_sampling,
    check_shape,
    check_tensor,
)
from seqconv.ops.fftconv import ACTIVATIONS, fftconv
from seqconv.ops.register import transformed


def passes_options_to(source, *but: str):
    """For an __init__ that passes keywords on to another by **: help() shows them with their defaults, and
    an unknown one is refused in the name of the class that was called."""

    def decorate(init):
        signature = inspect.signature(init)
        own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        taken = {*but, *[p.name for p in own]}
        others = inspect.signature(source).parameters.values()
        more = [p for p in others if p.kind == p.KEYWORD_ONLY and p.name not in taken]
        known = [p.name for p in (*own, *more)][1:]

        @functools.wraps(init)
        def checked(self, *args, **options):
            for name in options:
                if name not in known:
                    text = f"unknown keyword {name!r}; {hint(type(self), name, known)}"
                    raise TypeError(f"{type(self).__name__}: {text}")
            init(self, *args, **options)

        checked.__signature__ = signature.replace(parameters=[*own, *more])
        return checked

    return decorate


def full_precision(device: torch.device):
    """A context in which products keep their operands' precision, whatever autocast says."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class TiedDropout(nn.Dropout):
    """Dropout of whole channels of a sample: (batch, length, channels) with one mask for all times."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_ones(x.shape[0], 1, x.shape[2])
        return x * F.dropout(mask, self.p, self.training)


class ConvLayer(Described):
    """(batch, length, d_model) -> the same: y = GLU(W dropout(gelu(k * x + skip x)) + b).

    Parameters: the generator's; skip (heads, d_model) ~ N(0, 1); linear (2 d_model, heads d_model),
    torch's default. A two-sided layer's generator makes 2 heads kernels, the second half for the
    future. `resamples` says that the generator takes a rate.
    """

    resamples = False
    shown = ("heads", "bidirectional")
    meaning = ("bidirectional", "activation")

    def __init__(
        self,
        d_model: int,
        kernel: KernelGenerator,
        *,
        heads: int,
        bidirectional: bool,
        activation: str | None = "gelu",
        dropout: float = 0.0,
        tie_dropout: bool = False,
        postact: str | None = "glu",
    ):
        super().__init__()
        name = type(self).__name__
        check_choice(name, "activation", activation, ACTIVATIONS)
        check_choice(name, "postact", postact, ("glu", None))
        check_flag(name, bidirectional=bidirectional, tie_dropout=tie_dropout)
        self.d_model = d_model
        self.heads = heads
        self.bidirectional = bidirectional
        self.activation = activation
        self.postact = postact
        self.kernel = kernel
        self.skip = nn.Parameter(torch.empty(heads, d_model))
        self.reset_parameters()
        self.dropout = (TiedDropout if tie_dropout else nn.Dropout)(dropout)
        self.linear = nn.Linear(heads * d_model, 2 * d_model if postact == "glu" else d_model)

    def reset_parameters(self) -> None:
        """Draws skip anew, as at construction; kernel and linear map have a reset_parameters of their own."""
        nn.init.normal_(self.skip)

    @property
    def causal(self) -> bool:
        """Whether no output sees a later input."""
        return not self.bidirectional

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        rate: float = 1.0,
    ) -> Tensor:
        """x (batch, length, d_model), in the layer's dtype unless under autocast. mask (batch, length)
        marks padding, by True or by -inf (0 elsewhere), as in torch's attention: x is read as zeros
        there. The output there is not zero: every layer needs the mask, and so does a mean.
        lengths (batch,), integers, is a mask of everything from lengths[i] on. rate (S4D and SGConv;
        others take 1 only): steps of the kernel per step of x, for inputs sampled 1 / rate times as
        often as those of training.
        """
        name = type(self).__name__
        check_input(name, x, self.skip, self.d_model)
        padding = _padding(name, x, mask, lengths)
        if padding is not None:
            x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        return self._mix(rearrange(self._convolve(x, rate), "b l c h -> b l (c h)"))

    def _convolve(self, x: Tensor, rate: float) -> Tensor:
        """activation(k * x + skip x), (batch, length, heads, d_model)."""
        x, length = sized(x)
        k, k_rev = self._kernel(length, rate), None
        if self.bidirectional:
            k, k_rev = k[: self.heads], k[self.heads :]
        return fftconv(x, k, self.skip, k_rev=k_rev, activation=self.activation, layout="blh")

    def _kernel(self, length: int, rate: float) -> Tensor:
        name = type(self).__name__
        check_sampling(name, rate)
        if rate == 1.0:
            k = self.kernel(length)
        elif self.resamples:
            k = self.kernel(length, rate=rate)
        else:
            raise ValueError(f"{name}: rate must be 1 (its taps have no time scale), got {rate!r}")
        warn_of_missing_taps(self, k, length)
        return k

    def _mix(self, y: Tensor) -> Tensor:
        """(batch, length, heads d_model) after the activation -> (batch, length, d_model)."""
        wide = 2 * self.d_model if self.postact == "glu" else self.d_model
        y = apply_linear(self, "linear", self.dropout(y), wide)
        if self.postact is None:
            return y
        if not torch.compiler.is_compiling() and transformed((y,)):
            # torch's glu has no forward derivative of its forward derivative.
            first, gate = y.chunk(2, dim=-1)
            return first * gate.sigmoid()
        return F.glu(y, dim=-1)


def check_input(
    function: str, x: Tensor, own: Tensor, d_model: int, axes=("batch", "length")
) -> None:
    """x (*axes, d_model) on the device and, unless under autocast, in the dtype of `own`, a parameter of the
    layer itself: what stands in the place of its linear maps may have any weights or none."""
    check_tensor(function, "x", x)
    if x.device.type != "meta" and not torch.is_autocast_enabled(x.device.type):
        why = " (the layer's dtype) outside autocast"
        check_tensor(function, "x", x, dtypes=(own.dtype,), why=why)
    check_tensor(function, "x", x, device=own.device, owner="the layer")
    check_shape(function, "x", x, (*[(axis, None) for axis in axes], ("d_model", d_model)))


def sized(x: Tensor) -> tuple[Tensor, int]:
    """x (batch, length, d_model) and its length, which torch.jit.trace has as a tensor: a traced graph is what
    this one length leads to, and unflatten refuses every other when it runs."""
    length = x.shape[1]
    if not torch.jit.is_tracing():
        return x, length
    length = int(length)
    return x.unflatten(1, (1, length)).squeeze(1), length


def warn_of_missing_taps(layer: Described, k: Tensor, length: int) -> None:
    """Once for each layer, where its kernel (..., taps) is shorter than the input."""
    taps = k.shape[-1]
    if isinstance(length, int) and taps < length:
        text = f"the input has length {length} and the kernel {taps} taps (l_max): what lies {taps} steps or more away"
        layer.warn_once("taps", f"{text} is not seen. Make the layer with a larger l_max.")


def apply_linear(layer: nn.Module, name: str, x: Tensor, wide: int) -> Tensor:
    """The linear map of that name, or what stands in its place: (..., features) -> (..., wide)."""
    linear = getattr(layer, name)
    y = linear(x)
    if y.shape != (*x.shape[:-1], wide):
        raise ValueError(
            f"{type(layer).__name__}: {name} ({type(linear).__name__}) must map {tuple(x.shape)} to "
            f"{(*x.shape[:-1], wide)}, got {tuple(y.shape)}"
        )
    return y


def _padding(function: str, x: Tensor, mask, lengths) -> Tensor | None:
    """(batch, length), True at padding."""
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
        _require(valid, f"{function}: lengths must be between 0 and length={length}")
        return torch.arange(length, device=x.device) >= lengths.unsqueeze(1)
    if mask is None:
        return None
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
    _require((padding | (mask == 0)).all(), text)
    return padding


def _require(valid: Tensor, text: str) -> None:
    """ValueError unless valid; in a graph when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(valid, text)
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(valid):  # all samples of a vmap at once
        valid = torch._C._functorch.get_unwrapped(valid)
    if not (valid.is_meta or valid.all()):
        raise ValueError(text)
