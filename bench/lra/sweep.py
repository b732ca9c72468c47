"""Several runs, one after the other, each in a process of its own: any tasks, layers and seeds, or those for a GPU.

Started again, a sweep skips what is finished and resumes what is not.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.lra import options, recipes
from bench.lra.arguments import make_parser, parse_fit
from bench.lra.report import levels

COMMAND = [sys.executable, "-m", "bench.lra"]
REFUSED = {
    "--layer": "--layers",
    "--seed": "--seeds",
    "--task": "tasks come first",
    "--config": "give what differs from the recipe as options",
}


@dataclass(frozen=True)
class Planned:
    """One run: its name, its folder, and what `fit` is told."""

    name: str
    out: Path
    arguments: list[str]


def pending(out: Path) -> list[str] | None:
    """Returns what `fit` needs beyond its options: nothing for a new run, --resume where there is a checkpoint,
    --overwrite where a run has none yet; None for a run that is finished or has failed."""
    if (out / "result.json").exists():
        return None
    if (out / "last.ckpt").exists():
        return ["--resume"]
    return ["--overwrite"] if (out / "run.json").exists() else []


def listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def sweep(argv: list[str]) -> None:
    parser = make_parser(
        "sweep",
        "Trains several runs one after the other. Options that sweep does not have itself are given to every fit. "
        "Started again, it skips what is finished and resumes what is not.",
    )
    parser.add_argument("tasks", nargs="*", help="tasks, separated by blanks")
    parser.add_argument("--layers", default="s4d,sgconv,long_conv", help="separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--out", default="runs", help="folder of the run folders")
    own, rest = split_arguments(argv)
    for key in (word.partition("=")[0] for word in rest):
        if key in REFUSED:
            parser.error(f"{key} is none of a sweep's options: {REFUSED[key]}")
    chosen = parser.parse_args(own)
    if not chosen.tasks:
        parser.error("which tasks? python -m bench.lra --help lists them")
    for name in ("layers", "seeds"):
        if not listed(chosen[name]):
            parser.error(f"--{name} names none")
    # All runs are parsed before the first one starts, so that a mistake shows at once.
    plans = []
    for task in chosen.tasks:
        for seed in listed(chosen.seeds):
            for layer in listed(chosen.layers):
                name = Path(options.run_folder(task, layer, seed)).name
                out = Path(chosen.out) / name
                arguments = [task, "--layer", layer, "--seed", seed, "--out", str(out), *rest]
                parse_fit(arguments, "sweep")
                plans.append(Planned(name, out, arguments))
    run(plans)


def split_arguments(
    argv: list[str], known: Iterable[str] = ("--layers", "--seeds", "--out")
) -> tuple[list[str], list[str]]:
    """Returns the command's own arguments, which are `known`, and those for `fit`, each option with its value."""
    known = {*known, "--help", "-h"}
    own, rest, i = [], [], 0
    while i < len(argv):
        key, has_value, _ = argv[i].partition("=")
        taken = [argv[i]]
        if key.startswith("--") and not has_value and i + 1 < len(argv) and key != "--help":
            taken += [argv[i + 1]] if not argv[i + 1].startswith("--") else []
        (own if key in known or not key.startswith("-") else rest).extend(taken)
        i += len(taken)
    return own, rest


# ---- the runs for a GPU ----

GPU_RUNS = (  # (task, layer, options): the most informative first
    *(("listops-gen", layer, ()) for layer in ("s4d", "sgconv", "long_conv")),
    *(("pathfinder32-hard", layer, ()) for layer in ("s4d", "sgconv", "long_conv")),
    ("pathx-gen", "s4d", ("--max_minutes", "10")),
    ("path256-gen", "long_conv", ("--max_minutes", "2", "--compare", "10")),
)
GPU_TASKS = tuple(dict.fromkeys(task for task, *_ in GPU_RUNS))
PRECISIONS = ("bf16-mixed", "32-true")
SAMPLES = {"pathx-gen": 20_000, "path256-gen": 2_000}  # more than the minutes can use


