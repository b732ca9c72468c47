"""A call as a list of launches with everything in them but addresses, made once for all calls alike.

A recipe is made by the code that would make the launches themselves, from stand-ins for the tensors
(`Operand`) whose addresses (`Address`) are places to be filled in. It never changes afterwards and knows
no memory of any call, so that it may be kept, and run by several threads at a time.
"""

import math
from array import array
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from seqconv.backends.cuda.arguments import address, structure_of

ALIGNMENT = 512  # bytes: what torch's own allocations have on a device
SCRATCH = 0  # its number among a call's memories; then come the tensors, then the tables


class Address(NamedTuple):
    """A byte of one of a call's memories, by the memory's number."""

    memory: int
    offset: int = 0


@dataclass(frozen=True)
class Operand:
    """Of a tensor everything but where it lies; answers as a tensor does."""

    address: Address
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def cut(self, axis: int, count: int) -> "Operand":
        """The first `count` along an axis counted from the end."""
        axis += len(self.shape)
        return replace(self, shape=(*self.shape[:axis], count, *self.shape[axis + 1 :]))

    def data_ptr(self) -> Address:
        return self.address

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def dim(self) -> int:
        return len(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize


def geometries(tensors: list[Tensor | None]) -> list[tuple | None]:
    """All that operands need to know."""
    return [None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors]


def operands(geometries: tuple) -> list[Operand | None]:
    numbered = enumerate(geometries, SCRATCH + 1)
    return [None if known is None else Operand(Address(i), *known) for i, known in numbered]


class Launch(NamedTuple):
    kernel: str
    grid: int
    threads: int
    shared: int
    arguments: array  # zeros where addresses belong
    addresses: tuple[tuple[int, int, int], ...]  # place in arguments, memory, offset


class Recipe:
    """Launches in order, the tables they want, and the scratch memory that they share."""

    def __init__(self, tensors: int):
        self.launches: list[Launch] = []
        self.tables: dict[tuple, Address] = {}
        self.bytes = 0  # of scratch
        self._tensors, self._taken = tensors, 0

    def empty(self, *shape: int) -> Operand:
        """Scratch memory for float32 numbers."""
        start = -(-self._taken // ALIGNMENT) * ALIGNMENT
        self._taken = start + 4 * math.prod(shape)
        self.bytes = max(self.bytes, self._taken)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return Operand(Address(SCRATCH, start), torch.float32, shape, strides)

    @contextmanager
    def reused(self):
        """Scratch taken inside is free again behind it: launches run one after the other."""
        taken = self._taken
        yield
        self._taken = taken

    def table(self, *made_by) -> Address:
        number = 1 + self._tensors + len(self.tables)
        return self.tables.setdefault(made_by, Address(number))

    def launch(self, kernel: str, launch: tuple[int, int, int], fields: dict) -> None:
        """Adds a launch. launch: grid, threads, bytes of shared memory; fields: of the kernel's arguments."""
        words = structure_of(kernel).words(fields)
        places = [(i, *word) for i, word in enumerate(words) if isinstance(word, Address)]
        numbers = array("q", [0 if isinstance(word, Address) else word for word in words])
        self.launches.append(Launch(kernel, *launch, numbers, tuple(places)))

    def run(self, device, scratch: int, tensors: list[int]) -> None:
        """With scratch memory of `bytes` and the tensors at these addresses."""
        tables = [device.table(*made_by) for made_by in self.tables]  # kept until all is launched
        memories = [scratch, *tensors, *map(address, tables)]
        for kernel, grid, threads, shared, numbers, places in self.launches:
            arguments = numbers[:]  # this call's own: another thread may be filling in its
            for place, memory, offset in places:
                arguments[place] = memories[memory] + offset
            device.launch(kernel, grid, threads, shared, arguments)
