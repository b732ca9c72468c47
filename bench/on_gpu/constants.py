"""The planner's model against measurements: which of its constants were wrong, and by what factor."""

from seqconv.backends.cuda.cost import LAUNCH

ISSUED = "sm__inst_issued.avg.pct_of_peak_sustained_active"
EXECUTED = "smsp__inst_executed.sum"
DURATION = "gpu__time_duration.sum"
TRAFFIC = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def table(rows: list[dict], timed: list[dict]) -> list[list[str]]:
    """[constant, assumed, measured, factor] for everything that all rows and the newest times can decide."""
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
        # Of the rates that were measured: what the model still gets wrong is how fully they are used.
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
    """Of a call's kernels: instructions and bytes summed, the share of issue slots of the one that ran longest."""
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
