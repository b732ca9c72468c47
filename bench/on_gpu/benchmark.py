"""Times of whole calls beside a copy of their bytes, the planner's bound, torch.fft and other contenders. They are
medians of interleaved rounds, and a wrong result gets no time. The `times` steps replay graphs, so that they time the
kernels alone: these are what the targets are about."""

from dataclasses import asdict
from functools import partial

from bench.micro.contenders import BASELINE, ON_GPU, Case, missing
from bench.micro.jobs import BOTH
from bench.micro.measure import enter
from bench.micro.timing import interleaved, peak_bytes, summary
from bench.on_gpu import simulated
from bench.on_gpu.ceilings import MMA
from bench.on_gpu.machine import WrongReplay, poisoned
from bench.on_gpu.steps import PARTLY, RIGHT, WRONG
from bench.on_gpu.targets import BATCH, CHANNELS, FIRST, OTHERS, limit_of, predicted, sized

PAIR = ("seqconv", BASELINE)
SECONDS = 1.0  # for the rounds of one case
SECONDS_ALONE = 0.5  # the same for the kernels alone
KINDS_ALONE = (
    ({}, True),
    ({"op": BOTH[1]}, True),
    ({"op": BOTH[1]}, False),
    ({"mode": "gated"}, True),
)


def bandwidth(log) -> float | None:
    """Returns the bytes per second of a copy, from the step that measured it."""
    found = [row["value"] for row in log.rows("ceiling") if row["name"] == "copy"]
    return found[-1] if found else None


def interval(log) -> float | None:
    """Returns the measured cycles between two tensor core instructions of a scheduler."""
    found = [row["value"] for row in log.rows("ceiling") if row["name"] == f"{MMA[0]}, 4 warps"]
    return found[-1] if found else None


def measure(machine, log, case: Case, names, seconds: float, skip: bool, replay: bool) -> bool:
    """Writes a row of one case for each contender. Returns whether the results of seqconv are right."""
    tensors, dy = case.tensors(machine.device)
    if not skip:
        tensors[2] = None

    def failed(name, error):
        """Tells of a contender that is not there, has no memory, or does not run on this device."""
        if error is not None:
            if name == "seqconv":
                raise error
            log.say(f"{case}, {name}: {' '.join(str(error).split())[:200]}")
            machine.release()

    entrants = enter(case, names, tensors, dy, machine.device, failed, poisoned, tensor_cores=True)
    green, timers = dict(entrants.green), {}
    for name, run in entrants.right.items():
        try:
            timers[name] = machine.timer(run, replay)
        except WrongReplay as error:
            log.say(f"{case}, {name}: {error}")
            green[name] = False
    times = interleaved(timers, seconds, lambda timer: timer())
    copy = bandwidth(log)
    for name, error in entrants.errors.items():
        row = asdict(case) | {"contender": name, "skip": skip, "gate": green[name]}
        row |= {"error_l2": error[0], "error_max": error[1], "median": None}
        row |= {"floor_copy": case.bytes() / copy if copy else None}
        if name in times:
            clock, usual = timers[name].clock, timers.get(BASELINE)
            compared = usual is not None and usual.clock == clock
            row |= summary(times[name], times[BASELINE] if compared else None) | {"clock": clock}
            row |= {"peak_bytes": peak_bytes(entrants.calls[name], machine.device)}
        if name == "seqconv":
            row |= predicted(case, machine.limits) | {"target": limit_of(row)}
            launched = machine.launched(entrants.calls[name])
            count = case.batch * case.channels
            row["kernels"] = launched
            row["simulated"] = simulated.seconds(launched, count, interval(log), simulated.known())
        log.row("time", **row)
        log.say(line(row))
    return green["seqconv"]


def line(row: dict) -> str:
    """Returns a row as a line of text, with everything that it has to be compared with."""
    case = Case.of(row)
    skip = "" if row["skip"] else " without skip"
    text = f"{case}{skip}, {row['contender']}: "
    if not row["gate"]:
        return f"{text}WRONG, error {row['error_l2']:.1e}"
    if row["median"] is None:
        return f"{text}right, not timed"
    parts = [f"{row['median'] * 1e3:.4f} ms ({row['q1'] * 1e3:.4f} to {row['q3'] * 1e3:.4f})"]
    if row["floor_copy"]:
        parts.append(
            f"{row['median'] / row['floor_copy']:.2f} times a copy's {row['floor_copy'] * 1e3:.4f}"
        )
    if row.get("target"):
        parts.append(f"wanted {row['target']:.2f} times")
    if row.get("predicted"):
        parts.append(f"predicted bound {row['predicted'] * 1e3:.4f}")
    if row.get("simulated"):
        parts.append(f"simulated {row['simulated'] * 1e3:.4f}")
    if row.get("ratio") and row["contender"] != BASELINE:
        parts.append(f"{row['ratio']:.2f} times {BASELINE}'s speed")
    return text + ", ".join([*parts, f"error {row['error_l2']:.1e}", row["clock"]])


def cases(length: int, dry: bool):
    """Yields (case, contenders) of one length, the most informative first."""
    bf16 = {"dtype": "bfloat16"}
    yield sized(length, dry, **bf16), (*PAIR, *ON_GPU)
    yield sized(length, dry, op=BOTH[1], **bf16), PAIR
    yield sized(length, dry, mode="two_sided", **bf16), PAIR
    yield sized(length, dry, mode="gated", **bf16), (*PAIR, ON_GPU[0])
    yield sized(length, dry), PAIR


def each(machine, log, todo, seconds: float, replay: bool) -> int:
    """Measures every (case, contenders, skip) of `todo` for which there is time."""
    right, longest, seconds = True, 0.0, 0.02 if machine.dry else seconds
    for i, (case, names, skip) in enumerate(todo):
        if log.left() < 1.5 * longest:
            log.say(f"not reached: {', '.join(str(case) for case, *_ in todo[i:])}")
            return PARTLY if right else WRONG
        start = log.left()
        right &= measure(machine, log, case, names, seconds, skip, replay)
        machine.release()
        longest = max(longest, start - log.left())
    return RIGHT if right else WRONG


def beside(machine, log, lengths) -> int:
    absent = missing()
    log.say(f"not installed: {', '.join(n for n in ON_GPU if n in absent) or 'nothing'}")
    todo = [
        (case, [name for name in names if name not in absent], True)
        for length in lengths
        for case, names in cases(length, machine.dry)
    ]
    return each(machine, log, todo, SECONDS, replay=False)


def alone(machine, log, lengths) -> int:
    todo = []
    for length in lengths:
        batch, channels, steps = (2, 1, length // 16) if machine.dry else (BATCH, CHANNELS, length)
        shape = {"dtype": "bfloat16", "batch": batch, "channels": channels, "length": steps}
        todo += [(Case(**shape, **options), ["seqconv"], skip) for options, skip in KINDS_ALONE]
    return each(machine, log, todo, SECONDS_ALONE, replay=True)


def first(measured, machine, log) -> int:
    return measured(machine, log, [FIRST])


def others(measured, machine, log) -> int:
    return measured(machine, log, OTHERS[:1] if machine.dry else OTHERS)


STEPS = {
    "benchmark-4k": partial(first, beside),
    "benchmark": partial(others, beside),
    "times-4k": partial(first, alone),
    "times": partial(others, alone),
}