def gpu(argv: list[str]) -> None:
    parser = make_parser(
        "gpu",
        "Trains the generated tasks of the Long Range Arena on a GPU, in as many sessions as it takes. The most "
        "informative runs come first. Every run is made in bf16-mixed and in float32. ListOps and Pathfinder go "
        "through their whole schedules. Path-X gets a schedule shortened to ten minutes. Path256, which is 65,536 "
        "steps long, gets two minutes, and its training step is then timed beside torch.fft.",
    )
    parser.add_argument(
        "tasks", nargs="*", default=list(GPU_TASKS), help=f"some of {', '.join(GPU_TASKS)}"
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="length of this session")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/gpu", help="folder of the run folders")
    parser.add_argument("--data", default="data", help="folder of the data sets")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command")
    chosen = parser.parse_args(argv)
    for task in chosen.tasks:
        if task not in GPU_TASKS:
            parser.error(f"unknown task {task!r}{recipes.suggest(task, GPU_TASKS)}")
    if chosen.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            tried = "--device cpu tries the command without one"
            parser.error(f"torch finds no CUDA device here; {tried}")
    if chosen.minutes <= 0:
        parser.error(f"--minutes must be positive, got {chosen.minutes}")
    common = ["--seed", str(chosen.seed), "--data", chosen.data, "--device", chosen.device]
    wanted = [run for run in GPU_RUNS if run[0] in chosen.tasks]
    plans = []
    for task, layer, own in wanted:
        for precision in PRECISIONS:
            name = f"{task}-{layer}-{chosen.seed}-{precision}"
            out = Path(chosen.out) / name
            arguments = [task, "--layer", layer, *common, "--precision", precision]
            arguments += ["--out", str(out), *own]
            parse_fit(arguments, "gpu")
            plans.append(Planned(name, out, arguments))
    began = time.perf_counter()
    for task in dict.fromkeys(task for task, *_ in wanted):
        made = Path(chosen.data) / "generated" / task / "generated.json"
        if made.exists() and json.loads(made.read_text())["whole"]:
            continue
        making = [*COMMAND, "data", "make", task, "--root", chosen.data]
        making += ["--n", str(SAMPLES[task])] if task in SAMPLES else []
        if subprocess.run(making).returncode:
            raise SystemExit(1)
    run(plans, chosen.minutes - (time.perf_counter() - began) / 60)


# ---- one process after the other ----


def run(plans: list[Planned], minutes: float | None = None) -> None:
    """Runs one process after the other, for so many minutes in all."""
    failures, began = [], time.perf_counter()
    for number, plan in enumerate(plans, 1):
        extra = pending(plan.out)
        where = f"[{number}/{len(plans)}] {plan.name}"
        if extra is None:
            print(f"{where}: {outcome(plan.out)}, already there", flush=True)
            continue
        start = time.perf_counter()
        if minutes is not None:
            left = minutes - (start - began) / 60
            if left < 0.1:
                print(f"{where}: no time is left; the same command goes on", flush=True)
                raise SystemExit(130)
            extra += ["--stop_minutes", f"{left:.2f}"]
        print(f"{where}: {'resumed' if '--resume' in extra else 'started'}", flush=True)
        code = wait(subprocess.Popen([*COMMAND, "fit", *plan.arguments, *extra]))
        if code == 130:
            print(f"{where}: stopped; the same command goes on", flush=True)
            raise SystemExit(130)
        if code:
            failures.append(plan.name)
        took = (time.perf_counter() - start) / 60
        print(f"{where}: {outcome(plan.out)}, {took:.1f} minutes", flush=True)
    if failures:
        print(f"{len(failures)} of {len(plans)} runs failed: {', '.join(failures)}")
        raise SystemExit(1)


def wait(process: subprocess.Popen) -> int:
    """Returns the exit status of the process. The process stops itself: Ctrl-C reaches it directly, SIGTERM is
    passed on."""
    handlers = {
        signal.SIGINT: lambda *_: None,
        signal.SIGTERM: lambda *_: process.send_signal(signal.SIGTERM),
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def outcome(out: Path) -> str:
    try:
        result = json.loads((out / "result.json").read_text())
    except (OSError, ValueError):
        return "failed without a result"
    if result["status"] != "done":
        return f"failed ({result['status']})"
    beside = levels(*(result[name] for name in ("chance", "majority", "generated")))
    return f"test accuracy {result['test_accuracy']:.1%} ({beside})"
