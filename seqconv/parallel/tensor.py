"""Layers whose channels are divided among processes: tensor parallelism, for torch's parallelize_module.

Every process makes the kernels of its channels from its part of the generator's parameters, and convolves these
channels. The linear map is divided by columns, so that its input is gathered before it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from seqconv.layers.base import ConvLayer, KernelGenerator, check_input
from seqconv.layers.butterfly_conv import Butterfly, ButterflyConv
from seqconv.layers.hyena import Hyena
from seqconv.layers.module import whole
from seqconv.layers.packing import pack_of, prefilled
from seqconv.layers.padding import padding_of
from seqconv.layers.recurrence import Recurrent, discrete
from seqconv.layers.streaming import StreamingLayer
from seqconv.layers.streaming_conv import StreamingConv
from seqconv.ops.ssm_step import Step
from seqconv.parallel.call import random_numbers

LAYERS = (ConvLayer, Hyena)


def plan(
    layer: nn.Module,
    *,
    input_layouts: Placement | None = None,
    output_layouts: Placement | None = None,
    use_local_output: bool = True,
) -> ParallelStyle:
    """How torch's parallelize_module divides the channels of a layer of this package among the processes of a mesh.

        mesh = init_device_mesh("cuda", (8,))
        parallelize_module(model, mesh, {"blocks.*.conv": plan(model.blocks[0].conv)})

    Sharded along their channels are skip, the kernel generator's parameters that have such an axis (not the sets
    (A, B) that S4D's channels share with n_ssm < d_model, nor the networks of Hyena's filter and ButterflyConv's
    matrices, which every process has whole), the linear maps along their outputs, and Hyena's short convolutions.
    The number of processes need not divide the number of channels. Outputs, gradients and steps of an optimiser are
    those of one process. mask and lengths are plain tensors for the whole batch. Dropout is that of torch's
    DTensors; processes without a GPU must be in the same random state.

    Args:
        layer: S4D, SGConv, LongConv, ButterflyConv, Hyena, or a layer derived from ConvLayer. The plan holds for
            every such layer.
        input_layouts: how an input that is a plain tensor is placed, Replicate() by default.
        output_layouts: how the output is placed, Replicate() by default.
        use_local_output: True makes the output a plain tensor, False leaves it a DTensor.

    Returns:
        A torch.distributed.tensor.parallel.ParallelStyle. A mesh has one dimension: slice others.

    Raises:
        TypeError: layer is none of this package's, here or where the plan is applied.
    """
    _check("plan", layer)
    for name, value in (("input_layouts", input_layouts), ("output_layouts", output_layouts)):
        if value is not None and not isinstance(value, Placement):
            raise TypeError(f"plan: {name} must be a Placement, got {type(value).__name__}")
    layouts = (input_layouts or Replicate(), output_layouts or Replicate())
    return _Channels(*layouts, use_local_output)


def _check(function: str, layer) -> None:
    if not isinstance(layer, LAYERS):
        text = "S4D, SGConv, LongConv, ButterflyConv, Hyena or another ConvLayer"
        raise TypeError(f"{function}: layer must be {text}, got {type(layer).__name__}")


class _Channels(ParallelStyle):
    def __init__(self, inputs: Placement, outputs: Placement, local: bool):
        super().__init__()
        self.inputs, self.outputs, self.local = inputs, outputs, local

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check("plan", module)
        if device_mesh.ndim != 1:
            text = f"must have one dimension, got {device_mesh.ndim}: slice it, as in mesh['tp']"
            raise ValueError(f"plan: the mesh {text}")
        if isinstance(module, _DividedLayer) or module._context is not None:
            raise ValueError(f"plan: {type(module).__name__} is divided already")
        for part in list(module.modules()):
            if isinstance(part, KernelGenerator):
                own = _own_axes(part)
                self._distribute(part, device_mesh, own)
                _become(part, _WholeMatrices if isinstance(part, Butterfly) else _PartOfKernel)
                part.__dict__["_divided"] = frozenset(own)
            elif type(part) is nn.Linear and not _inside_generator(module, part):
                self._distribute(part, device_mesh, {"weight": 0, "bias": 0})
        own = {"skip": 1} | ({"short": 0, "short_bias": 0} if isinstance(module, Hyena) else {})
        self._distribute(module, device_mesh, own)
        for part in module.modules():  # what is left: every process has it whole
            self._distribute(part, device_mesh, {})
        kinds = {
            StreamingLayer: _DividedStreamingLayer,
            Recurrent: _DividedRecurrent,
            Hyena: _DividedHyena,
            ConvLayer: _DividedConvLayer,
        }
        _become(module, next(to for kind, to in kinds.items() if isinstance(module, kind)))
        module.__dict__["_style"] = self
        return module

    def _distribute(self, module: nn.Module, mesh: DeviceMesh, axes: dict[str, int]) -> None:
        """Makes DTensors of the module's own parameters and buffers, cut along their axes."""
        options = {"src_data_rank": self.src_data_rank}
        for name, t in list(module._parameters.items()):
            if t is not None and not isinstance(t, DTensor):
                t, trained = t.detach(), t.requires_grad
                d = distribute_tensor(t, mesh, [_placement(axes.get(name))], **options)
                module.register_parameter(name, nn.Parameter(d, requires_grad=trained))
        for name, t in module._buffers.items():
            if t is not None and not isinstance(t, DTensor):
                d = distribute_tensor(t, mesh, [_placement(axes.get(name))], **options)
                module._buffers[name] = d


