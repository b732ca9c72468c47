"""ListOps expressions and their values, drawn as for Long Range Arena (Nangia and Bowman 2018; Tay et al. 2021).

node(depth): down to depth `max_depth` it is an operator with probability 1/4, else a digit. An operator takes
2..`max_args` arguments. After these it is drawn whether the operator is MIN, MAX, MED (truncated to an integer) or SM
(sum modulo 10). An expression is kept if the number of its tokens (operators, digits and closing brackets) is in the
range wanted and if it has not been drawn before.

The files are like the released ones: basic_{train,val,test}.tsv with columns Source and Target and expressions as
binary trees. `( ( ( [MAX 3 ) 4 ) ] )` is [MAX 3 4 ].
"""

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

from bench import files
from bench.lra.data.workers import in_order

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CHUNK = 250  # expressions of one random stream


@dataclass(frozen=True)
class Settings:
    shortest: int  # tokens, inclusive
    longest: int
    max_depth: int
    max_args: int = 10


FULL = Settings(501, 1999, 10)
SHORT = Settings(20, 128, 5)


class _TooLong(Exception):
    pass


def value(operator: str, arguments: list[int]) -> int:
    if operator == "[MIN":
        return min(arguments)
    if operator == "[MAX":
        return max(arguments)
    if operator == "[SM":
        return sum(arguments) % 10
    ordered, middle = sorted(arguments), len(arguments) // 2
    odd = len(arguments) % 2
    return ordered[middle] if odd else (ordered[middle - 1] + ordered[middle]) // 2


def draw(rng: random.Random, settings: Settings) -> tuple[str, int, int] | None:
    """Returns (source, value, number of tokens), or None for an expression that is too long."""
    length = 0

    def node(depth: int) -> tuple[str, int]:
        nonlocal length
        length += 1
        if length > settings.longest:
            raise _TooLong  # it would be rejected in any case
        if depth >= settings.max_depth or rng.random() > 0.25:
            digit = rng.randrange(10)
            return str(digit), digit
        length += 1  # the closing bracket
        arguments = [node(depth + 1) for _ in range(rng.randint(2, settings.max_args))]
        operator = rng.choice(OPERATORS)
        text = operator
        for argument, _ in arguments:
            text = f"( {text} {argument} )"
        return f"( {text} ] )", value(operator, [v for _, v in arguments])

    try:
        source, target = node(1)
    except _TooLong:
        return None
    return (source, target, length) if length <= settings.longest else None


def chunk(settings: Settings, seed: int, index: int) -> tuple[list[tuple[str, int, int]], int]:
    """Returns the index-th CHUNK of kept expressions of a seed, and how many were drawn for them."""
    rng = random.Random(f"listops {seed} {index}")
    kept: list[tuple[str, int, int]] = []
    for drawn in count(1):
        sample = draw(rng, settings)
        if sample and sample[2] >= settings.shortest:
            kept.append(sample)
        if len(kept) == CHUNK:
            return kept, drawn


def expressions(settings: Settings, seed: int, workers: int) -> Iterator[tuple[str, int, int]]:
    """Yields distinct expressions without end, the same for any number of workers."""
    seen = set()
    tasks = ((settings, seed, i) for i in count())
    with closing(in_order(chunk, tasks, workers)) as results:
        for samples, _ in results:
            for sample in samples:
                if sample[0] not in seen:
                    seen.add(sample[0])
                    yield sample


def write(folder: Path, settings: Settings, n: int, seed: int, workers: int, advance) -> None:
    """Writes 96, 2 and 2 % of n expressions into three files, each whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    small, done = max(1, n // 50), count(1)
    with closing(expressions(settings, seed, workers)) as source:

        def rows(size: int, file) -> None:
            file.write(b"Source\tTarget\n")
            for text, target, _ in islice(source, size):
                file.write(f"{text}\t{target}\n".encode())
                advance("expressions", next(done), n)

        for split, size in (("train", n - 2 * small), ("val", small), ("test", small)):
            files.atomically(folder / f"basic_{split}.tsv", partial(rows, size))
