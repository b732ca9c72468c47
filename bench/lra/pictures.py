"""Pictures of a run."""

from pathlib import Path

import matplotlib

from bench.lra import files

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_curves(rows: list[dict], info, published: float | None, title: str, path: Path) -> None:
    """Loss and accuracy against steps, with the levels of chance, the commonest class and the paper."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, what in ((left, "loss"), (right, "accuracy")):
        for name, label in ((what, "training"), (f"val_{what}", "validation")):
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            marker = "o-" if name.startswith("val") else "-"
            axis.plot(
                *zip(*points, strict=True), marker, label=label, markersize=3
            ) if points else None
        axis.set(xlabel="steps", ylabel=what)
        axis.grid(alpha=0.3)
    left.set(ylabel="cross-entropy")
    right.axhline(info.chance, color="black", linestyle=":", linewidth=1, label="chance")
    right.axhline(info.majority, color="tab:gray", linestyle="--", linewidth=1, label="majority")
    if published is not None:
        right.axhline(published / 100, color="tab:green", linewidth=1, label="published")
    right.set(ylim=(0, 1))
    right.legend(fontsize="small", frameon=False)
    figure.suptitle(title + (" (generated data)" if info.generated else ""))
    files.atomically(path, lambda file: figure.savefig(file, dpi=120))
    plt.close(figure)
