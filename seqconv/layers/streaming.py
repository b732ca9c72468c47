"""Layers whose kernel is made of taps, step by step and chunk by chunk."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from seqconv.layers.base import ConvLayer, check_input, sized
from seqconv.layers.kept import Snapshot, tensors_of, watch
from seqconv.layers.packing import pack_of, prefilled
from seqconv.layers.padding import padding_of
from seqconv.layers.recurrence import gathered_by_hooks, run_pre_hooks
from seqconv.layers.state import State, check_kind
from seqconv.layers.streaming_conv import ConvState, StreamingConv
from seqconv.ops.checks import check_length
from seqconv.ops.register import exporting, transformed, transforms_active

KEPT = 4  # lengths of states whose convolutions are kept: each of them takes several kernels' lengths of memory


class Streaming(nn.Module):
    """A layer with init_state, step and prefill, whose generator makes taps.

    Both convolve with the taps that forward would have for an input of `length` steps, if init_state was given a
    length, and for a very long one otherwise. LongConv's and SGConv's taps are the same for all lengths from l_max on.
    """

    d_model: int
    _context: Any
    _generator = "kernel"  # its name in the layer
    _kept: tuple[Snapshot, dict] | None = None  # convolutions for steps, and what they were made of

    def _own(self) -> list[Tensor]:
        """The layer's own tensors of which the convolutions are made, beside those of the generator."""
        raise NotImplementedError

    def _convolutions(self, taps: int) -> list[StreamingConv]:
        """Makes them, with gradients if these are on."""
        raise NotImplementedError

    def _makers(self) -> list[nn.Module]:
        """The modules on whose parameters a state depends, the generator first."""
        return [getattr(self, self._generator)]

    def _first_mark(self, conv: StreamingConv) -> int:
        """The mark of the first convolution."""
        return conv.mark

    def _check_streams(self) -> None:
        """Raises TypeError where the layer cannot run step by step."""
        name = type(self).__name__
        if self._context is not None:
            text = "has no step() and no prefill(); a copy without it has"
            raise TypeError(f"{name}: a layer under context parallelism {text}")

    def _check_length(self, length) -> None:
        if length is not None:
            check_length(f"{type(self).__name__}.init_state", length, name="length")

    def _taps(self, length: int | None) -> int:
        generator = getattr(self, self._generator)
        known = getattr(generator, "taps", getattr(generator, "l_max", None))
        if known is None and length is None:
            text = f"{type(generator).__name__} makes kernels of any length"
            raise ValueError(
                f"{type(self).__name__}.init_state: length must be given, because {text}"
            )
        return min(n for n in (known, length) if n is not None)

    def _streams(
        self, length: int | None, x: Tensor | None = None, state: State | None = None
    ) -> Any:
        """The convolutions for states of that length, kept for as long as the kernel stays the same; with gradients,
        made anew, where x or state or a parameter has them."""
        kept = self._kept_streams(length, None if state is None else state.leaves()[-1])
        if x is None or state is None or not self._has_gradients(x, state):
            return kept
        made = self._convolutions(self._taps(length))
        for conv, same in zip(made, kept, strict=True):
            conv.mark = same.mark
        return made

    def _kept_streams(self, length: int | None, token: Tensor | None = None) -> list[StreamingConv]:
        self._check_streams()
        key = taps, _ = self._taps(length), getattr(self, "activation", None)
        kept = self._kept  # Other threads may replace it.
        own, modules = self._own(), self._makers()
        if torch.compiler.is_compiling() and kept is not None and key in kept[1]:
            if token is not None and not exporting():
                watch(kept[0], tensors_of(modules, own), token)
            return kept[1][key]
        if _transformed(tensors_of(modules, own)):  # Outside of the transform they mean nothing.
            made = self._convolutions(taps)
            for conv in made:
                conv.mark = 0
            return made
        if kept is None or not kept[0].holds(modules, own):
            kept = Snapshot(modules, own), {}
        if kept[0].random():
            text = "every pass would have another kernel: call eval(), or set it to 0"
            raise ValueError(f"{type(self).__name__}: with kernel_dropout in training {text}")
        made = kept[1].get(key)
        if made is None:
            with torch.no_grad():
                made = self._convolutions(taps)
                made[0].mark = self._first_mark(made[0])
            # Hooks may set parameters when the kernel is made.
            kept = Snapshot(modules, own), kept[1]
        if made is not next(
            reversed(kept[1].values()), None
        ):  # The last is the one that was used last.
            others = [(k, v) for k, v in kept[1].items() if k != key]
            self._kept = kept[0], dict([*others[1 - KEPT :], (key, made)])
        return made

    def __getstate__(self) -> dict:
        return vars(self) | {"_kept": None}

    def _named(self, convs: list[StreamingConv]) -> list[StreamingConv]:
        """Errors name the layer."""
        for conv in convs:
            conv.name = type(self).__name__
        return convs

    def _refuse_gradients(self, function: str, x: Tensor, state: State) -> None:
        if self._has_gradients(x, state):
            text = "has no gradient: call it under torch.no_grad(), or take prefill, which has one"
            raise RuntimeError(f"{function}: a step {text}")

    def _has_gradients(self, x: Tensor, state: State) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = [x, *state.leaves(), *self.parameters()]
        return any(t.requires_grad for t in tensors)


