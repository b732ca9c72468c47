"""What lies before the first step of a row: the convolution goes on from there, and tells how the next one can.

Rows get their history in front, the convolution takes them whole, and the outputs of the history are cut off. So all
options, backends and derivatives of the convolution are as they are without a history.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from seqconv.backends.inputs import Inputs
from seqconv.backends.offsets import offsets_of, readable
from seqconv.ops.checks import casts, check_shape, check_tensor, require


class Lengthened(NamedTuple):
    """Packed rows with `more` steps in front of each: their offsets; and among their steps the places of those of the
    pack, and of those in front, row by row."""

    cu_seqlens: Tensor
    steps: Tensor
    front: Tensor

    def join(self, front: Tensor, x: Tensor) -> Tensor:
        """(rows, more, ...) and (total, ...) -> (total + rows more, ...)."""
        out = x.new_empty(x.shape[0] + self.front.shape[0], *x.shape[1:])
        return out.index_copy(0, self.steps, x).index_copy(0, self.front, front.flatten(0, 1))

    def cut(self, y: Tensor) -> Tensor:
        """(total + rows more, ...) -> (total, ...)."""
        return y.index_select(0, self.steps)

    def last(self, x: Tensor, count: int) -> Tensor:
        """The last steps of every row of x (total + rows more, ...), (rows, count, ...), zeros where it has fewer."""
        offsets = self.cu_seqlens.to(x.device, torch.int64)
        steps, rows = x.shape[0], offsets.shape[0] - 1
        if not steps:
            return x.new_zeros(rows, count, *x.shape[1:])
        places = offsets[1:].unsqueeze(1) - count + torch.arange(count, device=x.device)
        inside = (places >= offsets[:-1].unsqueeze(1)).unflatten(1, (-1, *[1] * (x.dim() - 1)))
        return torch.where(inside, x[places.clamp(0, steps - 1)], 0.0)


def lengthened(
    function: str,
    cu_seqlens: Tensor,
    total: int,
    more: int,
    device: torch.device,
    max_seqlen: int | None = None,
) -> Lengthened:
    """Offsets on a GPU are not checked, since that would wait for it; no place is outside whatever they are."""
    if torch.compiler.is_compiling():
        valid = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)
        # Without numbers: a text that holds a size would bind the graph to it.
        text = "must be 0, then not decrease, and end with the number of steps"
        require(valid, f"{function}: cu_seqlens {text}")
    elif readable(cu_seqlens):
        offsets_of(cu_seqlens, total, max_seqlen, function=function)
    offsets = cu_seqlens.to(device, torch.int64).clamp(0, total)
    rows = offsets.shape[0] - 1
    number, place = (torch.arange(n, device=device) for n in (rows, total))
    row = torch.searchsorted(offsets[1:].contiguous(), place, right=True).clamp(max=rows - 1)
    front = (offsets[:-1] + more * number).unsqueeze(1) + torch.arange(more, device=device)
    # In int64: the steps in front may be more than int32 counts.
    longer = cu_seqlens.to(torch.int64) + more * torch.arange(rows + 1, device=cu_seqlens.device)
    return Lengthened(longer, place + more * (row + 1), front.flatten())


def check_history(inputs: Inputs, history, rows: int, axes: str, layout: str) -> None:
    """Requires (rows, channels, K - 1), or (rows, K - 1, channels) with layout="blh"; `axes` names the rows."""
    u, more = inputs.u, _more(inputs)
    dtypes = {} if casts(u.device) else {"dtypes": (u.dtype,)}
    check_tensor("fftconv", "history", history, device=u.device, **dtypes)
    channels = u.shape[-2 if layout == "bhl" else -1]
    pattern = [(axes, rows), ("channels", channels), ("K - 1", more)]
    if layout == "blh":
        pattern[1:] = reversed(pattern[1:])
    check_shape("fftconv", "history", history, tuple(pattern))


def _more(inputs: Inputs) -> int:
    return max(inputs.k.shape[-1] - 1, 0)


def _in_front(inputs: Inputs, history: Tensor, join: Callable, time: int) -> Inputs:
    """The signals with join(front, signal): the input has the history there, which its gate leaves as it is."""

    def joined(signal: Tensor | None, value: float) -> Tensor | None:
        if signal is None:
            return None
        shape = list(signal.shape if time else (len(history), *signal.shape))
        shape[1 if time == 0 else time] = _more(inputs)
        return join(signal.new_full(shape, value), signal)

    return inputs._replace(
        u=join(history.to(inputs.u.dtype), inputs.u),
        pre_gate=joined(inputs.pre_gate, 1.0),
        post_gate=joined(inputs.post_gate, 0.0),
    )


def continued(
    call: Callable, inputs: Inputs, history: Tensor | None, layout: str
) -> tuple[Tensor, Tensor]:
    """y = call(inputs) after the history, and what is the history of the next call: the last K - 1 of x = pre_gate u,
    those of `history` included."""
    u, more = inputs.u, _more(inputs)
    time = u.dim() - 1 if layout == "bhl" else 1
    length = u.shape[time]
    if history is None:
        shape = list(u.shape)
        shape[time] = more
        history, y = u.new_zeros(shape), call(inputs)
    else:
        history = history.to(u.dtype)
        # Of signals with heads time is the last axis in one layout, and the second in the other.
        axis = -1 if layout == "bhl" else 1
        join = lambda front, x: torch.cat([front, x], axis)  # noqa: E731
        y = call(_in_front(inputs, history, join, axis)).narrow(axis, more, length)
    start = max(length - more, 0)
    x = u.narrow(time, start, length - start)
    if inputs.pre_gate is not None:
        x = x * inputs.pre_gate.narrow(time, start, length - start).to(u.dtype)
    kept = history.narrow(time, more - max(more - length, 0), max(more - length, 0))
    return y, torch.cat([kept, x], time)


def continued_pack(
    call: Callable,
    inputs: Inputs,
    history: Tensor | None,
    layout: str,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """The same of packed rows, by call(inputs, layout=..., cu_seqlens=..., max_seqlen=...). history is (rows,
    channels, K - 1), or (rows, K - 1, channels) with layout="blh"."""
    back = (lambda t: t.movedim(0, -1).contiguous()) if layout == "bhl" else (lambda t: t)
    more, total = _more(inputs), inputs.u.shape[-1 if layout == "bhl" else 0]
    before = 0 if history is None else more
    rows = lengthened("fftconv", cu_seqlens, total, before, inputs.u.device, max_seqlen)
    first = inputs
    if layout == "bhl":
        signals = ("u", "pre_gate", "post_gate")
        turned = {n: None if t is None else t.movedim(-1, 0) for n, t in inputs._asdict().items()}
        first = inputs._replace(**{n: turned[n] for n in signals})
        history = history if history is None else history.movedim(1, -1)
    if history is None:
        y = call(inputs, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    else:
        longest = max_seqlen if max_seqlen is None else max_seqlen + more
        given = {"cu_seqlens": rows.cu_seqlens, "max_seqlen": longest}
        first = _in_front(first, history, rows.join, 0)
        y = back(rows.cut(call(first, layout="blh", **given)))
    x, gate = first.u, first.pre_gate
    x = x if gate is None else x * gate.to(x.dtype)
    kept = rows.last(x, more)
    return y, kept.movedim(1, -1) if layout == "bhl" else kept
