"""Measures seqconv.fftconv beside everything else that computes a long convolution here.

python -m bench.fftconv            a sample, under 4 minutes
python -m bench.fftconv --full     every requirement, under an hour; goes on where it was stopped
python -m bench.fftconv --table    docs/benchmarks.md's table, the picture and fftconv.md, from the results on disk

Every number is the median of interleaved rounds in one process; nothing is timed whose result
differs from float64's. Ratios are medians of the rounds' own ratios to the torch.fft formulation.
Two settings of the C allocator are measured, since large temporaries cost torch.fft dearly under
the default one: "tuned" never gives memory back and is the stricter comparison.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.micro import report
from bench.micro.contenders import BASELINE, CONTENDERS, DTYPES, ON_GPU, Case, make, missing
from bench.micro.gate import call, checked, errors, oracle, tolerance
from bench.micro.report import console
from bench.micro.requirements import (
    BOTH,
    ODD,
    POWERS,
    SHORT,
    THREADS,
    heads_for,
    neighbours,
    page,
    plural,
    readme_table,
    requirements,
)
from bench.micro.timing import (
    Clock,
    flops_per_second,
    interleaved,
    peak_bytes,
    quartiles,
    ratios,
    seconds_per_byte,
)
from bench.micro.worker import ALLOCATORS, Worker, refuse_fallback, serve

# ---- one measurement, in a worker ----


def measure(case: Case, names, budget: float, clock: Clock, peak_flops: float, beside=()):
    """Rows of results of one case, one per contender, a red gate without times; of one that does not compete
    {"contender", "absent": the reason}.

    `beside` are other cases of seqconv that go through the same rounds, (case, threads, weight) each,
    themselves checked in rows of their own; seqconv's row says how its time per element compares
    with the product of theirs to the power of their weights.
    """
    tensors, dy = case.tensors("cpu")
    part = checked(case, tensors, dy)
    exact = oracle(*part[:3])
    functions, found, absent = {}, {}, {}
    for name in dict.fromkeys((BASELINE, *names)):
        try:
            function = make(name, case, "cpu")
        except (ImportError, OSError) as error:
            absent[name] = f"cannot be imported: {error}"
            continue
        if function is None:
            absent[name] = "does not do this case"
            continue
        run = lambda function=function: call(case, function, tensors, dy)  # noqa: E731
        found[name] = errors(case, part[3](run()), exact)
        functions[name] = run
    allowed = tolerance(case, found.get(BASELINE, (1e-3, 1e-2)), exact, "cpu")
    green = {}
    for name, error in found.items():
        limits = allowed if name == "seqconv" else [1e3 * x for x in allowed]
        green[name] = all(e <= limit for e, limit in zip(error, limits, strict=True))
    del exact
    functions = {n: f for n, f in functions.items() if green[n]}
    counts: dict[str, int] = {}
    if green.get("seqconv"):
        for i, (other, threads, _) in enumerate(beside):
            arguments = (other, make("seqconv", other, "cpu"), *other.tensors("cpu"))
            functions[f"beside {i}"] = lambda a=arguments: call(*a)
            counts[f"beside {i}"] = threads
    usual, before = torch.get_num_threads(), {}

    def switch(name):
        torch.set_num_threads(counts.get(name, usual))
        functions[name]()  # wakes the threads, or sends them to sleep

    if set(counts.values()) - {usual}:
        before = {name: lambda name=name: switch(name) for name in functions}
    times = interleaved(functions, budget, clock, before)
    torch.set_num_threads(usual)
    floor_copy = seconds_per_byte("cpu", clock, min(case.bytes() // 2, 1 << 27)) * case.bytes()
    yield from ({"contender": n, "absent": why} for n, why in absent.items() if n in names)
    for name, error in found.items():
        if name not in names:
            continue
        row = {"contender": name, "error_l2": error[0], "error_max": error[1], "gate": green[name]}
        row |= (
            {"tolerance_l2": allowed[0], "tolerance_max": allowed[1]} if name == "seqconv" else {}
        )
        row |= {"median": None}
        if green[name]:
            low, mid, high = quartiles(times[name])
            row |= {"q1": low, "median": mid, "q3": high, "rounds": len(times[name])}
            if BASELINE in times:
                low, mid, high = ratios(times[BASELINE], times[name])
                row |= {"ratio_q1": low, "ratio": mid, "ratio_q3": high}
        if name == "seqconv" and beside and green[name]:
            seconds = [t / case.elements for t in times[name]]
            for i, (other, _, weight) in enumerate(beside):
                pairs = zip(seconds, times[f"beside {i}"], strict=True)
                seconds = [t / (o / other.elements) ** weight for t, o in pairs]
            row |= {"beside": quartiles(seconds)}
        yield row | {"floor_copy": floor_copy, "floor_flops": case.flops() / peak_flops}


def memory(case: Case, names):
    """Rows with the peak memory of one call of every contender."""
    tensors, dy = case.tensors("cpu")
    for name in names:
        function = make(name, case, "cpu")
        if function is not None:
            peak = peak_bytes(lambda f=function: call(case, f, tensors, dy), "cpu")
            yield {"contender": name, "median": None, "gate": True, "peak_bytes": peak}


def prepare(settings: dict):
    clock = Clock("cpu")
    peak_flops: dict[str, float] = {}

    def rows_of(job: dict):
        case = Case(**job["case"])
        if job["allocator"] == "returning":
            return memory(case, job["names"])
        dtype = torch.float64 if case.dtype == "float64" else torch.float32
        if case.dtype not in peak_flops:
            peak_flops[case.dtype] = flops_per_second("cpu", dtype, clock)
        peak = peak_flops[case.dtype]
        beside = [(Case(**other), threads, weight) for other, threads, weight in job["beside"]]
        return measure(case, job["names"], job["budget"], clock, peak, beside)

    return rows_of


# ---- what to measure ----


def jobs_of(args) -> list[dict]:
    """Jobs in the order of their processes, so that each process is started once."""
    jobs: list[dict] = []

    def add(allocator, threads, case, names, tag, budget=None, beside=()):
        budget = budget or args.budget
        job = {"allocator": allocator, "threads": threads, "case": case, "tag": tag}
        beside = [(asdict(other), t, weight) for other, t, weight in beside]
        jobs.append(job | {"names": list(names), "budget": budget, "beside": beside})

    pair = ("seqconv", BASELINE)
    if not args.full:
        for allocator in args.allocators:
            for threads in args.threads:
                for dtype in args.dtypes:
                    for mode in args.modes:
                        for batch in args.batch:
                            for length in args.lengths:
                                for op in args.ops:
                                    channels = heads_for(batch, length, args.elements)
                                    case = Case(mode, dtype, args.layout, batch, channels, length)
                                    case = replace(case, taps=args.taps, op=op)
                                    add(allocator, threads, case, args.contenders, "sample")
        for length in args.lengths:
            case = Case(channels=heads_for(8, length, args.elements), length=length)
            add("returning", args.threads[0], case, pair, "sample")
        return jobs

    def sized(length, batch=8, elements=1 << 22, **more):
        return Case(batch=batch, channels=heads_for(batch, length, elements), length=length, **more)

    everything = tuple(n for n in CONTENDERS if n not in ("conv1d", "torch.compile", *ON_GPU))
    for allocator in ("tuned", "default"):
        for threads in (1, 2):
            for run in range(3 if threads == 1 else 1):
                for batch in (8, 1):
                    for length in POWERS:
                        for op in BOTH:
                            full = run == 0 and op == "forward" and threads == 1
                            names = everything if full and allocator == "tuned" else pair
                            add(allocator, threads, sized(length, batch, op=op), names, "speed")
    one = ("tuned", 1)
    for length in (1024, 65536):
        add(*one, sized(length, elements=1 << 20), ("seqconv", "torch.compile"), "compiled")
    for length in POWERS:
        for op in BOTH:
            causal = [(sized(length, op=op), 1, 1.0)]
            for mode in ("two_sided", "gated", "heads"):
                elements = 1 << 20 if mode == "heads" else 1 << 22
                case = sized(length, elements=elements, mode=mode, op=op)
                add(*one, case, pair, "modes", beside=causal if mode == "two_sided" else ())
            add(*one, sized(length, layout="blh", op=op), pair, "layout")
            add(*one, sized(length, dtype="float64", elements=1 << 21, op=op), pair, "dtypes")
            for dtype in ("bfloat16", "float16"):
                add(*one, sized(length, dtype=dtype, op=op), pair, "dtypes", beside=causal)
    for length in ODD:
        for op in BOTH:
            below, above, share = neighbours(length)
            powers = [(sized(below, op=op), 1, 1 - share), (sized(above, op=op), 1, share)]
            add(*one, sized(length, op=op), pair, "odd lengths", 2.0, beside=powers)
    whole = sized(262144)
    for taps in SHORT:
        names = ("seqconv", BASELINE, "oaconvolve", "conv1d")[: 4 if taps <= 256 else 3]
        case = replace(whole, taps=taps)
        add(*one, case, names, "short kernels", 2.0, beside=[(whole, 1, 1.0)])
    add(*one, Case(batch=1, channels=1, length=64), pair, "one row")
    for wanted in THREADS:
        case = Case(**wanted)
        add("tuned", 2, case, pair, "threads", 2.0, beside=[(case, 1, 1.0)])
    for threads in (1, 2):
        for op in BOTH:
            for length in (4096, 65536, 1048576):
                for layout in ("bhl", "blh"):
                    case = sized(length, layout=layout, op=op)
                    add("returning", threads, case, pair, "memory")
    return jobs


def key_of(job_or_row: dict) -> tuple:
    case = job_or_row.get("case")
    case = asdict(case) if isinstance(case, Case) else {f: job_or_row[f] for f in asdict(Case())}
    compared = bool(job_or_row.get("beside"))
    return (*(job_or_row[f] for f in ("allocator", "threads", "tag")), compared, *case.values())


def run_jobs(jobs: list[dict], args, path: Path | None, done: list[dict]) -> list[dict]:
    """Rows of all jobs, those of `done` not measured again."""
    common = report.machine()
    have: dict[tuple, int] = {}
    done = report.same_run(done, common)
    for row in done:
        if row["contender"] == "seqconv" and row["gate"]:
            have[key_of(row)] = have.get(key_of(row), 0) + 1
    rows, worker, settings = list(done), None, None
    absent: dict[tuple[str, str], list[Case]] = {}  # name and reason -> cases
    deadline = time.monotonic() + args.time_budget if args.time_budget else None
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measuring", total=len(jobs))
        for job in jobs:
            key = key_of(job)
            if have.get(key, 0) > 0:
                have[key] -= 1
                progress.advance(task)
                continue
            if deadline and time.monotonic() > deadline:
                progress.stop()
                console.print("Time is up; what is left was not measured.")
                break
            wanted = (job["allocator"], job["threads"])
            if wanted != settings:
                if worker:
                    worker.close()
                worker, settings = Worker("bench.fftconv", *wanted), wanted
            case = job["case"]
            threads = plural(job["threads"], "thread")
            progress.update(task, description=f"{case}, {job['allocator']}, {threads}")
            message = {**job, "case": asdict(case)}
            for answer in worker(message, f"{case}, {threads}"):
                if "absent" in answer:
                    absent.setdefault((answer["contender"], answer["absent"]), []).append(case)
                    continue
                row = {"tag": job["tag"], "allocator": job["allocator"], "threads": job["threads"]}
                row |= asdict(case) | answer | common | {"when": time.strftime("%Y-%m-%d %H:%M")}
                rows.append(row)
                if path:
                    report.append(path, row)
            progress.advance(task)
        progress.update(task, description="measured")
    if worker:
        worker.close()
    for (name, reason), cases in absent.items():
        if not (args.full and reason == "does not do this case"):  # nobody asked for them there
            others = f" and {plural(len(cases) - 1, 'other')}" if len(cases) > 1 else ""
            console.print(f"{name}: {reason}: {cases[0]}{others}")
    return rows


# ---- what it says ----


def show(rows: list[dict]) -> None:
    """Every measurement, a line each."""
    for tag in dict.fromkeys(row["tag"] for row in rows):
        timed = [r for r in rows if r["tag"] == tag and r["allocator"] != "returning"]
        if not timed:
            continue
        table = Table(title=tag, title_justify="left")
        for name in ("case", "setting", "contender", "ns/element", "quartiles", "faster"):
            left = name in ("case", "setting", "contender")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for name in ("error", "copy floor", "flop floor"):
            table.add_column(name, justify="right")
        for row in timed:
            case = Case(**{f: row[f] for f in asdict(Case())})
            setting = f"{row['allocator']}, {row['threads']}"
            if not row["gate"]:
                wrong = f"{row['error_l2']:.1e}"
                table.add_row(str(case), setting, row["contender"], "[red]WRONG[/]", "", "", wrong)
                continue
            unit = 1e9 / case.elements
            table.add_row(
                str(case),
                setting,
                row["contender"],
                f"{row['median'] * unit:.2f}",
                f"{row['q1'] * unit:.2f}-{row['q3'] * unit:.2f}",
                f"{row['ratio']:.2f}x" if "ratio" in row else "",
                f"{row['error_l2']:.1e}",
                f"{row['floor_copy'] * unit:.2f}",
                f"{row['floor_flops'] * unit:.2f}",
            )
        console.print(table)
    spent = [r for r in rows if r["allocator"] == "returning"]
    if spent:
        table = Table(title="peak memory of one call, results included", title_justify="left")
        for name in ("case", "threads", "contender", "MiB", "of the inputs' size"):
            table.add_column(name)
        for row in spent:
            case = Case(**{f: row[f] for f in asdict(Case())})
            peak = row["peak_bytes"]
            text = (
                ("unknown", "")
                if peak is None
                else (f"{peak / 2**20:.1f}", f"{peak / case.elements / 4:.2f}")
            )
            table.add_row(str(case), str(row["threads"]), row["contender"], *text)
        console.print(table)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fftconv", description=__doc__.split("\n\n")[0]
    )
    numbers = {"type": int, "nargs": "+"}
    parser.add_argument("--full", action="store_true", help="everything; resumes from --json")
    parser.add_argument("--lengths", **numbers, default=[256, 4096, 65536])
    parser.add_argument("--batch", **numbers, default=[8])
    parser.add_argument("--threads", **numbers, default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument(
        "--modes", nargs="+", default=["causal"], choices=["causal", "two_sided", "gated", "heads"]
    )
    parser.add_argument("--layout", default="bhl", choices=["bhl", "blh"])
    parser.add_argument("--ops", nargs="+", default=list(BOTH), choices=BOTH)
    parser.add_argument("--taps", type=int, default=0, help="0: as many as the length")
    parser.add_argument("--elements", type=int, default=1 << 22, help="batch x channels x length")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["seqconv", BASELINE, "scipy.fft", "ducc0", "pyfftw"],
        choices=list(CONTENDERS),
    )
    parser.add_argument("--allocators", nargs="+", default=["tuned", "default"], choices=ALLOCATORS)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per case")
    parser.add_argument("--time-budget", type=float, help="seconds in all; stops after")
    parser.add_argument("--json", type=Path, help="file to append a line per measurement to")
    parser.add_argument("--plot", type=Path, help="picture to draw")
    parser.add_argument(
        "--table", action="store_true", help="rewrite docs/benchmarks.md from --json"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.worker:
        return serve(prepare)
    if args.table:
        rows = report.read(
            [args.json] if args.json else sorted(report.RESULTS.glob("fftconv*.jsonl"))
        )
        if not rows:
            raise SystemExit("no results: run make bench first")
        rows = report.same_run(rows)
        report.replace_between(report.ROOT / "docs/benchmarks.md", "bench", readme_table(rows))
        (report.RESULTS / "fftconv.md").write_text(page(rows))
        report.plot(rows, args.plot or report.RESULTS / "fftconv.png")
        return None
    if min(*args.lengths, *args.batch, args.elements, 1) < 1:
        raise SystemExit("--lengths, --batch and --elements must be at least 1")
    refuse_fallback()
    asked = args.contenders
    if args.full:
        asked = dict.fromkeys(name for job in jobs_of(args) for name in job["names"])
    for name in (name for name in asked if name in missing()):
        console.print(f"{name}: the package {CONTENDERS[name][0]} is not installed")
    args.contenders = [n for n in args.contenders if n not in missing()]
    if not args.contenders:
        raise SystemExit("--contenders: none of them is there")
    done = report.read([args.json]) if args.full and args.json and args.json.exists() else []
    console.print(f"{report.device_name()}; threads {args.threads if not args.full else [1, 2]}")
    rows = run_jobs(jobs_of(args), args, args.json, done)
    show(rows)
    report.show_requirements(requirements(rows))
    if args.plot:
        report.plot(rows, args.plot)
    return None


if __name__ == "__main__":
    main()
