"""Runs steps one after the other, each in a process of its own with a time limit. A fault on a GPU spoils its
process, and a kernel that hangs can only be killed. Standard library only."""

import hashlib
import importlib.util
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.facts import ROOT, commit, now
from bench.on_gpu.log import Console, Log, rows_of
from bench.on_gpu.steps import ABSENT, ALL_SECONDS, PARTLY, PARTS, RIGHT, WRONG, Step

CARRIED = ROOT / "build" / "gpu"  # where `make gpu` puts what travels
NEEDED, VITAL = ("torch", "einops", "cuda", "pytest", "numpy"), ("torch", "einops")
GREEN = ("passed", "absent", "skipped", "partly")
SLACK = 6.0  # times the limits, in a dry run
STAND_INS = Path(__file__).parent / "stand_ins"


def environment(dry: str | None) -> dict[str, str]:
    """Returns the environment of a step: it finds the carried kernels and packages, and in a dry run commands that only
    look like NVIDIA's."""
    found = dict(os.environ, PYTHONUNBUFFERED="1", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    found.setdefault("SEQCONV_CUBINS", str(CARRIED / "cubins"))
    paths = [
        str(ROOT),
        str(ROOT / "tests" / "helpers"),
        found.get("PYTHONPATH"),
        str(CARRIED / "packages"),
    ]
    found["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    if dry:
        found["PATH"] = os.pathsep.join([str(STAND_INS), found.get("PATH", "")])
    return found


def present() -> tuple[str, bool]:
    """Returns what Python finds, without importing it, and whether that is enough."""
    words, enough = [], True
    for name in NEEDED:
        here = importlib.util.find_spec(name) is not None
        carried = (CARRIED / "packages" / name).is_dir()
        words.append(f"{name} {'there' if here else 'carried' if carried else 'MISSING'}")
        enough = enough and (here or carried or name not in VITAL)
    extension = any((ROOT / "seqconv").glob("_C*.so"))
    words.append(f"seqconv/_C.abi3.so {'there' if extension else 'MISSING'}")
    return ", ".join(words), enough


def sources() -> str:
    """Returns a digest of everything that a step runs."""
    digest = hashlib.sha256()
    for folder in ("seqconv", "csrc/device", "bench/on_gpu"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".cuh", ".cu"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def follow(command: list[str], seconds: float, write: Callable[[str], None], env) -> int | None:
    """Runs a command and passes its lines to `write` as they come. Returns its exit status; None if it was cut at its
    limit."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": env, "cwd": ROOT}
    # In a group of its own, to be killed with the processes that it starts.
    process = subprocess.Popen(command, **options, preexec_fn=os.setpgrp)
    end, rest, ended = time.monotonic() + seconds, b"", None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                left = end - time.monotonic()
                if left <= 0:
                    break
                if selector.select(min(left, 0.5)):
                    chunk = os.read(process.stdout.fileno(), 1 << 16)
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        write(line.decode(errors="replace"))
                    if not chunk:
                        ended = process.wait(max(0.1, end - time.monotonic()))
                        break
                elif process.poll() is not None:  # a process that it started still holds the pipe
                    ended = process.returncode
                    break
    except subprocess.TimeoutExpired:
        pass
    finally:
        if rest:
            write(rest.decode(errors="replace"))
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # the GPU's driver does not let it go
            write("the process cannot be ended: the next step follows without it")
        process.stdout.close()
    return ended


def status_of(code: int | None) -> str:
    known = {None: "cut", RIGHT: "passed", WRONG: "wrong", ABSENT: "absent", PARTLY: "partly"}
    return known.get(code, "crashed")


def run_step(step: Step, seconds: float, folder: Path, dry: str | None, console: Console) -> str:
    console(f"== {step.name}: {step.what} (at most {seconds:.0f} s)")
    command = [sys.executable, "-m", "bench.on_gpu", "step", step.name, "--out", str(folder)]
    command += ["--seconds", str(seconds)]
    start = time.monotonic()
    code = follow(command + (["--dry", dry] if dry else []), seconds, console, environment(dry))
    status, spent = status_of(code), time.monotonic() - start
    how = {"cut": f"cut at its limit of {seconds:.0f} s", "crashed": f"crashed, exit status {code}"}
    console(f"== {step.name}: {how.get(status, status)} after {spent:.1f} s")
    Log(folder, step.name).row("step", status=status, code=code, seconds=round(spent, 2))
    return status


def chosen(part: str, only: list[str], everything: bool) -> list[Step]:
    steps, _ = PARTS[part]
    if only:
        return [step for step in steps if step.vital or step.name in only]
    return [step for step in steps if everything or not step.extra]


def run(
    part: str,
    folder: Path,
    *,
    only: list[str],
    everything: bool,
    again: bool,
    dry: str | None,
    seconds: float | None = None,
) -> int:
    """Runs a part's steps. Returns the exit status: 0 all right, 1 not, 2 a folder of the other kind, 3 no kernels."""
    with Console(folder) as console:
        return _run(console, part, folder, only, everything, again, dry, seconds)


def _run(console, part, folder, only, everything, again, dry, seconds) -> int:
    earlier = rows_of(folder)
    words, enough = present()
    console(f"bench.on_gpu {part}, Python {sys.version.split()[0]}: {words}; into {folder}")
    if not enough:
        console(f"stopped: {' and '.join(VITAL)} are needed")
        return 3
    if any(row["dry"] != bool(dry) for row in earlier if row["kind"] == "run"):
        console("this folder holds the other kind of run, dry or on a GPU: give another to --out")
        return 2
    state = sources()
    log = Log(folder, "run")
    log.row("run", part=part, dry=bool(dry), when=now(), commit=commit(), sources=state)
    newest = {r["step"]: r["status"] for r in earlier if r["kind"] == "step"}
    passed = {name for name, status in newest.items() if status == "passed"}
    before = {r["sources"] for r in earlier if r["kind"] == "run"} - {state}
    # The clock of a dry run is a shared machine's.
    slack = SLACK if dry else 1.0
    total = seconds or slack * (ALL_SECONDS if everything else PARTS[part][1])
    results: dict[str, str] = {}
    for step in chosen(part, only, everything):
        left = total - console.seconds()
        if step.name in passed and not (again or step.vital or step.name in only):
            note = ", with other sources" if before else ""
            console(f"== {step.name}: skipped, it passed before{note} (--again runs it)")
            results[step.name] = "skipped"
            continue
        if left < 5:
            console(f"== {step.name}: not reached, {total:.0f} s are over")
            results[step.name] = "not reached"
            Log(folder, step.name).row("step", status="not reached", code=None, seconds=0)
            continue
        results[step.name] = run_step(step, min(slack * step.seconds, left), folder, dry, console)
        if step.vital and results[step.name] != "passed":
            console("stopped: everything else would only measure torch.fft")
            return 3
    summary = ", ".join(f"{name} {status}" for name, status in results.items())
    green = all(status in GREEN for status in results.values())
    kind = "dry run " if dry else ""
    console(f"{kind}{part}: {'all right' if green else 'NOT ALL RIGHT'}: {summary}")
    return 0 if green else 1
