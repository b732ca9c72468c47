"""One picture of all layers at initialisation: kernels, and how much an output depends on each input."""

from pathlib import Path

import torch
from torch import Tensor

import seqconv
from bench.pictures import plt, save_small, stack

LENGTH, CHANNELS, SAMPLES, SHOWN = 1024, 32, 8, 4
LAYERS = {  # family -> how it is made, by its name, with the options that differ from the defaults
    "s4d": (seqconv.S4D, {}),
    "long_conv": (seqconv.LongConv, {"l_max": LENGTH}),
    "sgconv": (seqconv.SGConv, {"l_max": LENGTH}),
    "hyena": (seqconv.Hyena, {"l_max": LENGTH}),
    "butterfly": (seqconv.ButterflyConv, {"l_max": LENGTH}),
}
TWO_SIDED = ("s4d", "long_conv", "sgconv")


def layer(family: str, **options):
    """A new layer with the weights of seed 0, which drops nothing."""
    torch.manual_seed(0)
    make, others = LAYERS[family]
    return make(CHANNELS, **others, **options).eval()


def kernel(made) -> Tensor:
    """Returns the first kernel of each channel, (channels, taps)."""
    with torch.no_grad():
        return (made.filter if hasattr(made, "filter") else made.kernel)(LENGTH)[0]


def field(made) -> tuple[Tensor, Tensor]:
    """Returns lags and how much the output in the middle depends on the input at each, future ones below 0.

    It is the root mean square over samples and channels of the gradient of a random sum of that output's
    channels, divided by its value at lag 0. The inputs are standard normal.
    """
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, LENGTH, CHANNELS, generator=draw, requires_grad=True)
    weights = torch.randn(SAMPLES, CHANNELS, generator=draw)
    middle = LENGTH // 2
    (gradient,) = torch.autograd.grad((made(x)[:, middle] * weights).sum(), x)
    size = gradient.square().mean((0, 2)).sqrt()
    return middle - torch.arange(LENGTH), size / size[middle]


def draw_initial(families: list[str], titles: dict[str, str], path: Path) -> None:
    figure, axes = plt.subplots(
        len(families), 2, figsize=(10, 2.1 * len(families)), layout="constrained", squeeze=False
    )
    picked = torch.linspace(0, CHANNELS - 1, SHOWN).round().long()
    for (left, right), family in zip(axes, families, strict=True):
        made = layer(family)
        k = kernel(made)[picked]
        stack(left, k, k.abs().amax(1).clamp_min(1e-12))
        left.set_yticklabels([str(int(c)) for c in picked.flip(0)])
        left.set(title=f"{titles[family]}: kernels", ylabel="channel")
        if family in TWO_SIDED:
            lags, size = field(layer(family, bidirectional=True))
            right.plot(lags, size, color="tab:orange", linewidth=0.8, label="two-sided")
        lags, size = field(made)
        right.plot(lags, size, color="tab:blue", linewidth=1.2, label="causal")
        right.set(title=f"{titles[family]}: what an output sees", ylabel="gradient (rms)")
        # Below this are round-off and, of a causal layer, the future.
        right.set(yscale="log", ylim=(1e-4, 2), xlim=(-LENGTH // 2, LENGTH // 2))
        right.axvline(0, color="black", linewidth=0.5)
        right.grid(alpha=0.3)
    axes[0][1].legend(frameon=False, fontsize=9)
    axes[-1][0].set_xlabel("lag (steps)")
    axes[-1][1].set_xlabel("lag (steps; the future is left of 0)")
    save_small(figure, path)
