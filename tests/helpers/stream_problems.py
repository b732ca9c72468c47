"""Problems for steps of streams, whole ones and single steps from any state, and what is right: both in float64."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accuracy import rel_l2
from torch import Tensor

from seqconv import reference, use_backend
from seqconv.backends import tiles
from seqconv.backends.protocol import BLOCK
from seqconv.ops import stream

# Relative L2 errors of y: of float32 sums, and of the rounding to 16 bits.
BOUNDS = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def rings_for(batch: int, heads: int, channels: int, period: int, **options) -> stream.Rings:
    blocks = period // BLOCK
    return stream.Rings(
        torch.zeros(batch, blocks, channels, BLOCK, **options),
        torch.zeros(batch, blocks, heads, channels, BLOCK, **options),
        torch.zeros(batch, dtype=torch.int64, device=options.get("device")),
    )


@dataclass(frozen=True)
class Stream:
    """A stream from its first step on."""

    batch: int
    heads: int
    channels: int
    taps: int
    steps: int
    spread: bool = False
    activation: str = "none"
    gates: str = ""  # "pre", "post" or both
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.heads}x{self.channels}", f"{self.taps}of{self.steps}"]
        words += [self.activation, self.gates, str(self.dtype).removeprefix("torch.")]
        return "-".join(filter(None, [*words, "spread" * self.spread]))

    def tensors(self, device="cpu") -> dict[str, Tensor | None]:
        """Arguments of reference.fftconv_fft, made on the CPU."""
        rows = self.batch, self.channels, self.steps
        u, pre, post = (
            torch.randn(*s).to(device, self.dtype)
            for s in (rows, rows, (self.batch, self.heads, *rows[1:]))
        )
        k = torch.randn(self.heads, self.channels, self.taps).to(device)
        skip = torch.randn(self.heads, self.channels).to(device)
        return {
            "u": u,
            "k": k,
            "skip": skip,
            "pre_gate": pre if "pre" in self.gates else None,
            "post_gate": post if "post" in self.gates else None,
        }

    def start(self, given, backend=None) -> tuple[stream.Rings, stream.Taps]:
        """A state and what the backend makes of the kernel; without one, what the process uses."""
        device = given["u"].device
        period = stream.period_of(self.taps)
        rings = rings_for(self.batch, self.heads, self.channels, period, device=device)
        if not self.spread:
            rings = rings._replace(clock=rings.clock.cpu())
        with use_backend(backend) if backend else nullcontext():
            return rings, stream.taps_of(given["k"], given["skip"])

    def signals(self, given, t: int) -> list[Tensor | None]:
        """Of one step, with whatever strides they have."""
        names = "u", "pre_gate", "post_gate"
        return [None if given[name] is None else given[name][..., t] for name in names]

    def run(self, given, backend=None) -> Tensor:
        rings, taps = self.start(given, backend)
        steps = range(self.steps)
        options = self.activation, self.spread
        y = [stream.step(*self.signals(given, t), rings, taps, *options) for t in steps]
        return torch.stack(y, -1)

    def expected(self, given) -> Tensor:
        exact = {name: t if t is None else t.double() for name, t in given.items()}
        return reference.fftconv_fft(**exact, activation=self.activation)

    def error(self, y: Tensor, given) -> float:
        assert y.dtype == self.dtype and torch.isfinite(y).all()
        return rel_l2(y, self.expected(given).view_as(y)) / BOUNDS[self.dtype]


def one_step(
    backend,
    batch: int,
    heads: int,
    channels: int,
    period: int,
    clock: Tensor,
    spread: bool,
    device: str = "cpu",
) -> float:
    """The largest relative error that one step from a random state leaves in y and in the state.

    A wrong clock is infinitely wrong.
    """
    rings = rings_for(batch, heads, channels, period)
    rings.inputs.normal_(), rings.sums.normal_(), rings.clock.copy_(clock)
    k, u = torch.randn(heads, channels, period + 1), torch.randn(batch, channels)
    exact = stream.Rings(rings.inputs.double(), rings.sums.double(), rings.clock.clone())
    with use_backend("reference"):
        known = stream.taps_of(k.double(), None)
    y64 = stream.step(u.double(), None, None, exact, known, "none", spread)

    found = stream.Rings(*(t.to(device) for t in rings))
    found = found if spread else found._replace(clock=rings.clock)
    with use_backend(backend):
        taps = stream.taps_of(k.to(device), None)
    y = stream.step(u.to(device), None, None, found, taps, "none", spread)
    if not torch.equal(found.clock.cpu(), exact.clock):
        return torch.inf
    pairs = [(y, y64), (found.inputs, exact.inputs), (found.sums, exact.sums)]
    return max(rel_l2(one.cpu(), wanted) for one, wanted in pairs)


def clocks_of(channels: int, period: int, clock: int) -> list[int]:
    """Of the channels of a sample of a spread stream."""
    return tiles.clocks(torch.tensor([clock]), channels, period, True)[0].tolist()
