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


def make(config: Config, samples: int, recipe_epochs: int, timing: Timing | None = None) -> Plan:
    """The recipe's schedule, or what of it fits into max_minutes with the evaluations: at most a
    fifth of the time goes into those of the validation split. A shortened schedule is shortened
    as a whole, cosine and all, with a warm-up of at most a tenth."""
    optim, run = config.optim, config.run
    per_epoch = samples // optim.batch
    full = steps = optim.epochs * per_epoch
    period = run.eval_steps or per_epoch
    count = max(1, round(steps / period))
    if timing is not None:
        seconds = 60 * run.max_minutes - timing.test
        most = max(1, int(0.2 * seconds / max(timing.validation, 1e-9)))
        possible = int((seconds - min(count, most) * timing.validation) / timing.step)
        if possible < full:
            steps = max(1, possible)
            count = max(1, min(most, round(steps / period)))
            possible = int((seconds - count * timing.validation) / timing.step)
            steps = min(full, max(1, possible))
    period = max(1, steps // count)
    cosine = optim.schedule_steps or full
    warmup = optim.warmup
    if period * count < full and timing is not None:
        cosine = max(1, round(cosine * period * count / full))
        warmup = min(warmup, period * count // 10)
    elif optim.schedule_steps is None:
        cosine = period * count
    share = period * count * optim.batch / (recipe_epochs * samples)
    return Plan(period * count, period, warmup, cosine, share)
