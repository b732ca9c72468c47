"""Whether what a module can read still has the values that it had.

What is made of a module's parameters may be kept for as long as it has. Versions of tensors and their addresses do not
tell: `.data`, fused optimisers and hooks change parameters without a trace. Values do.
"""

from operator import attrgetter

import torch
from torch import Tensor, nn

from seqconv.backends import cpu

_PLAIN = (Tensor, nn.Parameter)
_KIND = attrgetter("dtype", "shape")


def unchanged(kept: list[Tensor], found: list[Tensor]) -> bool:
    """Whether the tensors are as many as before, each of the same dtype, shape, device and value.

    On the CPU their bytes are compared, all of them in one call: a NaN equals itself, and 0.0 does not equal -0.0. On
    another device torch.equal waits for it. Tensors on the meta device have no values that could differ.
    """
    if len(kept) != len(found):
        return False
    numbers = []
    for x, y in zip(kept, found, strict=True):
        if x.dtype != y.dtype or x.shape != y.shape or x.device != y.device:
            return False
        if _has_bytes(x) and _has_bytes(y):
            numbers += (x.data_ptr(), y.data_ptr(), x.nbytes)
        elif not (y.is_meta or torch.equal(x, y)):
            return False
    return not numbers or cpu.same_bytes(*numbers)


def _has_bytes(t: Tensor) -> bool:
    plain = type(t) in _PLAIN and t.is_cpu and t.is_contiguous()
    return plain and not (t.is_neg() or t._is_zerotensor() or cpu.missing)


def comparable(t: Tensor) -> bool:
    """Whether the tensor has values, all of them here."""
    return type(t) in _PLAIN and not t.is_meta


class Snapshot:
    """Everything that a module can read of its own, at one time: options, parameters and buffers.

    Options are compared by identity, and by value where that differs; tensors always by value.
    """

    def __init__(self, module: nn.Module):
        self.values = everything_read(module)
        self.tensors = [t for t in self.values.values() if isinstance(t, Tensor)]
        self.whole = all(map(comparable, self.tensors))
        self.copies = [t.clone() for t in self.tensors] if self.whole else []
        # Parametrized modules form tensors anew whenever they are read.
        formed = "parametrizations" in module._modules
        self._quick = self.whole and not formed and all(map(_has_bytes, self.tensors))
        if self._quick:
            self._named = [
                dict(names) for names in (vars(module), module._parameters, module._buffers)
            ]
            self._asked = [f for t in self.tensors for f in (t.data_ptr, t.is_contiguous, t.is_neg)]
            self._places = self._look()
            pairs = zip(self.copies, self.tensors, strict=True)
            self._numbers = [n for x, y in pairs for n in (x.data_ptr(), y.data_ptr(), x.nbytes)]

    def _look(self) -> list:
        """Where the tensors lie, and how their bytes are read."""
        return [*[ask() for ask in self._asked], *map(_KIND, self.tensors)]

    def fits(self, module: nn.Module) -> bool:
        """Whether everything has the same value, and has values at all."""
        if not self.whole:
            return False
        if self._quick:
            own, parameters, buffers = self._named
            same = cpu.same_items(
                vars(module), own, module._parameters, parameters, module._buffers, buffers
            )
            # The same tensors in the same places: only their bytes can differ. This takes a quarter of the time.
            if same and self._look() == self._places:
                return cpu.same_bytes(*self._numbers)
        found = everything_read(module)
        if found.keys() != self.values.keys():
            return False
        tensors = []
        for name, x in self.values.items():
            y = found[name]
            if isinstance(x, Tensor):
                if not (isinstance(y, Tensor) and comparable(y)):
                    return False
                tensors.append(y)
            elif x is not y and (type(x) is not type(y) or x != y):
                return False
        return unchanged(self.copies, tensors)


def everything_read(module: nn.Module) -> dict:
    """Everything that the module can read of its own, by name."""
    found = {name: value for name, value in vars(module).items() if name[0] != "_"}
    found |= module._parameters
    found |= module._buffers
    for name in getattr(module, "parametrizations", ()):
        found[name] = getattr(module, name)
    return found
