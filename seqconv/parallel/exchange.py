"""What processes send to one another, each with its gradient.

Everything is built on three collectives of torch.distributed: all_to_all_single with uneven sizes, all_gather, and
all_reduce of gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from seqconv.ops.checks import check_tensor
from seqconv.parallel.shards import Shards, halo

if hasattr(collectives, "all_gather_single_autograd"):  # its name since torch 2.13
    _gather = collectives.all_gather_single_autograd
else:
    _gather = collectives.all_gather_tensor_autograd


def _all_to_all(parts: list[Tensor], received: list[int], group) -> list[Tensor]:
    """Sends parts[r] to rank r, and returns what came from each rank, flat, of these sizes."""
    sent = [part.numel() for part in parts]
    flat = _Once.apply(torch.cat([part.reshape(-1) for part in parts]))
    out = collectives.all_to_all_single_autograd(flat, received, sent, group)
    return list(out.split(received))


def to_channels(
    x: Tensor, shards: Shards, channels: list[int], rank: int, group, axes: tuple[int, int]
) -> Tensor:
    """From this rank's steps of all channels to all steps of its channels; axes are those of channels and steps."""
    channel, step = (axis % x.dim() for axis in axes)
    parts = list(x.split(channels, channel))
    shapes = []
    for size in shards.sizes:
        shape = list(x.shape)
        shape[channel], shape[step] = channels[rank], size
        shapes.append(shape)
    received = _all_to_all(parts, [_product(shape) for shape in shapes], group)
    runs = []
    for r, (part, shape) in enumerate(zip(received, shapes, strict=True)):
        segments = shards.segments(r)
        cuts = part.view(shape).split([size for _, size in segments], step)
        runs += [(start, run) for (start, _), run in zip(segments, cuts, strict=True)]
    runs.sort(key=lambda pair: pair[0])
    return torch.cat([run for _, run in runs], step)


def to_shards(
    y: Tensor, shards: Shards, channels: list[int], rank: int, group, axes: tuple[int, int]
) -> Tensor:
    """The way back of to_channels."""
    channel, step = (axis % y.dim() for axis in axes)
    parts, shapes = [], []
    for r, count in enumerate(channels):
        runs = [y.narrow(step, start, size) for start, size in shards.segments(r)]
        parts.append(runs[0] if len(runs) == 1 else torch.cat(runs, step))
        shape = list(y.shape)
        shape[channel], shape[step] = count, shards.sizes[rank]
        shapes.append(shape)
    received = _all_to_all(parts, [_product(shape) for shape in shapes], group)
    pairs = zip(received, shapes, strict=True)
    return torch.cat([part.view(shape) for part, shape in pairs], channel)


def with_halo(
    x: Tensor, shards: Shards, rank: int, group, step: int, reach: tuple[int, int], circular: bool
) -> list[tuple[Tensor, int, int]]:
    """Each of this rank's segments with `reach` = (left, right) steps of its surroundings, where the sequence has
    them: (tensor, steps before the segment, size of the segment)."""
    step %= x.dim()
    known = shards, *reach, circular
    parts = []
    for r in range(shards.ranks):
        wanted = _flat(halo(known[0], r, *known[1:]))
        parts.append([x.narrow(step, at, n) for owner, at, n in wanted if owner == rank])
    parts = [torch.cat(p, step) if p else x.narrow(step, 0, 0) for p in parts]
    own = halo(known[0], rank, *known[1:])
    counts = [0] * shards.ranks
    for owner, _, size in _flat(own):
        counts[owner] += size
    row = _product(x.shape) // x.shape[step] if x.shape[step] else _product(_without(x, step))
    received = _all_to_all(parts, [row * count for count in counts], group)
    shape = list(x.shape)
    queues = []
    for part, count in zip(received, counts, strict=True):
        shape[step] = count
        queues.append(part.view(shape))
    taken, out = [0] * shards.ranks, []

    def take(pieces) -> list[Tensor]:
        found = []
        for owner, _, size in pieces:
            found.append(queues[owner].narrow(step, taken[owner], size))
            taken[owner] += size
        return found

    offset = 0
    for (_, size), (before, after) in zip(shards.segments(rank), own, strict=True):
        left, right = take(before), take(after)
        # The empty piece lets every rank take part in the backward pass, also one that needs nothing of the others.
        nothing = queues[0].narrow(step, 0, 0)
        whole = torch.cat([*left, x.narrow(step, offset, size), *right, nothing], step)
        out.append((whole, sum(n for _, _, n in before), size))
        offset += size
    return out


