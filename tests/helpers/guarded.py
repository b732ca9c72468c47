"""Recipes whose scratch memory shows every access beside its pieces.

The scratch memory of a call is one allocation, in which a kernel that leaves its piece would meet the next one
unnoticed. Here a band lies before, between and behind the pieces. At every launch all memory that belongs to no living
piece is filled with NaN, and must be unchanged afterwards. The PTX machine refuses to read or write it.
"""

import ctypes
from contextlib import contextmanager

import torch

from seqconv.backends.cuda.recipe import ALIGNMENT, Recipe

BAND = ALIGNMENT  # bytes, a whole number of alignments
NAN = 0xFF  # each byte of a number that is NaN in every format


class Overrun(AssertionError):
    """A kernel has written to scratch memory that belongs to no piece."""


class GuardedRecipe(Recipe):
    """A recipe with bands, whose launches go through a device that watches them."""

    def __init__(self, tensors: int):
        super().__init__(tensors)
        self._taken = BAND
        self.living: list[tuple[int, int]] = []  # the pieces' beginnings and ends, in bytes
        self.at_launches: list[list[tuple[int, int]]] = []

    def empty(self, *shape: int, **options):
        piece = super().empty(*shape, **options)
        self.living.append((piece.address.offset, self._taken))
        self._taken = -(-self._taken // ALIGNMENT) * ALIGNMENT + BAND
        self.bytes = max(self.bytes, self._taken)
        return piece

    @contextmanager
    def reused(self):
        with super().reused():
            yield
        self.living = [piece for piece in self.living if piece[1] <= self._taken]

    def launch(self, *launch) -> None:
        super().launch(*launch)
        self.at_launches.append(list(self.living))

    def run(self, device, scratch: int, tensors: list[int]) -> None:
        dead = [self._outside(scratch, living) for living in self.at_launches]
        super().run(_Watched(device, dead), scratch, tensors)

    def _outside(self, scratch: int, living: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The address and size of everything in the scratch memory that belongs to no living piece."""
        begins, ends = zip(*sorted(living), strict=True) if living else ((), ())
        gaps = zip((0, *ends), (*begins, self.bytes), strict=True)
        return [(scratch + begin, end - begin) for begin, end in gaps if begin < end]


class _Watched:
    """Hands launches on to a device, and knows for each of them what it must not touch."""

    def __init__(self, device, dead: list[list[tuple[int, int]]]):
        self.device, self.table, self.dead = device, device.table, iter(dead)

    def launch(self, kernel: str, *launch) -> None:
        dead = next(self.dead)
        for address, size in dead:
            ctypes.memset(address, NAN, size)
        if hasattr(self.device, "forbidden"):
            self.device.forbidden = dead
        self.device.launch(kernel, *launch)
        for address, size in dead:
            now = torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
            wrong = (now != NAN).nonzero()
            if len(wrong):
                at = wrong[0].item()
                raise Overrun(f"{kernel} wrote {at} bytes into a band of {size} between its pieces")
