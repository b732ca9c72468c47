"""The block that layers share: fftconv, GELU, dropout, linear map and GLU, around a kernel generator."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from seqconv.layers.linear_glu import LEAST, linear_glu, takes
from seqconv.layers.module import Described
from seqconv.layers.packing import Pack, by_rate, convolve_on, pack_of, refuse_history
from seqconv.layers.padding import padding_of
from seqconv.layers.precision import HALF, KeepsPrecision
from seqconv.ops.checks import (
    FLOATS,
    check_choice,
    check_flag,
    check_length,
    check_probability,
    check_sampling,
    check_shape,
    check_tensor,
)
from seqconv.ops.fftconv import ACTIVATIONS, fftconv
from seqconv.ops.register import exporting, transforms_active


class KernelGenerator(KeepsPrecision):
    """A module whose call with a length gives a kernel (heads, channels, taps), taps <= length.

    A subclass names in `reads` the parameters and buffers that its kernel is made of, and makes the kernel of
    them in generate(). `resamples` says that it takes a rate other than 1. `channel_axes` names the axis of channels
    of those tensors that have one. Where it does, generate() must make the kernel of some channels out of their slices:
    several processes then divide the channels among them. Otherwise every process makes the whole kernel.

    `overrides` maps the names of parameters to the optimiser settings that they ask for, which
    seqconv.param_groups collects. The parameters are made in float32, or in float64 where that is torch's default
    (`kernel_dtype`), and stay in it when a model is cast to a half precision: rounding them changes the kernel, by up
    to 80 percent. `read` and load_state_dict raise TypeError where parameters are in half precision nevertheless.

    reset_parameters() draws initial values for the parameters that a module holds itself, as torch's modules do.
    model.apply or a loop over model.modules() reaches all of them.
    """

    d_model: int
    heads: int
    reads: tuple[str, ...] = ()
    channel_axes: ClassVar[dict[str, int]] = {}
    resamples = False

    def __init__(self):
        super().__init__()
        self.overrides: dict[str, dict[str, float]] = {}

    def override(self, *names: str, **settings: float) -> None:
        """Sets `overrides` of parameters, or of the submodules that hold them. With lr=0 the parameters become
        buffers, which have no gradient and keep their place in the state_dict."""
        for name in names:
            self.overrides[name] = self.overrides.get(name, {}) | settings
            if settings.get("lr") != 0:
                continue
            part = getattr(self, name, None)
            holders = part.modules() if isinstance(part, nn.Module) else [self]
            for module in holders:
                for key in [name] if module is self else list(module._parameters):
                    tensor = module._parameters.get(key)
                    if tensor is not None:
                        del module._parameters[key]
                        module.register_buffer(key, tensor.detach())

    def forward(
        self, length: int, rate: float = 1.0, channels: slice | None = None, also=None
    ) -> Tensor:
        """The kernel for inputs of that length. With a rate, which is the number of the kernel's steps in one step
        of the input, it is the kernel for inputs that are sampled 1 / rate times as often. With channels it is the
        kernel of these channels only. With a function `also`, it is the pair of the kernel and also(self), which
        reads the parameters while a sharded generator has them whole."""
        if type(length) is not int or length < 0:
            check_length(type(self).__name__, length)
        if type(rate) is not float or rate != 1.0:
            name = type(self).__name__
            check_sampling(name, rate)
            if rate != 1 and not self.resamples:
                text = f"rate must be 1 (its taps have no time scale), got {rate!r}"
                raise ValueError(f"{name}: {text}")
        if also is not None:
            return self.forward(length, rate, channels), also(self)  # pyright: ignore
        if channels is None:
            return self.generate(self.read(), length, rate)
        self._check_channels(channels)
        if not self.makes_parts:
            return self.generate(self.read(), length, rate)[:, channels]
        return self.part(self.read(), length, rate, channels)

    def generate(self, tensors: list[Tensor], length: int, rate: float) -> Tensor:
        """The kernel (heads, channels, taps), made of the tensors that `reads` names."""
        raise NotImplementedError

    @property
    def makes_parts(self) -> bool:
        """Whether part() makes the kernel of some channels without the others: a class says how, and none derived
        from it has another generate()."""
        if "generate" in vars(self):
            return False
        for owner in type(self).__mro__:
            if owner is KernelGenerator or owner is nn.Module:
                return False
            if "channel_axes" in vars(owner) or "part" in vars(owner):
                return True
            if "generate" in vars(owner):
                return False
        return False

    def part(self, tensors: list[Tensor], length: int, rate: float, channels: slice) -> Tensor:
        """The kernel of these channels, (heads, channels, taps), made of the tensors that `reads` names."""
        return self.generate(self.select(tensors, channels), length, rate)

    def _check_channels(self, channels) -> None:
        if isinstance(channels, slice):
            first, last, step = channels.start, channels.stop, channels.step
            ends = 0 if first is None else first, self.d_model if last is None else last
            if step in (None, 1) and 0 <= ends[0] <= ends[1] <= self.d_model:
                return
        wanted = f"a slice of 0 ... {self.d_model} in steps of 1"
        raise ValueError(f"{type(self).__name__}: channels must be {wanted}, got {channels!r}")

    def select(self, tensors: list[Tensor], channels: slice) -> list[Tensor]:
        """The tensors that `reads` names, cut to these channels."""
        axes = [self.channel_axes.get(name) for name in self.reads]
        pairs = zip(tensors, axes, strict=True)
        return [t if axis is None else cut(t, axis, channels) for t, axis in pairs]

    def read(self) -> list[Tensor]:
        """The parameters and buffers in `reads`, each formed once if it is parametrized. TypeError if one of
        them, or of those in submodules, is in half precision."""
        values = []
        for name in self.reads:
            value = getattr(self, name)
            if value is not None and value.dtype in HALF:
                self._check_precision(name, value)
            values.append(value)
        for module in self.modules():
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None and value.dtype in HALF:
                    paths = (*self.named_parameters(), *self.named_buffers())
                    name = next((path for path, t in paths if t is value), name)
                    self._check_precision(name, value)
        return values


def cut(t: Tensor, axis: int, part: slice) -> Tensor:
    """t[..., part, ...] along the axis."""
    some = range(t.shape[axis])[part]
    return t.narrow(axis, some.start, len(some))


class TiedDropout(nn.Dropout):
    """Dropout of whole channels of a sample: x is (batch, length, channels), and all times have one mask. Of a pack
    (total, channels) all times of a row of `lengths` (rows,) have one; x may be several runs of its steps, with
    lengths (runs, rows)."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if not (self.training and self.p):  # A mask of ones would cost two passes over x.
            return x
        if lengths is None:
            mask = x.new_ones(x.shape[0], 1, x.shape[2])
            return x * F.dropout(mask, self.p, self.training)
        *runs, rows = lengths.shape
        mask = F.dropout(x.new_ones(rows, x.shape[1]), self.p, self.training)
        mask = mask.repeat(*runs, 1) if runs else mask
        return x * mask.repeat_interleave(lengths.flatten(), 0, output_size=x.shape[0])


