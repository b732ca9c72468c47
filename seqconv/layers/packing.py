"""Rows in layers: packed ones, rows with rates of their own, and rows that go on from a history."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqconv.backends.offsets import offsets_of, on_one, readable
from seqconv.layers.state import State
from seqconv.ops.checks import (
    FLOATS,
    check_flag,
    check_length,
    check_offsets,
    check_sampling,
    check_shape,
    check_tensor,
    require,
)
from seqconv.ops.history import lengthened

NUMBERS = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)


class Pack(NamedTuple):
    """The offsets of rows, as the caller gave them; and the steps that the kernel is made for, those of the longest."""

    cu_seqlens: Tensor
    max_seqlen: int | None
    longest: int

    def options(self) -> dict:
        """For fftconv."""
        return {"cu_seqlens": self.cu_seqlens, "max_seqlen": self.max_seqlen}

    @property
    def rows(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def lengths(self, device: torch.device) -> Tensor:
        return on_one(self.cu_seqlens).to(device, torch.int64).diff()

    def only(self, rows: Tensor) -> "tuple[Pack, Tensor]":
        """The pack of those rows for which `rows` is True, and where their steps are in this one."""
        lengths = self.lengths(rows.device)
        place = rows.repeat_interleave(lengths).nonzero().flatten()
        offsets = lengths[rows].cumsum(0)
        offsets = torch.cat([offsets.new_zeros(1), offsets])
        return Pack(offsets, self.longest, self.longest), place


def pack_of(
    function: str, x: Tensor, cu_seqlens, max_seqlen, mask=None, lengths=None, part: bool = False
) -> Pack:
    """The rows of x (total, d_model). With part=True x has some of their steps, and nobody compares the total."""
    if cu_seqlens is None:
        raise ValueError(
            f"{function}: max_seqlen must be None without cu_seqlens, got {max_seqlen!r}"
        )
    if mask is not None or lengths is not None:
        given = "mask" if mask is not None else "lengths"
        raise ValueError(
            f"{function}: {given} must be None with cu_seqlens, which leaves no padding"
        )
    check_offsets(function, cu_seqlens, x.device)
    if max_seqlen is not None:
        check_length(function, max_seqlen, name="max_seqlen")
    elif torch.compiler.is_compiling():
        text = "must be given inside of torch.compile, which cannot read the lengths of rows"
        raise ValueError(f"{function}: max_seqlen {text}")
    if max_seqlen is None or readable(cu_seqlens):
        total = None if part else x.shape[0]
        steps = offsets_of(cu_seqlens, total, max_seqlen, function=function).diff()
    longest = max_seqlen
    if longest is None:
        longest = int(steps.max()) if len(steps) else 0
    return Pack(cu_seqlens, max_seqlen, longest)


def pad(
    x: Tensor, cu_seqlens: Tensor, length: int | None = None, *, value: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A padded batch (rows, length, ...) of a pack x (total, ...), and the lengths (rows,) of its rows.

    Rows are padded at their end with `value`, to the longest row or to `length`, which no row may exceed.

    Example:
        >>> pad(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 3]))
        (tensor([[1., 2.],
                [3., 0.]]), tensor([2, 1]))
    """
    check_tensor("pad", "x", x, dtypes=NUMBERS)
    if x.dim() < 1:
        raise ValueError("pad: x must be (total, ...), got a number")
    check_offsets("pad", cu_seqlens, x.device)
    if length is not None:
        check_length("pad", length)
    lengths, total = cu_seqlens.to(x.device, torch.int64).diff(), x.shape[0]
    if torch.compiler.is_compiling() and length is not None:
        fits = (lengths >= 0).all() & (lengths <= length).all() & (lengths.sum() == total)
        # Without numbers: a text that holds a size would bind the graph to it.
        text = "must be 0, then not decrease, to the number of steps, by length at most"
        require(fits & (cu_seqlens[0] == 0), f"pad: cu_seqlens {text}")
    else:
        offsets_of(cu_seqlens, total, length, function="pad", name="length")
    if length is None:
        length = int(lengths.max()) if lengths.shape[0] else 0
    kept = torch.arange(length, device=x.device) < lengths.unsqueeze(1)
    out = x.new_full((lengths.shape[0], length, *x.shape[1:]), value)
    out[kept] = x
    return out, lengths


def unpadded(y: Tensor, lengths: Tensor) -> Tensor:
    """The steps of y (rows, length, ...) that are no padding, (total, ...)."""
    return y[torch.arange(y.shape[1], device=y.device) < lengths.unsqueeze(1)]


def rates_of(function: str, rate: Tensor, count: int, resamples: bool) -> list[float]:
    """The distinct rates of `count` samples or rows."""
    if torch.compiler.is_compiling():
        raise ValueError(f"{function}: rate must be a number inside of torch.compile, got a tensor")
    if rate.dim() == 0:
        check_sampling(function, rate)  # which says that it is no number  # pyright: ignore
    check_tensor(function, "rate", rate)
    check_shape(function, "rate", rate, (("batch", count),))
    if rate.requires_grad:
        raise ValueError(f"{function}: rate must not require a gradient: it has none")
    values = rate.unique().tolist()
    for value in values:
        check_sampling(function, value)
        if value != 1 and not resamples:
            raise ValueError(
                f"{function}: rate must be 1 (its taps have no time scale), got {value!r}"
            )
    return values


