"""Training runs on tests/lra_tiny.py's data, for the tests of bench.lra."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*arguments, before=(), delay=0.0, backend="", train=120) -> subprocess.Popen:
    """delay: seconds that reading a batch takes. backend: SEQCONV_BACKEND. train: training samples."""
    command = [*(before or [sys.executable]), "-m", "tests.helpers.lra_tiny", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = ENVIRONMENT | {"LRA_TINY_DELAY": str(delay), "SEQCONV_BACKEND": backend}
    environment["LRA_TINY_TRAIN"] = str(train)
    # A group of its own, to be interrupted as from a terminal.
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends the processes that it has started, which are of other groups
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, output
    return output


TINY = ("--model.d_model", 16, "--optim.batch", 10, "--optim.epochs", 6, "--checkpoint_steps", 5)
TINY += ("--log_steps", 5)
TIMES = ("seconds", "sequences_per_second", "waiting", "peak_mib")


def checkpoint(folder: Path, name: str = "last.ckpt") -> dict:
    return torch.load(folder / name, weights_only=True)


def rows(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]
