"""The generator of a layer's kernel: a module that makes taps of its parameters."""

import contextlib
from typing import ClassVar

import torch
from torch import Tensor, nn

from seqconv.layers.module import Described
from seqconv.ops.checks import check_length, check_sampling

HALF = (torch.bfloat16, torch.float16)


def full_precision(device: torch.device):
    """A context in which products keep the precision of their operands, also under autocast."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class KernelGenerator(Described):
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

    def _check_precision(self, name: str, value: Tensor, way: str = "") -> None:
        if value.dtype not in HALF:
            return
        dtype = str(value.dtype).removeprefix("torch.")
        way = way or (
            "layer.to(dtype) keeps kernels in float32, and so does seqconv.parallel.fully_shard under a "
            "mixed precision policy; .float() of the generator brings them back"
        )
        raise TypeError(
            f"{type(self).__name__}: {name} must be float32 or float64, got {dtype}: rounded to that it makes "
            f"another kernel; {way}"
        )

    def _apply(self, fn, recurse=True):
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            if out.dtype not in HALF:
                return out
            return (
                out.float()
                if out.is_meta or t.is_meta or t.dtype in HALF
                else t.to(out.device).float()
            )

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        way = "a checkpoint that is cast has to leave kernels in float32"
        for key, value in state_dict.items():
            if key.startswith(prefix) and isinstance(value, Tensor):
                self._check_precision(f"{key} of the checkpoint", value, way)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def cut(t: Tensor, axis: int, part: slice) -> Tensor:
    """t[..., part, ...] along the axis."""
    first, last, _ = part.indices(t.shape[axis])
    return t.narrow(axis, first, max(last - first, 0))
