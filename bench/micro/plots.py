"""Pictures of training runs, kernels and times."""

from pathlib import Path
from typing import BinaryIO

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from bench.micro import report


def stack(axis, k: Tensor, size: Tensor) -> None:
    """Kernels (channels, length), each divided by its size, one above the other."""
    for channel in range(len(k)):
        axis.plot(0.5 * k[channel] / size[channel] - channel, linewidth=0.8)
        axis.axhline(-channel, color="black", linewidth=0.3)
    axis.set(xlim=(0, k.shape[-1]), ylim=(0.4 - len(k), 0.6))
    axis.set_yticks(range(1 - len(k), 1))
    axis.set_yticklabels([f"channel {-int(t)}" for t in axis.get_yticks()])


def plot_kernels(
    before: list[Tensor], after: list[Tensor], name: str, file: BinaryIO, shown: int = 5
) -> None:
    """The first channels' kernels of every layer, one above the other, at initialisation and after
    training; each channel on its own scale, the same in both columns."""
    figure, axes = plt.subplots(
        len(after), 2, figsize=(11, 3.2 * len(after)), layout="constrained", squeeze=False
    )
    for row, pair in enumerate(zip(before, after, strict=True)):
        pair = [k[:shown] for k in pair]
        size = torch.stack([k.abs().amax(1) for k in pair]).amax(0).clamp_min(1e-12)
        for axis, k, when in zip(axes[row], pair, ("initialised", "trained"), strict=True):
            stack(axis, k, size)
            axis.set_title(f"{name}, layer {row + 1}, {when}")
            if row == len(after) - 1:
                axis.set_xlabel("lag (pixels)")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def plot_family(
    name: str,
    kernels: dict[str, list[Tensor]],
    sensitivities: dict[str, Tensor],
    caption: str,
    path: Path,
    shown: int = 6,
) -> None:
    """Before and after training: the first layer's kernels, their spectra, where their energy lies, and
    what the network's last position sees."""
    figure = plt.figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    above, below = top.subplots(1, 2), bottom.subplots(1, 3)
    first = {when: layers[0] for when, layers in kernels.items()}
    length = next(iter(first.values())).shape[-1]
    count = len(next(iter(first.values())))
    picked = torch.linspace(0, count - 1, min(shown, count)).round().long()
    size = torch.stack([k[picked].abs().amax(1) for k in first.values()]).amax(0).clamp_min(1e-12)
    styles = {  # the thin line in front: the two may coincide
        "initialised": {"color": "tab:orange", "linewidth": 0.8, "zorder": 3},
        "trained": {"color": "tab:blue", "linewidth": 1.6},
    }
    for axis, (when, k) in zip(above, first.items(), strict=True):
        stack(axis, k[picked], size)
        axis.set_yticklabels([str(int(c)) for c in picked.flip(0)])
        axis.set(title=f"kernels of layer 1, {when}", xlabel="lag (pixels)", ylabel="channel")
    spectrum, energy, seen = below
    for when, k in first.items():
        style = styles[when]
        magnitude = 20 * torch.fft.rfft(k, n=2 * length).abs().clamp_min(1e-12).log10()
        band(spectrum, torch.linspace(0, 0.5, length + 1), magnitude, when, **style)
        square = k.double().square()
        share = square.cumsum(1) / square.sum(1, keepdim=True).clamp_min(1e-30)
        band(energy, 1 + torch.arange(length), 100 * share, when, **style)
        gradient = sensitivities[when]
        seen.plot(1 + torch.arange(len(gradient)), gradient / gradient[0], **style)
    spectrum.set(title="spectra", xlabel="frequency (cycles per pixel)", ylabel="magnitude (dB)")
    spectrum.set_xlim(0, 0.5)
    energy.set(title="energy within a lag", xlabel="lag + 1 (pixels)", ylabel="share of energy (%)")
    energy.set(xscale="log", ylim=(0, 102), xlim=(1, length))
    seen.set(title="what the last position sees", xlabel="lag + 1 (pixels)", xscale="log")
    seen.set(ylabel="gradient (rms, 1 at its own pixel)", yscale="log", xlim=(1, length))
    for axis in below:
        axis.grid(alpha=0.3)
    spectrum.legend(frameon=False, fontsize=9)
    figure.suptitle(f"{name}: {caption}", fontsize=12)
    save_small(figure, path)


def band(axis, x: Tensor, values: Tensor, label: str, **style) -> None:
    """The median over the channels, and between the quartiles a shade."""
    low, middle, high = values.double().quantile(torch.tensor([0.25, 0.5, 0.75]).double(), 0)
    axis.plot(x, middle, label=label, **style)
    axis.fill_between(x, low, high, alpha=0.2, linewidth=0, color=style["color"])


def plot_limit(columns: list[dict], dt: float, u: Tensor, dt_u: float, path: Path) -> None:
    """Kernels above, responses to u below, of S4-LegS and of S4D-LegS with half of B, by state size."""
    figure, axes = plt.subplots(
        2, len(columns), figsize=(10, 6), layout="constrained", squeeze=False, sharey="row"
    )
    for (above, below), column in zip(axes.T, columns, strict=True):
        s4, s4d = column["kernels"]
        t = dt * torch.arange(len(s4))
        above.plot(t, s4d, color="tab:blue", linewidth=0.6, label="S4D-LegS, B / 2")
        above.plot(t, s4, color="tab:orange", linewidth=1.6, label="S4-LegS")
        above.set(title=f"N = {column['size']}: kernels {column['apart']:.0%} apart", xlabel="time")
        t = dt_u * torch.arange(len(u))
        s4, s4d = column["responses"]
        below.plot(t, u, color="tab:gray", linestyle=":", linewidth=1.2, label="input")
        below.plot(t, s4, color="tab:orange", linewidth=3, label="S4-LegS")
        below.plot(t, s4d, color="tab:blue", linewidth=1.2, label="S4D-LegS, B / 2")
        below.set(title=f"responses {column['error']:.2%} apart", xlabel="time")
    axes[0][0].set(ylabel="kernel of state 0", ylim=(-0.5, 2))
    axes[1][0].set(ylabel="state 0")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles = axes[1][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    save_small(figure, path)


def save_small(figure, path: Path) -> None:
    """As a picture of 128 colours, a third of the size and hardly another to the eye."""
    from PIL import Image

    figure.savefig(path, dpi=100)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


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
            style = {"color": f"C{i}", "marker": "os^DvP*"[i % 7], "markersize": 5}
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
