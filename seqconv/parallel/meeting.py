"""How the processes of a group learn one another's sizes, and that they agree about everything else."""

import struct
import weakref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from seqconv.ops.checks import FLOATS
from seqconv.ops.fftconv import ACTIVATIONS, LAYOUTS, MODES
from seqconv.ops.register import transforms_active
from seqconv.parallel.exchange import device_of
from seqconv.parallel.shards import ORDERS, Shards
from seqconv.parallel.traffic import METHODS

_NONE = -1  # in the place of what a rank does not have
_OTHER = -2  # in the place of what is refused whatever it is
_KEPT = 1024
_seen = weakref.WeakKeyDictionary()  # by group
_WORDS = (*ORDERS, *METHODS, *MODES, *LAYOUTS, *ACTIVATIONS[1:])


def code(value) -> int:
    """A fact as an integer: a dtype, a word, a flag, a number, None, or what no rank takes."""
    if value is None:
        return _NONE
    if isinstance(value, str):
        return _WORDS.index(value) if value in _WORDS else len(_WORDS)
    if isinstance(value, torch.dtype):
        return FLOATS.index(value) if value in FLOATS else 99
    if isinstance(value, float):
        return struct.unpack("<q", struct.pack("<d", value))[0]
    return int(value) if isinstance(value, int) else _OTHER


def shape_of(name: str, t, axes: int) -> dict:
    """The facts of a tensor, whatever came in its place."""
    if not isinstance(t, Tensor):
        return {f"{name}'s presence": t is not None, f"{name}'s dtype": None} | {
            f"{name}'s axis {i}": None for i in range(axes)
        }
    sizes = [*t.shape, *[None] * axes][:axes]
    facts = {f"{name}'s presence": True, f"{name}'s dtype": t.dtype}
    return facts | {f"{name}'s axis {i}": size for i, size in enumerate(sizes)}


def checksum(*tensors) -> int | None:
    """A number that tells masks and lengths apart. One process's part in the place of the whole is a usual mistake."""
    total = None
    for t in tensors:
        if isinstance(t, Tensor) and not t.is_meta:
            values = (t != 0 if t.is_floating_point() else t).flatten().long()
            weights = torch.arange(1, values.numel() + 1, device=t.device)
            total = (total or 0) + int((values * weights).sum())
    return total


def meet(
    function: str,
    group,
    facts: dict,
    length: int,
    order: str,
    refused: Exception | None = None,
    known: Shards | None = None,
    *,
    always: bool = False,
) -> Shards:
    """Exchanges a few numbers with all ranks of the group: the sizes of their shards, and facts that must agree.

    A rank that refuses its arguments takes part, too, so that no other rank waits for it. Where the sizes are known,
    the ranks meet the first time only that they have these sizes and facts. Afterwards each rank sees to its own
    size alone. With always=True they meet every time: facts that differ from call to call are not worth keeping.

    Raises:
        ValueError: ranks differ in a fact, which the message names with every rank's value; or another rank has
            refused its arguments.
        RuntimeError: the call is differentiated or mapped by torch.func, or in forward mode.
    """
    if transforms_active() or forward_ad._current_level >= 0:
        text = "torch.func transforms and forward-mode differentiation do not work over several processes"
        raise RuntimeError(f"{function}: {text}")
    facts = {"shards, given or not": known is not None} | facts
    numbers = tuple(map(code, facts.values()))
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if known is not None and refused is None:
        if known.ranks != ranks or known.sizes[rank] != length:
            wanted = f"the steps on each of {ranks} ranks, {length} on rank {rank}"
            refused = ValueError(f"{function}: shards must be {wanted}, got {known.sizes}")
    seen = _seen.setdefault(group, set())
    if known is not None and not always and (numbers, known) in seen:
        if refused is not None:
            raise refused  # The others do not wait here.
        return known
    own = torch.tensor([length, refused is not None, *numbers])
    table = exchange(own, group).tolist()
    if refused is not None:
        raise refused
    for rank, row in enumerate(table):
        if row[1]:
            text = f"rank {rank} of the group has refused its arguments; its message says why"
            raise ValueError(f"{function}: {text}")
    for i, (name, value) in enumerate(facts.items()):
        column = [row[i + 2] for row in table]
        if len(set(column)) > 1:
            raise ValueError(_disagreement(function, name, column, value))
    found = Shards(tuple(row[0] for row in table), order)
    if known is not None:
        if known != found:
            got = f"{list(known.sizes)} for {list(found.sizes)}"
            raise ValueError(f"{function}: shards must be the steps on each rank, got {got}")
        if len(seen) >= _KEPT:  # All ranks have seen the same, and forget at the same call.
            seen.clear()
        if not always:
            seen.add((numbers, known))
    return found


def exchange(own: Tensor, group) -> Tensor:
    """The ranks' integers, (ranks, ...)."""
    device = device_of(group)
    rows = [torch.empty_like(own, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, own.to(device), group=group)
    return torch.stack(rows).cpu()


def _disagreement(function: str, name: str, column: list[int], value) -> str:
    def shown(number: int) -> str:
        if number == _NONE:
            return "nothing"
        if name.endswith("dtype"):
            return str(FLOATS[number]).removeprefix("torch.") if number < 99 else "another dtype"
        if name in ("order", "method", "mode", "layout", "activation"):
            return repr(_WORDS[number]) if 0 <= number < len(_WORDS) else "another"
        if isinstance(value, float):
            return repr(struct.unpack("<d", struct.pack("<q", number))[0])
        if isinstance(value, bool):
            return str(bool(number))
        return str(number)

    got = ", ".join(f"{shown(number)} on rank {rank}" for rank, number in enumerate(column))
    return f"{function}: the ranks of the group must agree about {name}, got {got}"
