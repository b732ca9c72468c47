"""Steps of streams. They are proved against float64 first. Then they are timed, plain ones as Python calls them, and
spread ones as replays of a graph that holds one step."""

import time
from dataclasses import replace

import torch
from stream_problems import Stream

from bench.on_gpu.machine import poisoned
from bench.on_gpu.steps import PARTLY, RIGHT, WRONG
from seqconv.ops import stream

PROVED = (
    Stream(3, 2, 37, 97, 400, gates="pre post", activation="gelu"),
    Stream(2, 1, 70, 1000, 3000, dtype=torch.bfloat16),
)
TAPS, CHANNELS, BATCHES = (1024, 16384, 65536), 256, (1, 16)
COUNT = 2048  # of a plain stream that are timed together


def proved(machine, log) -> bool:
    right = True
    for case in PROVED[:1] if machine.dry else PROVED:
        for spread in (False, True):
            one = replace(case, spread=spread)
            torch.manual_seed(0)
            given = one.tensors(machine.device)
            with poisoned():
                error = one.error(one.run(given), given)
            right &= error < 1
            log.say(f"{'ok' if error < 1 else 'WRONG'} {one}: {error:.2f} of the allowed error")
            log.row("stream", case=str(one), right=error < 1, error=error)
    return right


def timed(machine, case: Stream, count: int) -> float:
    """The seconds of a step."""
    given = case.tensors(machine.device)
    rings, taps = case.start(given)
    (u, *gates), options = case.signals(given, 0), (case.activation, case.spread)

    def step():
        return stream.step(u, *gates, rings, taps, *options)

    if case.spread:
        return machine.replays(step)()
    step()
    machine.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    machine.synchronize()
    return (time.perf_counter() - start) / count


def run(machine, log) -> int:
    if not proved(machine, log):
        return WRONG
    sizes = [(taps, batch) for taps in TAPS for batch in BATCHES]
    for taps, batch in [(64, 1)] if machine.dry else sizes:
        if log.left() < 5:
            return PARTLY
        for spread in (False, True):
            case = Stream(batch, 1, 3 if machine.dry else CHANNELS, taps, 1, spread)
            seconds = timed(machine, case, 40 if machine.dry else COUNT)
            machine.release()
            log.say(f"{case}: {seconds * 1e6:.1f} us for a step")
            log.row("stream time", case=str(case), spread=spread, seconds=seconds)
    return RIGHT


STEPS = {"streams": run}
