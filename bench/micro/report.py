"""What was measured on what: the machine, tables in the terminal, the picture; bench.records' names as well."""

import platform
import re
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from bench.micro.records import RESULTS as RESULTS
from bench.micro.records import ROOT as ROOT
from bench.micro.records import append as append
from bench.micro.records import commit, length_name, versions
from bench.micro.records import markdown as markdown
from bench.micro.records import read as read
from bench.micro.records import replace_between as replace_between
from bench.micro.records import same_run as same_run
from seqconv.backends import cpu

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=160)  # a log, not a screen


def device_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name}, family {family} model {model}" if family else name


def machine() -> dict:
    """What every row says of where it was measured, and on which code."""
    here = {"device": device_name(), "isa": cpu.isa()}
    return here | {"versions": versions(), "commit": commit()}


def show_requirements(lines: list[tuple[str, str, str, bool]]) -> None:
    table = Table(title="requirements", title_justify="left")
    for name in ("what", "wanted", "measured", ""):
        table.add_column(name)
    for what, wanted, value, met in lines:
        table.add_row(what, wanted, value, "[green]met[/]" if met else "[red]not met[/]")
    console.print(table)
    console.print(f"{sum(line[3] for line in lines)} of {len(lines)} met")


def length_axis(axis, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [length_name(n) for n in lengths], minor=False)
    axis.set_xlabel("sequence length")
    axis.grid(alpha=0.3)


def plot(rows: list[dict], path: Path) -> None:
    """Time per element with its floors, and speed-up over torch.fft, against length: causal
    float32 with 8 samples on one thread and the tuned allocator, or what was measured nearest to it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def curve(value, **wanted):
        wanted = {"mode": "causal", "dtype": "float32", "layout": "bhl", "taps": 0} | wanted
        points: dict[int, list[float]] = {}
        for row in rows:
            if row["tag"] not in ("speed", "sample"):
                continue
            if all(row.get(key) == x for key, x in wanted.items()) and row["median"]:
                points.setdefault(row["length"], []).append(value(row))
        lengths = sorted(points)
        return lengths, [median(points[n]) for n in lengths]

    def per_element(row):
        return row["median"] * 1e9 / (row["batch"] * row["channels"] * row["length"])

    ours = [row for row in rows if row["contender"] == "seqconv" and row["median"]]
    preferred = {"batch": 8, "threads": 1, "allocator": "tuned"}
    keys = ("mode", "dtype", "layout", "taps")
    usual = [r for r in ours if tuple(r.get(k) for k in keys) == ("causal", "float32", "bhl", 0)]
    if not usual:
        raise ValueError("nothing to draw: no causal float32 convolution was measured")
    first = max(usual, key=lambda row: sum(row.get(k) == v for k, v in preferred.items()))
    base = {key: first.get(key) for key in preferred}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    colors = plt.get_cmap("tab10").colors
    forward = base | {"op": "forward"}
    others = [n for n in dict.fromkeys(r["contender"] for r in rows) if n != "seqconv"]
    lengths, _ = curve(per_element, contender="seqconv", **forward)
    for i, name in enumerate(["seqconv", *others]):
        x, y = curve(per_element, contender=name, **forward)
        strong = name in ("seqconv", "torch.fft")
        if x:
            style = {"linewidth": 2.4, "marker": "o"} if strong else {"linewidth": 1, "marker": "."}
            left.plot(x, y, color=colors[i % 10], label=name, alpha=1 if strong else 0.75, **style)
    for key, name, line in (
        ("floor_copy", "floor: the bytes, copied", ":"),
        ("floor_flops", "floor: the flops, at a matrix product's rate", "--"),
    ):
        x, y = curve(
            lambda r, key=key: r[key] * 1e9 / (r["batch"] * r["channels"] * r["length"]),
            contender="seqconv",
            **forward,
        )
        left.plot(x, y, line, color="black", linewidth=1, label=name)
    left.set(ylabel="ns per element", title="Causal convolution, forward", ylim=(0.2, None))
    left.set_yscale("log")
    left.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    styles = {"forward": ("tab:blue", "o"), "forward+backward": ("tab:red", "s")}
    for op, (color, marker) in styles.items():
        for allocator, line in (("tuned", "-"), ("default", "--")):
            x, y = curve(
                lambda r: r["ratio"],
                contender="seqconv",
                op=op,
                **(base | {"allocator": allocator}),
            )
            if x:
                label = f"{op}, {allocator} allocator"
                right.plot(x, y, line, color=color, marker=marker, label=label)
    right.axhline(1, color="black", linewidth=1)
    right.set(ylabel="times faster than torch.fft", title="Speed-up of seqconv", ylim=(0, None))
    right.legend(
        fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14)
    )
    for axis in (left, right):
        length_axis(axis, lengths)
    figure.suptitle(
        f"{first['device']} ({first['isa']}), float32, {base['batch']} samples, {base['threads']} thread(s)",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