def _placement(axis: int | None) -> Placement:
    return Replicate() if axis is None else Shard(axis)


def _inside_generator(layer: nn.Module, part: nn.Module) -> bool:
    generators = [m for m in layer.modules() if isinstance(m, KernelGenerator)]
    return any(part is m for generator in generators for m in generator.modules())


def _own_axes(generator: KernelGenerator) -> dict[str, int]:
    """The tensors to divide, with their axes: those with all channels, if the generator makes parts of a kernel."""
    if not generator.makes_parts:
        return {}
    axes = {}
    for name in generator.reads:
        axis = generator.channel_axes.get(name)
        t = generator._parameters.get(name, generator._buffers.get(name))
        if axis is not None and t is not None and t.shape[axis] == generator.d_model:
            axes[name] = axis
    return axes


def _become(module: nn.Module, kind: type) -> None:
    """Gives the module a class derived from its own, as torch's fully_shard does."""
    own = type(module)
    name = own.__name__ if isinstance(module, LAYERS) else f"Divided{own.__name__}"
    module.__class__ = type(name, (kind, own), {"__module__": own.__module__})  # pyright: ignore


def _mesh(module: nn.Module) -> DeviceMesh:
    states = (*module.parameters(), *module.buffers())
    return next(t.device_mesh for t in states if isinstance(t, DTensor))


def _local(t: DTensor) -> Tensor:
    """What this process has of a parameter, whose gradient comes from its own channels alone."""
    whole = all(placement.is_replicate() for placement in t.placements)
    return t.to_local(grad_placements=[Partial()]) if whole else t.to_local()


@contextlib.contextmanager
def _local_states(module: nn.Module, local: Callable[[DTensor], Tensor]):
    """A context in which the module has local(t) in the place of each parameter and buffer t. functional_call would
    call the module's hooks once more."""
    before = []
    for part in module.modules():
        for states in (part._parameters, part._buffers):
            before += [(states, key, t) for key, t in states.items() if isinstance(t, DTensor)]
    try:
        for states, key, t in before:
            states[key] = local(t)
        yield
    finally:
        for states, key, t in before:
            states[key] = t


