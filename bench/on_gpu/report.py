"""What a run on a GPU says: measured beside predicted beside wanted, which of the planner's constants were wrong, and
the README's section."""

from dataclasses import asdict
from pathlib import Path
from statistics import median

from bench.micro.contenders import BASELINE, Case
from bench.micro.records import length_name, markdown, replace_between
from bench.on_gpu import constants
from bench.on_gpu.benchmark import PEERS
from bench.on_gpu.log import rows_of
from bench.on_gpu.targets import BATCH, FASTER, LENGTHS, TWO_SIDED

SECTION = "gpu bench"


def last(rows: list[dict]) -> list[dict]:
    """Of every case's rows the newest: what was repaired has been measured again."""
    newest = {}
    for row in rows:
        case = tuple(row[f] for f in asdict(Case()))
        newest[(*case, row["contender"], row["skip"], row["step"].startswith("times"))] = row
    return list(newest.values())


def requirements(rows: list[dict]) -> list[tuple[str, str, str, bool]]:
    """(what, wanted, measured, met) of every target that the rows can decide."""
    mine = [r for r in rows if r["contender"] == "seqconv"]
    red = [r for r in mine if not r["gate"]]
    lines = [("every result of seqconv is right", "0 red", f"{len(red)} red", not red)]

    def compare(what, value, limit, at_least):
        met = value >= limit if at_least else value <= limit
        sign = ">=" if at_least else "<="
        lines.append((what, f"{sign} {limit:.3g}x", f"{value:.3g}x", met))

    def beside(row, contenders, **other) -> list[float]:
        """Medians of others on the same case, but for what `other` says."""
        same = asdict(Case()) | {f: row[f] for f in asdict(Case())} | other
        found = [r for r in rows if r["contender"] in contenders and r["median"]]
        return [r["median"] for r in found if all(r[f] == v for f, v in same.items())]

    for row in [r for r in mine if r["gate"] and r["median"]]:
        case = Case(**{f: row[f] for f in asdict(Case())})
        name = f"{case}{'' if row['skip'] else ' without skip'}"
        if row["target"] and row["floor_copy"] and row["batch"] == BATCH:
            compare(
                f"over a copy of its bytes, {name}",
                row["median"] / row["floor_copy"],
                row["target"],
                False,
            )
        if row["dtype"] != "float32" and "ratio" in row:
            compare(f"over {BASELINE}, {name}", row["ratio"], FASTER, True)
        if (
            row["mode"] == "two_sided"
            and row["length"] == 16384
            and (causal := beside(row, ["seqconv"], mode="causal"))
        ):
            compare(
                f"two-sided beside causal, {name}", row["median"] / min(causal), TWO_SIDED, False
            )
        if peers := beside(row, PEERS):
            compare(f"over the fastest peer, {name}", min(peers) / row["median"], 1.0, True)
    return lines


def measured_table(rows: list[dict]) -> str:
    header = [
        "case",
        "contender",
        "ms",
        "a copy's",
        "times",
        "wanted",
        "predicted bound",
        f"over {BASELINE}",
        "clock",
    ]
    lines = []
    for row in rows:
        case = Case(**{f: row[f] for f in asdict(Case())})
        name = f"{case}{'' if row['skip'] else ' without skip'}"
        if row["median"] is None:
            lines.append(
                [name, row["contender"], "right, not timed" if row["gate"] else "WRONG", *[""] * 6]
            )
            continue
        ms = lambda value: f"{value * 1e3:.4g}" if value else ""  # noqa: E731
        floor, target = row["floor_copy"], row.get("target")
        over = f"{row['ratio']:.2f}" if row.get("ratio") else ""
        times = f"{row['median'] / floor:.2f}" if floor else ""
        cells = [
            name,
            row["contender"],
            ms(row["median"]),
            ms(floor),
            times,
            f"{target:.2f}" if target else "",
        ]
        lines.append([*cells, ms(row.get("predicted")), over, row["clock"]])
    return markdown(header, lines)


def readme_section(rows: list[dict]) -> str:
    """Times of the causal convolution in bfloat16 beside a copy, the planner's bound and torch.fft."""
    run, facts = newest(rows, "run"), newest(rows, "facts")
    timed = last([r for r in rows if r["kind"] == "time"])
    header = ["bfloat16, 64 samples", *[length_name(n) for n in LENGTHS]]
    values = {
        "ms": lambda r: r["median"] * 1e3,
        "times a copy of its bytes": lambda r: (
            r["median"] / r["floor_copy"] if r["floor_copy"] else None
        ),
        "times the planner's bound": lambda r: r["median"] / r["predicted"],
        "times torch.fft's speed": lambda r: r.get("ratio"),
    }
    lines = []
    for what, wanted in (
        ("forward", {"op": "forward", "mode": "causal"}),
        ("forward and backward", {"op": "forward+backward", "mode": "causal"}),
        ("gated, forward", {"op": "forward", "mode": "gated"}),
    ):
        wanted = {
            **wanted,
            "contender": "seqconv",
            "dtype": "bfloat16",
            "batch": BATCH,
            "skip": True,
        }
        mine = [r for r in timed if r["median"] and all(r[f] == v for f, v in wanted.items())]
        for name, value in values.items():
            cells = []
            for length in LENGTHS:
                found = [x for r in mine if r["length"] == length and (x := value(r)) is not None]
                cells.append(f"{median(found):.3g}" if found else "-")
            if set(cells) != {"-"}:
                lines.append([f"{what}, {name}", *cells])
    met = requirements(timed)
    state = f"commit {run['commit']}" if run["commit"] != "unknown" else f"sources {run['sources']}"
    text = f"{facts['name']}, torch {facts['versions']['torch']}, {state}; "
    text += f"{sum(x[3] for x in met)} of {len(met)} targets are met. "
    text += "The planner's bound is what its model predicts."
    return "\n\n".join([markdown(header, lines), text])


def newest(rows: list[dict], kind: str) -> dict:
    found = [row for row in rows if row["kind"] == kind]
    if not found:
        raise SystemExit(f"bench.on_gpu: there is no row of kind {kind!r}: not the folder of a run")
    return found[-1]


def report(folder: Path, readme: Path | None) -> int:
    rows = rows_of(folder)
    run = newest(rows, "run")
    timed = last([row for row in rows if row["kind"] == "time"])
    print(
        f"{'DRY RUN: no number below is of a GPU. ' if run['dry'] else ''}{run['when']}, commit {run['commit']}\n"
    )
    status = {row["step"]: row["status"] for row in rows if row["kind"] == "step"}
    print(", ".join(f"{name} {value}" for name, value in status.items()), end="\n\n")
    print(measured_table(timed), end="\n\n")
    print(
        markdown(
            ["constant of the planner", "assumed", "measured", "factor"],
            constants.table(rows, timed),
        ),
        end="\n\n",
    )
    met = sorted(requirements(timed), key=lambda line: line[3])
    print(
        markdown(
            ["what", "wanted", "measured", ""],
            [[*x[:3], "met" if x[3] else "not met"] for x in met],
        )
    )
    if readme is None:
        return 0
    wrong = [row for row in timed if row["contender"] == "seqconv" and not row["gate"]]
    if run["dry"] or any(row["kind"] == "run" and row["dry"] for row in rows):
        print("\nbench.on_gpu: a dry run's times are no GPU's: the README is left as it is")
        return 1
    if not timed or wrong:
        print("\nbench.on_gpu: wrong results, or no times: the README is left as it is")
        return 1
    replace_between(readme, SECTION, readme_section(rows))
    print(f"\n{readme}: the section between the markers of {SECTION!r} is written")
    return 0
