"""Measures the generation of S4D's kernel, sums of exponentials, beside other ways to do it.

python -m bench.ssm_kernel [--lengths 1024 4096] [--json FILE] [--plot FILE]

Every number is the median of interleaved rounds in one process under the C library's tuned allocator,
the stricter comparison (see bench.fftconv). A result that differs from float64's definition gets no time.
The sum alone starts from its float64 exponents and weights. "from parameters" is seqconv.ssm_kernel
as a layer calls it: it makes exponents and weights first, in a fixed time per mode. The requirement over
torch.bmm counts the preallocated output forward (torch.bmm allocates a new one each time) and a new output
with gradients. The einsum and PyKeOps take seconds. They get few of the channels and their time is scaled, since
channels never meet. The floor is two multiply-adds per mode and element, three times that with gradients, at
the rate of a matrix product.
"""

import argparse
import importlib.util
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import files, pictures
from bench.facts import length_name, now
from bench.micro.jobs import BOTH
from bench.micro.requirements import Requirement, all_right, ratio_of, verdict
from bench.micro.timing import (
    Clock,
    flops_per_second,
    interleaved,
    ratios,
    summary,
    within,
    worst_errors,
)
from bench.micro.worker import ALLOCATORS, Worker, machine, refuse_fallback, serve
from bench.terminal import console, show_requirements, table
from seqconv import S4DKernel
from seqconv.backends import cpu, keops
from seqconv.ops import ssm
from seqconv.ops.ssm import discretize, multiply, ssm_kernel

INTO, FUSED, WHOLE, BMM, BMM_WHOLE, EINSUM, KEOPS = CONTENDERS = (
    "seqconv, preallocated",
    "seqconv",
    "seqconv, from parameters",
    "blocked torch.bmm",
    "blocked torch.bmm, from parameters",
    "einsum",
    "PyKeOps",
)
FEW = (EINSUM, KEOPS)
FROM_PARAMETERS = {WHOLE: "auto", BMM_WHOLE: "torch"}
OURS = (INTO, FUSED, WHOLE)
TRAINED = (FUSED, WHOLE, BMM, BMM_WHOLE)  # with gradients
CHECKED = 4  # channels
# Relative L2 error of seqconv. The worst element may be off by twice that share of the largest one. Others may have
# 1000 times both.
TOLERANCE = {"forward": 5e-7, "forward+backward": 2e-6}


def parameters(channels: int, modes: int) -> list[Tensor]:
    """Returns log_dt, A, B and C of S4D at its initialisation, in float32."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [t.float() for t in S4DKernel(channels, d_state=2 * modes).system()]


def exponents(log_dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a and w as seqconv.ssm_kernel forms them."""
    a, b = discretize(log_dt, A, "zoh")
    return a, 2 * multiply(C.double(), multiply(b, B.double()))


def definition(a: Tensor, w: Tensor, length: int, dtype=torch.complex64) -> Tensor:
    """Computes the sum as it is written down, with a table of channels x modes x length in between."""
    a, w = (torch.view_as_complex(t).to(dtype) for t in (a, w))
    table = torch.exp(a.unsqueeze(-1) * torch.arange(length))
    return torch.einsum("chn,hnl->chl", w, table).real


def functions(channels: int, length: int) -> dict:
    """Returns contenders by name. They map a, w and the length, or the parameters and the length, to k."""
    out = torch.empty(1, channels, length)

    def preallocated(a, w, length):
        cpu.ssm(out, ssm.Modes(a, w))
        return out

    def whole(log_dt, A, B, C, length, backend):
        return ssm_kernel(log_dt, A, C, length, B=B, backend=backend)

    return {
        INTO: preallocated,
        FUSED: partial(ssm.mode_sum, single=True),
        BMM: partial(ssm.mode_sum, single=True, backend="torch"),
        EINSUM: definition,
        KEOPS: partial(keops.mode_sum, dtype=torch.float32),
        **{name: partial(whole, backend=b) for name, b in FROM_PARAMETERS.items()},
    }


