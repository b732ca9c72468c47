"""Tasks x layers x seeds, one run after the other, each in a process of its own; resumable."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.lra.report import levels

COMMAND = [sys.executable, "-m", "bench.lra"]


REFUSED = {
    "--layer": "--layers",
    "--seed": "--seeds",
    "--task": "tasks come first",
    "--config": "give what differs from the recipe as options",
}


def listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def pending(out: Path) -> list[str] | None:
    """What `fit` needs to be told beyond its options: nothing for a new run, --resume, --overwrite
    where there is no checkpoint yet; None for a run that is finished, or has failed."""
    if (out / "result.json").exists():
        return None
    if (out / "last.ckpt").exists():
        return ["--resume"]
    return ["--overwrite"] if (out / "run.json").exists() else []


def main(argv: list[str], make_parser: Callable, parse_fit: Callable) -> None:
    parser = make_parser(
        "sweep",
        "Several runs one after the other. What sweep does not know itself goes to every fit. Started "
        "again, it skips what is finished and resumes what is not.",
    )
    parser.add_argument("tasks", nargs="*", help="tasks, separated by blanks")
    parser.add_argument("--layers", default="s4d,sgconv,long_conv", help="separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--out", default="runs", help="folder of the run folders")
    known = {"--layers", "--seeds", "--out", "--help", "-h"}
    own, rest, i = [], [], 0
    while i < len(argv):
        key, has_value, _ = argv[i].partition("=")
        taken = [argv[i]]
        if key.startswith("--") and not has_value and i + 1 < len(argv) and key != "--help":
            taken += [argv[i + 1]] if not argv[i + 1].startswith("--") else []
        (own if key in known or not key.startswith("-") else rest).extend(taken)
        i += len(taken)
    for key in (word.partition("=")[0] for word in rest):
        if key in REFUSED:
            parser.error(f"{key} is none of a sweep's options: {REFUSED[key]}")
    chosen = parser.parse_args(own)
    if not chosen.tasks:
        parser.error("which tasks? python -m bench.lra --help lists them")
    for name in ("layers", "seeds"):
        if not listed(chosen[name]):
            parser.error(f"--{name} names none")
    # All of them are read before the first is started: a mistake shows at once.
    plans = []
    for task in chosen.tasks:
        for seed in listed(chosen.seeds):
            for layer in listed(chosen.layers):
                name = f"{task.replace(':', '-')}-{layer}-{seed}"
                out = Path(chosen.out) / name
                arguments = [task, "--layer", layer, "--seed", seed, "--out", str(out), *rest]
                parse_fit(arguments, "sweep")
                plans.append((name, out, arguments))
    run(plans)


def run(plans: list[tuple[str, Path, list[str]]], minutes: float | None = None) -> None:
    """One process after the other for each (name, run folder, arguments of fit), for so many minutes."""
    failures, began = [], time.perf_counter()
    for number, (name, out, arguments) in enumerate(plans, 1):
        extra = pending(out)
        where = f"[{number}/{len(plans)}] {name}"
        if extra is None:
            print(f"{where}: {outcome(out)}, already there", flush=True)
            continue
        start = time.perf_counter()
        if minutes is not None:
            left = minutes - (start - began) / 60
            if left < 0.1:
                print(f"{where}: no time is left; the same command goes on", flush=True)
                raise SystemExit(130)
            extra += ["--stop_minutes", f"{left:.2f}"]
        print(f"{where}: {'resumed' if '--resume' in extra else 'started'}", flush=True)
        code = wait(subprocess.Popen([*COMMAND, "fit", *arguments, *extra]))
        if code == 130:
            print(f"{where}: stopped; the same command goes on", flush=True)
            raise SystemExit(130)
        if code:
            failures.append(name)
        took = (time.perf_counter() - start) / 60
        print(f"{where}: {outcome(out)}, {took:.1f} minutes", flush=True)
    if failures:
        print(f"{len(failures)} of {len(plans)} runs failed: {', '.join(failures)}")
        raise SystemExit(1)


def wait(process: subprocess.Popen) -> int:
    """Its return code. It is left to it to stop: Ctrl-C reaches it too, SIGTERM is passed on."""
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
