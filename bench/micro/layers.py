"""Measures every layer, forward and backward, beside what a user would write with torch.fft.

python -m bench.layers [--lengths 1024 4096] [--json FILE]
python -m bench.layers --parts    the parts of a step, each by itself (bench/micro/parts.py)
python -m bench.layers --table    writes the README's tables from bench/results/layers.jsonl

Both have the same parameters and the same kernel generator. "torch.fft" convolves by bench/micro/natural.py, in the
layout that is faster for the case. ButterflyConv has no transform of torch's to take: "torch.fft" is its definition
there, by einsum and torch.bmm. Outputs and gradients of all are first compared with float64's.
Ratios are medians of the ratios of interleaved rounds under the C library's tuned allocator,
the stricter comparison (see bench.fftconv). Memory is the peak of one step beyond inputs and layer.
"""

import argparse
import contextlib
import copy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.progress import track
from torch import Tensor, nn

from bench import files
from bench.facts import RESULTS, ROOT, length_name, now, plural, same_run
from bench.micro import natural, parts
from bench.micro.contenders import BASELINE
from bench.micro.language_step import LanguageStep
from bench.micro.timing import Clock, interleaved, peak_bytes, summary, within, worst_errors
from bench.micro.worker import Worker, machine, refuse_fallback, serve
from bench.terminal import console, table
from seqconv import S4D, ButterflyConv, Hyena, LongConv, SGConv, use_backend

LAYERS = {  # name -> the layer for a d_model and a length
    "S4D": lambda d, n: S4D(d),
    "S4D, two-sided": lambda d, n: S4D(d, bidirectional=True),
    "LongConv": lambda d, n: LongConv(d, l_max=n),
    "LongConv, two-sided": lambda d, n: LongConv(d, l_max=n, bidirectional=True),
    "SGConv": lambda d, n: SGConv(d, l_max=n),
    "SGConv, two-sided": lambda d, n: SGConv(d, l_max=n, bidirectional=True),
    "Hyena": lambda d, n: Hyena(d, l_max=n),
    "ButterflyConv": lambda d, n: ButterflyConv(d, l_max=n),
}
MODELS = {"language model": LanguageStep}  # of a width and a length

OURS, DEFINITION = "seqconv", "definition"


def ways_of(layer: nn.Module) -> dict[str, str]:
    """The ways to compute a layer, and which contender each of them is a way of."""
    if isinstance(layer, ButterflyConv):
        return {OURS: OURS, DEFINITION: BASELINE}
    return {OURS: OURS} | dict.fromkeys(natural.LAYOUTS, BASELINE)


