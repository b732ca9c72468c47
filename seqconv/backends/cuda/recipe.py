"""A call as a list of launches that lack nothing but addresses. It is made once for all calls that are alike.

The code that makes a recipe reads like code that launches: it gets stand-ins for the tensors (`Operand`), whose
addresses (`Address`) name places to be filled in. A recipe never changes afterwards and knows no memory of any call.
So it may be kept, and several threads may run it at a time.
"""

import math
from array import array
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from seqconv.backends.cuda.arguments import address, structure_of

ALIGNMENT = 512  # bytes; torch aligns its own allocations on a device so
SCRATCH = 0  # the scratch memory's number among the memories of a call; tensors follow, then tables


class Address(NamedTuple):
    """A byte of one of the memories of a call, which are numbered."""

    memory: int
    offset: int = 0


@dataclass(frozen=True)
class Operand:
    """Stands for a tensor: it knows everything but the memory, and answers as a tensor does."""

    address: Address
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool = True  # the memory begins at a multiple of 16 bytes

    def in_pieces(self) -> bool:
        """Whether every row can be read 16 bytes at a time: rows without gaps, which begin at multiples of them."""
        each = 16 // self.dtype.itemsize
        *others, time = zip(self.shape, self.strides, strict=True)
        return (
            self.aligned
            and time[0] % each == 0
            and time[1] == 1
            and all(size == 1 or stride % each == 0 for size, stride in others)
        )

    def cut(self, axis: int, count: int) -> "Operand":
        """The operand's first `count` elements along an axis, which is counted from the end."""
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


def geometries(tensors: list[Tensor | None], address=Tensor.data_ptr) -> list[tuple | None]:
    """What operands are made from. address(tensor) says where it begins, up to multiples of 16 bytes."""
    return [
        None if t is None else (t.dtype, t.shape, t.stride(), address(t) % 16 == 0) for t in tensors
    ]


def offset(tensor: Tensor) -> int:
    """Bytes from the beginning of the tensor's memory, which allocators align. A tensor of a compiler has no more."""
    return tensor.storage_offset() * tensor.element_size()


def operands(geometries: tuple) -> list[Operand | None]:
    numbered = enumerate(geometries, SCRATCH + 1)
    return [None if known is None else Operand(Address(i), *known) for i, known in numbered]


class Launch(NamedTuple):
    kernel: str
    grid: int
    threads: int
    shared: int
    arguments: array  # it has zeros where addresses belong
    addresses: tuple[
        tuple[int, int, int], ...
    ]  # of each its place in the arguments, memory and offset


class Recipe:
    """Launches in their order, the tables that they want, and the scratch memory that they share."""

    def __init__(self, tensors: int):
        self.launches: list[Launch] = []
        self.tables: dict[tuple, Address] = {}
        self.bytes = 0  # of the scratch memory
        self._tensors, self._taken = tensors, 0

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Operand:
        """Takes a piece of the scratch memory."""
        start = -(-self._taken // ALIGNMENT) * ALIGNMENT
        self._taken = start + dtype.itemsize * math.prod(shape)
        self.bytes = max(self.bytes, self._taken)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return Operand(Address(SCRATCH, start), dtype, shape, strides)

    @contextmanager
    def reused(self):
        """Frees what was taken inside: launches run one after the other, so that later ones may write there."""
        taken = self._taken
        yield
        self._taken = taken

    def table(self, *made_by) -> Address:
        number = 1 + self._tensors + len(self.tables)
        return self.tables.setdefault(made_by, Address(number))

    def launch(self, kernel: str, launch: tuple[int, int, int], fields: dict) -> None:
        """Adds a launch of (grid, threads, bytes of shared memory) with these fields of the kernel's arguments."""
        words = structure_of(kernel).words(fields)
        places = [(i, *word) for i, word in enumerate(words) if isinstance(word, Address)]
        numbers = array("q", [0 if isinstance(word, Address) else word for word in words])
        self.launches.append(Launch(kernel, *launch, numbers, tuple(places)))

    def run(self, device, scratch: int, tensors: list[int]) -> None:
        """Launches everything with scratch memory of `bytes` and the tensors at these addresses."""
        # The list keeps the tables until everything is launched.
        tables = [device.table(*made_by) for made_by in self.tables]
        memories = [scratch, *tensors, *map(address, tables)]
        for kernel, grid, threads, shared, numbers, places in self.launches:
            arguments = numbers[:]  # a copy, since another thread may be filling in its own
            for place, memory, offset in places:
                arguments[place] = memories[memory] + offset
            device.launch(kernel, grid, threads, shared, arguments)
