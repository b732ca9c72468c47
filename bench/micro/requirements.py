"""What the CPU kernels must reach, decided from measurements, and the README's table of them."""

import math
from dataclasses import asdict
from statistics import median

from bench.micro import report
from bench.micro.contenders import FAST, Case

POWERS = (256, 1024, 4096, 16384, 65536, 262144, 1048576)
ODD = (1000, 5000, 14113, 65537, 100000)
SHORT = (64, 256, 1024, 4096)
BOTH = ("forward", "forward+backward")
# What the speed-up over torch.fft must be at POWERS, one thread, float32; three quarters with two.
REQUIRED = {
    ("tuned", "forward"): (5.0, 5.0, 5.0, 4.6, 4.6, 4.8, 5.0),
    ("tuned", "forward+backward"): (6.4, 6.3, 6.0, 5.6, 5.5, 5.3, 5.3),
    ("default", "forward"): (10, 9, 9, 8, 8, 8, 8),
    ("default", "forward+backward"): (16, 15, 15, 14, 12, 11, 10),
}
# (case, how many times faster two threads are than one)
THREADS_LIMITS: tuple[tuple[dict, float], ...] = (
    ({"channels": 64, "length": 4096}, 1.8),
    ({"channels": 64, "length": 4096, "op": BOTH[1]}, 1.8),
    ({"batch": 1, "channels": 1, "length": 65536}, 1.5),
    ({"batch": 1, "channels": 1, "length": 1048576}, 1.5),
    ({"channels": 1, "length": 4096, "op": BOTH[1]}, 1.5),
    ({"channels": 1, "length": 262144, "op": BOTH[1]}, 1.5),
)
THREADS = tuple(case | {"batch": case.get("batch", 8)} for case, _ in THREADS_LIMITS)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def heads_for(batch: int, length: int, elements: int) -> int:
    return max(1, elements // (batch * length))


def neighbours(length: int) -> tuple[int, int, float]:
    """The powers measured below and above, and the share of the way between them, in logarithms."""
    below = max(n for n in POWERS if n <= length)
    above = min(n for n in POWERS if n >= length)
    return below, above, math.log(length / below) / math.log(above / below)


def verdict(
    what: str,
    value: float | None,
    limit: float,
    at_least: bool = True,
    unit: str = "x",
    most: float | None = None,
):
    """[(what, wanted, measured, met)], or [] where nothing was measured; beside what is not met, the `most` that
    the floors allow."""
    if value is None:
        return []
    met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    note = f", floors {most:.3g}{unit}" if most is not None and not met else ""
    return [(what, f"{sign} {limit:.3g}{unit}", f"{value:.3g}{unit}{note}", met)]


class Find:
    """Medians over the runs of what was measured."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __call__(self, value: str, contender: str = "seqconv", **wanted) -> float | None:
        full = asdict(Case()) | {"threads": 1, "allocator": "tuned"} | wanted
        full.pop("channels", None)
        full["contender"] = contender
        found = [
            r[value]
            for r in self.rows
            if value in r and all(r.get(k) == v for k, v in full.items() if v is not None)
        ]
        # Quartiles are kept as a list.
        found = [x[1] if isinstance(x, list) else x for x in found if x is not None]
        return median(found) if found else None


def requirements(rows: list[dict]) -> list[tuple[str, str, str, bool]]:
    """(what, wanted, measured, met) of every requirement that the rows can decide."""
    find = Find([r for r in rows if r["gate"]])
    lines: list[tuple[str, str, str, bool]] = []

    def compare(*args, **named):
        lines.extend(verdict(*args, **named))

    def most(**wanted) -> float | None:
        """The speed-up over torch.fft at which the bytes and then the flops would take all the time."""
        floors = [find(name, **wanted) for name in ("floor_copy", "floor_flops")]
        return ratio_of(find("median", "torch.fft", **wanted), sum(f or 0 for f in floors) or None)

    def ratio_of(a, b):
        return None if a is None or b is None else a / b

    def per(find_args):
        row = [r for r in find.rows if all(r.get(k) == v for k, v in find_args.items())]
        values = [
            r["median"] / (r["batch"] * r["channels"] * r["length"]) for r in row if r["median"]
        ]
        return median(values) if values else None

    def time_of(contender="seqconv", tag=None, **wanted):
        full = (
            asdict(Case()) | {"threads": 1, "allocator": "tuned", "contender": contender} | wanted
        )
        if "channels" not in wanted:
            full.pop("channels")
        if tag:
            full["tag"] = tag
        return per(full)

    red = [r for r in rows if r["contender"] == "seqconv" and not r["gate"]]
    lines.append(("every result of seqconv is right", "0 red", f"{len(red)} red", not red))
    for (allocator, op), limits in REQUIRED.items():
        for threads, share in ((1, 1.0), (2, 0.75)):
            for batch in (8, 1):
                for length, limit in zip(POWERS, limits, strict=True):
                    name = f"{allocator}, {op}, B={batch}, L={report.length_name(length)}, {plural(threads, 'thread')}"
                    wanted = {"allocator": allocator, "op": op, "threads": threads}
                    wanted |= {"batch": batch, "length": length, "tag": "speed"}
                    value = find("ratio", **wanted)
                    compare(name, value, limit * share, most=most(**wanted))
    for batch in (8, 1):
        for length in POWERS:
            others = [time_of(name, batch=batch, length=length) for name in FAST]
            fastest = min((x for x in others if x), default=None)
            mine = time_of(batch=batch, length=length, tag="speed")
            name = f"against the fastest other, B={batch}, L={report.length_name(length)}"
            compare(name, ratio_of(fastest, mine), 3)
    for op in BOTH:
        for length, limit in zip(POWERS, REQUIRED["tuned", op], strict=True):
            at = {"length": length, "op": op}
            label = f"{op}, L={report.length_name(length)}"
            two = find("beside", mode="two_sided", **at)
            compare(f"two-sided beside causal, {label}", two, 1.15, False)
            for mode in ("gated", "heads"):
                value, bound = find("ratio", mode=mode, **at), most(mode=mode, **at)
                compare(f"{mode}, {label}", value, limit, most=bound)
            blh = ratio_of(find("ratio", layout="blh", **at), find("ratio", tag="speed", **at))
            compare(f"blh ratio over bhl ratio, {label}", blh, 0.6)
            for dtype in ("bfloat16", "float16"):
                half = find("beside", dtype=dtype, **at)
                compare(f"{dtype} beside float32, {label}", half, 1.25, False)
            compare(f"float64, {label}", find("ratio", dtype="float64", **at), 4)
    for op in BOTH:
        for length in ODD:
            name = f"beside its neighbours, {op}, L={length}"
            compare(name, find("beside", length=length, op=op), 1.35, False)
    for taps in SHORT:
        at = {"length": 262144, "taps": taps}
        compare(f"K={taps} beside K=L at L=256K", find("beside", **at), 1.0, False)
        other = ratio_of(time_of("oaconvolve", **at), time_of(**at))
        compare(f"K={taps} at L=256K against oaconvolve", other, 4)
    compare("one row of 64", find("ratio", batch=1, length=64), 1.0)
    for wanted, limit in THREADS_LIMITS:
        full = {"batch": 8, "op": BOTH[0], "taps": 0} | wanted
        rows_of = [r for r in find.rows if r["tag"] == "threads" and r.get("beside")]
        shares = [r["beside"][1] for r in rows_of if all(r[k] == v for k, v in full.items())]
        shape = f"B={full['batch']}, H={full['channels']}, L={full['length']}"
        value = 1 / median(shares) if shares else None
        compare(f"2 threads over 1, {full['op']}, {shape}", value, limit)
    for row in rows:
        if row["allocator"] == "returning" and row["contender"] == "seqconv" and row["peak_bytes"]:
            case = Case(**{f: row[f] for f in asdict(Case())})
            results = case.elements * (1 if case.op == "forward" else 2)
            results += case.channels * (case.length + 1) * (case.op != "forward")
            # 64 bytes x length per thread and k's spectrum, at up to a quarter of padding.
            scratch = (row["threads"] * 64 + case.channels * 10) * case.length
            rest = row["peak_bytes"] - 4 * results
            name = f"memory beyond the results, {case}, {plural(row['threads'], 'thread')}"
            compare(name, rest / 2**20, (scratch + (1 << 20)) / 2**20, False, " MiB")
    return lines


def readme_table(rows: list[dict]) -> str:
    """Speed-ups over torch.fft at every length, and what they were measured on."""
    find = Find([r for r in rows if r["gate"] and r["tag"] == "speed"])
    first = next((r for r in rows if r["tag"] == "speed"), None)
    if first is None:
        raise SystemExit("bench.fftconv: the table needs a full run (--full), and there is none")
    header = ["", *[report.length_name(n) for n in POWERS]]
    lines = []

    def line(name, text, **wanted):
        cells = [find(text, length=n, **wanted) for n in POWERS]
        if any(cells):
            lines.append([name, *["-" if c is None else f"{c:.1f}x" for c in cells]])

    for threads in (1, 2):
        for batch in (8, 1):
            for op in BOTH:
                for allocator in ("tuned", "default"):
                    name = ", ".join(
                        [op, plural(batch, "sample"), plural(threads, "thread"), allocator]
                    )
                    wanted = {"batch": batch, "op": op, "threads": threads}
                    line(name, "ratio", allocator=allocator, **wanted)
    cells = [find("median", length=n) for n in POWERS]
    elements = [8 * heads_for(8, n, 1 << 22) * n for n in POWERS]
    absolute = [f"{c * 1e9 / e:.2f}" if c else "-" for c, e in zip(cells, elements, strict=True)]
    lines.append(["ns per element, forward, 8 samples, 1 thread, tuned allocator", *absolute])
    lines_met = requirements(rows)
    met = sum(x[3] for x in lines_met)
    used = first["versions"]
    return "\n\n".join(
        [
            report.markdown(header, lines),
            f"{first['device']} ({first['isa']} kernels), torch {used['torch']}, commit {first['commit']}; "
            f"{met} of the harness's {len(lines_met)} requirements [are met there](../bench/results/fftconv.md).",
        ]
    )


def page(rows: list[dict]) -> str:
    """Every requirement, for bench/results: those that are not met first."""
    lines = sorted(requirements(rows), key=lambda line: line[3])
    header = ["what", "wanted", "measured", ""]
    table = [[*line[:3], "met" if line[3] else "not met"] for line in lines]
    met = sum(line[3] for line in lines)
    return f"""# What `make bench` asks of the CPU kernels

{met} of {len(lines)} are met on {rows[0]["device"]} ({rows[0]["isa"]} kernels), commit {rows[0]["commit"]}.
The limits were set for two cores of a Zen 3. "Floors", beside what is not met, is the speed-up over torch.fft of a call
that takes as long as a copy of its bytes and, after that, its flops at a matrix product's rate: near it there is
little left to gain, and a kernel passes it only by doing both at a time.

{report.markdown(header, table)}
"""
