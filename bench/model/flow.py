"""Which instructions a warp runs in one turn of a kernel's loop over rows, found in the machine code.

The loop over rows is the innermost one that holds every instruction of a kind, such as the products of the tensor
cores. Of the loops inside it one has to know how often they turn. A branch forward is not taken, as compilers arrange
what is usual, unless it jumps over a block that is declared rare.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bench.model.code import Instruction


@dataclass(eq=False)
class Block:
    """Instructions from `start` to before `end` that run one after another, and the blocks that may follow.

    The first of `after` is the block below, if the last instruction can fall through.
    """

    start: int
    end: int
    number: int
    after: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Loop:
    """Blocks from which a branch leads back to `head`, through which alone one gets in."""

    head: int
    blocks: set[int]
    tails: set[int]  # blocks that branch to the head
    instructions: list[Instruction]  # of one turn, branches inside not taken

    def count(self, name: str) -> int:
        return sum(i.name == name for i in self.instructions)


def blocks_of(code: Sequence[Instruction]) -> list[Block]:
    starts = {0}
    for k, instruction in enumerate(code):
        if instruction.target is not None:
            starts |= {instruction.target, k + 1}
        elif instruction.name in ("EXIT", "RET", "BRX", "JMP", "JMX"):
            starts.add(k + 1)
    edges = sorted(k for k in starts if k < len(code)) + [len(code)]
    blocks = [Block(*pair, n) for n, pair in enumerate(pairwise(edges))]
    at = {block.start: block.number for block in blocks}
    for block in blocks:
        last = code[block.end - 1]
        if last.may_fall_through and block.end < len(code):
            block.after.append(block.number + 1)
        if last.target is not None:
            block.after.append(at[last.target])
    return blocks


def _reached(blocks: list[Block]) -> set[int]:
    """The blocks that branches lead to from the first one. Subroutines, which are called, are not among them."""
    reached, waiting = {0}, [0]
    while waiting:
        new = set(blocks[waiting.pop()].after) - reached
        reached |= new
        waiting += new
    return reached


def _dominators(blocks: list[Block], before: list[list[int]]) -> list[set[int]]:
    """For each block those that one always passes on the way to it. Blocks that nothing reaches have no such set."""
    reached = _reached(blocks)
    found = [set(reached) if n in reached else set() for n in range(len(blocks))]
    found[0], changed = {0}, True
    while changed:
        changed = False
        for n in sorted(reached - {0}):
            new = set.intersection(*(found[b] for b in before[n] if b in reached)) | {n}
            if new != found[n]:
                found[n], changed = new, True
    return found


def loops_of(code: Sequence[Instruction], blocks: list[Block]) -> list[Loop]:
    """Returns the loops in the order of their heads in the code. Two with one head are one loop."""
    before: list[list[int]] = [[] for _ in blocks]
    for block in blocks:
        for n in block.after:
            before[n].append(block.number)
    dominators, loops = _dominators(blocks, before), {}
    for block in blocks:
        for head in block.after:
            if head not in dominators[block.number]:
                continue
            inside, waiting = {head, block.number}, [block.number]
            while waiting:
                b = waiting.pop()
                new = [] if b == head else [x for x in before[b] if x not in inside]
                inside.update(new)
                waiting += new
            loop = loops.setdefault(head, Loop(head, set(), set(), []))
            loop.blocks |= inside
            loop.tails.add(block.number)
    for loop in loops.values():
        for b in sorted(loop.blocks):
            loop.instructions += code[blocks[b].start : blocks[b].end]
    return [loops[head] for head in sorted(loops)]


def row_loop(
    code: Sequence[Instruction], blocks: list[Block], loops: list[Loop], core: Iterable[str]
) -> Loop | None:
    """Returns the innermost loop that holds all instructions of the kinds `core`; None if no loop holds them all."""
    core = tuple(core)
    holding = {
        n
        for n in _reached(blocks)
        if any(i.name in core for i in code[blocks[n].start : blocks[n].end])
    }
    if not holding:
        raise ValueError(f"core: the kernel should have instructions {' or '.join(core)}, got none")
    whole = [loop for loop in loops if holding <= loop.blocks]
    return min(whole, key=lambda loop: len(loop.blocks), default=None)


Turns = Sequence[int] | Callable[[list[Loop], Loop | None], Sequence[int]]


def turn(
    code: Sequence[Instruction],
    turns: Turns = (),
    core: Iterable[str] = ("HMMA",),
    rare: Callable[[Sequence[Instruction]], bool] | None = None,
) -> list[Instruction]:
    """Returns what a warp runs in one turn of the loop over rows; of a kernel without that loop, from begin to end.

    turns: how often each loop inside it runs, in the order of their heads in the code; or a function that is given
        these loops and the loop over rows (None without one), and returns that. A loop that is left at its
        first block runs this block once more. A loop that turns 0 times is gone around.
    core: the names of the instructions that the loop over rows must hold all of.
    rare: tells of the instructions of a block whether they are jumped over, where the code can do that.
    ValueError if there are more or fewer loops than numbers of turns, or a number is no integer from 0 on, or there is
    no way around a loop of 0 turns.
    """
    blocks = blocks_of(code)
    loops = loops_of(code, blocks)
    rows = row_loop(code, blocks, loops, core)
    inside = rows.blocks if rows else {b.number for b in blocks}
    inner = [loop for loop in loops if loop is not rows and loop.blocks <= inside]
    declared = list(turns(inner, rows) if callable(turns) else turns)
    if len(declared) != len(inner):
        sizes = ", ".join(str(len(loop.instructions)) for loop in inner) or "none"
        raise ValueError(
            f"turns: one number is wanted for each of {len(inner)} loops (instructions: {sizes}), got {declared}"
        )
    for number in declared:
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"turns: a loop turns 0 times or more often, got {number!r}")
    of_loop = dict(zip(inner, declared, strict=True))
    inside = _around(blocks, rows, inside, [loop for loop in inner if not of_loop[loop]])
    of_loop = {loop: number for loop, number in of_loop.items() if loop.head in inside}
    left = rare or (lambda instructions: False)
    path = _walk(code, blocks, rows, inside, of_loop, left)
    return [instruction for b in path for instruction in code[blocks[b].start : blocks[b].end]]


def _around(blocks, rows: Loop | None, inside: set[int], skipped: list[Loop]) -> set[int]:
    """Returns the blocks outside of the skipped loops from which one gets to the end of a turn without them."""
    usable = inside - set().union(*(loop.blocks for loop in skipped))
    found = usable & (rows.tails if rows else {n for n in inside if not blocks[n].after})
    waiting = list(found)
    while waiting:
        end = waiting.pop()
        new = {n for n in usable - found if end in blocks[n].after}
        if rows and end == rows.head:
            new = set()
        found |= new
        waiting += new
    if (rows.head if rows else 0) not in found:
        around = ", around the loops of 0 turns" if skipped else ""
        raise ValueError(f"turns: no path leads to the end of a turn{around}")
    return found


def _walk(code, blocks, rows: Loop | None, inside: set[int], turns: dict, rare) -> list[int]:
    """Returns the numbers of the blocks of one turn in the order in which they run."""
    done = dict.fromkeys(turns, 0)
    path = [rows.head if rows else 0]
    at_end = {
        loop: any(set(blocks[tail].after) - loop.blocks for tail in loop.tails) for loop in turns
    }
    longest = len(blocks) * math.prod(number + 1 for number in turns.values())

    def leaves(loop: Loop, block: Block) -> bool:
        """Whether the loop is over at this block, from which one can leave it."""
        if at_end[loop]:
            return block.number in loop.tails and done[loop] == turns[loop] - 1
        return done[loop] == turns[loop] - (block.number != loop.head)

    while len(path) <= longest:
        block = blocks[path[-1]]
        after = [n for n in block.after if n in inside]
        for loop in sorted(turns, key=lambda loop: len(loop.blocks)):  # the innermost first
            if block.number not in loop.blocks:
                continue
            outside = [n for n in after if n not in loop.blocks]
            if outside and leaves(loop, block):
                after, done[loop] = outside, 0
                continue
            stays = [n for n in after if n in loop.blocks]
            after = [n for n in stays if n != loop.head] or stays
            done[loop] += after == [loop.head]
            break
        if rows:
            after = [n for n in after if n != rows.head]
        if not after:
            if block.number in rows.tails if rows else not block.after:
                return path
            break
        if len(after) > 1 and rare(code[blocks[after[0]].start : blocks[after[0]].end]):
            after = after[1:]
        path.append(after[0])
    raise ValueError("turns: the usual path does not come to the end of a turn")