_DROPOUTS, _WEIGHTS = (nn.Dropout, TiedDropout), {"weight", "bias"}
_global_hooks = torch.nn.modules.module._has_any_global_hook


class ConvLayer(Described):
    """(batch, length, d_model) -> the same: y = GLU(W dropout(gelu(k * x + skip x)) + b).

    The parameters are the generator's; skip (heads, d_model), which begins as N(0, 1); and linear (2 d_model,
    heads d_model), which begins as torch's linear maps do. The generator of a two-sided layer makes 2 heads
    kernels, and the second half of them is for the future.
    """

    shown = ("heads", "bidirectional")
    meaning = ("bidirectional", "activation")
    _context: Any = None  # where the steps are divided among processes: seqconv.parallel.context

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
        check_probability(name, dropout=dropout)
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
        """Draws skip anew, as at construction. The kernel and the linear map have a reset_parameters of their own."""
        nn.init.normal_(self.skip)

    @property
    def causal(self) -> bool:
        """Whether no output sees a later input."""
        return not self.bidirectional

    @property
    def resamples(self) -> bool:
        """Whether the layer takes a rate other than 1, as its kernel generator does."""
        return self.kernel.resamples

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        rate: float | Tensor = 1.0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        history: Tensor | None = None,
        return_history: bool = False,
    ) -> Tensor:
        """The layer's output for x (batch, length, d_model), which has the layer's dtype unless under autocast.

        mask (batch, length) marks padding, by True or by -inf (0 elsewhere), as in torch's attention: x is
        read as zeros there. The output at padding is not zero, so that every layer needs the mask, and so does a
        mean. lengths (batch,), integers, masks every step from lengths[i] on. rate is the number of the
        kernel's steps in one step of x, for inputs that are sampled 1 / rate times as often as those of training.
        S4D and SGConv take a rate; the other layers take 1 only. A tensor (batch,), or (rows,) of a pack, gives each
        sample its own, and the kernel is made once for each rate that occurs.

        cu_seqlens (rows + 1,), int32 or int64, packs rows of any lengths: x is then (total, d_model), and so is the
        output. Row i has the steps [cu_seqlens[i], cu_seqlens[i + 1]) and is seen by no other row. The kernel is that
        of the longest row, or of max_seqlen steps where that is given: outputs are those of the padded batch.

        history (batch, steps, d_model) has the inputs before x, any number of them, and (rows, steps, d_model) those
        before every packed row, where zeros stand for no input. return_history=True returns the pair of the output and
        what is the history of the next call: all inputs so far, or as many as the kernel's taps reach. Gradients pass
        through it. Only causal layers take it; states, where a layer has them, take less memory.
        """
        name, pack = type(self).__name__, None
        packed = cu_seqlens is not None or max_seqlen is not None
        if history is not None or return_history is not False:
            refuse_history(self, mask=mask, lengths=lengths, return_history=return_history)
        if packed and self._context is not None:
            y, pack = self._context.convolve_packed(self, x, rate)
            return self._mix(y.flatten(-2), pack)
        check_input(name, x, self.skip, self.d_model, ("total",) if packed else ("batch", "length"))
        if packed:
            pack = pack_of(name, x, cu_seqlens, max_seqlen, mask, lengths)
        if history is not None or return_history:
            y, kept = convolve_on(self, x, rate, pack, history)
            y = self._mix(y.flatten(-2), pack)
            return (y, kept) if return_history else y  # pyright: ignore
        if mask is not None or lengths is not None:
            padding = padding_of(name, x, mask, lengths)
            x = x.masked_fill(padding.unsqueeze(-1), 0.0)
        plain = self._context is None and not isinstance(rate, Tensor)
        y = self._convolve(x, rate, pack) if plain else self._convolved(x, rate, pack)  # pyright: ignore
        return self._mix(y.flatten(-2)) if pack is None else self._mix(y.flatten(-2), pack)

    def _convolved(self, x: Tensor, rate: float | Tensor, pack: Pack | None) -> Tensor:
        """What _convolve returns, by other ways where rows differ in rate or processes divide the steps."""
        context = self._context
        if isinstance(rate, Tensor):
            if context is not None:
                context.refuse_rates(type(self).__name__)
            return by_rate(self, x, rate, pack)
        return self._convolve(x, rate, pack) if context is None else context.convolve(self, x, rate)

    def _convolve(self, x: Tensor, rate: float, pack: Pack | None = None) -> Tensor:
        """activation(k * x + skip x), (batch, length, heads, d_model); of packed rows (total, heads, d_model)."""
        if pack is None:
            x, length = sized(x)
            rows = {}
        else:
            length, rows = pack.longest, pack.options()
        k, k_rev = self._kernel(length, rate), None
        if self.bidirectional:
            k, k_rev = k[: self.heads], k[self.heads :]
        options = {"activation": self.activation, "layout": "blh"}
        return fftconv(x, k, self.skip, k_rev=k_rev, **options, **rows)

    def _kernel(self, length: int, rate: float) -> Tensor:
        if type(rate) is not float or rate != 1.0:
            check_sampling(type(self).__name__, rate)
        k = self.kernel(length) if rate == 1.0 else self.kernel(length, rate=rate)
        if isinstance(length, int) and k.shape[-1] < length:
            warn_of_missing_taps(self, k, length)
        return k

    def _mix(self, y: Tensor, pack: Any = None) -> Tensor:
        """(..., heads d_model) after the activation -> (..., d_model). The pack says which steps are of one row."""
        wide = 2 * self.d_model if self.postact == "glu" else self.d_model
        dropout: Any = self._modules["dropout"]
        hooks = dropout._forward_hooks or dropout._forward_pre_hooks or _global_hooks()
        if dropout.training or hooks or type(dropout) not in _DROPOUTS:  # not idle
            tied = pack is not None and isinstance(dropout, TiedDropout)
            y = dropout(y, pack.lengths(y.device)) if tied else dropout(y)  # pyright: ignore
        linear: Any = self._modules["linear"]
        tiled = self.postact == "glu" and is_plain(linear) and y.numel() >= LEAST
        if tiled and takes(linear, y, wide):
            return linear_glu(y, linear.weight, linear.bias)
        y = apply_linear(self, "linear", y, wide)
        if self.postact is None:
            return y
        plain = type(y) is Tensor or exporting()
        if forward_ad._current_level >= 0 or transforms_active() or not plain:
            # torch's glu has no forward derivative of its forward derivative, and for DTensors no rule before 2.13.
            first, gate = y.chunk(2, dim=-1)
            return first * gate.sigmoid()
        return F.glu(y, dim=-1)