def results(op: str, function, inputs, dk: Tensor) -> list[Tensor]:
    """Returns [k], or k and the gradients of the inputs."""
    length = dk.shape[-1]
    if op == "forward":
        with torch.no_grad():
            return [function(*inputs, length)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    k = function(*inputs, length)
    return [k, *torch.autograd.grad(k, inputs, dk)]


def measure(job: dict, clock: Clock):
    """Yields the rows of one length, one for each contender. A wrong result gets no times."""
    channels, modes, length, op = (job[x] for x in ("channels", "modes", "length", "op"))
    given = parameters(channels, modes)
    with torch.no_grad():
        summands = exponents(*given)
    dk = torch.randn(1, channels, length)
    few = min(channels, max(CHECKED, min(16, (1 << 24) // (modes * length))))
    made = functions(channels, length)

    def inputs(name):
        return given if name in FROM_PARAMETERS else summands

    def first(count, tensors):
        """Cuts tensors to their first channels, along the first axis or the one after the heads."""
        return [t.narrow(t.dim() // 4, 0, count) for t in tensors]

    def exact_of(name):
        def function(*tensors):
            *tensors, length = tensors
            summands = exponents(*tensors) if name in FROM_PARAMETERS else tensors
            return definition(*summands, length, dtype=torch.complex128)

        doubles = [t.double() for t in first(CHECKED, inputs(name))]
        return results(op, function, doubles, dk[:, :CHECKED].double())

    rows, runs, exact = {}, {}, {}
    for name in job["contenders"]:
        kind = name in FROM_PARAMETERS
        if kind not in exact:
            exact[kind] = exact_of(name)
        crest = max((t.abs().max() / t.square().mean().sqrt()).item() for t in exact[kind])
        allowed = (TOLERANCE[op], 2 * TOLERANCE[op] * crest)
        count = few if name in FEW else channels
        run = partial(results, op, made[name], first(count, inputs(name)), dk[:, :count])
        k, *grads = run()
        error = worst_errors([k[:, :CHECKED], *first(CHECKED, grads)], exact[kind])
        gate = within(error, allowed, 1 if name in OURS else 1000)
        rows[name] = {"contender": name, "timed_channels": count, "gate": gate, "median": None}
        rows[name] |= {"error_l2": error[0], "error_max": error[1], "tolerance": allowed}
        if gate:
            runs[name] = run
    del exact
    times = interleaved(runs, job["budget"], clock)
    each = {n: [1e9 * t / (rows[n]["timed_channels"] * length) for t in times[n]] for n in runs}
    for name, row in rows.items():
        if name in each:
            slow, fast = (BMM_WHOLE, WHOLE) if name in FROM_PARAMETERS else (BMM, FUSED)
            row |= summary(each[name], each.get(slow)) | {"unit": "ns per element"}
            if fast in each:
                row |= {"over_seqconv": ratios(each[name], each[fast])[1]}
        yield row


def prepare(settings: dict):
    clock = Clock("cpu")

    def rows_of(job: dict):
        peak = flops_per_second("cpu", torch.float32, clock)
        return [row | {"peak_flops": peak} for row in measure(job, clock)]

    return rows_of


def add_floor(rows: list[dict]) -> None:
    """Adds floors, by the highest rate that the run has seen."""
    peak = max((row["peak_flops"] for row in rows), default=0.0)
    for row in rows:
        products = 1 if row["op"] == "forward" else 3
        row["floor"] = products * 4 * row["modes"] / peak * 1e9
        if row["gate"]:
            row["of_peak"] = row["floor"] / row["median"]


def requirements(rows: list[dict]) -> list[Requirement]:
    """Returns every requirement that the rows can decide."""
    lines = [all_right(rows)]
    for row in rows:
        name, length, op = row["contender"], row["length"], row["op"]
        at = f"{op}, L={length_name(length)}"
        ratio = row.get("ratio")
        if name == INTO and row["gate"] and length >= 16384:
            lines += verdict(f"share of peak, preallocated, {at}", row["of_peak"], 0.5, True, "")
            lines += verdict(f"time, preallocated, {at}", row["median"], 2.5, False, " ns")
            lines += verdict(f"goal: time, preallocated, {at}", row["median"], 2.0, False, " ns")
        if name == (INTO if op == "forward" else FUSED) and length >= 4096:
            lines += verdict(f"{name} over torch.bmm, {at}", ratio, 5)
        if name == EINSUM and length >= 1024:
            limit = 20 if length >= 4096 else 5
            lines += verdict(f"torch.bmm over the einsum, {at}", ratio_of(1.0, ratio), limit)
    return lines


def show(rows: list[dict]) -> None:
    numbers = ("ns/element", "quartiles", "over torch.bmm", "of peak", "error L2", "max/rms")
    shown = table("S4D's kernel", ("length", "op", "contender"), numbers)
    for row in rows:
        few = row["timed_channels"] < row["channels"]
        name = row["contender"] + (f", {row['timed_channels']} channels, scaled" if few else "")
        cells = [length_name(row["length"]), row["op"], name]
        cells += ["[red]WRONG[/]", "", "", ""]
        if row["gate"]:
            ratio = f"{row['ratio']:.3g}x" if "ratio" in row else ""
            cells[3:] = [f"{row['median']:.2f}", f"{row['q1']:.2f}-{row['q3']:.2f}", ratio]
            cells += [f"{row['of_peak']:.1%}"]
        shown.add_row(*cells, f"{row['error_l2']:.1e}", f"{row['error_max']:.1e}")
    console.print(shown)


def main() -> None:
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.ssm_kernel", description=summary)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--d-state", type=int, default=64, help="twice the modes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--allocator", default="tuned", choices=ALLOCATORS)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each length")
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--json", type=Path, help="append a line for each measurement to this file")
    parser.add_argument("--plot", type=Path, help="draw this picture")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(prepare)
    if min(*args.lengths, args.channels, args.d_state // 2, args.threads) < 1:
        raise SystemExit("--lengths, --channels and --threads must be >= 1, --d-state >= 2")
    refuse_fallback()
    names = list(args.contenders)
    if KEOPS in names and importlib.util.find_spec("pykeops") is None:
        names.remove(KEOPS)
        console.print(f"{KEOPS}: the package pykeops is not installed")
    common = machine() | {"threads": args.threads, "allocator": args.allocator}
    worker, rows = Worker("bench.ssm_kernel", args.allocator, args.threads), []
    job = {"channels": args.channels, "modes": args.d_state // 2, "budget": args.budget}
    for length in args.lengths:
        for op in BOTH:
            shape = job | {"length": length, "op": op}
            there = names if op == "forward" else [n for n in names if n in TRAINED]
            for row in worker(shape | {"contenders": there}) if there else []:
                rows.append(shape | row | common | {"when": now()})
    worker.close()
    add_floor(rows)
    for row in rows if args.json else []:
        files.append(args.json, row)
    show(rows)
    show_requirements(requirements(rows))
    if args.plot:
        pictures.plot_ssm_kernel(rows, args.plot)
    return None


if __name__ == "__main__":
    main()
