"""The kernels' own times, from graph replays, without another contender: what the targets are about."""

from bench.micro.contenders import Case
from bench.on_gpu.benchmark import each
from bench.on_gpu.targets import BATCH, CHANNELS, FIRST, OTHERS

BOTH = "forward+backward"
KINDS = (({}, True), ({"op": BOTH}, True), ({"op": BOTH}, False), ({"mode": "gated"}, True))
SECONDS = 0.5  # of the rounds of one case


def run(machine, log, lengths) -> int:
    todo = []
    for length in lengths:
        batch, channels, steps = (2, 1, length // 16) if machine.dry else (BATCH, CHANNELS, length)
        shape = {"dtype": "bfloat16", "batch": batch, "channels": channels, "length": steps}
        todo += [(Case(**shape, **options), ["seqconv"], skip) for options, skip in KINDS]
    return each(machine, log, todo, SECONDS, replay=True)


def others(machine, log) -> int:
    return run(machine, log, OTHERS[:1] if machine.dry else OTHERS)


STEPS = {"times-4k": lambda machine, log: run(machine, log, [FIRST]), "times": others}