def check_input(
    function: str, x: Tensor, own: Tensor, d_model: int, axes=("batch", "length")
) -> None:
    """Requires x (*axes, d_model) on the device and, unless under autocast, in the dtype of `own`. That is a
    parameter of the layer itself, because the modules in the place of its linear maps may have any weights or none."""
    if type(x) is Tensor and x.dtype == own.dtype and x.dtype in FLOATS and x.device == own.device:
        dense = x.layout == torch.strided and not x.is_nested
        if dense and x.dim() == len(axes) + 1 and x.shape[-1] == d_model:
            return  # The usual case passes all checks below.
    check_tensor(function, "x", x)
    if x.device.type != "meta" and not torch.is_autocast_enabled(x.device.type):
        why = " (the layer's dtype) outside autocast"
        check_tensor(function, "x", x, dtypes=(own.dtype,), why=why)
    check_tensor(function, "x", x, device=own.device, owner="the layer")
    if len(axes) == 2 and x.dim() == 2 and x.shape[-1] == d_model:
        wanted, found = f"(batch, length, d_model={d_model})", tuple(x.shape)
        raise ValueError(
            f"{function}: x must be {wanted}, got {found}; packed rows need cu_seqlens"
        )
    check_shape(function, "x", x, (*[(axis, None) for axis in axes], ("d_model", d_model)))


