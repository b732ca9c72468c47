"""Pictures of training runs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
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
