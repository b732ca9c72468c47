"""Measures convolutions and layers over several processes: strong and weak scaling, bytes, and the meeting.

python -m bench.parallel [--processes 1 2 4] [--length 65536] [--out FOLDER]
python -m bench.parallel --paper    prints the bytes of 8 to 1,024 GPUs by the package's formula, measures nothing

Strong scaling divides one sequence among the processes. Weak scaling gives every process as many steps as the
largest group has then. One process alone calls seqconv.fftconv or the layer itself. Every method at every number of
processes takes its turn in each round, from a barrier to the end of the slowest rank. Ratios are medians of those of
rounds. Results in float64 must be those of one process to 1e-12 in relative L2 norm, gradients included. Those in
float32, which are timed, may be off by 1e-4: channels' contributions to a gradient that cancel leave more round-off
where ranks add them. A wrong result gets no time. "Meeting" is the exchange of sizes and facts before each call, which
is not made where shards= is given.

The command starts the processes itself, with one thread each. Under torchrun those that it started take part.
"""

import argparse
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn

from bench import files
from bench.facts import length_name, now, plural
from bench.micro.jobs import BOTH
from bench.micro.ranks import Part, Ranks, local, of_worker, torchrun
from bench.micro.timing import interleaved, quartiles, ratios, summary, within, worst_errors
from bench.micro.traffic import Traffic, paper
from bench.micro.worker import machine, refuse_fallback, serve
from bench.terminal import console, plain, table
from seqconv import S4D, Hyena, fftconv, parallel
from seqconv.parallel.shards import chunk_sizes

TOLERANCE, IN_FLOAT32 = (
    1e-12,
    (1e-4, 1e-2),
)  # relative L2; and the worst element over the root mean square
TAPS = 128  # of the short kernel
TINY = 64  # steps of each process where the meeting is measured
ALONE = "alone"