def _channels(count: int, mesh: DeviceMesh) -> slice:
    """This process's channels, as Shard cuts them."""
    each = -(-count // mesh.size())
    first = min(each * mesh.get_local_rank(), count)
    return slice(first, min(first + each, count))


def _joined(local: Tensor, mesh: DeviceMesh, axis: int, count: int) -> DTensor:
    """All processes' parts, of which this is one, with count channels along the axis."""
    shape = [*local.shape]
    shape[axis] = count
    stride = torch.empty(shape, device="meta").stride()
    size = {"shape": torch.Size(shape), "stride": stride}
    return DTensor.from_local(local.contiguous(), mesh, [Shard(axis)], run_check=False, **size)


class _PartOfKernel(KernelGenerator):
    """A generator that makes the kernel of this process's channels, as part of a DTensor."""

    _divided: frozenset[str]

    def forward(self, length: int, rate: float = 1.0, channels=None, also=None) -> DTensor:
        if channels is not None or also is not None:
            raise ValueError(f"{type(self).__name__}: its channels are divided among processes")
        mesh = _mesh(self)
        # Dropout draws for these channels only; the default generators of all processes stay in the same state.
        numbers = random_numbers(self, mesh.get_group(), alike=not self.makes_parts)
        with _local_states(self, _local), numbers:
            k = super().forward(length, rate, _channels(self.d_model, mesh))
        return _joined(k, mesh, 1, self.d_model)

    def select(self, tensors: list[Tensor], channels: slice) -> list[Tensor]:
        """What is divided is cut already; select() gets a tensor without memory in its place."""
        pairs = list(zip(self.reads, tensors, strict=True))
        full = [self._in_place_of(n, t) if n in self._divided else t for n, t in pairs]
        found = zip(pairs, super().select(full, channels), strict=True)
        return [own if name in self._divided else cut for (name, own), cut in found]

    def _in_place_of(self, name: str, t: Tensor) -> Tensor:
        shape = list(t.shape)
        shape[self.channel_axes[name]] = self.d_model
        return t.new_empty(()).expand(shape)


class _WholeMatrices(Butterfly):
    """A learned transform of this process's channels, with all matrices."""

    def forward(self, x: Any, sets: list[int] | None = None):
        mesh, channels = x.device_mesh, x.shape[1]
        if self.heads > 1:
            sets = [c * self.heads // channels for c in range(channels)[_channels(channels, mesh)]]
        own = x.redistribute(placements=[Shard(1)]).to_local()
        with _local_states(self, _local):
            return _joined(super().forward(own, sets), mesh, 1, channels)


class _DividedLayer(nn.Module):
    """A layer on DTensors, with plain tensors around it as the plan says."""

    _style: _Channels
    skip: DTensor
    d_model: int

    def forward(
        self,
        x,
        mask=None,
        *,
        lengths=None,
        rate: float = 1.0,
        cu_seqlens=None,
        max_seqlen=None,
        history=None,
        return_history=False,
    ):
        if history is not None or return_history:
            text = "history must be None and return_history False under tensor parallelism"
            raise ValueError(f"{type(self).__name__}: {text}")
        mesh, style = self.skip.device_mesh, self._style
        if isinstance(x, Tensor) and not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [style.inputs], run_check=False)
        if mask is not None or lengths is not None:
            name = type(self).__name__
            check_input(name, x, self.skip, self.d_model)
            mask, lengths = (t if t is None else whole(t) for t in (mask, lengths))
            padding = padding_of(name, x, mask, lengths)
            mask = DTensor.from_local(padding, mesh, [Replicate()], run_check=False)
        packed = {}
        if cu_seqlens is not None or max_seqlen is not None:
            if isinstance(self, ButterflyConv):
                text = "cu_seqlens must be None under tensor parallelism"
                raise ValueError(f"{type(self).__name__}: {text}")
            if cu_seqlens is not None:
                own = whole(cu_seqlens)
                cu_seqlens = DTensor.from_local(own, mesh, [Replicate()], run_check=False)
            packed = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        y = super().forward(x, mask, rate=rate, **packed)
        y = y.redistribute(placements=[style.outputs])
        return y.to_local() if style.local else y


class _DividedConvLayer(_DividedLayer, ConvLayer):
    def _convolve(self, x, rate: float, pack=None):
        y: Any = super()._convolve(x, rate, pack)
        # The linear map has all channels as its input, and heads cannot be joined with channels that are divided.
        own = y.redistribute(placements=[Replicate()]).to_local().contiguous()
        return DTensor.from_local(own, self.skip.device_mesh, [Replicate()], run_check=False)


class _DividedSteps(_DividedLayer):
    """Steps and chunks, with this process's channels in the state."""

    def step(self, x, state):
        y, state = super().step(self._whole_input(x), state)  # pyright: ignore
        return self._output(y), state

    def prefill(self, x, state, mask=None, *, lengths=None, cu_seqlens=None, max_seqlen=None):
        mask, lengths = (t if t is None else whole(t) for t in (mask, lengths))
        x = self._whole_input(x)
        if cu_seqlens is not None or max_seqlen is not None:
            return self._prefill_packed(x, state, mask, lengths, cu_seqlens, max_seqlen)
        y, state = super().prefill(x, state, mask, lengths=lengths)  # pyright: ignore
        return self._output(y), state

    def _prefill_packed(self, x: Tensor, state, mask, lengths, cu_seqlens, max_seqlen):
        name = f"{type(self).__name__}.prefill"
        check_input(name, x, self.skip, self.d_model, ("total",))
        own = cu_seqlens if cu_seqlens is None else whole(cu_seqlens)
        pack = pack_of(name, x, own, max_seqlen, mask, lengths)
        steps: Any = super()

        def prefill(rows: Tensor, state, lengths: Tensor):
            y, state = steps.prefill(rows, state, lengths=lengths)
            return _whole(y), state

        y, state = prefilled(prefill, x, state, pack)
        y = DTensor.from_local(y, self.skip.device_mesh, [Replicate()], run_check=False)
        return self._output(y), state

    def _whole_input(self, x):
        if isinstance(x, Tensor) and not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.skip.device_mesh, [self._style.inputs], run_check=False)
        return _whole(x)

    def _output(self, y: DTensor):
        y = y.redistribute(placements=[self._style.outputs])
        return y.to_local() if self._style.local else y

    def _channels(self) -> slice:
        return _channels(self.d_model, self.skip.device_mesh)

    def _joined(self, y: Tensor) -> DTensor:
        """(..., channels of this process) -> all channels, on every process."""
        mesh = self.skip.device_mesh
        own = _whole(_joined(y, mesh, y.dim() - 1, self.d_model))
        return DTensor.from_local(own, mesh, [Replicate()], run_check=False)


