"""ListOps expressions and their values, drawn as for Long Range Arena (Nangia and Bowman 2018; Tay et al. 2021).

node(depth): below depth `max_depth` an operator with probability 1/4, else a digit. An operator takes 2..`max_args`
arguments; which of MIN, MAX, MED (truncated to an integer) and SM (sum modulo 10) it is, is drawn after them. An
expression is kept if the number of its tokens, operators, digits and closing brackets, is in the range wanted and
it has not been drawn before.

Written as the released files are: basic_{train,val,test}.tsv, columns Source and Target, expressions as binary
trees: `( ( ( [MAX 3 ) 4 ) ] )` is [MAX 3 4 ].
"""

import os
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from bench.lra.data.workers import in_order

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CHUNK = 250  # expressions that one random stream yields


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
    """(source, value, number of tokens), or None for an expression longer than wanted."""
    length = 0

    def node(depth: int) -> tuple[str, int]:
        nonlocal length
        length += 1
        if length > settings.longest:
            raise _TooLong  # it would be rejected: no need to finish it
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
    """The index-th CHUNK of kept expressions of a seed, and how many were drawn for them."""
    rng = random.Random(f"listops {seed} {index}")
    kept: list[tuple[str, int, int]] = []
    for drawn in count(1):
        sample = draw(rng, settings)
        if sample and sample[2] >= settings.shortest:
            kept.append(sample)
        if len(kept) == CHUNK:
            return kept, drawn


def expressions(settings: Settings, seed: int, workers: int) -> Iterator[tuple[str, int, int]]:
    """Distinct expressions without end; the same whatever the number of workers."""
    seen = set()
    tasks = ((settings, seed, i) for i in count())
    with closing(in_order(chunk, tasks, workers)) as results:
        for samples, _ in results:
            for sample in samples:
                if sample[0] not in seen:
                    seen.add(sample[0])
                    yield sample


def write(folder: Path, settings: Settings, n: int, seed: int, workers: int, advance) -> None:
    """96, 2 and 2 % of n expressions into three files, each whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    small = max(1, n // 50)
    source = expressions(settings, seed, workers)
    try:
        done = 0
        for split, size in (("train", n - 2 * small), ("val", small), ("test", small)):
            path = folder / f"basic_{split}.tsv"
            temporary = path.with_suffix(".tmp")
            with open(temporary, "w") as file:
                file.write("Source\tTarget\n")
                for _ in range(size):
                    text, target, _ = next(source)
                    file.write(f"{text}\t{target}\n")
                    done += 1
                    advance("expressions", done, n)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        source.close()