def by_rate(layer, x: Tensor, rate: Tensor, pack: Pack | None) -> Tensor:
    """What layer._convolve returns, for a rate of every sample or row: it is called once for each that occurs."""
    count, parts, places = x.shape[0] if pack is None else pack.rows, [], []
    for value in rates_of(type(layer).__name__, rate, count, layer.resamples):
        chosen = (rate == value).to(x.device)
        if pack is None:
            some, place = None, chosen.nonzero().flatten()
        else:
            some, place = pack.only(chosen)
        places.append(place)
        parts.append(layer._convolve(x[place], value, some))
    if not parts:
        return layer._convolve(x, 1.0, pack)
    return torch.cat(parts)[torch.cat(places).argsort()]


def refuse_history(layer, return_history: bool, **others) -> None:
    """Requires what a layer's forward with a history can take: none of the others."""
    name = type(layer).__name__
    check_flag(name, return_history=return_history)
    for argument, value in others.items():
        if value is not None:
            kind = type(value).__name__
            raise ValueError(f"{name}: {argument} must be None with a history, got a {kind}")
    text = "history must be None and return_history False"
    if not layer.causal:
        raise ValueError(f"{name}: {text}, because its outputs see later inputs")
    if layer._context is not None:
        raise ValueError(f"{name}: {text} under context parallelism")


def check_history(name: str, x: Tensor, history, axis: str, count: int) -> Tensor:
    """The history (count, steps, d_model); without steps if there is none."""
    if history is None:
        return x.new_zeros(count, 0, x.shape[-1])
    check_tensor(name, "history", history, dtypes=(x.dtype,), device=x.device, owner="x")
    pattern = (axis, count), ("steps", None), ("d_model", x.shape[-1])
    check_shape(name, "history", history, pattern)
    return history


def go_on(call, name: str, x: Tensor, history, kept) -> tuple[Tensor, Tensor]:
    """call(x) after the history, and the next history: the last kept(steps) of all steps."""
    history = check_history(name, x, history, "batch", x.shape[0])
    x = torch.cat([history, x], 1)
    # A copy: a slice would keep all steps in memory.
    return call(x)[:, history.shape[1] :], x[:, x.shape[1] - kept(x.shape[1]) :].clone()


def convolve_on(layer, x: Tensor, rate, pack: Pack | None, history) -> tuple[Tensor, Tensor]:
    """What layer._convolved returns after the history, and the next history."""
    name = type(layer).__name__
    kept = lambda steps: _kept(layer, steps, rate)  # noqa: E731
    if pack is None:
        return go_on(lambda x: layer._convolved(x, rate, None), name, x, history, kept)
    history = check_history(name, x, history, "rows", pack.rows)
    before = history.shape[1]
    rows = lengthened(name, pack.cu_seqlens, x.shape[0], before, x.device)
    longest = pack.longest + before
    x = rows.join(history, x)
    y = rows.cut(layer._convolved(x, rate, Pack(rows.cu_seqlens, longest, longest)))
    return y, rows.last(x, kept(longest))


def _kept(layer, steps: int, rate) -> int:
    """How many of the last inputs a later output can see."""
    taps: Any = getattr(layer.kernel, "taps", getattr(layer.kernel, "l_max", None))
    known = isinstance(taps, int) and not isinstance(rate, Tensor) and rate == 1
    return min(steps, taps - 1) if known else steps


def prefilled(prefill, x: Tensor, state: Any, pack: Pack) -> tuple[Tensor, Any]:
    """prefill(rows, state, lengths) of a pack x (total, d_model), and the state after it. The batches that it gets are
    padded, so rows of similar lengths share one: a single long row costs memory for itself alone."""
    groups: dict[int, list[int]] = {}
    if readable(pack.cu_seqlens) and isinstance(state, State) and state.batch == pack.rows:
        for i, length in enumerate(on_one(pack.cu_seqlens).diff().tolist()):
            groups.setdefault(length.bit_length(), []).append(i)
    if len(groups) < 2:
        rows, lengths = pad(x, pack.cu_seqlens, pack.longest)
        y, state = prefill(rows, state, lengths)
        return unpadded(y, lengths), state
    parts, places, new = [], [], state.select(range(pack.rows))
    for group in groups.values():
        chosen = torch.zeros(pack.rows, dtype=torch.bool, device=x.device)
        chosen[group] = True
        some, place = pack.only(chosen)
        rows, lengths = pad(x[place], some.cu_seqlens)
        y, after = prefill(rows, state.select(group), lengths)
        new.insert(group, after)
        parts.append(unpadded(y, lengths))
        places.append(place)
    return torch.cat(parts)[torch.cat(places).argsort()], new
