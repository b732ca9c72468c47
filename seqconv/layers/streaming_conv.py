"""A causal convolution whose input comes in pieces: one step at a time, or a chunk of steps at once."""

from functools import cached_property
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv.backends.protocol import BLOCK
from seqconv.backends.tiles import clocks, first_clocks, sizes
from seqconv.layers.padding import extents, shifted
from seqconv.layers.state import State, check_state, mark_of
from seqconv.ops import stream
from seqconv.ops.checks import (
    check_choice,
    check_flag,
    check_length,
    check_shape,
    check_tensor,
)
from seqconv.ops.fftconv import ACTIVATIONS, NARROW, fftconv
from seqconv.ops.register import exporting, library, transforms_active
from seqconv.reference import activate


class ConvState(State):
    """The state of a convolution: inputs and sums of outputs to come, in rings (see seqconv.ops.stream); the rows'
    clocks, on the host unless the steps are spread; and the rows' ages, on the host."""

    tensors: ClassVar = ("inputs", "sums", "clock", "age")
    options: ClassVar = ("kernel", "length", "spread")
    inputs: Tensor
    sums: Tensor
    clock: Tensor
    age: Tensor
    kernel: int
    length: int | None
    spread: bool

    def _forgotten(self) -> list[Tensor]:
        return [self.inputs, self.sums, self.age]

    def map(self, function) -> "ConvState":
        new: Any = super().map(function)
        if not self.spread:
            new.clock = new.clock.to("cpu")
        new.age = new.age.to("cpu")
        return new


