"""Measures a convolution whose inputs come one at a time, beside other ways to generate.

python -m bench.streaming [--lengths 1024 4096] [--json FILE] [--plot FILE]
python -m bench.streaming --table    writes the table of docs/benchmarks.md and the picture from --json

The kernel has as many taps as the stream has steps, and all is in float32. In each round, each contender generates
one stream. seqconv.streaming.StreamingConv takes all of its steps, which are timed one by one. "fftconv anew"
convolves all inputs so far at each step. "dot product" reads them from a contiguous cache, by the fastest of four ways
at each position: einsum, vecdot, and a product of a matrix and a vector in either order. These two are timed at some
positions, and their total is integrated by the trapezoid rule. "S4D's recurrence" is S4D.step without the activation
and the linear map; its steps are all alike. Outputs that differ from float64's get no time. Totals, and ratios of
totals, are medians over the rounds. The worst step is the largest of the medians of single positions.
"""

import argparse
import gc
from pathlib import Path
from statistics import median

import torch
from rich.progress import track

from bench import files, pictures
from bench.facts import RESULTS, ROOT, length_name, now, plural, same_run
from bench.micro.streaming_contenders import (
    CONTENDERS,
    OURS,
    RECURRENCE,
    WHOLE,
    Problem,
    Recurrence,
    integrated,
    sampled,
    stream,
    tiles,
)
from bench.micro.streaming_report import readme_table, requirements, show
from bench.micro.timing import Clock, ratios, summary, within, worst_errors
from bench.micro.worker import Worker, device_name, machine, refuse_fallback, serve
from bench.terminal import console, show_requirements
from seqconv.streaming import StreamingConv

LENGTHS = [1024, 4096, 16384, 65536]
BATCHES = [1, 16]
CALLS = 3  # of a sampled contender at a position in a round; the median counts
# Of seqconv: relative L2 error, and that of the worst element over the root mean square. Others may have 1000 times
# both.
TOLERANCE = (5e-7, 5e-6)
PER_OCTAVE = 4  # points of a curve


class Checks:
    """The worst errors of each contender so far."""

    def __init__(self):
        self.errors = dict.fromkeys(CONTENDERS, (0.0, 0.0))

    def __call__(self, name: str, results, exact) -> None:
        self.errors[name] = tuple(map(max, self.errors[name], worst_errors(results, exact)))

    def row(self, name: str) -> dict:
        tolerance = TOLERANCE if name in WHOLE else tuple(1000 * t for t in TOLERANCE)
        error = self.errors[name]
        row = {"contender": name, "gate": within(error, tolerance), "total": None}
        return row | {"error_l2": error[0], "error_max": error[1], "tolerance": tolerance}


def measure(job: dict, clock: Clock):
    """Yields a row for each contender at one length and batch. A wrong result gets no times."""
    problem = Problem(job["batch"], job["channels"], job["length"], job["positions"])
    exact, check = problem.exact(), Checks()
    conv = StreamingConv(problem.taps)
    conv.taps(None)  # The spectra are made once per kernel.
    recurrence = Recurrence(problem)
    exact_recurrence = recurrence.exact()
    totals: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    steps: dict[str, list[list[float]]] = {name: [] for name in WHOLE}
    points: list[dict] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(job["rounds"]):
            for name, spread in WHOLE.items():
                seconds, outputs = stream(conv, problem, spread)
                check(name, outputs, exact)
                totals[name].append(sum(seconds))
                steps[name].append(seconds)
            points.append(_points(problem, exact[0], clock, check))
            seconds, outputs = recurrence()
            check(RECURRENCE, [outputs], [exact_recurrence])
            totals[RECURRENCE].append(seconds * problem.length)
    finally:
        gc.enable()
    curves = {RECURRENCE: _flat(problem.at, totals[RECURRENCE])}
    for name in points[0]:
        fastest, curves[name] = _fastest(problem.at, [found[name] for found in points])
        for found in points:
            each = [found[name][way][i] for i, way in enumerate(fastest)]
            totals[name].append(integrated(problem.at, each))
    apart = tiles(conv, problem, job["budget"], clock)
    for name in CONTENDERS:
        row = check.row(name) | ({"tiles": apart} if name == OURS else {})
        if row["gate"]:
            row |= summary(totals[name])
            row |= {"total": row["median"], "over_seqconv": ratios(totals[name], totals[OURS])[1]}
            if name in WHOLE:
                each = [median(times) for times in zip(*steps[name], strict=True)]
                curves[name] = _curve(each)
                row |= {"median_step": median(each), "worst_step": max(each)}
            row["curve"] = curves[name]
        yield row


def _points(problem: Problem, exact, clock: Clock, check: Checks) -> dict[str, dict[str, list]]:
    """Contender -> way -> seconds at each position, of one round."""
    found: dict[str, dict[str, list]] = {}
    for name, ways in sampled(problem).items():
        found[name] = {way: [] for way in ways}
        for way, function in ways.items():
            for n, wanted in zip(problem.at, exact, strict=True):
                check(name, [function(n)], [wanted])
                each = [clock(lambda f=function, n=n: f(n)) for _ in range(CALLS)]
                found[name][way].append(median(each))
    return found