def _transformed(tensors: list[Tensor]) -> bool:
    """Whether torch.func's transforms or forward-mode differentiation watch some of these tensors."""
    if transforms_active():
        return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))  # pyright: ignore
    return transformed(tensors)


def kernel_of(generator, taps: int) -> Tensor:
    """generator(taps). Under FSDP without its hooks, which may run only inside of the whole model's forward: the
    parameters must have been gathered, by unshard()."""
    return generator.forward(taps) if gathered_by_hooks(generator) else generator(taps)


class StreamingLayer(Streaming, ConvLayer):
    """A ConvLayer that runs step by step: a layer of yours whose generator makes taps derives from this class. A
    generator with an attribute l_max (or taps) has so many at most; otherwise states need a length."""

    def _own(self) -> list[Tensor]:
        return [self.skip]

    def _convolutions(self, taps: int) -> list[StreamingConv]:
        k = kernel_of(self.kernel, taps)
        conv = StreamingConv(k, self.skip, activation=self.activation)
        return self._named([conv])

    def _check_streams(self) -> None:
        if self.bidirectional:
            text = "a two-sided layer sees the future, which has not come yet, and has no steps"
            text += "; make it with bidirectional=False"
            raise TypeError(f"{type(self).__name__}: {text}")
        super()._check_streams()

    def init_state(
        self, batch: int, *, length: int | None = None, spread: bool = False
    ) -> ConvState:
        """The state before any input, for so many samples. See seqconv.streaming.StreamingConv.init_state: length
        bounds the number of steps, which makes the state smaller if they are fewer than taps; spread makes all steps
        cost about the same."""
        self._check_length(length)
        (conv,) = self._streams(length)
        return conv.init_state(batch, length=length, spread=spread)

    def step(self, x: Tensor, state: ConvState) -> tuple[Tensor, ConvState]:
        """Maps x (batch, d_model) of one time to y of that time, and returns the state, which it changes in place.

        y is what forward gives, up to round-off. It has no gradient, and raises RuntimeError where one is asked for.
        ValueError: state belongs to another batch, device, dtype or layer, or the kernel's parameters have changed.
        """
        name = f"{type(self).__name__}.step"
        check_input(name, x, self.skip, self.d_model, ("batch",))
        if self._forward_pre_hooks:
            x = run_pre_hooks(self, x.unsqueeze(1)).squeeze(1)
        self._check_streams()
        check_kind(name, state, ConvState)
        self._refuse_gradients(name, x, state)
        (conv,) = self._streams(state.length, x, state)
        y, state = conv.step(self._mine(x), state)
        return self._mixed(y), state

    def prefill(
        self,
        x: Tensor,
        state: ConvState,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, ConvState]:
        """Maps x (batch, length, d_model), which follows the inputs that led to `state`, to y and the state after it,
        a new one. They are those that length calls of step give, in one convolution, and they have gradients.

        mask and lengths are as in forward. Padding at the left or right end of a row is no step of it: y is not
        defined there, and the state is the one after the row's own inputs. Between these, masked inputs are zeros.

        cu_seqlens (rows + 1,) packs the rows' steps: x and y are (total, d_model), and the state is that of all rows
        after their own inputs. max_seqlen says that none has more.
        """
        name = f"{type(self).__name__}.prefill"
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
        padding = None
        if mask is not None or lengths is not None:
            padding = padding_of(name, x, mask, lengths)
        self._check_streams()
        check_kind(name, state, ConvState)
        (conv,) = self._streams(state.length, x, state)
        y, state = conv.prefill(self._mine(x).movedim(1, 2), state, padding=padding)
        return self._mixed(rearrange(y, "b c h l -> b l c h")), state

    def _mine(self, x: Tensor) -> Tensor:
        """The channels of x (..., d_model) that this process convolves: all of them, unless they are divided."""
        return x

    def _mixed(self, y: Tensor) -> Tensor:
        """The layer's output of y (..., heads, channels) of this process."""
        return self._mix(y.flatten(-2))
