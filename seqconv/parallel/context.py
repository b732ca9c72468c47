"""Context parallelism: the steps of a sequence are divided among processes, for every layer of a model."""

from contextlib import ExitStack
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle

from seqconv.layers.base import ConvLayer, KernelGenerator, TiedDropout, check_input
from seqconv.layers.butterfly_conv import ButterflyConv
from seqconv.layers.conv1d import Conv1d
from seqconv.layers.hyena import Hyena
from seqconv.layers.padding import padding_of
from seqconv.ops.checks import check_choice
from seqconv.parallel import exchange, layers, packs
from seqconv.parallel.call import Call, random_numbers
from seqconv.parallel.meeting import checksum, meet, shape_of
from seqconv.parallel.shards import ORDERS, Shards, given
from seqconv.parallel.traffic import METHODS

NAME = "ContextParallel"
# Their masks are the same at all times, so that they must be the same on all ranks.
_TIED = (TiedDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)


class ContextParallel(ParallelStyle):
    """Divides the steps of a layer's input among the processes of a mesh, for torch's parallelize_module.

        parallelize_module(model, mesh["cp"], {"blocks.*.conv": ContextParallel()})

    Afterwards the layer takes this rank's steps x (batch, steps, d_model) and returns theirs; mask (batch, length)
    and lengths (batch,) are those of whole sequences, on every rank the same. A pack is divided along its steps, too:
    x is (steps, d_model), cu_seqlens is that of the whole pack on every rank, and rows may be cut anywhere. Gradients
    of the layer's parameters are summed over the ranks in the backward pass. seqconv.parallel.context_parallel does
    this to a whole model.

    Args:
        order, shards: as in seqconv.parallel.fftconv.
        method: "auto", "a2a", "halo", or "state": S4D convolves each shard by itself and adds the response to the
            state that the shards before it leave, (batch, d_model, d_state / 2) complex numbers from each rank
            whatever the length. "auto" takes what moves the fewest bytes. ButterflyConv has "a2a" only.

    Raises:
        ValueError, TypeError: an option is none of these; the module is no layer of this package, or its parameters are
            sharded over a mesh without the ranks of this one.
    """

    def __init__(
        self,
        *,
        order: str = "contiguous",
        method: str = "auto",
        shards: tuple[int, ...] | None = None,
    ):
        check_choice(NAME, "order", order, ORDERS)
        check_choice(NAME, "method", method, METHODS)
        self.order, self.method = order, method
        self.shards = given(NAME, shards, order)

    def _apply(self, module: nn.Module, device_mesh) -> nn.Module:
        if not isinstance(module, (ConvLayer, Hyena)):
            raise TypeError(
                f"{NAME}: module must be a layer of seqconv, got {type(module).__name__}"
            )
        return self._divide(module, exchange.process_group(NAME, device_mesh))

    def _divide(self, module: ConvLayer | Hyena, group) -> nn.Module:
        if module._context is not None:
            raise ValueError(f"{NAME}: module must be without context parallelism, but it has it")
        if self.shards and self.shards.ranks != dist.get_world_size(group):
            ranks = dist.get_world_size(group)
            raise ValueError(
                f"{NAME}: shards must be {ranks} numbers, got {len(self.shards.sizes)}"
            )
        for name in ("_convolve", "_kernel"):
            known = [getattr(kind, name) for kind in (ConvLayer, ButterflyConv)]
            if isinstance(module, ConvLayer) and getattr(type(module), name) not in known:
                text = f"{type(module).__name__} convolves by a {name} of its own, which is not divided"
                raise TypeError(f"{NAME}: {text}")
        _Context(module, group, self.order, self.method, self.shards)
        sum_gradients(module, group)
        _divide_randomness(module, group)
        return module


