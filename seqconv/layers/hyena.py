"""Hyena: gates and long convolutions in turn, with the kernel a small network's function of time (arXiv 2302.10866)."""

import math
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from seqconv.layers.base import (
    apply_linear,
    check_input,
    sized,
    warn_of_missing_taps,
)
from seqconv.layers.hyena_filter import HyenaFilter
from seqconv.layers.kept import tensors_of
from seqconv.layers.module import Described
from seqconv.layers.options import Defaults, refuse
from seqconv.layers.packing import go_on, pack_of, prefilled, refuse_history
from seqconv.layers.padding import padding_of
from seqconv.layers.recurrence import run_pre_hooks
from seqconv.layers.state import State, check_kind, mark_of
from seqconv.layers.streaming import Streaming, kernel_of
from seqconv.layers.streaming_conv import ConvState, StreamingConv
from seqconv.ops.checks import check_positive, check_sampling
from seqconv.ops.fftconv import fftconv
from seqconv.ops.register import exporting

FILTER = Defaults(HyenaFilter)


class HyenaState(State):
    """The states of a Hyena's short convolution and of its long ones."""

    tensors: ClassVar = ("short", "long")
    short: ConvState
    long: tuple[ConvState, ...]


class Hyena(Streaming, Described):
    """Hyena operator, (batch, length, d_model) -> the same, causal.

        x_1, ..., x_N, v = short convolution of (W_in x + b_in), 3 taps
        v <- k_i * (x_i v) + skip_i (x_i v)   for i = 1, ..., N - 1
        y = W_out (x_N v) + b_out

    with N = order gates, N - 1 long convolutions, k from HyenaFilter, and the gates fused into the
    convolutions. Inputs longer than l_max are convolved with the l_max taps there are. Outputs grow as
    |x|^(order + 1): inputs for which that nears float32's largest number overflow. The convolutions' round-off
    lets a later step move earlier outputs by about eps times what it adds to a product of gates and values: a
    step that is s times as large moves them by about eps s^order.

    Parameters: in_proj ((order + 1) d_model, d_model) and out_proj (d_model, d_model), torch's
    default; short ((order + 1) d_model, 3), tap 0 the present's, and short_bias, uniform in
    +-1 / sqrt(3); skip (order - 1, d_model) ~ N(0, 1); the filter's, see there. All but the filter's
    are trained like any weight.

    Args:
        d_model: the number of channels.
        l_max: the number of taps of each kernel.
        order: the number of gates, at least 2. It is one more than the number of long convolutions, as in the
            reference implementation. The paper's Hyena-2 is order=3 without the first gate.
        emb_dim: the number of features of time that the filter sees, which is odd. filter_width, filter_layers:
            the sizes of its network. filter_frequency: the initial frequency of its sines.
        filter_features, filter_decay, filter_shift, filter_table_lr: HyenaFilter's features, decay, shift and
            table_lr. "spaced" features are those of the reference implementation.
        kernel_lr: the learning rate that param_groups gives to the filter's network, unless its own lr is
            smaller. With 0 its parameters are buffers.

    The filter's parameters stay float32 under .to(bfloat16) and .half(). l_max sets the filter's scale
    of time: a state_dict loads into a layer of the same l_max only.

    Source: arXiv 2302.10866, section 3. Example:
        >>> layer = Hyena(8, l_max=100)
        >>> layer(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    causal = True
    shown = meaning = ("order",)
    _generator = "filter"
    _context: Any = None  # where the steps are divided among processes: seqconv.parallel.context

    def __init__(
        self,
        d_model: int,
        *,
        l_max: int,
        order: int = 2,
        emb_dim: int = FILTER.emb_dim,
        filter_width: int = FILTER.width,
        filter_layers: int = FILTER.layers,
        filter_frequency: float = FILTER.frequency,
        filter_features: str = FILTER.features,
        filter_decay: str = FILTER.decay,
        filter_shift: float = FILTER.shift,
        filter_table_lr: float = FILTER.table_lr,
        kernel_lr: float = FILTER.lr,
        **unknown: NoReturn,
    ):
        refuse(self, Hyena, unknown)
        super().__init__()
        check_positive("Hyena", d_model=d_model, l_max=l_max)
        if not isinstance(order, int) or order < 2:
            raise ValueError(f"Hyena: order must be an integer >= 2, got {order!r}")
        check_positive("Hyena", filter_width=filter_width, filter_layers=filter_layers)
        self.d_model, self.order = d_model, order
        self.in_proj = nn.Linear(d_model, (order + 1) * d_model)
        self.short = nn.Parameter(torch.empty((order + 1) * d_model, 3))
        self.short_bias = nn.Parameter(torch.empty((order + 1) * d_model))
        self.filter = HyenaFilter(
            d_model,
            l_max=l_max,
            heads=order - 1,
            emb_dim=emb_dim,
            width=filter_width,
            layers=filter_layers,
            frequency=filter_frequency,
            features=filter_features,
            decay=filter_decay,
            shift=filter_shift,
            table_lr=filter_table_lr,
            lr=kernel_lr,
        )
        self.skip = nn.Parameter(torch.empty(order - 1, d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the short convolutions and skip anew, as at construction. The filter and the linear maps draw
        their own parameters."""
        bound = 1 / math.sqrt(3)
        nn.init.uniform_(self.short, -bound, bound)
        nn.init.uniform_(self.short_bias, -bound, bound)
        nn.init.normal_(self.skip)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        rate: float = 1.0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        history: Tensor | None = None,
        return_history: bool = False,
    ) -> Tensor:
        """x (batch, length, d_model), in the layer's dtype unless under autocast. mask (batch, length)
        marks padding, by True or by -inf (0 elsewhere), as in torch's attention: the output elsewhere is
        the same as without those steps' content; with padding on one side, as without those steps.
        lengths (batch,), integers, is a mask of everything from lengths[i] on. rate must be 1.

        cu_seqlens (rows + 1,), int32 or int64, packs rows of any lengths: x is then (total, d_model), and so is the
        output. Row i has the steps [cu_seqlens[i], cu_seqlens[i + 1]). max_seqlen says that none is longer.

        history (batch, steps, d_model) has the inputs before x, and return_history=True returns the pair of the output
        and the history of the next call, as in ConvLayer, though not of packed rows: an input of zeros is not none.
        """
        packed = cu_seqlens is not None or max_seqlen is not None
        axes = ("total",) if packed else ("batch", "length")
        check_input("Hyena", x, self.skip, self.d_model, axes)
        check_sampling("Hyena", rate)
        if rate != 1.0:
            raise ValueError(f"Hyena: rate must be 1 (its taps have no time scale), got {rate!r}")
        if history is not None or return_history is not False:
            refuse_history(self, return_history, mask=mask, lengths=lengths)
            if packed:
                text = "must be None and return_history False with cu_seqlens, where prefill gives states"
                raise ValueError(f"Hyena: history {text}")
            reach = (self.order - 1) * (self.filter.l_max - 1) + self.short.shape[-1] - 1
            y, kept = go_on(self.forward, "Hyena", x, history, lambda steps: min(steps, reach))
            return (y, kept) if return_history else y  # pyright: ignore
        padding, convs, make = None, (fftconv, fftconv), self.filter
        if self._context is not None and packed:
            length, *convs, make = self._context.hyena(self, x)
        elif packed:
            pack = pack_of("Hyena", x, cu_seqlens, max_seqlen, mask, lengths)
            length, convs = pack.longest, [partial(fftconv, **pack.options())] * 2
        else:
            x, length = sized(x)
            if mask is not None or lengths is not None:
                padding = padding_of("Hyena", x, mask, lengths)
            if self._context is not None:
                length, *convs, make = self._context.hyena(self, x)
        short, long = (partial(conv, layout="blh") for conv in convs)
        return self._operator(x, padding, length, short, long, make)

    def _operator(self, x: Tensor, padding: Tensor | None, length, short, long, make) -> Tensor:
        """The layer with these convolutions of steps before channels, and a generator."""
        # Padding is set to zero three times: otherwise the biases of the input projection and of the short
        # convolution would be put there and reach the steps after it.
        wide = (self.order + 1) * self.d_model
        x = apply_linear(self, "in_proj", _zero(x, padding), wide)
        x = short(_zero(x, padding), self.short, bias=self.short_bias)
        x, width = _zero(x, padding), self.d_model
        if exporting():  # At a split ExecuTorch ties the batch to the example's.
            *gates, v = [x[..., i : i + width] for i in range(0, wide, width)]
        else:
            *gates, v = x.split(width, dim=-1)
        k = make(length)
        if isinstance(length, int) and k.shape[-1] < length:
            warn_of_missing_taps(self, k, length)
        for i in range(self.order - 1):
            post_gate = gates[-1] if i == self.order - 2 else None
            v = long(v, k[i], self.skip[i], pre_gate=gates[i], post_gate=post_gate)
        return apply_linear(self, "out_proj", v, self.d_model)

    def _own(self) -> list[Tensor]:
        return [self.short, self.short_bias, self.skip]

    def _makers(self) -> list[nn.Module]:
        return [self.filter, self.in_proj]  # A state holds inputs that in_proj has mapped.

    def _first_mark(self, conv: StreamingConv) -> int:
        before = tensors_of([self.in_proj], [self.short_bias])
        return mark_of(conv.k, *[t for t in before if t.is_floating_point()])

    def _convolutions(self, taps: int) -> list[StreamingConv]:
        """The short convolution and the long ones."""
        pairs = zip(kernel_of(self.filter, taps), self.skip, strict=True)
        found = [StreamingConv(self.short), *[StreamingConv(k, skip) for k, skip in pairs]]
        return self._named(found)

    def init_state(
        self, batch: int, *, length: int | None = None, spread: bool = False
    ) -> HyenaState:
        """The state before any input, for so many samples. length bounds the number of steps, which makes the state
        smaller if they are fewer than taps; spread makes all steps cost about the same."""
        self._check_length(length)
        convs = self._streams(length)
        short, *long = [conv.init_state(batch, length=length, spread=spread) for conv in convs]
        return HyenaState(short=short, long=tuple(long))

    def step(self, x: Tensor, state: HyenaState) -> tuple[Tensor, HyenaState]:
        """Maps x (batch, d_model) of one time to y of that time, and returns the state, which it changes in place.
        It has no gradient, and raises RuntimeError where one is asked for."""
        name = "Hyena.step"
        check_input(name, x, self.skip, self.d_model, ("batch",))
        if self._forward_pre_hooks:
            x = run_pre_hooks(self, x.unsqueeze(1)).squeeze(1)
        check_kind(name, state, HyenaState)
        self._refuse_gradients(name, x, state)
        short, *long = self._streams_of(name, state, x)
        x, first = short.step(self._enter(x), state.short)
        x = x + self._mine(self.short_bias).to(x.dtype)
        *gates, v = x.chunk(self.order + 1, dim=-1)
        parts = []
        for i, (conv, part) in enumerate(zip(long, state.long, strict=True)):
            post_gate = gates[-1] if i == self.order - 2 else None
            v, part = conv.step(v, part, pre_gate=gates[i], post_gate=post_gate)
            parts.append(part)
        if first is not state.short:  # In an exported program a step makes new states.
            state = HyenaState(short=first, long=tuple(parts))
        return self._leave(v), state

    def prefill(
        self,
        x: Tensor,
        state: HyenaState,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, HyenaState]:
        """Maps x (batch, length, d_model), which follows the inputs that led to `state`, to y and the state after it,
        a new one. It has gradients. mask and lengths are as in forward; padding at the left or right end of a row is
        no step of it, and y is not defined there.

        cu_seqlens (rows + 1,) packs the rows' steps: x and y are (total, d_model), and the state is that of all rows
        after their own inputs. max_seqlen says that none has more.
        """
        name = "Hyena.prefill"
        if cu_seqlens is not None or max_seqlen is not None:
            self._check_streams()
            check_input(name, x, self.skip, self.d_model, ("total",))
            pack = pack_of(name, x, cu_seqlens, max_seqlen, mask, lengths)
            call = lambda x, s, n: self.prefill(x, s, lengths=n)  # noqa: E731
            return prefilled(call, x, state, pack)
        check_input(name, x, self.skip, self.d_model)
        if self._forward_pre_hooks:
            x = run_pre_hooks(self, x)
        x, _ = sized(x)
        unmasked = mask is None and lengths is None
        padding = None if unmasked else padding_of(name, x, mask, lengths)
        short, *long = self._streams_of(name, state, x)
        x = self._enter(_zero(x, padding)).movedim(1, 2)
        x, first = short.prefill(x, state.short, padding=padding)
        x = x + self._mine(self.short_bias).to(x.dtype).unsqueeze(-1)
        *gates, v = x.chunk(self.order + 1, dim=1)
        states = []
        for i, (conv, part) in enumerate(zip(long, state.long, strict=True)):
            post_gate = gates[-1] if i == self.order - 2 else None
            options = {"pre_gate": gates[i], "post_gate": post_gate, "padding": padding}
            v, part = conv.prefill(v, part, **options)
            states.append(part)
        y = self._leave(v.movedim(1, 2))
        return y, HyenaState(short=first, long=tuple(states))

    def _enter(self, x: Tensor) -> Tensor:
        """(..., d_model) -> (..., order + 1 times the channels of this process): of every gate, then of v."""
        return apply_linear(self, "in_proj", x, (self.order + 1) * self.d_model)

    def _mine(self, t: Tensor) -> Tensor:
        """Of (order + 1) d_model values those of the channels of this process: all, unless they are divided."""
        return t

    def _leave(self, v: Tensor) -> Tensor:
        return apply_linear(self, "out_proj", v, self.d_model)

    def _streams_of(self, function: str, state, x: Tensor) -> list[StreamingConv]:
        check_kind(function, state, HyenaState)
        if len(state.long) != self.order - 1:
            text = f"must have {self.order - 1} long convolutions, got {len(state.long)}"
            raise ValueError(f"{function}: state {text}")
        return self._streams(state.short.length, x, state)


def _zero(x: Tensor, padding: Tensor | None) -> Tensor:
    return x if padding is None else x.masked_fill(padding.unsqueeze(-1), 0.0)
