"""What the model has to know of a kernel beside its machine code."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.model.code import Instruction
from bench.model.flow import Loop, turn
from bench.model.simulator import Residents
from seqconv.backends.cuda import kernels
from seqconv.backends.cuda.kernels import HalfShape

TILE = 256  # points, the inner transform of the kernels of 16-bit rows


@dataclass(frozen=True)
class Described:
    """How a kernel divides its work, and what its machine code alone does not tell.

    A slot is a group of warps that works on rows of its own, `rows` of them in one turn of the loop over rows.
    turns: how often each loop inside that loop runs, in their order. None: such loops have tensor core instructions,
        and all as many turns as give `products`.
    products: the tensor core instructions of a warp in one turn, which the path must have; None: not known.
    core: the names of the instructions that the loop over rows holds all of.
    rare: the name of the instructions that most of a block consists of which is left out, since it runs seldom.
    """

    points: int
    warps: int
    traffic: float  # bytes a point that a row moves from and to memory
    slots: int = 1
    blocks: int = 1  # of a multiprocessor
    rows: int = 1
    shared: int = 0  # bytes of a block
    turns: Sequence[int] | None = ()
    products: int | None = None
    core: tuple[str, ...] = ("HMMA",)
    rare: str = ""

    @property
    def residents(self) -> Residents:
        return Residents(self.warps, self.slots, self.blocks)

    def path(self, code: Sequence[Instruction]) -> list[Instruction]:
        """What a warp runs in one turn. ValueError where the loops are not those that are described."""
        turns = self._turns if self.turns is None else self.turns
        path = turn(code, turns, self.core, self._seldom if self.rare else None)
        found = sum(i.name == "HMMA" for i in path)
        if self.products is not None and found != self.products:
            raise ValueError(f"products: {self.products} are described, and {found} are there")
        return path

    def _seldom(self, block: Sequence[Instruction]) -> bool:
        return 2 * sum(i.name == self.rare for i in block) > len(block)

    def _turns(self, inner: list[Loop], rows: Loop | None) -> list[int]:
        """The turns of the loops inside that over rows, all the same: a compiler chooses how many tiles one takes."""
        if not inner:
            return []
        each = sum(loop.count("HMMA") for loop in inner)
        if rows is None or self.products is None or not all(loop.count("HMMA") for loop in inner):
            raise ValueError(f"turns: they are not known for {len(inner)} loops")
        found, rest = divmod(self.products - rows.count("HMMA") + each, each)
        if rest or found < 1:
            raise ValueError(
                f"turns: loops with {each} of {rows.count('HMMA')} products cannot make {self.products}"
            )
        return [found] * len(inner)


def half(backward: bool, shape: HalfShape) -> Described:
    """Describes a kernel of 16-bit rows in pieces."""
    gates = (shape.flags & kernels.GATED).bit_count()
    # The products of a tile are 4 of each outer pass, 4 of its inverse, and 16 of the inner points in each direction.
    if not backward:
        products, tensors = 4 + 32 + 4, 2 + gates
    else:
        # Two rows go in and one comes out; the diagonal makes dk's sums, and without gates 2 more make the skip's.
        sums = 4 if shape.pair == 2 else 0
        products = 2 * (4 + 16) + 16 + 4 + sums + (0 if gates else 2)
        tensors = 6 if gates else 3
    tiles = shape.points // TILE // shape.warps * (1 if backward else shape.pair)
    return Described(
        points=shape.points,
        warps=shape.warps,
        traffic=2 * tensors,
        slots=shape.slots,
        blocks=shape.blocks,
        rows=1 if backward else shape.pair,
        shared=shape.shared,
        turns=None,
        products=products * tiles,
        rare="FMUL" if backward else "",  # sums are rescaled where the largest magnitude grows
    )


def describe(kernel: str) -> Described | None:
    """Returns the description of a kernel, or None where there is none: its loops depend on its arguments."""
    shape = kernels.HALF_SHAPES.get(kernel)
    if shape is None or not shape.flags & kernels.PIECES or not shape.flags & kernels.WHOLE:
        return None
    return half("backward" in kernel, shape)
