"""Measurements in processes of their own, each with its C allocator and its number of threads."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import torch

from bench.facts import ROOT, commit, processor, versions
from seqconv import explain
from seqconv.backends import cpu

THRESHOLD = str(8 << 30)
ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": THRESHOLD, "MALLOC_TRIM_THRESHOLD_": THRESHOLD},
    # Blocks above 64 KiB are given back at once, so that the resident set shows what is in use.
    "returning": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}


class Worker:
    """A process `python -m module --worker`, which must call serve(). worker(job, title) returns rows of results."""

    def __init__(self, module: str, allocator: str, threads: int, **settings):
        environment = {**os.environ, **ALLOCATORS[allocator], "OMP_NUM_THREADS": str(threads)}
        environment["MKL_NUM_THREADS"] = str(threads)
        environment["GOMP_SPINCOUNT"] = "300000"  # as where no policy is set
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", module, "--worker"]
        options = {"stdin": pipe, "stdout": pipe, "text": True, "env": environment}
        self.process = subprocess.Popen(command, cwd=ROOT, **options)
        self._send({"threads": threads, **settings})

    def _send(self, message: dict) -> None:
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def __call__(self, job: dict, title: str = "") -> list[dict]:
        """title: what a message calls the job; its values by default."""
        with contextlib.suppress(BrokenPipeError):  # what follows says that the process is dead
            self._send(job)
        rows = []
        while line := self.process.stdout.readline().strip():
            rows.append(json.loads(line))
        if not rows:
            title = title or ", ".join(f"{name} {value}" for name, value in job.items())
            raise SystemExit(f"the process that measures died: {title}")
        return rows

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(prepare: Callable[[dict], Callable[[dict], Iterable[dict]]]) -> None:
    """Reads settings, then a job per line. Answers each job with the rows of prepare(settings)(job) and an empty
    line."""
    # What libraries print goes to standard error, so that it does not get between the rows.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    measure = prepare(settings)
    for line in sys.stdin:
        for row in measure(json.loads(line)):
            print(json.dumps(row), file=answers, flush=True)
        print(file=answers, flush=True)


def refuse_fallback() -> None:
    """Exits if seqconv would be measured without its kernels."""
    reason = explain(torch.zeros(1, 1, 64), torch.zeros(1, 64)).fallback
    if reason:
        raise SystemExit(f"seqconv would take its fallback: {reason}")


def device_name() -> str:
    """Returns the processor's name, with its family and model where they are known."""
    fields = processor()
    family = fields.get("cpu family")
    more = f", family {family} model {fields.get('model')}" if family else ""
    return fields["model name"] + more


def machine() -> dict:
    """Returns what every row says of where it was measured, and of the code."""
    here = {"device": device_name(), "isa": cpu.isa()}
    return here | {"versions": versions(), "commit": commit()}
