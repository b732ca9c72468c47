"""What a run on a GPU says: measured beside predicted, simulated and wanted, which of the planner's constants were
wrong and by what factor, and the README's section."""

from dataclasses import asdict
from pathlib import Path
from statistics import median

from bench.facts import length_name
from bench.files import markdown, replace_between
from bench.micro.contenders import BASELINE, ON_GPU, Case
from bench.micro.requirements import Requirement, all_right, ratio_of, verdict, verdicts_table
from bench.on_gpu import simulated
from bench.on_gpu.log import rows_of
from bench.on_gpu.targets import BATCH, FASTER, LENGTHS, TWO_SIDED
from seqconv.backends.cuda.cost import LAUNCH

SECTION = "gpu bench"
# ncu's names
ISSUED = "sm__inst_issued.avg.pct_of_peak_sustained_active"
EXECUTED = "smsp__inst_executed.sum"
DURATION = "gpu__time_duration.sum"
TRAFFIC = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def name_of(row: dict) -> str:
    return f"{Case.of(row)}{'' if row['skip'] else ' without skip'}"


def last(rows: list[dict]) -> list[dict]:
    """Returns the newest row of every case. What was repaired has been measured again."""
    newest = {}
    for row in rows:
        case = tuple(row[f] for f in asdict(Case()))
        newest[(*case, row["contender"], row["skip"], row["step"].startswith("times"))] = row
    return list(newest.values())


def requirements(rows: list[dict]) -> list[Requirement]:
    """Returns every target that the rows can decide."""
    mine = [r for r in rows if r["contender"] == "seqconv"]
    lines = [all_right(mine, " of seqconv")]

    def beside(row, contenders, **other) -> list[float]:
        """Returns medians of contenders on the same case, apart from what `other` says."""
        same = asdict(Case()) | {f: row[f] for f in asdict(Case())} | other
        found = [r for r in rows if r["contender"] in contenders and r["median"]]
        return [r["median"] for r in found if all(r[f] == v for f, v in same.items())]

    for row in [r for r in mine if r["gate"] and r["median"]]:
        name = name_of(row)
        if row["target"] and row["floor_copy"] and row["batch"] == BATCH:
            times = row["median"] / row["floor_copy"]
            lines += verdict(f"over a copy of its bytes, {name}", times, row["target"], False)
        if row["dtype"] != "float32":
            lines += verdict(f"over {BASELINE}, {name}", row.get("ratio"), FASTER)
        if row["mode"] == "two_sided" and row["length"] == 16384:
            causal = min(beside(row, ["seqconv"], mode="causal"), default=None)
            times = ratio_of(row["median"], causal)
            lines += verdict(f"two-sided beside causal, {name}", times, TWO_SIDED, False)
        peer = min(beside(row, ON_GPU), default=None)
        lines += verdict(f"over the fastest peer, {name}", ratio_of(peer, row["median"]), 1.0)
    return lines


def measured_table(rows: list[dict]) -> str:
    header = ["case", "contender", "ms", "a copy's", "times", "wanted", "predicted bound"]
    header += ["simulated", f"over {BASELINE}", "clock"]

    def ms(value: float | None) -> str:
        return f"{value * 1e3:.4g}" if value else ""

    def two(value: float | None) -> str:
        return f"{value:.2f}" if value else ""

    lines = []
    for row in rows:
        cells, middle, floor = [name_of(row), row["contender"]], row["median"], row["floor_copy"]
        if middle is None:
            lines.append([*cells, "right, not timed" if row["gate"] else "WRONG", *[""] * 7])
            continue
        times = two(floor and middle / floor)
        cells += [ms(middle), ms(floor), times, two(row.get("target")), ms(row.get("predicted"))]
        cells.append(ms(row.get("simulated")))
        lines.append([*cells, two(row.get("ratio")), row["clock"]])
    return markdown(header, lines)


