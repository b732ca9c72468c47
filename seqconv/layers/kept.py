"""Whether a kernel is still the one that something was made of: asked at every step, so the answer must be cheap."""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from seqconv.ops.register import library

SMALL = 4096  # elements up to which a tensor is compared whole
SAMPLES = 64  # elements that are compared of a larger one

DROPOUTS = nn.modules.dropout._DropoutNd
_PLAIN = (bool, int, float, str, tuple, type(None))
_SKIPPED = frozenset(("training", "overrides"))


_keys = itertools.count()
_snapshots: weakref.WeakValueDictionary[int, "Snapshot"] = weakref.WeakValueDictionary()


class Snapshot:
    """What modules and their parts hold: options, parameters and buffers. And some tensors more. The first module is
    the one that makes kernels.

    torch counts changes of a tensor in place, but not those through .data and by kernels of other libraries.
    Therefore values are compared, too: of all elements of a small tensor, and of some of a large one. Attributes that
    are tensors are not compared, because hooks make them anew, of parameters, at every call.
    """

    def __init__(self, modules: list[nn.Module], tensors: list[Tensor]):
        self.modules = list(modules)
        self.types = [(m, type(m)) for module in modules for m in module.modules()]
        self.dropouts = [m for m in modules[0].modules() if isinstance(m, DROPOUTS)]
        self.options: list[tuple[dict, list]] = []  # of attributes, by name
        self.members: list[
            tuple[dict, dict]
        ] = []  # dictionaries of modules, by name or number, and what they held
        for m, _ in self.types:
            plain = [
                (name, value)
                for name, value in vars(m).items()
                if name[0] != "_" and name not in _SKIPPED and isinstance(value, _PLAIN)
            ]
            # Adapters put another forward in the place of the class's.
            plain.append(("forward", vars(m).get("forward")))
            self.options.append((vars(m), plain))
            hooks = m._forward_pre_hooks, m._forward_hooks
            for members in (m._modules, m._parameters, m._buffers, *hooks):
                self.members.append((members, dict(members)))
        found = tensors_of(modules, tensors)
        self.versions = [(t, _version(t)) for t in found]
        self.key = next(_keys)
        _snapshots[self.key] = self
        with torch.no_grad():
            views = [_sample(t) for t in found if _comparable(t)]
            self.values = [(view, view.clone()) for view in views]

    def random(self) -> bool:
        """Whether a part of the first module draws random numbers."""
        return any(m.p > 0 and m.training for m in self.dropouts)

    def holds(self, modules: list[nn.Module], tensors: list[Tensor]) -> bool:
        """Whether these are the modules, they and their parts hold the same, and the other tensors are the same."""
        if any(now is not then for now, then in zip(modules, self.modules, strict=True)):
            return False
        for module, kind in self.types:
            if type(module) is not kind:
                return False
        for now, then in self.members:
            if len(now) != len(then):
                return False
            for name, value in then.items():
                if now.get(name) is not value:
                    return False
        for now, plain in self.options:
            for name, value in plain:
                other: Any = now.get(name)
                if other is not value and (type(other) is not type(value) or other != value):
                    return False
        for own, (t, _) in zip(tensors, self.versions, strict=False):
            if getattr(own, "_local_tensor", own) is not t:
                return False
        return self.unchanged([t for t, _ in self.versions])

    def unchanged(self, tensors: list[Tensor]) -> bool:
        """Whether these tensors, which are those of the snapshot, have the same values."""
        if len(tensors) != len(self.versions):
            return False
        for t, (_, version) in zip(tensors, self.versions, strict=True):
            if _version(t) != version:
                return False
        if (
            any(view.is_cuda for view, _ in self.values)
            and torch.cuda.is_current_stream_capturing()
        ):
            return True  # The comparison would wait for the device.
        return all(torch.equal(view, kept) for view, kept in self.values)


def tensors_of(modules: list[nn.Module], tensors: list[Tensor]) -> list[Tensor]:
    """These tensors, the parameters and buffers of these modules and all parts; of a DTensor this process's part."""
    found = list(tensors)
    for module in modules:
        for m in module.modules():
            found += [
                t for part in (m._parameters, m._buffers) for t in part.values() if t is not None
            ]
    return [getattr(t, "_local_tensor", t) for t in found]


def watch(snapshot: Snapshot, tensors: list[Tensor], token: Tensor) -> None:
    """In a graph of torch.compile: raises ValueError, when the graph runs, unless the tensors, of tensors_of, are those
    of the snapshot. The token is any tensor that the graph changes, without which it would leave the check out."""
    torch.ops.seqconv.stream_watch(tensors, token, snapshot.key)


def _watch(tensors: list[Tensor], token: Tensor, key: int) -> None:
    snapshot = _snapshots.get(key)
    if snapshot is None or not snapshot.unchanged(tensors):
        raise ValueError(
            "step: the parameters have changed since init_state. Start anew with init_state"
        )


library.define("stream_watch(Tensor[] tensors, Tensor(a!) token, int key) -> ()")
library.impl("stream_watch", _watch, "CompositeExplicitAutograd")
torch.library.register_fake("seqconv::stream_watch", lambda *_: None, lib=library)


def _sample(t: Tensor) -> Tensor:
    """A view of the tensor's memory, of one axis where that is possible."""
    t = t.detach()
    if t.numel() <= SMALL or not t.is_contiguous():
        return t
    return t.view(-1)[:: -(-t.numel() // SAMPLES)]


def _version(t: Tensor) -> tuple:
    if not _comparable(t):
        return (t.shape,)
    return t.data_ptr(), t.dtype, t.shape, -1 if t.is_inference() else t._version


def _comparable(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and not t.is_meta