def step(way: str, layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of the input and of every parameter."""
    with contextlib.ExitStack() as stack:
        if way == DEFINITION:
            stack.enter_context(use_backend("reference"))
        elif way != OURS:
            stack.enter_context(natural.in_layers(way))
        y = layer(x)
        found = [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]
        if isinstance(layer, LanguageStep):
            layer.update(found[2:])
        return found


def problem(job: dict) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make = (LAYERS | MODELS)[job["layer"]]
    layer = make(job["d_model"], job["length"]).eval()  # without dropout
    x, dy = torch.randn(2, job["batch"], job["length"], job["d_model"])
    return layer, x.requires_grad_(), dy


def measure(job: dict, clock: Clock):
    """Yields the rows of one layer and length, one for each way. A wrong result gets no times."""
    layer, x, dy = problem(job)
    exact_x, exact_layer = x.detach().double().requires_grad_(), copy.deepcopy(layer).double()
    exact = step(DEFINITION, exact_layer, exact_x, dy.double())
    ways = ways_of(layer)
    found = {way: worst_errors(step(way, layer, x, dy), exact) for way in ways}
    del exact, exact_x, exact_layer
    # torch.fft must only compute the same. seqconv may have twice the round-off of torch.fft.
    allowed = dict.fromkeys(ways, (1e-4, 1e-2))
    theirs = [error for way, error in found.items() if way != OURS]
    largest = [max(errors) for errors in zip(*theirs, strict=True)]
    allowed[OURS] = (2 * largest[0] + 5e-7, 2 * largest[1] + 1e-5)
    runs = {
        way: partial(step, way, layer, x, dy)
        for way, error in found.items()
        if within(error, allowed[way])
    }
    times = interleaved(runs, job["budget"], clock)
    right = [way for way in ways if way != OURS and way in runs]
    fastest = min(right, key=lambda way: median(times[way]), default=None)
    for way, error in found.items():
        if way not in (OURS, fastest) and (way in runs or fastest is not None):
            continue  # the slower layout
        row = {"contender": ways[way], "way": way, "gate": way in runs, "median": None}
        row |= {"error_l2": error[0], "error_max": error[1], "tolerance": allowed[way]}
        if way in runs:
            both = OURS in runs and fastest is not None
            row |= summary(times[way], times[fastest] if both else None)
        yield row


def memory(job: dict):
    layer, x, dy = problem(job)
    for way in ways_of(layer):
        yield {"way": way, "bytes": peak_bytes(partial(step, way, layer, x, dy), "cpu")}


def prepare(settings: dict):
    """What a worker does with a job, by the name in its settings."""
    clock = Clock("cpu")
    by_parts = partial(parts.measure, problem=problem, step=partial(step, OURS), clock=clock)
    return {"memory": memory, "time": partial(measure, clock=clock), "parts": by_parts}[
        settings["what"]
    ]


def run(args) -> list[dict]:
    common = machine() | {"threads": args.threads, "allocator": "tuned"}
    clock = Worker("bench.layers", "tuned", args.threads, what="parts" if args.parts else "time")
    scale = None
    if not args.parts:
        scale = Worker("bench.layers", "returning", args.threads, what="memory")
    jobs = [(layer, length) for layer in args.layers for length in args.lengths]
    rows = []
    for layer, length in track(jobs, "measuring", console=console):
        job = {"op": "parts" if args.parts else "forward+backward"}
        job |= {"layer": layer, "length": length, "batch": args.batch, "d_model": args.d_model}
        peaks = {row["way"]: row["bytes"] for row in scale(job)} if scale else {}
        for row in clock(job | {"budget": args.budget}):
            here = {"peak_bytes": peaks[row["way"]]} if scale else {}
            rows.append(job | row | here | {"when": now()} | common)
            if args.json:
                files.append(args.json, rows[-1])
    clock.close()
    if scale:
        scale.close()
    return rows


# ---- what it prints ----


def mebibytes(row: dict) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"


def named(row: dict) -> str:
    return (
        row["contender"] if row["way"] == row["contender"] else f"{row['contender']}, {row['way']}"
    )


def show(rows: list[dict]) -> None:
    numbers = ("ms", "quartiles", "faster", "quartiles", "MiB", "error L2", "max/rms")
    shown = table("layers, forward and backward", ("layer", "length", "way"), numbers)
    for row in rows:
        cells = [row["layer"], length_name(row["length"]), named(row)]
        if row["gate"]:
            cells += [f"{1e3 * row['median']:.1f}", f"{1e3 * row['q1']:.1f}-{1e3 * row['q3']:.1f}"]
        else:
            cells += ["[red]WRONG[/]", ""]
        if row["contender"] == "seqconv" and "ratio" in row:
            cells += [f"{row['ratio']:.2f}x", f"{row['ratio_q1']:.2f}-{row['ratio_q3']:.2f}"]
        else:
            cells += ["", ""]
        shown.add_row(*cells, mebibytes(row), f"{row['error_l2']:.1e}", f"{row['error_max']:.1e}")
    console.print(shown)


def show_parts(rows: list[dict]) -> None:
    header, lines = parts.readme_table(rows, length_name)
    shown = table("the parts of a step", header[:2], header[2:])
    for line in lines:
        shown.add_row(*line)
    console.print(shown)


def origin(rows: list[dict]) -> str:
    first = rows[-1]
    shape = f"{first['batch']} samples, d_model {first['d_model']}, {plural(first['threads'], 'thread')}"
    where = f"{first['device']} ({first['isa']} kernels), torch {first['versions']['torch']}"
    return f"{shape}; {where}, commit {first['commit']}."


def alike(rows: list[dict]) -> list[dict]:
    """Those with as many threads, samples and channels as the last one."""
    keys = ("threads", "batch", "d_model")
    return [row for row in rows if all(row[k] == rows[-1][k] for k in keys)]


def parts_table(rows: list[dict]) -> str:
    """Returns what the parts of each layer's step take at the length in the middle, of the last measurement."""
    rows = alike(rows)
    lengths = sorted({row["length"] for row in rows})
    some = [row for row in rows if row["length"] == lengths[len(lengths) // 2]]
    return files.markdown(*parts.readme_table(some, length_name))


def readme_table(rows: list[dict]) -> str:
    """Returns speed-ups with milliseconds, and memory, of the last measurement of each layer and length."""
    last = {}
    for row in alike(rows):
        if row["gate"]:
            last[row["layer"], row["length"], row["contender"]] = row
    lengths = sorted({length for _, length, _ in last})
    header = ["", *map(length_name, lengths)]
    header += [f"MiB at {length_name(lengths[-1])}: seqconv, torch.fft"]
    lines = []
    for layer in dict.fromkeys(layer for layer, _, _ in last):
        cells = []
        for length in lengths:
            row = last.get((layer, length, "seqconv"), {})
            both = "ratio" in row
            cells.append(f"{row['ratio']:.2f}x, {1e3 * row['median']:.1f} ms" if both else "-")
        ends = [last.get((layer, lengths[-1], way)) for way in (OURS, BASELINE)]
        lines.append([layer, *cells, ", ".join(mebibytes(r) if r else "-" for r in ends)])
    return "\n\n".join([files.markdown(header, lines), origin(rows)])


def main() -> None:
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=summary)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--layers", nargs="+", choices=LAYERS | MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--budget", type=float, default=5.0, help="seconds for each layer and length"
    )
    parser.add_argument("--json", type=Path, help="append a line for each measurement to this file")
    parser.add_argument(
        "--table", action="store_true", help="rewrite the README's table from --json"
    )
    parser.add_argument("--parts", action="store_true", help="time the parts of a step instead")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(prepare)
    if args.table:
        path = args.json or RESULTS / "layers.jsonl"
        rows = files.read([path]) if path.exists() else []
        if not rows:
            raise SystemExit("no results: run make bench-layers first")
        whole = [row for row in rows if row["op"] != "parts" and row["layer"] in LAYERS]
        of_parts = [row for row in rows if row["op"] == "parts"]
        for name, some, make in (
            ("layers bench", whole, readme_table),
            ("parts bench", of_parts, parts_table),
        ):
            if some:
                files.replace_between(ROOT / "README.md", name, make(same_run(some)))
        return None
    if min(*args.lengths, args.batch, args.d_model, args.threads) < 1:
        raise SystemExit("--lengths, --batch, --d-model and --threads must be >= 1")
    refuse_fallback()
    args.layers = args.layers or list(parts.LAYERS if args.parts else LAYERS)
    if args.parts and not set(args.layers) <= set(parts.LAYERS):
        raise SystemExit(f"--parts takes --layers {' '.join(parts.LAYERS)} only")
    return (show_parts if args.parts else show)(run(args))


if __name__ == "__main__":
    main()
