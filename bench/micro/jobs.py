"""What bench.fftconv measures: a sample, or every case that a requirement asks for."""

import math
from dataclasses import asdict, replace
from itertools import product

from bench.micro.contenders import BASELINE, COMPILED, CONTENDERS, ON_GPU, Case
from bench.micro.packed import ONE_BY_ONE, PACKED, PADDED

POWERS = (256, 1024, 4096, 16384, 65536, 262144, 1048576)
LENGTHS, ELEMENTS = (256, 4096, 65536), 1 << 22  # of a sample
ODD = (1000, 5000, 14113, 65537, 100000)
SHORT = (64, 256, 1024, 4096)
BOTH = ("forward", "forward+backward")
# (case, how many times faster two threads must be than one)
THREADS_LIMITS: tuple[tuple[dict, float], ...] = (
    ({"channels": 64, "length": 4096}, 1.8),
    ({"channels": 64, "length": 4096, "op": BOTH[1]}, 1.8),
    ({"batch": 1, "channels": 1, "length": 65536}, 1.5),
    ({"batch": 1, "channels": 1, "length": 1048576}, 1.5),
    ({"channels": 1, "length": 4096, "op": BOTH[1]}, 1.5),
    ({"channels": 1, "length": 262144, "op": BOTH[1]}, 1.5),
)
PAIR = ("seqconv", BASELINE)
# (mode, rows, steps of the longest row, channels)
PACKS = (("packed", 64, 16384, 64), ("packed_equal", 1000, 64, 64))
PACKED_NAMES = (PACKED, ONE_BY_ONE, PADDED, BASELINE)


def channels_for(batch: int, length: int, elements: int) -> int:
    return max(1, elements // (batch * length))


def sized(length: int, batch: int = 8, elements: int = ELEMENTS, **more) -> Case:
    channels = channels_for(batch, length, elements)
    return Case(batch=batch, channels=channels, length=length, **more)


def neighbours(length: int) -> tuple[int, int, float]:
    """Returns the powers measured below and above, and the share of the way between them, in logarithms."""
    below = max(n for n in POWERS if n <= length)
    above = min(n for n in POWERS if n >= length)
    return below, above, math.log(length / below) / math.log(above / below)


def job(allocator, threads, case: Case, names, tag, budget: float, beside=()) -> dict:
    """beside: other cases of seqconv in the same rounds, (case, threads, weight) each."""
    made = {"allocator": allocator, "threads": threads, "case": case, "tag": tag}
    beside = [(asdict(other), t, weight) for other, t, weight in beside]
    return made | {"names": list(names), "budget": budget, "beside": beside}


def key_of(job_or_row: dict) -> tuple:
    """Returns what a job and its rows have in common."""
    case = job_or_row.get("case") or Case.of(job_or_row)
    compared = bool(job_or_row.get("beside"))
    settings = (job_or_row[f] for f in ("allocator", "threads", "tag"))
    return (*settings, compared, *asdict(case).values())


def packs(args) -> list[dict]:
    """Returns the jobs of packed rows. --lengths has the longest rows of those of many lengths. Fewer --elements than
    the default leave fewer channels."""
    jobs, share = [], min(1.0, args.elements / ELEMENTS)
    shapes = [(*PACKS[0][:2], length, PACKS[0][3]) for length in args.lengths or [PACKS[0][2]]]
    settings = product(args.allocators, args.threads, [*shapes, PACKS[1]], args.ops)
    for allocator, threads, (mode, rows, length, channels), op in settings:
        channels = max(1, round(channels * share))
        case = Case(mode, layout=args.layout, batch=rows, channels=channels, length=length, op=op)
        jobs.append(job(allocator, threads, case, PACKED_NAMES, "packed", args.budget))
    return jobs


def sample(args) -> list[dict]:
    """Returns the jobs that the command line asks for."""
    jobs = packs(args) if "packed" in args.modes else []
    modes = [mode for mode in args.modes if mode != "packed"]
    if not modes:
        return jobs
    lengths = args.lengths or LENGTHS
    axes = args.allocators, args.threads, args.dtypes, modes, args.batch, lengths, args.ops
    for allocator, threads, dtype, mode, batch, length, op in product(*axes):
        channels = channels_for(batch, length, args.elements)
        case = Case(mode, dtype, args.layout, batch, channels, length, args.taps, op)
        jobs.append(job(allocator, threads, case, args.contenders, "sample", args.budget))
    for length in lengths:
        case = sized(length, elements=args.elements)
        jobs.append(job("returning", args.threads[0], case, PAIR, "sample", args.budget))
    return jobs


def full(usual_budget: float) -> list[dict]:
    """Returns every job, in the order of their processes, so that each process is started once."""
    jobs: list[dict] = []

    def add(allocator, threads, case, names, tag, budget=usual_budget, beside=()):
        jobs.append(job(allocator, threads, case, names, tag, budget, beside))

    everything = tuple(n for n in CONTENDERS if n not in ("conv1d", *COMPILED, *ON_GPU))
    for allocator, threads in product(("tuned", "default"), (1, 2)):
        for run in range(3 if threads == 1 else 1):
            for batch, length, op in product((8, 1), POWERS, BOTH):
                all_of_them = run == 0 and op == "forward" and (allocator, threads) == ("tuned", 1)
                names = everything if all_of_them else PAIR
                add(allocator, threads, sized(length, batch, op=op), names, "speed")
    one = ("tuned", 1)
    for length in (1024, 65536):
        add(*one, sized(length, elements=1 << 20), ("seqconv", "torch.compile"), "compiled")
    for length, op in product(POWERS, BOTH):
        causal = [(sized(length, op=op), 1, 1.0)]
        for mode in ("two_sided", "gated", "heads"):
            elements = 1 << 20 if mode == "heads" else 1 << 22
            case = sized(length, elements=elements, mode=mode, op=op)
            add(*one, case, PAIR, "modes", beside=causal if mode == "two_sided" else ())
        add(*one, sized(length, layout="blh", op=op), PAIR, "layout")
        add(*one, sized(length, dtype="float64", elements=1 << 21, op=op), PAIR, "dtypes")
        for dtype in ("bfloat16", "float16"):
            add(*one, sized(length, dtype=dtype, op=op), PAIR, "dtypes", beside=causal)
    for length, op in product(ODD, BOTH):
        below, above, share = neighbours(length)
        powers = [(sized(below, op=op), 1, 1 - share), (sized(above, op=op), 1, share)]
        add(*one, sized(length, op=op), PAIR, "odd lengths", 2.0, powers)
    whole = sized(262144)
    for taps in SHORT:
        names = (*PAIR, "oaconvolve", "conv1d")[: 4 if taps <= 256 else 3]
        add(*one, replace(whole, taps=taps), names, "short kernels", 2.0, [(whole, 1, 1.0)])
    add(*one, Case(batch=1, channels=1, length=64), PAIR, "one row")
    for wanted, _ in THREADS_LIMITS:
        case = Case(**wanted)
        add("tuned", 2, case, PAIR, "threads", 2.0, [(case, 1, 1.0)])
    for threads, (mode, rows, length, channels), op in product((1, 2), PACKS, BOTH):
        case = Case(mode, batch=rows, channels=channels, length=length, op=op)
        add("tuned", threads, case, PACKED_NAMES, "packed", 2.0)
    for threads, op, length in product((1, 2), BOTH, (4096, 65536, 1048576)):
        for layout in ("bhl", "blh"):
            add("returning", threads, sized(length, layout=layout, op=op), PAIR, "memory")
    return jobs