def sized(x: Tensor) -> tuple[Tensor, int]:
    """x (batch, length, d_model) and its length as an integer. torch.jit.trace has the length as a tensor: the
    traced graph holds for this one length, and unflatten refuses every other length when the graph runs."""
    length = x.shape[1]
    if not torch.jit.is_tracing():  # pyright: ignore
        return x, length
    length = int(length)
    return x.unflatten(1, (1, length)).squeeze(1), length


def warn_of_missing_taps(layer: Described, k: Tensor, length: int) -> None:
    """Warns, once for each layer, that its kernel (..., taps) is shorter than the input."""
    taps = k.shape[-1]
    text = f"the input has length {length} and the kernel {taps} taps (l_max / rate): what lies {taps} steps or more"
    layer.warn_once("taps", f"{text} away is not seen. Make the layer with a larger l_max.")


def is_plain(linear: Any) -> bool:
    """Whether a call of the module does what torch's linear map does, and nobody wants to see it."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks
    hooks = hooks or linear._backward_hooks or linear._backward_pre_hooks or _global_hooks()
    graph = torch.compiler.is_compiling() or torch._C._is_tracing()
    own = linear._parameters
    return type(linear) is nn.Linear and own.keys() == _WEIGHTS and not (hooks or graph)


def apply_linear(layer: nn.Module, name: str, x: Tensor, wide: int) -> Tensor:
    """Applies the linear map of that name, or the module in its place: (..., features) -> (..., wide)."""
    linear: Any = layer._modules[name]
    if is_plain(linear):
        # Around one step torch's call of a module takes longer than the preparation of a linear map.
        y = F.linear(x, linear._parameters["weight"], linear._parameters["bias"])
    else:
        y = linear(x)
    shape = y.shape
    if shape[-1] != wide or shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{type(layer).__name__}: {name} ({type(linear).__name__}) must map {tuple(x.shape)} to "
            f"{(*x.shape[:-1], wide)}, got {tuple(y.shape)}"
        )
    return y