def gather(t: Tensor, group) -> Tensor:
    """The tensors of all ranks, (ranks, ...). It does not wait: the first use of the result does."""
    return _gather(_Once.apply(t.contiguous().unsqueeze(0)), 0, group)


class _Once(Function):
    """The tensor itself, with a first derivative only."""

    @staticmethod
    def forward(ctx, t):
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        _refuse_graphs()
        return grad


def _refuse_graphs() -> None:
    """Raises in a backward pass that is recorded: what is differentiated then differs from rank to rank, so that one
    rank would wait for others that have no part in it."""
    if torch.is_grad_enabled():
        text = "create_graph must be False: there are first derivatives only over several processes"
        raise RuntimeError(f"parallel: {text}")


class _Total(Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _Total.apply(grad, ctx.group), None


def sum_over_ranks(t: Tensor, group=None) -> Tensor:
    """The sum of a tensor over the ranks of a group, on each of them, with its gradient.

    A mean over a sequence of which every rank has some steps is sum_over_ranks(x.sum(1), group) / length. Every rank
    then goes on with the same numbers. As the gradients of context parallelism are those of the sum of the ranks'
    losses, each of P ranks that compute the same loss differentiates loss / P.

    Args:
        t: of the same shape and dtype on all ranks.
        group: a ProcessGroup, or a DeviceMesh of one axis; None is every process.
    """
    check_tensor("parallel.sum_over_ranks", "t", t)
    return _Total.apply(t, process_group("parallel.sum_over_ranks", group))


class _Summed(Function):
    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        pairs = zip(grads, ctx.needs_input_grad[1:], strict=True)
        return None, *[summed(g, ctx.group) if wanted else None for g, wanted in pairs]


def replicated(group, *tensors: Tensor | None) -> list[Any]:
    """The same tensors, which every rank has, with gradients that are summed over the ranks."""
    given = [t for t in tensors if t is not None]
    found = iter(_Summed.apply(group, *given) if torch.is_grad_enabled() else given)
    return [t if t is None else next(found) for t in tensors]


def summed(grad: Tensor, group, number: int = 0) -> Tensor:
    """The sum of the ranks' gradients, added in float32 at least.

    Raises RuntimeError where ranks have come with gradients of different numbers, which are those of different tensors.
    """
    _refuse_graphs()
    if grad.layout != torch.strided:
        text = f"gradients must be dense, got layout {grad.layout}"
        raise TypeError(f"parallel: {text} (of nn.Embedding(sparse=True)?)")
    wide = torch.promote_types(grad.dtype, torch.float32)
    digits = [number // 61**i % 61 for i in range(3)]  # Sums of their squares are exact in float32.
    labels = torch.tensor([*digits, *[n * n for n in digits]], dtype=wide)
    labels = labels.to(grad.device, non_blocking=True)
    total = torch.cat([grad.reshape(-1).to(wide), labels])
    dist.all_reduce(total, group=group)
    # Labels have this mean and this mean square only if they are all the same.
    same = (total[-6:] == labels * dist.get_world_size(group)).all()
    text = "parallel: the ranks of a group have formed the gradients of their parameters in different orders"
    if same.is_cpu:
        if not same:
            raise RuntimeError(text)
    else:
        torch._assert_async(same, text)  # pyright: ignore  # without waiting for the device
    return total[:-6].view(grad.shape).to(grad.dtype)


def process_group(function: str, group) -> dist.ProcessGroup:
    """The group of a ProcessGroup, of a DeviceMesh of one axis, or of all processes if None."""
    if not dist.is_available() or not dist.is_initialized():
        text = "torch.distributed is not initialized; call torch.distributed.init_process_group"
        raise RuntimeError(f"{function}: {text}, or start the program by torchrun and do so")
    if group is None:
        return dist.group.WORLD  # pyright: ignore
    if isinstance(group, dist.ProcessGroup):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            text = f"a mesh of one axis, got {group.ndim} axes; mesh['name'] is one of them"
            raise ValueError(f"{function}: group must be {text}")
        return group.get_group()
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{function}: this process is not a member of group")
    wanted = "a ProcessGroup, a DeviceMesh or None"
    raise TypeError(f"{function}: group must be {wanted}, got {type(group).__name__}")


def device_of(group) -> torch.device:
    """The device through which a group exchanges small numbers: the CPU where the group can."""
    devices = getattr(group, "_device_types", [torch.device("cpu")])
    return torch.device("cpu") if torch.device("cpu") in devices else devices[0]


def _product(shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _without(x: Tensor, step: int) -> list[int]:
    return [size for axis, size in enumerate(x.shape) if axis != step]


def _flat(sides) -> list[tuple[int, int, int]]:
    return [piece for before, after in sides for piece in (*before, *after)]