def _flat(at: list[int], totals: list[float]) -> dict:
    return {"position": [1, at[-1]], "mean": [median(totals) / at[-1]] * 2}


def _fastest(at: list[int], rounds: list[dict]) -> tuple[list[str], dict]:
    """The fastest way at each position, and the curve of these."""
    medians = {
        way: [median(each) for each in zip(*[r[way] for r in rounds], strict=True)]
        for way in rounds[0]
    }
    fastest = [min(medians, key=lambda way: medians[way][i]) for i in range(len(at))]
    mean = [medians[way][i] for i, way in enumerate(fastest)]
    return fastest, {"position": at, "mean": mean, "way": fastest}


def _curve(steps: list[float]) -> dict:
    """Mean and worst time of the steps between points of a geometric sequence of positions."""
    ends = [round(2 ** (i / PER_OCTAVE)) for i in range(PER_OCTAVE * len(steps).bit_length())]
    ends = sorted({n for n in ends if n < len(steps)} | {len(steps)})
    pieces = [steps[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return {
        "position": ends,
        "mean": [sum(p) / len(p) for p in pieces],
        "worst": [max(p) for p in pieces],
    }


def prepare(settings: dict):
    clock = Clock("cpu")

    def rows_of(job: dict):
        with torch.no_grad():
            yield from measure(job, clock)

    return rows_of


# ---- the command ----


def needed_bytes(batch: int, channels: int, length: int) -> int:
    """About the most that a job holds at once: tokens, two caches and a result of all times, and what belongs to the
    kernel. The rings of the stream's state are there before the caches are."""
    return 4 * channels * length * (6 * batch + 16)


def free_bytes() -> int | None:
    """The memory that the system can give, if it says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")), None)


SHAPE = ("threads", "batch", "channels", "length", "positions")


def run(args) -> list[dict]:
    """Returns the rows of all jobs. Those that --json has of this machine and commit are not measured again."""
    common = machine() | {"allocator": "tuned"}
    kept = files.read([args.json]) if args.json and args.json.exists() else []
    kept = [r for r in same_run(kept, common) if r["gate"]] if kept else []
    jobs, rows = [], []
    for threads in args.threads:
        for length in args.lengths:
            for batch in args.batch:
                rounds = args.rounds if length <= args.long else min(args.rounds, 3)
                job = {"threads": threads, "batch": batch, "channels": args.channels}
                job |= {"length": length, "positions": args.positions, "rounds": rounds}
                jobs.append(job)
    worker, settings = None, None
    for job in track(jobs, "measuring", console=console):
        done = [
            r for r in kept if all(r[x] == job[x] for x in SHAPE) and r["rounds"] == job["rounds"]
        ]
        if len({r["contender"] for r in done}) == len(CONTENDERS):
            rows += done[-len(CONTENDERS) :]
            continue
        title = (
            f"B={job['batch']}, L={length_name(job['length'])}, {plural(job['threads'], 'thread')}"
        )
        needed, free = needed_bytes(job["batch"], job["channels"], job["length"]), free_bytes()
        if free is not None and needed > free:
            console.print(
                f"{title}: not measured: it needs {needed >> 20} MiB, {free >> 20} are free"
            )
            continue
        if job["threads"] != settings:
            if worker:
                worker.close()
            settings = job["threads"]
            worker = Worker("bench.streaming", "tuned", settings)
        for row in worker(job | {"budget": args.budget}, title):
            rows.append(job | row | common | {"when": now()})
            if args.json:
                files.append(args.json, rows[-1])
    if worker:
        worker.close()
    return rows


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.streaming", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=7, help="at most 3 above --long")
    parser.add_argument("--long", type=int, default=16384, help="longer streams get fewer rounds")
    parser.add_argument("--positions", type=int, default=12, help="at which others are timed")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for the tiles alone")
    parser.add_argument(
        "--json", type=Path, help="append a line for each measurement; goes on from what it has"
    )
    parser.add_argument("--plot", type=Path, help="draw this picture")
    parser.add_argument(
        "--table", action="store_true", help="rewrite docs/benchmarks.md's table from --json"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.worker:
        return serve(prepare)
    if args.table:
        path = args.json or RESULTS / "streaming.jsonl"
        rows = files.read([path]) if path.exists() else []
        if not rows:
            raise SystemExit("no results: run make bench-streaming first")
        rows = same_run(rows)
        files.replace_between(ROOT / "docs/benchmarks.md", "streaming bench", readme_table(rows))
        pictures.plot_streaming(rows, args.plot or RESULTS / "streaming.png")
        return None
    numbers = (*args.lengths, *args.batch, *args.threads, args.channels, args.rounds)
    if min(*numbers, args.positions) < 1:
        raise SystemExit("lengths, batches, channels, threads, rounds and positions must be >= 1")
    refuse_fallback()
    console.print(f"{device_name()}; threads {args.threads}")
    rows = run(args)
    show(rows)
    show_requirements(requirements(rows))
    if args.plot:
        pictures.plot_streaming(rows, args.plot)
    return None


if __name__ == "__main__":
    main()
