"""The requirements of the CPU kernels, decided from measurements, and the table of them in docs/benchmarks.md."""

from dataclasses import asdict
from itertools import product
from statistics import median

from bench.facts import length_name, plural
from bench.files import markdown
from bench.micro.contenders import BASELINE, FAST, Case
from bench.micro.jobs import BOTH, ODD, PACKS, POWERS, SHORT, THREADS_LIMITS, channels_for
from bench.micro.packed import ONE_BY_ONE, PACKED, PADDED

Requirement = tuple[str, str, str, bool]  # what, wanted, measured, met
# The speed-up over torch.fft that is wanted at POWERS on one thread in float32. Two threads need three quarters of it.
REQUIRED = {
    ("tuned", "forward"): (5.0, 5.0, 5.0, 4.6, 4.6, 4.8, 5.0),
    ("tuned", "forward+backward"): (6.4, 6.3, 6.0, 5.6, 5.5, 5.3, 5.3),
    ("default", "forward"): (10, 9, 9, 8, 8, 8, 8),
    ("default", "forward+backward"): (16, 15, 15, 14, 12, 11, 10),
}


def verdict(
    what: str,
    value: float | None,
    limit: float,
    at_least: bool = True,
    unit: str = "x",
    most: float | None = None,
) -> list[Requirement]:
    """Returns one requirement in a list, or [] where nothing was measured.

    most: the best value that the floors allow. It is named beside what is not met.
    """
    if value is None:
        return []
    met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    note = f", floors {most:.3g}{unit}" if most is not None and not met else ""
    return [(what, f"{sign} {limit:.3g}{unit}", f"{value:.3g}{unit}{note}", met)]


def all_right(rows: list[dict], of: str = "") -> Requirement:
    red = sum(not row["gate"] for row in rows)
    return f"every result{of} is right", "0 red", f"{red} red", not red


def verdicts_table(lines: list[Requirement]) -> str:
    """Returns the requirements in Markdown. Those that are not met come first."""
    cells = [[*line[:3], "met" if line[3] else "not met"] for line in lines]
    return markdown(["what", "wanted", "measured", ""], sorted(cells, key=lambda c: c[3] == "met"))