class Conv(nn.Module):
    """fftconv with a kernel of its own, of one process or, after divide(), of several."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.k = nn.Parameter(torch.randn(channels, taps) / taps**0.5)
        self.skip = nn.Parameter(torch.randn(channels))
        self.options: dict = {}

    def forward(self, x: Tensor) -> Tensor:
        convolve = parallel.fftconv if self.options else fftconv
        return convolve(x, self.k, self.skip, layout="blh", **self.options)

    def explain(self, x: Tensor) -> parallel.Explanation:
        return parallel.explain(x, self.k, self.skip, layout="blh", **self.options)


WORKS = {  # name -> what makes it for a d_model and a length, and its methods
    "short kernel": (lambda d, n: Conv(d, min(TAPS, n)), ("halo", "a2a")),
    "long kernel": (lambda d, n: Conv(d, n), ("a2a",)),
    "S4D": (lambda d, n: S4D(d), ("state", "a2a")),
    "Hyena": (lambda d, n: Hyena(d, l_max=n), ("a2a",)),
}


def divide(model: nn.Module, **options) -> nn.Module:
    if isinstance(model, Conv):
        model.options = options
        return model
    return parallel.context_parallel(model, options.pop("group"), **options)


@dataclass(frozen=True)
class Entry:
    """What is timed in each round."""

    length: int
    processes: int
    method: str
    op: str
    known: bool = True  # shards= is given

    @property
    def sizes(self) -> tuple[int, ...]:
        return chunk_sizes(self.length, self.processes)


# ---- in each process ----


def results(op: str, model: nn.Module, x: Tensor, dy: Tensor, around=lambda part: part()) -> list:
    """Returns [y], or y and the gradients of the input and of every parameter."""
    if op == "forward":
        with torch.no_grad():
            return [around(partial(model, x))]
    y = around(partial(model, x))
    leaves = [x, *model.parameters()]
    return [y.detach(), *around(lambda: torch.autograd.grad(y, leaves, dy))]


def counted(group, op: str, model: nn.Module, x: Tensor, dy: Tensor) -> list[int]:
    """The bytes that this rank sends forward and backward."""
    found = []

    def around(part):
        with Traffic(group) as traffic:
            result = part()
        found.append(traffic.sent)
        return result

    results(op, model, x, dy, around)
    return [*found, 0][:2]


class Measurement:
    """One work in a shape, on one rank."""

    def __init__(self, ranks: Ranks, job: dict):
        self.ranks, self.job = ranks, job
        self.make = WORKS[job["work"]][0]
        self.exact: dict[int, list[Tensor]] = {}

    def problem(self, length: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        model = self.make(self.job["d_model"], length).eval()  # without dropout
        x, dy = torch.randn(2, self.job["batch"], length, self.job["d_model"])
        place = {"device": self.ranks.device, "dtype": dtype}
        return model.to(**place), x.to(**place).requires_grad_(), dy.to(**place)

    def part(self, entry: Entry, dtype: torch.dtype = torch.float32) -> tuple:
        """The model and this rank's steps of x and dy."""
        model, x, dy = self.problem(entry.length, dtype)
        if entry.method == ALONE:
            return model, x, dy
        group = self.ranks.groups[entry.processes]
        shards = entry.sizes if entry.known else None
        divide(model, group=group, method=entry.method, shards=shards)
        x, dy = (t.detach().split(entry.sizes, 1)[self.ranks.rank].clone() for t in (x, dy))
        return model, x.requires_grad_(), dy

    def alone(self, length: int) -> list[Tensor]:
        """One process's results in float64."""
        if length not in self.exact:
            self.exact[length] = results(BOTH[1], *self.problem(length, torch.float64))
        return self.exact[length]

    def facts(self, entry: Entry) -> dict:
        """Errors, and bytes; all ranks return the same."""
        ours = [0.0] * 8
        if self.ranks.rank < entry.processes:
            exact = self.alone(entry.length)
            cut = [t.split(entry.sizes, 1)[self.ranks.rank] for t in exact[:2]] + exact[2:]
            cut = cut[:1] if entry.op == "forward" else cut
            double, usual = self.part(entry, torch.float64), self.part(entry)
            ours[:2] = worst_errors(results(entry.op, *double), cut)
            ours[2:4] = worst_errors(results(entry.op, *usual), cut)
            ours[4] = ours[0] <= TOLERANCE and within(tuple(ours[2:4]), IN_FLOAT32)
            if entry.method != ALONE:
                model, x, _ = usual
                told = model.explain(x) if isinstance(model, Conv) else parallel.explain(x, model)
                ours[5] = told.sent[self.ranks.rank]
                ours[6:] = counted(self.ranks.groups[entry.processes], entry.op, *usual)
        rows = self.ranks.tell(ours)[: entry.processes]
        columns = list(zip(*rows, strict=True))
        promised, forward, backward = ([int(n) for n in column] for column in columns[5:])
        return {
            "gate": all(columns[4]),
            "error_float64": max(columns[0]),
            "error_l2": max(columns[2]),
            "error_max": max(columns[3]),
            "promised": promised,
            "sent": forward,
            "sent_backward": backward,
        }

    def rows(self, entries: list[Entry]):
        found = {entry: self.facts(entry) for entry in entries}
        self.exact.clear()
        parts = {}
        for entry in (e for e in entries if found[e]["gate"]):
            here = self.ranks.rank < entry.processes
            run = partial(results, entry.op, *self.part(entry)) if here else None
            parts[entry] = Part(self.ranks.groups[entry.processes], run)
        times = interleaved(
            parts, self.job["budget"], self.ranks.seconds, agreed=self.ranks.first_says
        )
        for entry in entries if self.ranks.rank == 0 else ():
            row = asdict(entry) | found[entry] | {"median": None}
            yield row | (compared(entry, times) if entry in times else {})


