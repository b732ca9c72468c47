"""Measurements in processes of their own: each with its C allocator and its number of threads."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable

import torch

from bench.micro import report
from seqconv import explain

THRESHOLD = str(8 << 30)
ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": THRESHOLD, "MALLOC_TRIM_THRESHOLD_": THRESHOLD},
    # Every larger block is given back at once, so that the resident set says what is in use.
    "returning": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}


class Worker:
    """A process `python -m module --worker`, which must call serve(); worker(job, title) -> rows of results."""

    def __init__(self, module: str, allocator: str, threads: int, **settings):
        environment = {**os.environ, **ALLOCATORS[allocator], "OMP_NUM_THREADS": str(threads)}
        environment["MKL_NUM_THREADS"] = str(threads)
        environment["GOMP_SPINCOUNT"] = "300000"  # what waiting threads do where nothing is set
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", module, "--worker"]
        options = {"stdin": pipe, "stdout": pipe, "text": True, "env": environment}
        self.process = subprocess.Popen(command, cwd=report.ROOT, **options)
        self._send({"threads": threads, **settings})

    def _send(self, message: dict) -> None:
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def __call__(self, job: dict, title: str = "") -> list[dict]:
        """title: how a person calls the job, if not by its values."""
        self._send(job)
        rows = []
        while line := self.process.stdout.readline().strip():
            rows.append(json.loads(line))
        if not rows:
            title = title or ", ".join(f"{name} {value}" for name, value in job.items())
            raise SystemExit(f"the process that measures died: {title}")
        return rows

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(prepare: Callable[[dict], Callable[[dict], Iterable[dict]]]) -> None:
    """Takes settings, then a job per line; answers with the rows of prepare(settings)(job) and an
    empty line."""
    # What libraries print must not get between the rows.
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
    """Exits where seqconv would be measured without its kernels."""
    reason = explain(torch.zeros(1, 1, 64), torch.zeros(1, 64)).fallback
    if reason:
        raise SystemExit(f"seqconv would take its fallback: {reason}")
