"""How many steps a run has, where it is evaluated, and its learning rate; without torch."""

import math
from dataclasses import dataclass

from bench.lra.options import Config


@dataclass(frozen=True)
class Plan:
    steps: int  # of the optimiser; a multiple of period
    period: int  # steps between evaluations
    warmup: int
    cosine: int  # step at which the learning rate would be zero
    share: float  # of the recipe's samples

    def factor(self, step: int) -> float:
        """Of the learning rate: linear from 0 to 1 over the warm-up, then half a cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.cosine - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Timing:
    """Seconds, measured before training."""

    step: float
    validation: float
    test: float


def make(config: Config, samples: int, whole: int, timing: Timing | None = None) -> Plan:
    """The recipe's schedule, or what of it fits into max_minutes with the evaluations: at most a
    fifth of the time goes into those of the validation split. A shortened schedule is shortened
    as a whole, cosine and all, with a warm-up of at most a tenth.

    samples: of the training split. whole: of all the recipe's epochs, by which `share` is measured.
    """
    optim, run = config.optim, config.run
    per_epoch = samples // optim.batch
    full = optim.epochs * per_epoch
    wanted = min(run.eval_steps or per_epoch, full)
    count = -(-full // wanted)
    period = -(-full // count)  # the last one as long as the others: a few steps more than `full`
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
    return Plan(period * count, period, warmup, cosine, period * count * optim.batch / whole)