def compared(entry: Entry, times: dict[Entry, list[float]]) -> dict:
    """An entry's times, and quartiles of their ratios to those of one process and of what it is without a meeting."""
    own, row = times[entry], summary(times[entry])
    share, rest = divmod(entry.length, entry.processes)
    base = Entry(entry.length, 1, ALONE, entry.op)
    part = Entry(share, 1, ALONE, entry.op)
    known = Entry(entry.length, entry.processes, entry.method, entry.op)
    if base in times:
        row |= {"strong": ratios(times[base], own)}
    if part in times and not rest:
        row |= {"weak": ratios(times[part], own)}
    if not entry.known and known in times:
        row |= {"meeting": quartiles([a - b for a, b in zip(own, times[known], strict=True)])}
    return row


def measuring(ranks: Ranks):
    def rows_of(job: dict):
        entries = [Entry(**entry) for entry in job["entries"]]
        yield from Measurement(ranks, job).rows(entries)
        if ranks.rank:
            yield {}  # a sign of life

    return rows_of


def prepare(settings: dict):
    return measuring(of_worker(settings))


# ---- in the process that reports ----


def jobs(args, counts: list[int]) -> list[dict]:
    """Scaling for every work, and meetings for one function and one layer."""
    most = max(counts)
    strong = {(args.length, count) for count in counts}
    weak = {(args.length // most * count, count) for count in counts}
    common = {"d_model": args.d_model, "batch": args.batch, "budget": args.budget}
    found = []
    for work in args.works:
        entries = [
            Entry(length, count, method, op)
            for length, count in sorted(strong | weak)
            for method in ((ALONE,) if count == 1 else WORKS[work][1])
            for op in BOTH
        ]
        found.append(common | {"work": work, "tag": "scaling", "entries": entries})
    for work in ("short kernel", "S4D"):
        entries = [
            Entry(TINY * count, count, WORKS[work][1][0], "forward", known)
            for count in counts
            for known in (True, False)
            if count > 1
        ]
        if work in args.works and entries:
            found.append(common | {"work": work, "tag": "meeting", "entries": entries})
    return [job | {"entries": [asdict(e) for e in job["entries"]]} for job in found]


def report(rows: list[dict], common: dict, args) -> None:
    where = f"{common['device']} ({common['isa']} kernels), {plural(common['cores'], 'core')}"
    shape = f"{plural(args.batch, 'sample')}, d_model {args.d_model}, float32, 1 thread each"
    plain.print(f"{where}, torch {common['versions']['torch']}, commit {common['commit']}; {shape}")
    words = ("work", "pass", "method", "steps", "processes")
    numbers = ("ms", "quartiles", "strong", "weak", "KiB: explain", "forward", "backward", "error")
    shown = table("scaling", words, numbers)
    for row in (r for r in rows if r["tag"] == "scaling"):
        cells = [row["work"], row["op"], row["method"], length_name(row["length"])]
        cells += [str(row["processes"]), *timed(row)]
        if row["method"] == ALONE:
            shown.add_row(*cells)
            continue
        cells += [f"{row['strong'][1]:.2f}x" if "strong" in row else ""]
        cells += [f"{row['weak'][1]:.0%}" if "weak" in row else ""]
        for name in ("promised", "sent", "sent_backward"):
            cells.append(f"{max(row[name]) / 1024:,.1f}")
        shown.add_row(*cells, f"{row['error_float64']:.0e}")
    console.print(shown)
    shown = table(
        "meeting before a call, forward", ("work", "method", "processes"), ("ms", "quartiles")
    )
    shown.add_column("of it: the meeting, ms", justify="right")
    for row in (r for r in rows if "meeting" in r):
        cells = [row["work"], row["method"], str(row["processes"]), *timed(row)]
        shown.add_row(*cells, f"{1e3 * row['meeting'][1]:.2f}")
    if shown.row_count:
        console.print(shown)
    plain.print("strong: times as fast as one process with the same steps in all.")
    plain.print("weak: the time of one process with a rank's steps, over this time.")
    plain.print(
        "KiB: what the rank that sends most sends, as explain says (forward; of a Hyena one long convolution) and as "
        "counted, without the sums of parameters' gradients."
    )
    plain.print(f"error: from one process, in float64, relative L2; {TOLERANCE:.0e} is allowed.")
    wrong = sum(not row["gate"] for row in rows)
    plain.print(f"{wrong} of {len(rows)} results were wrong and were not timed.")
    most = max(row["processes"] for row in rows)
    if common["backend"] == "gloo" and most > 1:
        plain.print(
            "gloo on one machine copies through memory and the loopback interface, which is no network: "
            "bytes are those of any machine, times are not."
        )
    if common["backend"] == "gloo" and most > common["cores"]:
        cores = plural(common["cores"], "core")
        plain.print(
            f"This machine has {cores}: more processes than that share them, and show no scaling."
        )


def timed(row: dict) -> list[str]:
    if not row["gate"]:
        return ["[red]WRONG[/]", ""]
    return [f"{1e3 * row['median']:.2f}", f"{1e3 * row['q1']:.2f}-{1e3 * row['q3']:.2f}"]


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    text = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=text)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", help="numbers of processes (default: 1 2 4)")
    add("--length", type=int, help="steps of the largest sequence (default: 65536)")
    add("--d-model", type=int, help="channels (default: 64)")
    add("--batch", type=int, default=1)
    add("--works", nargs="+", default=list(WORKS), choices=WORKS)
    add("--budget", type=float, help="seconds for each work (default: 10)")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: NCCL, a GPU for each rank")
    add("--quick", action="store_true", help="few steps, channels and rounds")
    add("--out", type=Path, help="add to parallel.jsonl and draw parallel.png in this folder")
    add("--paper", action="store_true", help="print the table of bytes for 8 to 1,024 GPUs")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    usual = (4096, 8, 0.0) if args.quick else (65536, 64, 10.0)
    for name, value in zip(("length", "d_model", "budget"), usual, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def checked(args) -> list[int]:
    """The numbers of processes, one among them; exits where an option is wrong."""
    there = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else None
    counts = sorted({1, *(args.processes or ([there] if there else [2, 4]))})
    if counts[0] < 1:
        raise SystemExit("--processes must be >= 1")
    if there and counts[-1] != there:
        raise SystemExit(f"--processes must end with the {there} of torchrun, got {counts[-1]}")
    if args.length < TINY * counts[-1]:
        text = f"--length must be >= {TINY * counts[-1]}, {TINY} steps for each process"
        raise SystemExit(f"{text}, got {args.length}")
    if min(args.batch, args.d_model) < 1:
        raise SystemExit("--batch and --d-model must be >= 1")
    if args.device == "cuda":
        gpus = torch.cuda.device_count()
        if not there and counts[-1] > gpus:
            raise SystemExit(f"--processes must be <= {gpus}, a GPU for each, got {counts[-1]}")
    else:
        refuse_fallback()
    return counts


def main() -> None:
    args = parsed()
    if args.worker:
        return serve(prepare)
    if args.paper:
        return print(paper())
    counts = checked(args)
    common = machine() | {"threads": 1, "allocator": "tuned", "cores": len(os.sched_getaffinity(0))}
    common |= {"backend": "nccl" if args.device == "cuda" else "gloo"}
    if args.device == "cuda":
        common |= {"device": torch.cuda.get_device_name()}
    under = dist.is_torchelastic_launched()
    common |= {"allocator": "default"} if under else {}
    rows = []
    begun = (
        torchrun(counts, args.device, measuring)
        if under
        else local("bench.parallel", counts, args.device)
    )
    with begun as answer:
        for job in track(jobs(args, counts), "measuring", console=console):
            shape = {name: value for name, value in job.items() if name != "entries"}
            for row in filter(None, answer(job)):
                rows.append(shape | row | common | {"when": now()})
    if not rows:
        return None  # another rank reports
    if args.out:
        from bench.pictures import plot_parallel

        args.out.mkdir(parents=True, exist_ok=True)
        for row in rows:
            files.append(args.out / "parallel.jsonl", row)
        plot_parallel(rows, args.out / "parallel.png")
    return report(rows, common, args)


if __name__ == "__main__":
    main()
