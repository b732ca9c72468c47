"""Pictures of training runs, kernels and times."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from bench import report


def plot_curve(rows: list[dict], path: Path) -> None:
    """Loss and accuracy against seconds of training."""
    seconds = [row["seconds"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(seconds, [row["loss"] for row in rows], "o-", color="tab:gray")
    left.set(xlabel="seconds of training", ylabel="cross-entropy (running mean)", yscale="log")
    right.plot(
        seconds,
        [row["accuracy"] for row in rows],
        "o-",
        color="tab:blue",
        label="training digits (running mean)",
    )
    right.plot(
        seconds,
        [row["held_out"] for row in rows],
        "s-",
        color="tab:orange",
        label="held-out digits",
    )
    right.axhline(0.1, color="black", linestyle=":", linewidth=1, label="chance")
    right.set(xlabel="seconds of training", ylabel="accuracy", ylim=(0, 1))
    right.legend(loc="center right", frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_kernels(
    before: list[Tensor], after: list[Tensor], name: str, path: Path, shown: int = 5
) -> None:
    """The first channels' kernels of every layer, one above the other, at initialisation and after
    training; each channel on its own scale, the same in both columns."""
    figure, axes = plt.subplots(
        len(after), 2, figsize=(11, 3.2 * len(after)), layout="constrained", squeeze=False
    )
    for row, pair in enumerate(zip(before, after, strict=True)):
        size = torch.stack([k[:shown].abs().amax(1) for k in pair]).amax(0).clamp_min(1e-12)
        for axis, k, when in zip(axes[row], pair, ("initialised", "trained"), strict=True):
            for channel in range(min(shown, len(k))):
                axis.plot(0.5 * k[channel] / size[channel] - channel, linewidth=0.8)
                axis.axhline(-channel, color="black", linewidth=0.3)
            axis.set(title=f"{name}, layer {row + 1}, {when}", xlim=(0, k.shape[-1]))
            axis.set_yticks(range(1 - min(shown, len(k)), 1))
            axis.set_yticklabels([f"channel {-int(t)}" for t in axis.get_yticks()])
            if row == len(after) - 1:
                axis.set_xlabel("lag (pixels)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_ssm_kernel(rows: list[dict], path: Path) -> None:
    """Time per element with its floor, and how many times seqconv's others take, against length."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    names = list(dict.fromkeys(row["contender"] for row in rows))
    styles = {"forward": "-", "forward+backward": "--"}
    for op, line in styles.items():
        here = sorted((r for r in rows if r["op"] == op and r["gate"]), key=lambda r: r["length"])
        for i, name in enumerate(names):
            found = [r for r in here if r["contender"] == name]
            if not found:
                continue
            x = [r["length"] for r in found]
            label = name if op == "forward" else f"{name}, with gradients"
            style = {"color": f"C{i}", "marker": "os^Dv"[i % 5], "markersize": 5}
            left.plot(x, [r["median"] for r in found], line, label=label, **style)
            q1, q3 = ([r[q] for r in found] for q in ("q1", "q3"))
            left.fill_between(x, q1, q3, color=style["color"], alpha=0.15, linewidth=0)
            if not name.startswith("seqconv") and all("over_seqconv" in r for r in found):
                right.plot(x, [r["over_seqconv"] for r in found], line, **style)
        floor = [(r["length"], r["floor"]) for r in here]
        if floor:
            label = "floor: the multiply-adds" + (", with gradients" if op != "forward" else "")
            left.plot(*zip(*floor, strict=True), line, color="black", linewidth=1, label=label)
    left.set(yscale="log", ylabel="ns per element", title="Time of the kernel")
    right.set(yscale="log", ylabel="times seqconv's time", title="Speed-up of seqconv")
    right.axhline(1, color="black", linewidth=0.8)
    for axis in (left, right):
        report.length_axis(axis, sorted({row["length"] for row in rows}))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    first = rows[0]
    shape = f"{first['channels']} channels, {first['modes']} modes, float32"
    threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
    figure.suptitle(f"{first['device']} ({first['isa']}), {shape}, {threads}", fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)