class StreamingConv:
    """fftconv(u, k, skip, activation=...) for an input that comes in pieces, exact, at any number of taps.

        v[t] = sum_{s<=t} k[t-s] x[s] + skip x[t],   x = pre_gate * u,   y = post_gate * activation(v)

    step takes one time of every sample. L steps cost O(L log^2 L) by relaxed tiling, the state holds less than two
    kernels' lengths of inputs and as many sums, and no step allocates more than its output. prefill takes a chunk of
    steps at once, by fftconv, and has gradients. Both may alternate in any order.

    Args:
        k: (channels, K), or (heads, channels, K); float32 or narrower, or the dtype of the inputs. It is copied.
        skip: (channels,) or (heads, channels), or None.
        activation: None, "gelu", "silu" or "relu".

    Example:
        >>> conv = StreamingConv(torch.tensor([[1.0, 10.0]]))
        >>> state = conv.init_state(1)
        >>> [conv.step(torch.tensor([[u]]), state)[0].item() for u in (1.0, 2.0, 3.0)]
        [1.0, 12.0, 23.0]

    Sources: arXiv 2410.12982, arXiv 2410.03766. Twin: seqconv.reference.fftconv of the whole input.
    """

    def __init__(self, k: Tensor, skip: Tensor | None = None, *, activation: str | None = None):
        name = type(self).__name__
        check_tensor(name, "k", k)
        check_choice(name, "activation", activation, ACTIVATIONS)
        channels, taps = ("channels", None), ("K", None)
        check_shape(name, "k", k, (channels, taps), (("heads", None), channels, taps))
        self.heads = k.shape[0] if k.dim() == 3 else None
        self.channels, self.count = k.shape[-2:]
        if skip is not None:
            check_tensor(name, "skip", skip, dtypes=(*NARROW, k.dtype), device=k.device, owner="k")
            channels = ("channels", self.channels)
            patterns = (
                [(channels,)]
                if self.heads is None
                else [(channels,), (("heads", self.heads), channels)]
            )
            check_shape(name, "skip", skip, *patterns)
        wide = torch.promote_types(k.dtype, torch.float32)
        self.k = (k if k.dim() == 3 else k.unsqueeze(0)).to(wide).clone()
        self.skip = None if skip is None else skip.to(wide).expand(self.k.shape[:2]).clone()
        self.activation = activation
        self._taps: dict[int, stream.Taps] = {}  # by the number of taps that the state can meet
        self._periods: dict[int | None, int] = {}  # by the state's length
        self.name = name

    @cached_property
    def mark(self) -> int:
        """The number by which a state knows this kernel."""
        return mark_of(self.k, self.skip)

    def taps(self, length: int | None) -> stream.Taps:
        """What steps need of the kernel, made at the first step."""
        count = self._reach(length)
        if count not in self._taps:
            with torch.no_grad():
                self._taps[count] = stream.taps_of(self.k.detach()[..., :count], self.skip)
        return self._taps[count]

    def _reach(self, length: int | None) -> int:
        """How many taps a state has: those that fit its period, so that few sets of spectra serve all lengths."""
        return self.count if length is None else min(self.count, stream.period_of(length) + 1)

    def _period(self, length: int | None) -> int:
        found = self._periods.get(length)
        if found is None:
            found = self._periods[length] = stream.period_of(self._reach(length))
        return found

    def init_state(
        self, batch: int, *, length: int | None = None, spread: bool = False
    ) -> ConvState:
        """The state before any input.

        length bounds the number of steps of a row, if there are fewer than taps: the state is as large as
        min(K, length) asks for, and a row's step after that is a ValueError. spread makes all steps cost about the
        same: the rows do their work at different times, where otherwise step t does as much as the largest power
        of two that divides t. On a GPU the steps of such a state are always the same kernels, which a CUDA graph
        can record.
        """
        name = f"{self.name}.init_state"
        check_length(name, batch, name="batch")
        check_flag(name, spread=spread)
        if length is not None:
            check_length(name, length, name="length")
        period = self._period(length)
        clock = first_clocks(batch, self.channels, period, spread)
        clock = clock.to(self.k.device) if spread else clock
        if not torch.is_grad_enabled():  # Steps are to come, compiled ones perhaps.
            self.taps(length)
        rings = stream.zero_rings(self.k.detach(), batch, period, clock)
        return ConvState(
            **rings._asdict(),
            age=torch.zeros(batch, dtype=torch.int64),
            kernel=self.mark,
            length=length,
            spread=spread,
        )

    def step(
        self,
        u: Tensor,
        state: ConvState,
        *,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
    ) -> tuple[Tensor, ConvState]:
        """y (batch, channels), or (batch, heads, channels) where k has heads, of u (batch, channels) of one time,
        and the state, which it changes in place. pre_gate is like u, post_gate like y. It has no gradient: with
        tensors that require one it raises RuntimeError, and prefill does what is asked for.
        """
        name = f"{self.name}.step"
        y_axes = self._check(name, u, state, (pre_gate, post_gate), ())
        if torch.is_grad_enabled() and _any_gradient(
            u, pre_gate, post_gate, self.k, self.skip, *state.leaves()[:2]
        ):
            text = "a step has no gradient: call it under torch.no_grad(), or take prefill, which has one"
            raise RuntimeError(f"{name}: {text}")
        rings = stream.Rings(state.inputs, state.sums, state.clock)
        if post_gate is not None and self.heads is None:
            post_gate = post_gate.unsqueeze(1)
        activation = self.activation or "none"
        if torch.compiler.is_compiling() and exporting():
            y, state = self._portable_step(name, u, pre_gate, post_gate, state, rings)
            return (y if y_axes == 3 else y.squeeze(1)), state
        if state.length is not None:
            torch.ops.seqconv.stream_age(state.age, None, state.length, name)
        y = stream.step(
            u, pre_gate, post_gate, rings, self.taps(state.length), activation, state.spread
        )
        return (y if y_axes == 3 else y.squeeze(1)), state

    def _portable_step(self, function: str, u, pre_gate, post_gate, state: ConvState, rings):
        """The step of an exported program: y (batch, heads, channels), and a new state."""
        if state.length is not None and state.length <= self.count:
            text = f"an exported step cannot refuse the steps after length={state.length}"
            raise ValueError(
                f"{function}: {text}: make the state without it, or with more than all taps"
            )
        x = u.to(self.k.dtype)
        x = x if pre_gate is None else x * pre_gate.to(x.dtype)
        v, rings = stream.portable_step(x, rings, self.k, self.skip, state.spread)
        y = activate(v, self.activation or "none")
        y = (y if post_gate is None else y * post_gate.to(y.dtype)).to(u.dtype)
        new: Any = state.map(lambda t: t)
        new.inputs, new.sums, new.clock = rings
        if state.length is not None:
            new.age = state.age + 1
        return y, new

    def prefill(
        self,
        u: Tensor,
        state: ConvState,
        *,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, ConvState]:
        """y (batch, channels, length), or (batch, heads, channels, length), of a chunk u (batch, channels, length)
        that follows the inputs so far, and the state after it, a new one. It is differentiable, through the state
        too. padding (batch, length), True where a row has no input yet (on the left) or any more (on the right):
        there y means nothing, and no time passes for the state.
        """
        name = f"{self.name}.prefill"
        self._check(name, u, state, (pre_gate, post_gate), ("length",))
        length, batch = u.shape[-1], u.shape[0]
        x = u.to(self.k.dtype)
        x = x if pre_gate is None else x * pre_gate.to(x.dtype)
        first = None
        count: int | Tensor = length
        if padding is not None:
            first, count = extents(padding)
            x = x.masked_fill(padding.unsqueeze(1), 0.0)
            x = shifted(x, first.view(-1, 1, 1).expand(-1, self.channels, 1))
        if state.length is not None:
            age = state.age.clone()
            steps = count if isinstance(count, Tensor) else torch.tensor(count)
            torch.ops.seqconv.stream_age(age, steps, state.length, name)
        k = self.k[..., : self._reach(state.length)]
        future = _future(k, state)
        period = future.shape[-1]
        v = fftconv(F.pad(x, (0, period)), k) + F.pad(future, (0, length))
        if first is None:
            future = v[..., length:]
        else:
            ends = count.view(-1, 1, 1, 1).expand(-1, *v.shape[1:3], 1)  # pyright: ignore
            future = shifted(v, ends)[..., :period]
        v = v[..., :length]
        if self.skip is not None:
            v = v + self.skip.unsqueeze(-1) * x.unsqueeze(1)
        if first is not None:
            v = shifted(v, (-first).view(-1, 1, 1, 1).expand(-1, *v.shape[1:3], 1))
        v = activate(v, self.activation or "none")
        v = v if self.heads is not None else v.squeeze(1)
        y = (v if post_gate is None else v * post_gate.to(v.dtype)).to(u.dtype)
        new = self.init_state(batch, length=state.length, spread=state.spread)
        now = clocks(new.clock.to(x.device), self.channels, period, state.spread)
        future = future if not state.spread else _rolled(future, -now)
        new.sums = future.unflatten(-1, (-1, BLOCK)).movedim(-2, 1).contiguous()
        new.age = state.age if state.length is None else age
        return y, new

    def _check(self, function: str, u, state, gates, times: tuple[str, ...]) -> int:
        """Checks arguments, and returns the number of y's axes without time."""
        axes = 2 if self.heads is None else 3
        usual = (
            type(u) is Tensor and u.dtype == self.k.dtype and not times and gates == (None, None)
        )
        if usual and u.device == self.k.device and isinstance(state, ConvState):
            if u.shape == (state.inputs.shape[0], self.channels) and state.kernel == self.mark:
                if u.layout == torch.strided and self._fits(state):
                    return axes  # The usual case passes all checks below.
        check_tensor(function, "u", u, device=self.k.device, owner="the kernel")
        if (u.dtype == torch.float64) != (self.k.dtype == torch.float64):
            wanted = "float64" if self.k.dtype == torch.float64 else "float32, bfloat16 or float16"
            raise TypeError(f"{function}: u must be {wanted} like the kernel, got {u.dtype}")
        time = tuple((t, u.shape[-1] if u.dim() else None) for t in times)
        channels = ("channels", self.channels)
        check_shape(function, "u", u, (("batch", None), channels, *time))
        batch = ("batch", u.shape[0])
        heads = () if self.heads is None else (("heads", self.heads),)
        for name, gate, more in (("pre_gate", gates[0], ()), ("post_gate", gates[1], heads)):
            if gate is not None:
                check_tensor(function, name, gate, dtypes=(u.dtype,), device=u.device)
                check_shape(function, name, gate, (batch, *more, channels, *time))
        check_state(function, state, ConvState, u.shape[0], u.device, self.mark)
        if not self._fits(state):
            self._refuse(function, state)
        return axes

    def _shapes(self, state: ConvState) -> tuple[tuple[int, ...], ...]:
        """Those of the inputs, the sums and the clock."""
        batch, length, channels = state.inputs.shape[0], state.length, self.channels
        blocks = self._period(length) // BLOCK
        rings = (batch, blocks, channels, BLOCK), (batch, blocks, self.k.shape[0], channels, BLOCK)
        return *rings, (batch,)

    def _fits(self, state: ConvState) -> bool:
        """Whether the state's memory is as the kernels of steps read it."""
        inputs, sums, clock = state.inputs, state.sums, state.clock
        wide = self.k.dtype
        if inputs.dtype is not wide or sums.dtype is not wide or clock.dtype is not torch.int64:
            return False
        if (inputs.shape, sums.shape, clock.shape) != self._shapes(state):
            return False
        dense = inputs.is_contiguous() and sums.is_contiguous() and clock.is_contiguous()
        return dense and inputs.device == self.k.device

    def _refuse(self, function: str, state: ConvState) -> NoReturn:
        """Says why a state does not fit."""
        dtypes = self.k.dtype, self.k.dtype, torch.int64
        for name, shape, dtype in zip(ConvState.tensors, self._shapes(state), dtypes, strict=False):
            t = getattr(state, name)
            for what, wanted, came in (("dtype", dtype, t.dtype), ("shape", shape, tuple(t.shape))):
                if wanted != came:
                    raise ValueError(
                        f"{function}: state.{name} must have {what}={wanted}, got {came}"
                    )
            if name != "clock" and t.device != self.k.device:
                raise ValueError(
                    f"{function}: state.{name} must be on {self.k.device}, got {t.device}"
                )
            if not t.is_contiguous():
                text = "must be contiguous, as select makes it"
                raise ValueError(f"{function}: state.{name} {text}, got strides {t.stride()}")
        raise ValueError(f"{function}: state must be one that init_state makes")