class _DividedStreamingLayer(_DividedSteps, _DividedConvLayer, StreamingLayer):
    def _convolutions(self, taps: int) -> list[StreamingConv]:
        k, skip = self.kernel(taps).to_local(), self.skip.to_local()
        return self._named([StreamingConv(k, skip, activation=self.activation)])

    def _mine(self, x: Tensor) -> Tensor:
        x = DTensor.from_local(x, self.skip.device_mesh, [Replicate()], run_check=False)
        return _whole(x, Partial())[..., self._channels()]

    def _mixed(self, y: Tensor) -> Tensor:
        return self._mix(self._joined(y).flatten(-2))


class _DividedRecurrent(_DividedSteps, _DividedConvLayer, Recurrent):
    def _mine(self, x: Tensor) -> Tensor:
        x = DTensor.from_local(x, self.skip.device_mesh, [Replicate()], run_check=False)
        return _whole(x, Partial())[..., self._channels()]

    def _mixed(self, y: Tensor) -> Tensor:
        return self._mix(self._joined(y.unflatten(-1, (self.heads, -1))).flatten(-2))

    def _own_skip(self) -> Tensor:
        return self.skip.to_local()

    def _discrete(self, kernel, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        with _local_states(kernel, _local):
            return discrete(kernel, rate, channels=self._channels())

    def _step_inputs(self, modes: Tensor, x: Tensor, skip, system) -> Step:
        return Step(modes, self._mine(x), self._own_skip(), *system)

    def other_kernel(self) -> str | None:
        return None if isinstance(self.kernel, _PartOfKernel) else super().other_kernel()


class _DividedHyena(_DividedSteps, Hyena):
    def _convolutions(self, taps: int) -> list[StreamingConv]:
        short = self._mine(self.short.movedim(0, -1)).movedim(-1, 0)  # pyright: ignore
        pairs = zip(self.filter(taps).to_local(), self.skip.to_local(), strict=True)
        found = [StreamingConv(short), *[StreamingConv(k, skip) for k, skip in pairs]]
        return self._named(found)

    def _enter(self, x: Tensor) -> Tensor:
        x = DTensor.from_local(x, self.skip.device_mesh, [Replicate()], run_check=False)
        return self._mine(super()._enter(x))

    def _mine(self, t: Tensor) -> Tensor:
        parts = _whole(t, Partial()).unflatten(-1, (self.order + 1, self.d_model))
        return parts[..., self._channels()].flatten(-2)

    def _leave(self, v: Tensor) -> Tensor:
        return super()._leave(self._joined(v))


def _whole(t, gradient: Placement | None = None) -> Tensor:
    """All of a DTensor. Its gradient is Partial() where every process uses its own channels only."""
    whole = t.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[gradient or Replicate()])