def context_parallel(model: nn.Module, mesh=None, **options) -> nn.Module:
    """Divides the steps of all sequences in a model among the processes of a mesh, in place; returns the model.

    Every layer of this package in the model becomes a ContextParallel one. The gradients of all parameters, those of
    other modules, too, are summed over the ranks, so that they are those of one process where the ranks'
    losses add up to its loss. Elementwise dropout draws other masks on every rank, and dropout of whole
    channels the same ones.

    Other modules see this rank's steps only, which is right for what acts on each step by itself. Positional
    embeddings, means over a sequence and attention need to know of the other ranks.

    With DistributedDataParallel, call this first and then wrap the model. With FSDP2, shard over a mesh that includes
    these ranks, and call this afterwards.

    Args:
        model: a module with layers of this package in it, or a layer.
        mesh: a DeviceMesh of one axis or a ProcessGroup; None is every process.
        options: those of ContextParallel.

    Raises:
        ValueError, TypeError: an argument is not as above, or the model has a seqconv.nn.Conv1d, which is not divided.

    Example, on each of several processes:
        model = context_parallel(model, mesh["cp"])
        y = model(x.chunk(world, 1)[rank])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"context_parallel: model must be a module, got {type(model).__name__}")
    style, group = ContextParallel(**options), exchange.process_group("context_parallel", mesh)
    for path, module in model.named_modules():
        if isinstance(module, Conv1d):
            text = f"{path or 'model'} is a Conv1d, whose steps are not divided"
            raise TypeError(f"context_parallel: {text}; parallel.fftconv with its taps is")
    found = [m for m in model.modules() if isinstance(m, (ConvLayer, Hyena))]
    if not found:
        raise ValueError("context_parallel: model must have a layer of seqconv, got none")
    sum_gradients(model, group)
    for module in found:
        style._divide(module, group)
    _divide_randomness(model, group)
    model.register_forward_pre_hook(_check_parameters)
    return model


class _OfProcesses:
    """What belongs to running processes."""

    def __reduce__(self):
        text = "a model under context parallelism cannot be pickled: save its state_dict"
        raise TypeError(f"{NAME}: {text}")


class _Context(_OfProcesses):
    """What a layer knows of the other processes. `now` holds the shards of the forward pass that runs, and `pack` the
    rows."""

    def __init__(self, layer, group, order: str, method: str, shards: Shards | None):
        self.group, self.order, self.method, self.shards = group, order, method, shards
        self.now: Shards | None = shards
        self.pack: packs.DividedPack | None = None
        layer._context = self
        layer.register_forward_pre_hook(self._meet, with_kwargs=True, prepend=True)

    def __deepcopy__(self, memo):
        return self

    def begin(self, layer, x: Tensor, **packed) -> Call:
        """The call that a forward pass of x would make."""
        self._meet(layer, (x,), packed)
        if self.pack is None:
            check_input(type(layer).__name__, x, layer.skip, layer.d_model)
        return self._call(layer, x)

    @_disable_dynamo  # torch.compile cannot look into process groups, nor wait for numbers of other ranks.
    def _meet(self, layer, args, kwargs):
        """Learns the sizes of the shards, and cuts mask and lengths, which are of whole sequences, to this rank's."""
        _check_parameters(layer, args)
        names = "x", "mask"
        found = dict(zip(names, args, strict=False)) | kwargs
        x, mask, lengths = (found.get(name) for name in ("x", "mask", "lengths"))
        rows = found.get("cu_seqlens"), found.get("max_seqlen")
        packed = any(row is not None for row in rows)
        pack, refused = self._offered(layer, x, rows, mask, lengths) if packed else (None, None)
        ready = isinstance(x, Tensor) and x.dim() == (2 if packed else 3)
        rate = found.get("rate", 1.0)
        rate = float(rate) if isinstance(rate, (int, float)) else rate  # The layer refuses others.
        facts = packs.facts_of(rows, pack)
        facts |= {
            "order": self.order,
            "method": self.method,
            "x's batch": x.shape[0] if ready and not packed else None,
        }
        facts |= {
            "x's d_model": x.shape[-1] if ready else None,
            "x's dtype": getattr(x, "dtype", None),
        }
        facts |= {"x's gradient": getattr(x, "requires_grad", False), "training": layer.training}
        facts |= {"the layer's d_model": layer.d_model, "rate": rate}
        facts |= {"gradients being recorded": torch.is_grad_enabled()}
        facts |= shape_of("mask", mask, 2) | shape_of("lengths", lengths, 1)
        if self.shards is None:
            facts["mask and lengths, which are those of whole rows (a checksum of them)"] = (
                checksum(mask, lengths)
            )
        name = type(layer).__name__
        steps = x.shape[0 if packed else 1] if ready else 0
        known = {"refused": refused, "known": self.shards, "always": packed}
        self.now = meet(name, self.group, facts, steps, self.order, **known)
        rank = dist.get_rank(self.group)
        self.pack = None if pack is None else packs.divided(name, pack, self.now, rank)
        if packed or not ready or (mask is None and lengths is None):
            return None
        whole = x.new_empty(1, 1, 1).expand(x.shape[0], self.now.length, 1)
        padding = padding_of(name, whole, mask, lengths)
        segments = self.now.segments(rank)
        own = torch.cat([padding.narrow(1, *segment) for segment in segments], 1)
        others = {n: v for n, v in found.items() if n not in ("x", "mask", "lengths")}
        return (x,), others | {"mask": own}

    @staticmethod
    def _offered(layer, x, rows, mask, lengths):
        """What this rank says of the pack, or why it refuses it: the other ranks are told before it raises."""
        name = type(layer).__name__
        try:
            check_input(name, x, layer.skip, layer.d_model, ("total",))
            return packs.offered(name, x, rows, mask, lengths), None
        except (TypeError, ValueError) as error:
            return None, error

    def _call(self, layer, x: Tensor) -> Call:
        assert self.now is not None  # since _meet
        return layers.call_of(layer, self.now, x, self.method, self.group, self.pack)

    @_disable_dynamo
    def convolve(self, layer: ConvLayer, x: Tensor, rate: float) -> Tensor:
        return layers.convolve(layer, x, rate, self._call(layer, x))

    @_disable_dynamo
    def convolve_packed(self, layer: ConvLayer, x: Tensor, rate: float | Tensor):
        """What ConvLayer._convolve returns of packed rows, for this rank's steps, and the pack."""
        if isinstance(rate, Tensor):
            self.refuse_rates(type(layer).__name__)
        return self.convolve(layer, x, rate), self.pack

    @staticmethod
    def refuse_rates(name: str) -> NoReturn:
        raise ValueError(f"{name}: rate must be a number under context parallelism")

    @_disable_dynamo
    def hyena(self, layer: Hyena, x: Tensor):
        return layers.hyena(layer, x, self._call(layer, x))