def _any_gradient(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _grow_older(age: Tensor, count: Tensor | None, length: int, function: str) -> None:
    """Adds count, or 1, to the ages of rows, of which none may take more than `length` steps."""
    older = age + (1 if count is None else count.to(age.device))
    oldest = int(older.max()) if len(older) else 0
    if oldest > length:
        text = f"made for length={length} steps, and this would be step {oldest} of a row"
        raise ValueError(f"{function}: the state was {text}")
    age.copy_(older)


library.define("stream_age(Tensor(a!) age, Tensor? count, int length, str function) -> ()")
library.impl("stream_age", _grow_older, "CompositeExplicitAutograd")
torch.library.register_fake("seqconv::stream_age", lambda *_: None, lib=library)


def _rolled(x: Tensor, by: Tensor) -> Tensor:
    """x[b, c, h, (t + by[b, h]) mod period] of x (batch, heads, channels, period)."""
    period, place = x.shape[-1], torch.arange(x.shape[-1], device=x.device)
    rows = []
    for row, shift in zip(x, by, strict=True):  # an index of all rows would be twice as large as x
        index = (place + shift.unsqueeze(-1)) % period
        rows.append(row.gather(-1, index.expand(row.shape)))
    return torch.stack(rows) if rows else x


def _future(k: Tensor, state: ConvState) -> Tensor:
    """What all inputs so far add to the outputs to come, (batch, heads, channels, period), the next one first."""
    sums = state.sums.movedim(1, -2).flatten(-2)  # (b c h period)
    period = sums.shape[-1]
    now = clocks(state.clock.to(sums.device), k.shape[1], period, state.spread)  # (b h)
    if torch.compiler.is_compiling() or transforms_active() or state.inputs.any():
        x = state.inputs.movedim(1, -2).flatten(-2)  # (b h period)
        place = torch.arange(period, device=x.device)
        x = torch.where(place < now.unsqueeze(-1), x, 0.0)  # Older inputs are in the sums.
        sums = _with_tiles(k, x, now, sums)
    if not (torch.compiler.is_compiling() or state.spread):
        clock = state.clock.unique()
        if len(clock) <= 1:
            return sums.roll(-int(clock) if len(clock) else 0, -1)
    return _rolled(sums, now)


def _with_tiles(k: Tensor, x: Tensor, now: Tensor, sums: Tensor) -> Tensor:
    """The sums after all tiles to come, if no more inputs came: of every size one at most has inputs."""
    heads, period = k.shape[0], x.shape[-1]
    padded = F.pad(k, (0, 2 * period - k.shape[-1]))
    for n in sizes(period):
        end = -(-now // n)  # of the block of n inputs in which the last one is
        due = (end * n > now) & ((end % 2 == 1) | (n == period))
        blocks = x.unflatten(-1, (-1, n))
        chosen = (end - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, n)
        u, k_rev = blocks.gather(-2, chosen).squeeze(-2), padded[..., 1:n].flip(-1)
        part = fftconv(u, padded[..., n : 2 * n], k_rev=k_rev)
        wanted = due.unsqueeze(-1)
        if n == period:  # No tap reaches further.
            wanted = wanted & (torch.arange(n, device=x.device) < now.unsqueeze(-1))
        part = torch.where(wanted.unsqueeze(1), part, 0.0).unsqueeze(-2)  # (b c h 1 n)
        index = (end % (period // n))[:, None, :, None, None].expand(-1, heads, -1, 1, n)
        sums = sums.unflatten(-1, (-1, n)).scatter_add(-2, index, part).flatten(-2)
    return sums
