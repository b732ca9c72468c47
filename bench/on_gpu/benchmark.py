"""Times of whole calls beside a copy of their bytes, the planner's bound, torch.fft and what else is there. Interleaved
rounds, medians, and no time for a wrong result."""

from dataclasses import asdict

from bench.micro.contenders import BASELINE, Case, make, missing
from bench.micro.gate import call, checked, errors, oracle, tolerance
from bench.micro.timing import interleaved, peak_bytes, quartiles, ratios
from bench.on_gpu.machine import WrongReplay, poisoned
from bench.on_gpu.steps import PARTLY, RIGHT, WRONG
from bench.on_gpu.targets import FIRST, OTHERS, limit_of, predicted, sized

PEERS = ("flashfftconv", "subquadratic_ops", "nvsubquadratic")
PAIR = ("seqconv", BASELINE)
SECONDS = 1.0  # of the rounds of one case


def bandwidth(log) -> float | None:
    """Bytes per second of a copy, from the step that measured it."""
    found = [row["value"] for row in log.rows("ceiling") if row["name"] == "copy"]
    return found[-1] if found else None


def measure(machine, log, case: Case, names, seconds: float, skip: bool, replay: bool) -> bool:
    """Rows of one case, one per contender; whether seqconv's results are right."""
    tensors, dy = case.tensors(machine.device)
    if not skip:
        tensors[2] = None
    part = checked(case, tensors, dy)
    exact = oracle(*part[:3])
    functions, found = {}, {}
    for name in names:
        try:
            function = make(name, case, machine.device)
            if function is None:
                continue
            run = lambda function=function: call(case, function, tensors, dy)  # noqa: E731
            with poisoned():
                found[name] = errors(case, part[3](run()), exact)
        except (ImportError, RuntimeError) as error:  # not there, no memory, or not on this device
            if name == "seqconv":
                raise
            log.say(f"{case}, {name}: {' '.join(str(error).split())[:200]}")
            machine.release()
            continue
        functions[name] = run
    allowed = tolerance(case, found.get(BASELINE, (1e-3, 1e-2)), exact, "gpu")
    green = {}
    for name, error in found.items():
        limits = allowed if name == "seqconv" else [1e3 * x for x in allowed]
        green[name] = all(e <= limit for e, limit in zip(error, limits, strict=True))
    del exact
    timers = {}
    for name in [name for name in functions if green[name]]:
        try:
            timers[name] = machine.timer(functions[name], replay)
        except WrongReplay as error:
            log.say(f"{case}, {name}: {error}")
            green[name] = False
    times = interleaved(timers, seconds, lambda timer: timer())
    copy = bandwidth(log)
    for name, error in found.items():
        row = asdict(case) | {"contender": name, "skip": skip, "gate": green[name]}
        row |= {"error_l2": error[0], "error_max": error[1], "median": None}
        row |= {"floor_copy": case.bytes() / copy if copy else None}
        if name in times:
            low, mid, high = quartiles(times[name])
            row |= {"q1": low, "median": mid, "q3": high, "rounds": len(times[name])}
            row |= {"clock": timers[name].clock}
            if BASELINE in times and timers[BASELINE].clock == timers[name].clock:
                row |= {"ratio": ratios(times[BASELINE], times[name])[1]}
            row |= {"peak_bytes": peak_bytes(functions[name], machine.device)}
        if name == "seqconv":
            row |= predicted(case, machine.limits) | {"target": limit_of(row)}
        log.row("time", **row)
        log.say(line(row))
    return green["seqconv"]


def line(row: dict) -> str:
    """A row for people: everything it has to be compared with on one line."""
    case = Case(**{f: row[f] for f in asdict(Case())})
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
    if row.get("ratio") and row["contender"] != BASELINE:
        parts.append(f"{row['ratio']:.2f} times {BASELINE}'s speed")
    return text + ", ".join([*parts, f"error {row['error_l2']:.1e}", row["clock"]])


def cases(length: int, dry: bool):
    """(case, contenders) of one length, the most telling first."""
    bf16 = {"dtype": "bfloat16"}
    yield sized(length, dry, **bf16), (*PAIR, *PEERS)
    yield sized(length, dry, op="forward+backward", **bf16), PAIR
    yield sized(length, dry, mode="two_sided", **bf16), PAIR
    yield sized(length, dry, mode="gated", **bf16), (*PAIR, PEERS[0])
    yield sized(length, dry), PAIR


def each(machine, log, todo, seconds: float, replay: bool) -> int:
    """Measures every (case, contenders, skip) of `todo` that time allows."""
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
    log.say(f"not installed: {', '.join(n for n in PEERS if n in absent) or 'nothing'}")
    todo = [
        (case, [name for name in names if name not in absent], True)
        for length in lengths
        for case, names in cases(length, machine.dry)
    ]
    return each(machine, log, todo, SECONDS, replay=False)


def longer(machine, log) -> int:
    return beside(machine, log, OTHERS[:1] if machine.dry else OTHERS)


STEPS = {"benchmark-4k": lambda machine, log: beside(machine, log, [FIRST]), "benchmark": longer}
