"""The kernels' own times, from graph replays, without another contender: what the targets are about."""

from bench.contenders import Case
from bench.on_gpu.benchmark import measure
from bench.on_gpu.targets import BATCH, CHANNELS, FIRST, OTHERS

BOTH = "forward+backward"
KINDS = (({}, True), ({"op": BOTH}, True), ({"op": BOTH}, False), ({"mode": "gated"}, True))
SECONDS = 0.5


def run(machine, log, lengths) -> bool:
    right = True
    for length in lengths:
        for options, skip in KINDS:
            shape = (2, 1, length // 16) if machine.dry else (BATCH, CHANNELS, length)
            batch, channels, steps = shape
            case = Case(dtype="bfloat16", batch=batch, channels=channels, length=steps, **options)
            seconds = 0.02 if machine.dry else SECONDS
            right &= measure(machine, log, case, ["seqconv"], seconds, skip, replay=True)
            machine.release()
    return right


def others(machine, log) -> bool:
    return run(machine, log, OTHERS[:1] if machine.dry else OTHERS)


STEPS = {"times-4k": lambda machine, log: run(machine, log, [FIRST]), "times": others}