class _Sum:
    """The hook of a parameter, which is also what shows that its gradient is summed: copies have no hooks."""

    def __init__(self, group, number: int):
        self.group, self.number = group, number

    def __call__(self, grad: Tensor) -> Tensor:
        return exchange.summed(grad, self.group, self.number)


def _has(p: Tensor, hooks: tuple[type, ...]) -> bool:
    return any(type(hook) in hooks for hook in (p._backward_hooks or {}).values())


def _is_summed(p: Tensor) -> bool:
    return _has(p, (_Sum,))


def sum_gradients(model: nn.Module, group) -> None:
    """Sums the gradients of a model's parameters over the ranks of a group, as each backward pass forms them."""
    ranks = set(dist.get_process_group_ranks(group))
    for number, (path, p) in enumerate(model.named_parameters()):
        if isinstance(p, DTensor):
            own = set(p.device_mesh.mesh.flatten().tolist())
            if not ranks <= own:
                text = f"sharded over a mesh with the ranks {sorted(ranks)}, got {sorted(own)}"
                raise ValueError(f"{NAME}: {path} must be {text}")
        elif not _is_summed(p) and (p.is_floating_point() or p.is_complex()):
            trained = p.requires_grad
            p.requires_grad_()  # A frozen one gets the hook, too, for it may be trained later.
            p.register_hook(_Sum(group, number))
            p.requires_grad_(trained)
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for part in module.modules():
            part.__dict__["_seqconv_sharded"] = True
        if not any(isinstance(hook, _Scale) for hook in module._forward_pre_hooks.values()):
            # After FSDP's own hook, which gathers the parameters.
            module.register_forward_pre_hook(_Scale(len(ranks)))


class _Scale(_OfProcesses):
    """Makes of FSDP's means over all ranks sums over the context ranks, and means over the others: a hook of an FSDP
    module, which gives every parameter that is gathered for its forward pass a hook. FSDP's own divide factor does so
    for some meshes and dtypes only."""

    def __init__(self, ranks: int):
        self.ranks = ranks

    def __call__(self, module: nn.Module, args) -> None:
        if not torch.is_grad_enabled():
            return
        for p in module.parameters():
            if p.requires_grad and not isinstance(p, DTensor) and not _has(p, (_Sum, _Times)):
                p.register_hook(_Times(self.ranks))


class _Times:
    def __init__(self, factor: int):
        self.factor = factor

    def __call__(self, grad: Tensor) -> Tensor:
        return grad * self.factor


@_disable_dynamo
def _check_parameters(module: nn.Module, args) -> None:
    if not torch.is_grad_enabled():
        return
    groups = [m for m in module.modules() if isinstance(m, FSDPModule)]
    inside = {id(part) for group in groups for part in group.modules()}  # not gathered yet
    for path, part in module.named_modules():
        sharded = "_seqconv_sharded" in vars(part)
        if sharded and id(part) in inside:
            continue
        for name, p in part._parameters.items():
            if p is None or not p.requires_grad or (sharded and isinstance(p, DTensor)):
                continue
            if not _has(p, (_Sum, _Times) if sharded else (_Sum,)):
                full = f"{path}.{name}" if path else name
                raise RuntimeError(
                    f"{NAME}: the gradient of {full} ({type(module).__name__}) would not be summed over the ranks, "
                    "because the parameter was made or replaced afterwards (by a copy, fully_shard, or a "
                    "parametrization), or gathered for another method than forward; call context_parallel last"
                )


def _divide_randomness(model: nn.Module, group) -> None:
    """Dropout of single steps draws other masks on each rank; dropout of whole channels the same. Those of kernels
    are the kernels' own matter."""
    inside = {id(m) for g in model.modules() if isinstance(g, KernelGenerator) for m in g.modules()}
    for module in model.modules():
        kinds = torch.nn.modules.dropout._DropoutNd
        if (
            not isinstance(module, kinds)
            or id(module) in inside
            or hasattr(module, "_seqconv_random")
        ):
            continue
        numbers = module.__dict__["_seqconv_random"] = _Numbers(group, isinstance(module, _TIED))
        module.register_forward_pre_hook(numbers.enter)
        module.register_forward_hook(numbers.leave, always_call=True)


class _Numbers(_OfProcesses):
    """The random numbers of a dropout module, while its forward pass runs."""

    def __init__(self, group, alike: bool):
        self.group, self.alike, self.stack = group, alike, ExitStack()

    def __deepcopy__(self, memo):
        return _Numbers(self.group, self.alike)

    @_disable_dynamo
    def enter(self, module, args):
        self.stack.enter_context(random_numbers(module, self.group, alike=self.alike))

    @_disable_dynamo
    def leave(self, module, args, output):
        self.stack.close()
