"""What bench.streaming prints: a table of its rows, the requirements that they decide, and the table in docs."""

from math import log

from bench.facts import length_name, plural
from bench.files import markdown
from bench.micro.requirements import Requirement, all_right, ratio_of, verdict
from bench.micro.streaming_contenders import (
    ANEW,
    CONVOLUTIONS,
    DOT,
    OURS,
    RECURRENCE,
    SPREAD,
    TILES,
)
from bench.terminal import console, table

LEAST = {16: 20, 1: 12}  # batch -> how many times as long the dot product has to take at DECIDED
DECIDED = 16384
ENDS = (4096, 65536)  # between which the exponent of the total is taken


class Find:
    """Rows by threads, batch, length and contender; the last of each that is right."""

    def __init__(self, rows: list[dict]):
        names = ("threads", "batch", "length", "contender")
        self.rows = {tuple(r[n] for n in names): r for r in rows if r["gate"]}
        self.cases = sorted({key[:2] for key in self.rows})
        self.lengths = sorted({key[2] for key in self.rows})

    def __call__(self, case: tuple, length: int, contender: str, value: str) -> float | None:
        return self.rows.get((*case, length, contender), {}).get(value)

    def tiles(self, case: tuple, apart: str) -> float | None:
        return (self(case, DECIDED, OURS, "tiles") or {}).get(apart)

    def exponent(self, case: tuple) -> float | None:
        short, long = (self(case, n, OURS, "total") for n in ENDS)
        if short is None or long is None:
            return None
        return log(long / short) / log(ENDS[1] / ENDS[0])


def requirements(rows: list[dict]) -> list[Requirement]:
    """Returns every requirement that the rows can decide."""
    find, lines = Find(rows), [all_right(rows)]
    for threads, batch in find.cases:
        case = threads, batch
        name = f"B={batch}, {plural(threads, 'thread')}"
        at = f"{name}, L={length_name(DECIDED)}"
        if batch in LEAST:
            ratio = find(case, DECIDED, DOT, "over_seqconv")
            lines += verdict(f"dot product over seqconv, {at}", ratio, LEAST[batch])
        if batch == 16:
            for goal, apart in (("", TILES), ("goal: ", CONVOLUTIONS)):
                ratio = ratio_of(find(case, DECIDED, OURS, "total"), find.tiles(case, apart))
                lines += verdict(f"{goal}seqconv over its {apart}, {at}", ratio, 2.5, False)
        ends = " to ".join(map(length_name, ENDS))
        lines += verdict(
            f"exponent of the total, {name}, {ends}", find.exponent(case), 1.25, False, ""
        )
        steps = [find(case, DECIDED, SPREAD, x) for x in ("worst_step", "median_step")]
        ratio = ratio_of(*steps)
        lines += verdict(f"spread: worst step over the median, {at}", ratio, 4, False)
        ratio = find(case, DECIDED, SPREAD, "over_seqconv")
        lines += verdict(f"spread: total over the other mode's, {at}", ratio, 1.3, False)
    return lines


def show(rows: list[dict]) -> None:
    numbers = ("us a step", "quartiles", "over seqconv", "median step", "worst step")
    shown = table(
        "streams, step by step",
        ("batch", "length", "threads", "contender"),
        (*numbers, "error L2", "max/rms"),
    )
    for row in rows:
        cells = [
            str(row["batch"]),
            length_name(row["length"]),
            str(row["threads"]),
            row["contender"],
        ]
        if row["gate"]:
            q1, middle, q3 = (us(row[q] / row["length"]) for q in ("q1", "median", "q3"))
            worst = [us(row[x]) if x in row else "" for x in ("median_step", "worst_step")]
            cells += [middle, f"{q1}-{q3}", f"{row['over_seqconv']:.3g}x", *worst]
        else:
            cells += ["[red]WRONG[/]", "", "", "", ""]
        shown.add_row(*cells, f"{row['error_l2']:.1e}", f"{row['error_max']:.1e}")
    console.print(shown)
    for row in rows:
        if row["contender"] == OURS:
            case = f"{plural(row['batch'], 'sample')}, {plural(row['threads'], 'thread')}"
            tiles = [f"{name} {us(t / row['length'])} us" for name, t in row["tiles"].items()]
            text = f"{case}, {length_name(row['length'])} steps, for each of them"
            console.print(f"{text}: {', '.join(tiles)}")


def us(seconds: float) -> str:
    """Microseconds, to three digits."""
    value = 1e6 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def readme_table(rows: list[dict]) -> str:
    """Returns the times of a step, the ratios of totals, and what they were measured on."""
    find, first = Find(rows), rows[-1]
    lines = []
    for threads, batch in find.cases:
        name = f"{plural(batch, 'sample')}, {plural(threads, 'thread')}"

        def line(what, contender, value, form, name=name, case=(threads, batch)):
            found = [form(find(case, n, contender, value), n) for n in find.lengths]
            lines.append([f"{name}: {what}", *found])

        line("a step, mean", OURS, "total", lambda x, n: us(x / n) + " us" if x else "-")
        for what, contender in (
            ("all inputs convolved anew", ANEW),
            ("dot product over a cache", DOT),
            ("S4D's recurrence", RECURRENCE),
        ):
            line(what, contender, "over_seqconv", lambda x, n: f"{x:.3g}x" if x else "-")
        for what, contender in (("worst step", OURS), ("worst step, spread", SPREAD)):
            line(what, contender, "worst_step", lambda x, n: us(x) + " us" if x else "-")
    where = f"{first['device']} ({first['isa']} kernels), torch {first['versions']['torch']}"
    text = f"{first['channels']} channels, float32; {where}, commit {first['commit']}"
    if {ENDS[0], DECIDED, ENDS[1]} <= set(find.lengths):
        decided = requirements(rows)
        met = sum(line[3] for line in decided)
        text += f"; {met} of the benchmark's {len(decided)} requirements are met there."
    else:
        text = f"A reduced run, which leaves most requirements open: {text}."
    return "\n\n".join([markdown(["", *map(length_name, find.lengths)], lines), text])
