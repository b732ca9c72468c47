"""What bench.streaming compares: convolutions and a recurrence whose inputs come one at a time.

A contender is whole, and takes every step of a stream, or it is sampled: its time at a position does not depend on
the steps before, and is measured at some positions only.
"""

import copy
from collections import Counter
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from bench.micro.timing import Clock, interleaved, quartiles
from seqconv import S4D, fftconv
from seqconv.backends.protocol import BLOCK
from seqconv.ops.stream import period_of
from seqconv.streaming import StreamingConv

OURS, SPREAD, ANEW, DOT, RECURRENCE = CONTENDERS = (
    "seqconv",
    "seqconv, spread",
    "fftconv anew",
    "dot product",
    "S4D's recurrence",
)
WHOLE = {OURS: False, SPREAD: True}  # and whether the state is spread
TILES, CONVOLUTIONS = "tiles alone", "tiles by fftconv"  # measured beside the contenders
CHECKED = (
    4  # channels whose outputs are compared at every position; at some positions, all channels are
)
RECURRENT_STEPS = 300


def positions(length: int, count: int) -> list[int]:
    """Numbers of inputs so far at which sampled contenders are timed: 1, `length` and others in between, half of
    them as a geometric and half as an arithmetic sequence."""
    half = max(2, count // 2)
    geometric = {round(length ** (i / (half - 1))) for i in range(half)}
    return sorted(geometric | {max(1, round(length * (i + 1) / half)) for i in range(half)})


def integrated(at: list[int], seconds: list[float]) -> float:
    """The sum over all steps up to at[-1] of a time known at some, by the trapezoid rule."""
    pairs = zip(at, at[1:], seconds, seconds[1:], strict=False)
    area = sum((b - a) * (x + y) / 2 for a, b, x, y in pairs)
    return area + (seconds[0] + seconds[-1]) / 2


class Problem:
    """Taps (channels, length), of which those at lag t are about 1 / sqrt(t + 1) large, so that outputs at all
    positions are equally large; and tokens (length, batch, channels)."""

    def __init__(self, batch: int, channels: int, length: int, count: int):
        torch.manual_seed(0)
        self.batch, self.channels, self.length = batch, channels, length
        self.taps = torch.randn(channels, length) / torch.arange(1, length + 1).sqrt()
        self.tokens = torch.randn(length, batch, channels)
        self.at = positions(length, count)
        self.checked = torch.linspace(0, channels - 1, min(CHECKED, channels)).long()

    def exact(self) -> tuple[Tensor, Tensor]:
        """In float64, the outputs at `at`, (positions, batch, channels), by their definition, and those of the
        channels `checked` at every position, (length, batch, checked), by torch.fft."""
        some = torch.empty(len(self.at), self.batch, self.channels, dtype=torch.float64)
        for channels in torch.arange(self.channels).split(16):
            x = self.tokens[..., channels].double().movedim(0, -1)  # (b h l)
            back = self.taps[channels].double().flip(-1)
            for i, n in enumerate(self.at):
                some[i][:, channels] = (x[..., :n] * back[:, -n:]).sum(-1)
        x = self.tokens[..., self.checked].double().movedim(0, -1)
        spectrum = torch.fft.rfft(self.taps[self.checked].double(), 2 * self.length)
        every = torch.fft.irfft(torch.fft.rfft(x, 2 * self.length) * spectrum, 2 * self.length)
        return some, every[..., : self.length].movedim(-1, 0)


def stream(conv: StreamingConv, problem: Problem, spread: bool) -> tuple[list[float], list[Tensor]]:
    """The seconds of every step, and the outputs as Problem.exact has them."""
    state = conv.init_state(problem.batch, spread=spread)
    every = torch.empty(problem.length, problem.batch, len(problem.checked))
    some, seconds, at = [], [], set(problem.at)
    for t, u in enumerate(problem.tokens.unbind()):
        start = perf_counter()
        y, _ = conv.step(u, state)
        seconds.append(perf_counter() - start)
        every[t] = y[:, problem.checked]
        if t + 1 in at:
            some.append(y)
    return seconds, [torch.stack(some), every]


def sampled(problem: Problem) -> dict[str, dict[str, Callable[[int], Tensor]]]:
    """Contender -> the ways to compute it -> y (batch, channels) after n inputs. What a way keeps of the past lies as
    it is read fastest."""
    taps, back = problem.taps, problem.taps.flip(-1).contiguous()
    past = problem.tokens.movedim(0, -1).contiguous()  # (b h l)
    by_channel = past.transpose(0, 1)  # (h b l)
    by_time = problem.tokens.movedim(-1, 0).contiguous()  # (h l b)
    return {
        ANEW: {"fftconv": lambda n: fftconv(past[..., :n], taps[:, :n])[..., -1]},
        DOT: {
            "einsum": lambda n: torch.einsum("bhn,hn->bh", past[..., :n], back[:, -n:]),
            "vecdot": lambda n: torch.linalg.vecdot(past[..., :n], back[:, -n:]),
            "matrix-vector": lambda n: _rows(
                torch.bmm(by_channel[..., :n], back[:, -n:].unsqueeze(-1)).squeeze(-1)
            ),
            "vector-matrix": lambda n: _rows(
                torch.bmm(back[:, -n:].unsqueeze(1), by_time[:, :n]).squeeze(1)
            ),
        },
    }


def _rows(y: Tensor) -> Tensor:
    return y.transpose(0, 1)


class Recurrence:
    """S4D(channels).step without the activation, the linear map and GLU. Its time is the same at every position."""

    def __init__(self, problem: Problem):
        torch.manual_seed(0)
        self.layer = S4D(problem.channels, activation=None, postact=None).eval()
        self.layer.linear = nn.Identity()
        self.x = problem.tokens[:RECURRENT_STEPS]

    def exact(self) -> Tensor:
        layer = copy.deepcopy(self.layer).double()
        return layer(self.x.double().transpose(0, 1)).transpose(0, 1)

    def __call__(self) -> tuple[float, Tensor]:
        """The seconds of a step, and the outputs of RECURRENT_STEPS steps or fewer."""
        state, found, seconds = self.layer.init_state(self.x.shape[1]), [], []
        for x in self.x:
            start = perf_counter()
            y, state = self.layer.step(x, state)
            seconds.append(perf_counter() - start)
            found.append(y)
        return sum(seconds) / len(seconds), torch.stack(found)


def tile_counts(length: int) -> Counter:
    """Size of a tile -> how many there are in a stream of `length` steps with as many taps."""
    period = period_of(length)
    return Counter(min(end & -end, period) for end in range(BLOCK, length + 1, BLOCK))


def tiles(conv: StreamingConv, problem: Problem, budget: float, clock: Clock) -> dict[str, float]:
    """Seconds of all tiles of a stream, each size measured alone.

    TILES is the stream's own tile: a step after which a tile of that size is due, less the step before it, after which
    none is. CONVOLUTIONS is fftconv of the same inputs, taps and outputs, contiguous: it makes the spectrum of the
    taps too, which a tile has.
    """
    state = conv.init_state(problem.batch)
    state.inputs.normal_()
    u = problem.tokens[0]
    counts = tile_counts(problem.length)
    padded = torch.nn.functional.pad(problem.taps, (0, 2 * max(counts, default=0)))
    found = dict.fromkeys((TILES, CONVOLUTIONS), 0.0)
    for n, count in counts.items():
        x = torch.randn(problem.batch, problem.channels, n)
        k, k_rev = padded[:, n : 2 * n].contiguous(), padded[:, 1:n].flip(-1).contiguous()
        times = interleaved(
            {
                "before": lambda: conv.step(u, state),
                TILES: lambda: conv.step(u, state),
                CONVOLUTIONS: lambda x=x, k=k, k_rev=k_rev: fftconv(x, k, k_rev=k_rev),
            },
            budget / len(counts),
            clock,
            {
                "before": lambda n=n: state.clock.fill_(n - 2),
                TILES: lambda n=n: state.clock.fill_(n - 1),
            },
        )
        pairs = zip(times[TILES], times["before"], strict=True)
        times[TILES] = [max(0.0, after - before) for after, before in pairs]
        for name in found:
            found[name] += count * quartiles(times[name])[1]
    return found
