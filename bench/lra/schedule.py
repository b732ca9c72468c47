"""How long the steps of a run take, how many of them it has, where it is evaluated, and its learning rate."""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import nn

import seqconv
from bench.lra.batches import Batch, tensors
from bench.lra.model import loss_of
from bench.lra.options import Config
from bench.micro import natural

Contenders = dict[str, tuple[Any, list[Batch]]]  # name -> (convolution, batches)
TORCH_FFT = (
    "torch.fft"  # as a convolution: bench/micro/natural.py, in the faster of its two layouts
)


@dataclass(frozen=True)
class Schedule:
    steps: int  # of the optimiser; a multiple of period
    period: int  # steps between evaluations
    warmup: int
    cosine: int  # the step at which the learning rate would be zero
    share: float  # of the recipe's samples

    def factor(self, step: int) -> float:
        """Of the learning rate: it rises from 0 to 1 over the warm-up, then falls along half a cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.cosine - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, of a validation and of the test, measured before training."""

    step: float
    validation: float
    test: float


def make(config: Config, samples: int, whole: int, timing: Timing | None = None) -> Schedule:
    """Returns the recipe's schedule, or what of it fits into max_minutes together with the evaluations.

    At most a fifth of the time goes into evaluations of the validation split. A shortened schedule is shortened as
    a whole: its cosine too, and its warm-up to at most a tenth.

    samples: of the training split. whole: of all the recipe's epochs, by which `share` is measured.
    """
    optim, run = config.optim, config.run
    per_epoch = samples // optim.batch
    full = optim.epochs * per_epoch
    wanted = min(run.eval_steps or per_epoch, full)
    count = -(-full // wanted)
    period = -(
        -full // count
    )  # all periods are equal, so there may be a few more steps than `full`
    cosine, warmup = optim.schedule_steps or period * count, optim.warmup
    if timing is not None:
        seconds = 60 * run.max_minutes - timing.test
        most = max(1, int(0.2 * seconds / max(timing.validation, 1e-9)))
        possible = int((seconds - min(count, most) * timing.validation) / timing.step)
        if possible < full:
            count = max(1, min(most, round(max(1, possible) / wanted)))
            possible = max(1, int((seconds - count * timing.validation) / timing.step))
            longer = -(-possible // count)
            pairs = [(p, min(count, max(1, possible // p))) for p in (longer, max(1, longer - 1))]
            period, count = max(pairs, key=lambda pair: pair[0] * pair[1])
            shortened = period * count / full
            cosine = max(1, round((optim.schedule_steps or full) * shortened))
            warmup = min(warmup, period * count // 10)
    return Schedule(period * count, period, warmup, cosine, period * count * optim.batch / whole)


# ---- what a step takes ----


def autocast(precision: str) -> tuple[torch.dtype, bool]:
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return half.get(precision, torch.bfloat16), precision in half


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: nn.Module, config: Config, splits, device, world: int = 1, context=None
) -> Timing:
    """Times a few steps and evaluation batches of a copy of the model. It draws no random number from the run's.

    world: the number of processes, or of groups of them, that share a batch. context: how those of a group divide
    the steps, which all of them time together.
    """
    model = copy.deepcopy(model).to(device)
    if context is not None:
        context.divide(model)
    optim = config.optim
    part = max(1, optim.batch // optim.accumulate // world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    rng = torch.Generator().manual_seed(0)

    def seconds(split, train: bool, repeats: int) -> float:
        found = []
        for _ in range(repeats + 2):
            indices = torch.randint(len(split), (min(part, len(split)),), generator=rng).numpy()
            start = time.perf_counter()
            batch = tensors(split, indices, packed=config.run.packed).to(device)
            with torch.autocast(device.type, *autocast(config.run.precision)):
                with torch.set_grad_enabled(train):
                    loss = loss_of(model(*batch.inputs), batch.labels)
            if train:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            synchronize(device)
            found.append(time.perf_counter() - start)
        return median(found[2:])

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        step = seconds(splits["train"], True, 10) * optim.accumulate
        model.eval()
        per_batch = seconds(splits["val"], False, 3)
    per_sample = per_batch / (part * world)
    return Timing(step, len(splits["val"]) * per_sample, len(splits["test"]) * per_sample)


class Steps:
    """Whole training steps of a copy of a model, with dropout and AdamW. The learning rate is zero, so that every step
    begins with the same weights."""

    def __init__(self, model: nn.Module, precision: str):
        self.model, self.precision = copy.deepcopy(model), precision
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.dtype = next(self.model.parameters()).dtype

    def __call__(self, convolution: Callable | str, batch: Batch) -> float:
        """Returns the seconds of a step in which `convolution` takes the place of seqconv.fftconv, or in which layers
        are written with torch.fft in the layout of that name. In evaluation the weights have gradients, but the
        optimiser does nothing."""
        x, *rows = batch.inputs
        x = x.to(self.dtype) if x.is_floating_point() else x
        with contextlib.ExitStack() as stack:
            if convolution in natural.LAYOUTS:
                stack.enter_context(natural.in_layers(convolution))
            else:
                for place in natural.PLACES:
                    stack.enter_context(mock.patch(place, convolution))
            synchronize(x.device)
            start = time.perf_counter()
            self.optimizer.zero_grad()
            with torch.autocast(x.device.type, *autocast(self.precision)):
                loss = loss_of(self.model(x, *rows), batch.labels)
            loss.backward()
            if self.model.training:
                self.optimizer.step()
            synchronize(x.device)
            return time.perf_counter() - start

    def differ(self, contenders: Contenders) -> float:
        """Returns the worst relative L2 difference of a gradient from the last contender's, without dropout and with
        the running statistics of norms. Raises RuntimeError if it is 1e-3 or more."""
        self.model.eval()
        found = []
        for convolution, batches in contenders.values():
            self(convolution, batches[0])
            found.append([p.grad for p in self.model.parameters()])
        theirs = found[-1]
        # A parameter before a norm may have a gradient of round-off alone, so the whole gradient is the scale.
        whole = torch.stack([b.norm() for b in theirs]).norm()
        worst = max(
            ((a - b).norm() / b.norm().clamp_min(1e-3 * whole)).item()
            for ours in found[:-1]
            for a, b in zip(ours, theirs, strict=True)
        )
        if not worst < 1e-3:
            raise RuntimeError(f"gradients differ by {worst:.1e} (relative L2): no time is shown")
        return worst


def time_steps(model: nn.Module, contenders: Contenders, rounds: int, precision: str):
    """Times training steps of contenders in interleaved rounds, after a check that their gradients agree. A contender
    is what computes the convolutions, and batches.

    Returns the seconds of all its batches for each contender and round, the worst difference of a gradient, and the
    most MiB of a step on a GPU for each contender ({} on a CPU).
    """
    layouts = {
        name: natural.LAYOUTS if conv is TORCH_FFT else () for name, (conv, _) in contenders.items()
    }
    contenders = {
        (name, layout): (layout or conv, batches)
        for name, (conv, batches) in contenders.items()
        for layout in layouts[name] or (None,)
    }
    seconds, worst, peaks = _time_steps(model, contenders, rounds, precision)
    fastest = {}
    for name, own in layouts.items():
        ways = [(name, layout) for layout in own or (None,)]
        fastest[name] = min(ways, key=lambda way: median(seconds[way]))
    peaks = {name: peaks[way] for name, way in fastest.items() if way in peaks}
    return {name: seconds[way] for name, way in fastest.items()}, worst, peaks


def _time_steps(model: nn.Module, contenders: dict, rounds: int, precision: str):
    """The same of contenders that say what they compute with."""
    steps, peaks = Steps(model, precision), {}
    worst = steps.differ(contenders)
    steps.model.train()
    convolution, batches = next(iter(contenders.values()))
    steps(convolution, batches[0])  # makes AdamW's state
    for name, (convolution, batches) in contenders.items():
        device = batches[0].x.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        steps(convolution, batches[0])
        if device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(device) / 2**20
    seconds: dict = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (convolution, batches) in contenders.items():
            seconds[name].append(sum(steps(convolution, batch) for batch in batches))
    return seconds, worst, peaks


def compare_step(
    model: nn.Module, batch: Batch, rounds: int, precision: str, padded: Batch | None = None
) -> dict:
    """Times training steps with seqconv.fftconv and with the torch.fft formulation, which has the same samples as
    `padded` where `batch` is a pack, in the faster of its two layouts (bench/micro/natural.py).

    Returns {"seqconv", "torch.fft": medians in milliseconds, "ratio": median of the ratios, "difference": the worst
    relative L2 difference of a gradient}, and on a GPU "peak_mib", the most memory of a step of each. Raises
    RuntimeError if the gradients differ by 1e-3 or more.
    """
    theirs = batch if padded is None else padded
    contenders = {"seqconv": (seqconv.fftconv, [batch]), "torch.fft": (TORCH_FFT, [theirs])}
    seconds, worst, peaks = time_steps(model, contenders, rounds, precision)
    pairs = zip(seconds["seqconv"], seconds["torch.fft"], strict=True)
    found = {name: 1e3 * median(times) for name, times in seconds.items()}
    found |= {"ratio": median(slow / fast for fast, slow in pairs), "difference": worst}
    return found | ({"peak_mib": peaks} if peaks else {})