def constants(rows: list[dict], timed: list[dict]) -> list[list[str]]:
    """Compares the planner's constants with what all rows and the newest times say: [constant, assumed, measured,
    factor] each."""
    facts = [row for row in rows if row["kind"] == "facts" and row["limits"]]
    if not facts:
        return []
    limits = facts[-1]["limits"]
    ceilings = {row["name"]: row["value"] for row in rows if row["kind"] == "ceiling"}
    lines: list[list[str]] = []

    def compare(name: str, assumed: float, measured: float | None, unit: str, scale: float = 1.0):
        if measured:
            cells = [f"{assumed * scale:.4g} {unit}", f"{measured * scale:.4g} {unit}"]
            lines.append([name, *cells, f"{measured / assumed:.2f}"])

    compare("bandwidth", limits["bandwidth"], ceilings.get("copy"), "TB/s", 1e-12)
    compare("clock, for issue", limits["clock"], ceilings.get("clock"), "GHz", 1e-9)
    compare("LAUNCH", LAUNCH, ceilings.get("launch"), "us", 1e6)
    bandwidth = ceilings.get("copy", limits["bandwidth"])
    slots = limits["processors"] * 4 * ceilings.get("clock", limits["clock"])
    for row in timed:
        if not row["step"].startswith("times") or not row["median"]:
            continue
        what = (
            f"{row['mode']}, {row['op']}{'' if row['skip'] else ' without skip'}, L={row['length']}"
        )
        io, issue = row["moved"] / bandwidth, row["work"] / slots
        # These are the rates that were measured, so the rest is how fully they are used.
        bound, share = ("issue slots", issue) if issue > io else ("bandwidth", io)
        cells = ["1.00", f"{share / row['median']:.2f}", f"{row['median'] / share:.2f}"]
        lines.append([f"share of {bound} used, {what}", *cells])
    models = {row["case"]: row for row in rows if row["kind"] == "model"}
    for name, row in {row["case"]: row for row in rows if row["kind"] == "counters"}.items():
        counted, model = of_call([kernel["values"] for kernel in row["launched"]]), models[name]
        compare(f"warp instructions, {name}", model["work"], counted.get("work"), "M", 1e-6)
        compare(f"bytes, {name}", model["moved"], counted.get("moved"), "MB", 1e-6)
        if counted.get("issued"):
            compare(f"share of issue slots by ncu, {name}", 1.0, counted["issued"] / 100, "")
    for kernel in ("mma_f16", "mma_f32"):
        found = ceilings.get(f"{kernel}, 4 warps")
        if found:
            lines.append(
                [f"cycles between two {kernel} of a scheduler", "4 to 6", f"{found:.2f}", "-"]
            )
    return lines


def of_call(kernels: list[dict]) -> dict[str, float]:
    """Sums the instructions and bytes of a call's kernels. The share of issue slots is that of the longest one."""
    found: dict[str, float] = {}
    work = [values[EXECUTED] for values in kernels if EXECUTED in values]
    if work:
        found["work"] = sum(work)
    moved = [values[name] for values in kernels for name in TRAFFIC if name in values]
    if moved:
        found["moved"] = sum(moved)
    busy = [(values.get(DURATION, 0.0), values[ISSUED]) for values in kernels if ISSUED in values]
    if busy:
        found["issued"] = max(busy)[1]
    return found


def readme_section(rows: list[dict]) -> str:
    """Returns the times of the causal convolution in bfloat16 beside a copy, the planner's bound and torch.fft."""
    run, facts = newest(rows, "run"), newest(rows, "facts")
    timed = last([r for r in rows if r["kind"] == "time"])
    header = ["bfloat16, 64 samples", *[length_name(n) for n in LENGTHS]]
    values = {
        "ms": lambda r: r["median"] * 1e3,
        "times a copy of its bytes": lambda r: ratio_of(r["median"], r["floor_copy"]),
        "times the planner's bound": lambda r: r["median"] / r["predicted"],
        "times torch.fft's speed": lambda r: r.get("ratio"),
    }
    lines = []
    for what, wanted in (
        ("forward", {"op": "forward", "mode": "causal"}),
        ("forward and backward", {"op": "forward+backward", "mode": "causal"}),
        ("gated, forward", {"op": "forward", "mode": "gated"}),
    ):
        wanted |= {"contender": "seqconv", "dtype": "bfloat16", "batch": BATCH, "skip": True}
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
    dry = "DRY RUN: no number below is of a GPU. " if run["dry"] else ""
    print(f"{dry}{run['when']}, commit {run['commit']}\n")
    status = {row["step"]: row["status"] for row in rows if row["kind"] == "step"}
    print(", ".join(f"{name} {value}" for name, value in status.items()), end="\n\n")
    print(measured_table(timed), end="\n\n")
    for row in simulated.wrong(timed):
        factor = row["median"] / row["simulated"]
        print(
            f"The simulation is wrong by more than 15 %: {name_of(row)}: {factor:.2f} times as long"
        )
    header = ["constant of the planner", "assumed", "measured", "factor"]
    print(markdown(header, constants(rows, timed)), end="\n\n")
    print(verdicts_table(requirements(timed)))
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
