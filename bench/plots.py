"""Pictures of training runs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor


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
    right.legend(loc="lower right", frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_kernels(
    before: list[Tensor], after: list[Tensor], name: str, path: Path, shown: int = 6
) -> None:
    """The first channels' kernels of every layer, at initialisation and after training."""
    figure, axes = plt.subplots(
        len(after), 2, figsize=(10, 2.6 * len(after)), layout="constrained", squeeze=False
    )
    for row, pair in enumerate(zip(before, after, strict=True)):
        limit = max(1.05 * k[:shown].abs().max().item() for k in pair)
        for axis, k, when in zip(
            axes[row], pair, ("at initialisation", "after training"), strict=True
        ):
            axis.plot(k[:shown].T, linewidth=0.8)
            axis.set(
                title=f"{name}, layer {row + 1}, {when}",
                ylim=(-limit, limit),
                xlim=(0, k.shape[-1]),
            )
            axis.grid(alpha=0.3)
            if row == len(after) - 1:
                axis.set_xlabel("lag (pixels)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