def ratio_of(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


class Find:
    """Medians over the runs of what was measured."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def matching(self, contender: str, wanted: dict) -> list[dict]:
        """Returns the rows of a case. Its number of channels counts only if it is wanted, and so does the tag."""
        full = asdict(Case()) | {"threads": 1, "allocator": "tuned", "contender": contender}
        full = {k: v for k, v in (full | wanted).items() if k != "channels" or k in wanted}
        return [r for r in self.rows if all(r.get(k) == v for k, v in full.items())]

    def __call__(self, value: str, contender: str = "seqconv", **wanted) -> float | None:
        found = [r[value] for r in self.matching(contender, wanted) if value in r]
        # Quartiles are kept as a list.
        found = [x[1] if isinstance(x, list) else x for x in found if x is not None]
        return median(found) if found else None

    def per_element(self, contender: str = "seqconv", **wanted) -> float | None:
        rows = [r for r in self.matching(contender, wanted) if r["median"]]
        values = [r["median"] / (r["batch"] * r["channels"] * r["length"]) for r in rows]
        return median(values) if values else None


def requirements(rows: list[dict]) -> list[Requirement]:
    """Returns every requirement that the rows can decide."""
    find = Find([r for r in rows if r["gate"]])
    lines: list[Requirement] = []

    def compare(*args, **named):
        lines.extend(verdict(*args, **named))

    def most(**wanted) -> float | None:
        """Returns the speed-up over torch.fft of a call that takes as long as its bytes and then its flops do."""
        floors = [find(name, **wanted) for name in ("floor_copy", "floor_flops")]
        return ratio_of(find("median", "torch.fft", **wanted), sum(f or 0 for f in floors) or None)

    lines.append(all_right([r for r in rows if r["contender"] == "seqconv"], " of seqconv"))
    for (allocator, op), limits in REQUIRED.items():
        for threads, share in ((1, 1.0), (2, 0.75)):
            for batch in (8, 1):
                for length, limit in zip(POWERS, limits, strict=True):
                    name = f"{allocator}, {op}, B={batch}, L={length_name(length)}, {plural(threads, 'thread')}"
                    wanted = {"allocator": allocator, "op": op, "threads": threads}
                    wanted |= {"batch": batch, "length": length, "tag": "speed"}
                    value = find("ratio", **wanted)
                    compare(name, value, limit * share, most=most(**wanted))
    for batch in (8, 1):
        for length in POWERS:
            others = [find.per_element(name, batch=batch, length=length) for name in FAST]
            fastest = min((x for x in others if x), default=None)
            mine = find.per_element(batch=batch, length=length, tag="speed")
            name = f"against the fastest other, B={batch}, L={length_name(length)}"
            compare(name, ratio_of(fastest, mine), 3)
    for op in BOTH:
        for length, limit in zip(POWERS, REQUIRED["tuned", op], strict=True):
            at = {"length": length, "op": op}
            label = f"{op}, L={length_name(length)}"
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
        other = ratio_of(find.per_element("oaconvolve", **at), find.per_element(**at))
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
            case = Case.of(row)
            results = case.elements * (1 if case.op == "forward" else 2)
            results += case.channels * (case.length + 1) * (case.op != "forward")
            # 64 bytes x length per thread and k's spectrum, at up to a quarter of padding.
            scratch = (row["threads"] * 64 + case.channels * 10) * case.length
            rest = row["peak_bytes"] - 4 * results
            name = f"memory beyond the results, {case}, {plural(row['threads'], 'thread')}"
            compare(name, rest / 2**20, (scratch + (1 << 20)) / 2**20, False, " MiB")
    return lines + packed_requirements(rows)


def packed_requirements(rows: list[dict]) -> list[Requirement]:
    """Returns those of packed rows, which the packs in PACKS decide."""
    found = {}
    for row in rows:
        shape = tuple(row[name] for name in ("mode", "batch", "length", "channels"))
        if row["contender"] == PACKED and row["gate"] and shape in PACKS:
            shape = plural(row["batch"], "row") + f" of up to {length_name(row['length'])}"
            setting = row["allocator"], row["op"], shape, plural(row["threads"], "thread")
            found.setdefault((row["mode"], ", ".join(setting)), []).append(row["against"])
    lines = []
    for (mode, name), runs in found.items():
        times = {way: median(run[way][1] for run in runs) for way in runs[0]}
        if mode != PACKS[0][0]:
            lines += verdict(f"packed beside a batch, {name}", 1 / times[PADDED], 1.3, False)
            continue
        lines += verdict(f"packed beside row by row, {name}", 1 / times[ONE_BY_ONE], 1.25, False)
        lines += verdict(f"padded torch.fft beside packed, {name}", times[BASELINE], 8)
        lines += verdict(f"padded beside packed, {name}", times[PADDED], 4)
    return lines


def packed_table(rows: list[dict]) -> str:
    """Returns how many times as long the same rows take without packing, and how long packing takes."""
    lines = []
    for mode, batch, longest, channels in PACKS:
        for op, threads in product(BOTH, (1, 2)):
            wanted = {"mode": mode, "op": op, "threads": threads, "batch": batch}
            wanted |= {"length": longest, "channels": channels, "contender": PACKED}
            wanted |= {"allocator": "tuned", "layout": "bhl", "gate": True}
            runs = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
            if not runs:
                continue
            cells = [f"{1e3 * median(r['median'] for r in runs):.1f} ms"]
            for way in (ONE_BY_ONE, PADDED, BASELINE):
                times = [r["against"][way][1] for r in runs if way in r["against"]]
                cells.append(f"{median(times):.2f}x" if times else "-")
            of = f"{batch:,} rows of {'up to ' * (mode == 'packed')}{longest:,} steps"
            lines.append([f"{of}, {op}, {plural(threads, 'thread')}", *cells])
    mode, batch, longest, channels = PACKS[0]
    lengths = Case(mode, batch=batch, length=longest).lengths
    first = rows[0]
    where = f"{first['device']} ({first['isa']} kernels), torch {first['versions']['torch']}"
    text = (
        f"{channels} channels, float32, tuned allocator; the {len(lengths)} rows have {sum(lengths):,} steps; "
        f"{where}, commit {first['commit']}."
    )
    header = ["", "packed", "row by row", "padded", "padded, torch.fft"]
    return "\n\n".join([markdown(header, lines), text])


def readme_table(rows: list[dict]) -> str:
    """Returns the speed-ups over torch.fft at every length, and what they were measured on."""
    find = Find([r for r in rows if r["gate"] and r["tag"] == "speed"])
    first = next((r for r in rows if r["tag"] == "speed"), None)
    if first is None:
        raise SystemExit("bench.fftconv: the table needs a full run (--full), and there is none")
    lines = []
    for threads, batch, op, allocator in product((1, 2), (8, 1), BOTH, ("tuned", "default")):
        wanted = {"batch": batch, "op": op, "threads": threads, "allocator": allocator}
        cells = [find("ratio", length=n, **wanted) for n in POWERS]
        if any(cells):
            name = [op, plural(batch, "sample"), plural(threads, "thread"), allocator]
            lines.append([", ".join(name), *("-" if c is None else f"{c:.1f}x" for c in cells)])
    times = [find("median", length=n) for n in POWERS]
    elements = [8 * channels_for(8, n, 1 << 22) * n for n in POWERS]
    absolute = [f"{t * 1e9 / e:.2f}" if t else "-" for t, e in zip(times, elements, strict=True)]
    lines.append(["ns per element, forward, 8 samples, 1 thread, tuned allocator", *absolute])
    met = [line[3] for line in requirements(rows)]
    where = f"{first['device']} ({first['isa']} kernels), torch {first['versions']['torch']}"
    text = (
        f"{where}, commit {first['commit']}; {sum(met)} of the harness's {len(met)} requirements "
    )
    text += "[are met there](../bench/results/fftconv.md)."
    return "\n\n".join([markdown(["", *map(length_name, POWERS)], lines), text])


def page(rows: list[dict], packs: list[dict]) -> str:
    """Returns every requirement, for bench/results. packs: the results of packed rows."""
    lines = requirements(rows) + packed_requirements(packs)
    met = sum(line[3] for line in lines)
    return f"""# What `make bench` asks of the CPU kernels

{met} of {len(lines)} are met on {rows[0]["device"]} ({rows[0]["isa"]} kernels), commit {rows[0]["commit"]}.
The limits were set for two cores of a Zen 3. "Floors", beside what is not met, is the speed-up over torch.fft of a call
that takes as long as a copy of its bytes and, after that, its flops at a matrix product's rate: near it there is
little left to gain, and a kernel passes it only by doing both at a time.

{verdicts_table(lines)}
"""
