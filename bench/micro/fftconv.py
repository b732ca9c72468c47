"""Measures seqconv.fftconv beside everything else that computes a long convolution here.

python -m bench.fftconv            measures a sample in under 4 minutes
python -m bench.fftconv --full     measures every requirement in under an hour; goes on where it was stopped
python -m bench.fftconv --table    writes the table of docs/benchmarks.md, the picture and fftconv.md from the results

Every number is the median of interleaved rounds in one process. A result that differs from float64's
gets no time. Ratios are medians of the rounds' own ratios to the torch.fft formulation.
Two settings of the C allocator are measured, because large temporaries cost torch.fft dearly under
the default one. "tuned" never gives memory back and is the stricter comparison.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch

from bench import files, pictures
from bench.facts import RESULTS, ROOT, now, plural, same_run
from bench.micro import packed
from bench.micro.contenders import BASELINE, CONTENDERS, DTYPES, Case, missing
from bench.micro.jobs import BOTH, ELEMENTS, LENGTHS, PACKS, full, key_of, sample
from bench.micro.measure import measure, memory
from bench.micro.requirements import packed_table, page, readme_table, requirements
from bench.micro.timing import Clock, flops_per_second
from bench.micro.worker import ALLOCATORS, Worker, device_name, machine, refuse_fallback, serve
from bench.terminal import console, progress, show_requirements, table


def prepare(settings: dict):
    """Returns what a worker (bench.micro.worker) answers a job with."""
    clock = Clock("cpu")
    peak_flops: dict[str, float] = {}

    def rows_of(job: dict):
        case = Case(**job["case"])
        if job["allocator"] == "returning":
            return memory(case, job["names"])
        dtype = torch.float64 if case.dtype == "float64" else torch.float32
        if case.dtype not in peak_flops:
            peak_flops[case.dtype] = flops_per_second("cpu", dtype, clock)
        common = case, job["names"], job["budget"], clock, peak_flops[case.dtype]
        if case.mode.startswith("packed"):
            return packed.measure(*common)
        beside = [(Case(**other), threads, weight) for other, threads, weight in job["beside"]]
        return measure(*common, beside)

    return rows_of


def run_jobs(jobs: list[dict], args, path: Path | None, done: list[dict]) -> list[dict]:
    """Returns the rows of all jobs. Those of `done` are not measured again."""
    common = machine()
    have: dict[tuple, int] = {}
    done = same_run(done, common)
    for row in done:
        if row["contender"] == "seqconv" and row["gate"]:
            have[key_of(row)] = have.get(key_of(row), 0) + 1
    rows, worker, settings = list(done), None, None
    absent: dict[tuple[str, str], list[Case]] = {}  # (name, reason) -> cases
    deadline = time.monotonic() + args.time_budget if args.time_budget else None
    with progress(console) as bar:
        task = bar.add_task("measuring", total=len(jobs))
        for job in jobs:
            key = key_of(job)
            if have.get(key, 0) > 0:
                have[key] -= 1
                bar.advance(task)
                continue
            if deadline and time.monotonic() > deadline:
                bar.stop()
                console.print("Time is up. The other cases were not measured.")
                break
            wanted = (job["allocator"], job["threads"])
            if wanted != settings:
                if worker:
                    worker.close()
                worker, settings = Worker("bench.fftconv", *wanted), wanted
            case = job["case"]
            threads = plural(job["threads"], "thread")
            bar.update(task, description=f"{case}, {job['allocator']}, {threads}")
            message = {**job, "case": asdict(case)}
            for answer in worker(message, f"{case}, {threads}"):
                if "absent" in answer:
                    absent.setdefault((answer["contender"], answer["absent"]), []).append(case)
                    continue
                row = {name: job[name] for name in ("tag", "allocator", "threads")}
                rows.append(row | asdict(case) | answer | common | {"when": now()})
                if path:
                    files.append(path, rows[-1])
            bar.advance(task)
        bar.update(task, description="measured")
    if worker:
        worker.close()
    for (name, reason), cases in absent.items():
        if not (args.full and reason == "does not do this case"):  # nobody asked for them there
            others = f" and {plural(len(cases) - 1, 'other')}" if len(cases) > 1 else ""
            console.print(f"{name}: {reason}: {cases[0]}{others}")
    return rows


# ---- what it prints ----


def show(rows: list[dict]) -> None:
    """Prints a line for every measurement."""
    words = ("case", "setting", "contender")
    numbers = ("ns/element", "quartiles", "faster", "error", "copy floor", "flop floor")
    for tag in dict.fromkeys(row["tag"] for row in rows):
        timed = [r for r in rows if r["tag"] == tag and r["allocator"] != "returning"]
        if not timed:
            continue
        shown = table(tag, words, numbers)
        for column in shown.columns[:6]:
            column.no_wrap = True
        for row in timed:
            case, error = Case.of(row), f"{row['error_l2']:.1e}"
            cells = [str(case), f"{row['allocator']}, {row['threads']}", row["contender"]]
            if not row["gate"]:
                shown.add_row(*cells, "[red]WRONG[/]", "", "", error)
                continue
            names = ("median", "q1", "q3", "floor_copy", "floor_flops")
            middle, low, high, *floors = (f"{row[n] * 1e9 / case.elements:.2f}" for n in names)
            ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
            shown.add_row(*cells, middle, f"{low}-{high}", ratio, error, *floors)
        console.print(shown)
    spent = [r for r in rows if r["allocator"] == "returning"]
    if spent:
        words = ("case", "threads", "contender", "MiB", "of the inputs' size")
        shown = table("peak memory of one call, results included", words)
        for row in spent:
            case, peak = Case.of(row), row["peak_bytes"]
            cells = ["unknown", ""]
            if peak is not None:
                cells = [f"{peak / 2**20:.1f}", f"{peak / case.elements / 4:.2f}"]
            shown.add_row(str(case), str(row["threads"]), row["contender"], *cells)
        console.print(shown)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fftconv", description=__doc__.split("\n\n")[0]
    )
    numbers = {"type": int, "nargs": "+"}
    parser.add_argument(
        "--full", action="store_true", help="measure everything; goes on from --json"
    )
    parser.add_argument(
        "--lengths",
        **numbers,
        help=f"default: {LENGTHS}; {PACKS[0][2]} for the longest of packed rows",
    )
    parser.add_argument("--batch", **numbers, default=[8])
    parser.add_argument("--threads", **numbers, default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["causal"],
        choices=["causal", "two_sided", "gated", "heads", "packed"],
        help="packed has float32, rows and competitors of its own",
    )
    parser.add_argument("--layout", default="bhl", choices=["bhl", "blh"])
    parser.add_argument("--ops", nargs="+", default=list(BOTH), choices=BOTH)
    parser.add_argument(
        "--taps", type=int, default=0, help="taps of the kernel; 0: as many as the length"
    )
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="batch x channels x length")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["seqconv", BASELINE, "scipy.fft", "ducc0", "pyfftw"],
        choices=list(CONTENDERS),
    )
    parser.add_argument("--allocators", nargs="+", default=["tuned", "default"], choices=ALLOCATORS)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per case")
    parser.add_argument(
        "--time-budget", type=float, help="seconds after which no further case is begun"
    )
    parser.add_argument("--json", type=Path, help="append a line for each measurement to this file")
    parser.add_argument("--plot", type=Path, help="draw this picture")
    parser.add_argument(
        "--table", action="store_true", help="rewrite docs/benchmarks.md's table from --json"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write_tables(rows: list[dict], picture: Path) -> None:
    """Packed rows may have been measured alone, and then at another commit."""
    packs = [row for row in rows if row["tag"] == "packed"]
    packs = same_run(packs) if packs else []
    rows = same_run([row for row in rows if row["tag"] != "packed"])
    place = ROOT / "docs/benchmarks.md"
    files.replace_between(place, "bench", readme_table(rows))
    if packs:
        files.replace_between(place, "packed bench", packed_table(packs))
    (RESULTS / "fftconv.md").write_text(page(rows, packs))
    pictures.plot_fftconv(rows, picture)


def main() -> None:
    args = parse()
    if args.worker:
        return serve(prepare)
    if args.table:
        rows = files.read([args.json] if args.json else sorted(RESULTS.glob("fftconv*.jsonl")))
        if not rows:
            raise SystemExit("no results: run make bench first")
        write_tables(rows, args.plot or RESULTS / "fftconv.png")
        return None
    if min(*(args.lengths or []), *args.batch, args.elements, 1) < 1:
        raise SystemExit("--lengths, --batch and --elements must be at least 1")
    refuse_fallback()
    asked = args.contenders
    if args.full:
        asked = dict.fromkeys(name for job in full(args.budget) for name in job["names"])
    for name in (name for name in asked if name in missing()):
        console.print(f"{name}: the package {CONTENDERS[name][0]} is not installed")
    args.contenders = [n for n in args.contenders if n not in missing()]
    if not args.contenders:
        raise SystemExit("--contenders: none of them is there")
    done = files.read([args.json]) if args.full and args.json and args.json.exists() else []
    console.print(f"{device_name()}; threads {args.threads if not args.full else [1, 2]}")
    jobs = full(args.budget) if args.full else sample(args)
    rows = run_jobs(jobs, args, args.json, done)
    show(rows)
    show_requirements(requirements(rows))
    if args.plot:
        pictures.plot_fftconv(rows, args.plot)
    return None


if __name__ == "__main__":
    main()
