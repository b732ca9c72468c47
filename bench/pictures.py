"""Every picture: training curves, kernels, and times against length. matplotlib is imported here only."""

from functools import partial
from pathlib import Path
from statistics import median
from typing import BinaryIO

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from bench import files
from bench.facts import length_name, plural

# ---- training runs ----


def plot_curves(rows: list[dict], info, published: float | None, title: str, path: Path) -> None:
    """Loss and accuracy against steps, with the levels of chance, of the commonest class and of the paper."""
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


# ---- kernels ----


def stack(axis, k: Tensor, size: Tensor) -> None:
    """Draws kernels (channels, length) one above the other, each divided by its size."""
    for channel in range(len(k)):
        axis.plot(0.5 * k[channel] / size[channel] - channel, linewidth=0.8)
        axis.axhline(-channel, color="black", linewidth=0.3)
    axis.set(xlim=(0, k.shape[-1]), ylim=(0.4 - len(k), 0.6))
    axis.set_yticks(range(1 - len(k), 1))
    axis.set_yticklabels([f"channel {-int(t)}" for t in axis.get_yticks()])


def plot_kernels(
    before: list[Tensor], after: list[Tensor], name: str, file: BinaryIO, shown: int = 5
) -> None:
    """The first channels' kernels of every layer, one above the other, at initialisation and after training.

    Each channel has a scale of its own, which is the same in both columns.
    """
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
    styles = {  # the thin line is in front, since the two may coincide
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
    """Draws the median over the channels, and a shade between the quartiles."""
    low, middle, high = values.double().quantile(torch.tensor([0.25, 0.5, 0.75]).double(), 0)
    axis.plot(x, middle, label=label, **style)
    axis.fill_between(x, low, high, alpha=0.2, linewidth=0, color=style["color"])


def plot_limit(columns: list[dict], dt: float, u: Tensor, dt_u: float, path: Path) -> None:
    """S4-LegS and S4D-LegS with half of B, a column for each state size: kernels above, responses to u below."""
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


def save_small(figure, path: Path, dpi: int = 100) -> None:
    """Saves a picture of 48 colours, far apart. It takes a quarter of the space and hardly looks different."""
    from PIL import Image

    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(48, Image.Quantize.MAXCOVERAGE).save(
        path, optimize=True
    )


# ---- times against length ----


def length_axis(axis, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [length_name(n) for n in lengths], minor=False)
    axis.set_xlabel("sequence length")
    axis.grid(alpha=0.3)


def plot_fftconv(rows: list[dict], path: Path) -> None:
    """Time per element with its floors, and speed-up over torch.fft, against length.

    It shows the causal convolution in float32 of 8 samples on one thread with the tuned allocator, or what was
    measured nearest to that.
    """

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

    def per_element(row, value="median"):
        return row[value] * 1e9 / (row["batch"] * row["channels"] * row["length"])

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
        x, y = curve(partial(per_element, value=key), contender="seqconv", **forward)
        left.plot(x, y, line, color="black", linewidth=1, label=name)
    left.set(ylabel="ns per element", title="Causal convolution, forward", ylim=(0.2, None))
    left.set_yscale("log")
    styles = {"forward": ("tab:blue", "o"), "forward+backward": ("tab:red", "s")}
    for op, (color, marker) in styles.items():
        for allocator, line in (("tuned", "-"), ("default", "--")):
            wanted = base | {"allocator": allocator, "op": op, "contender": "seqconv"}
            x, y = curve(lambda r: r["ratio"], **wanted)
            if x:
                label = f"{op}, {allocator} allocator"
                right.plot(x, y, line, color=color, marker=marker, label=label)
    right.axhline(1, color="black", linewidth=1)
    right.set(ylabel="times faster than torch.fft", title="Speed-up of seqconv", ylim=(0, None))
    legend = {"fontsize": 8, "frameon": False, "ncols": 2, "loc": "upper center"}
    for axis in (left, right):
        axis.legend(**legend, bbox_to_anchor=(0.5, -0.14))
        length_axis(axis, lengths)
    figure.suptitle(
        f"{first['device']} ({first['isa']}), float32, {base['batch']} samples, {base['threads']} thread(s)",
        fontsize=10,
    )
    save_small(figure, path, dpi=120)


def plot_ssm_kernel(rows: list[dict], path: Path) -> None:
    """Time per element with its floor, and the time of others over that of seqconv, against length."""
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
        length_axis(axis, sorted({row["length"] for row in rows}))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    first = rows[0]
    shape = f"{first['channels']} channels, {first['modes']} modes, float32"
    shape += f", {plural(first['threads'], 'thread')}"
    figure.suptitle(f"{first['device']} ({first['isa']}), {shape}", fontsize=10)
    save_small(figure, path)


# ---- several processes ----


def plot_parallel(rows: list[dict], path: Path) -> None:
    """Strong and weak scaling, and the bytes that a rank sends, against the number of processes."""
    rows = [r for r in rows if r["tag"] == "scaling" and r["median"]]
    if not rows:
        raise ValueError("nothing to draw: no result was right")
    longest = max(r["length"] for r in rows)
    counts = sorted({r["processes"] for r in rows})
    figure, (strong, weak, sent) = plt.subplots(1, 3, figsize=(14, 5), layout="constrained")
    names = dict.fromkeys((r["work"], r["method"]) for r in rows if r["processes"] > 1)
    for i, (work, method) in enumerate(names):
        for op, line in (("forward", "--"), ("forward+backward", "-")):
            own = [r for r in rows if (r["work"], r["method"], r["op"]) == (work, method, op)]
            style = {
                "color": f"C{i}",
                "marker": "os^DvP*"[i % 7],
                "markersize": 5,
                "linestyle": line,
            }
            label = f"{work}, {method}" + (", forward alone" if op == "forward" else "")
            for axis, value in ((strong, "strong"), (weak, "weak")):
                found = [
                    (r["processes"], r[value][1])
                    for r in own
                    if value in r and (value == "weak" or r["length"] == longest)
                ]
                axis.plot(*zip((1, 1.0), *sorted(found), strict=True), label=label, **style)
            found = [
                (r["processes"], (max(r["sent"]) + max(r["sent_backward"])) / 2**20)
                for r in own
                if r["length"] == longest
            ]
            sent.plot(*zip(*sorted(found), strict=True), **style)
    strong.plot(counts, counts, color="black", linestyle=":", linewidth=1, label="ideal")
    weak.axhline(1, color="black", linestyle=":", linewidth=1)
    title = f"{length_name(longest)} steps"
    strong.set(title=f"Strong scaling: {title} in all", ylabel="times as fast as one process")
    weak.set(
        title=f"Weak scaling: {title} / {counts[-1]} for each", ylabel="time of one process / time"
    )
    sent.set(title=f"Bytes: {title}", ylabel="MiB sent, largest of the ranks")
    sent.set_yscale("log")
    first = rows[0]
    for axis in (strong, weak, sent):
        axis.set_xticks(counts)
        axis.set_xlabel("processes")
        axis.grid(alpha=0.3)
        if counts[-1] > first["cores"] and first["backend"] == "gloo":
            axis.axvspan(first["cores"], counts[-1], color="gray", alpha=0.15, linewidth=0)
    handles = strong.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    where = f"{first['device']} ({first['isa']}), {plural(first['cores'], 'core')}"
    if counts[-1] > first["cores"] and first["backend"] == "gloo":
        where += "; where it is grey, processes share cores"
    figure.suptitle(
        f"{where}; {first['backend']}, d_model {first['d_model']}, float32", fontsize=10
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- streams ----


def plot_streaming(rows: list[dict], path: Path) -> None:
    """Time of a step against its position in the longest stream, and the mean against the length, for each batch."""
    rows = [r for r in rows if r["gate"] and r["threads"] == rows[-1]["threads"]]
    if not rows:
        raise ValueError("nothing to draw: no result was right")
    batches, names = ({r[x]: None for r in rows} for x in ("batch", "contender"))
    longest = max(r["length"] for r in rows)
    size = {"figsize": (11, 3.6 * len(batches)), "layout": "constrained"}
    figure, axes = plt.subplots(len(batches), 2, squeeze=False, sharey=True, **size)
    for (left, right), batch in zip(axes, batches, strict=True):
        for i, name in enumerate(names):
            own = [r for r in rows if (r["batch"], r["contender"]) == (batch, name)]
            own = sorted({r["length"]: r for r in own}.values(), key=lambda r: r["length"])
            style = {"color": f"C{i}", "marker": "os^Dv"[i % 5], "markersize": 4}
            for row in own:
                if row["length"] == longest:
                    curve, below = row["curve"], {**style, "linewidth": 1}
                    left.plot(curve["position"], [1e6 * t for t in curve["mean"]], **below)
                    if "worst" in curve:
                        worst = [1e6 * t for t in curve["worst"]]
                        below |= {"linestyle": ":", "marker": ""}
                        left.plot(curve["position"], worst, **below)
            times = [(r["length"], 1e6 * r["total"] / r["length"]) for r in own]
            if times:
                right.plot(*zip(*times, strict=True), label=name, **style)
        title = plural(batch, "sample")
        left.set(title=f"{title}: a step, by its position", ylabel="us (dotted: the worst)")
        right.set(title=f"{title}: a step, mean over the stream", yscale="log")
        length_axis(right, sorted({r["length"] for r in rows}))
        left.set_xscale("log", base=2)
        left.set_xlabel(f"position in a stream of {length_name(longest)} steps")
        left.grid(alpha=0.3)
    handles = right.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    first = rows[-1]
    shape = f"{first['channels']} channels, float32, {plural(first['threads'], 'thread')}"
    figure.suptitle(f"{first['device']} ({first['isa']}), {shape}", fontsize=10)
    save_small(figure, path)
