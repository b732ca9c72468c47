"""The demo as its user runs it: interrupted, resumed, finished."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "bench.demo", "--epochs", "1", "--rounds", "2"]


def start(out: Path, *options: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), *options], cwd=ROOT, env=os.environ, **pipes
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


@pytest.mark.parametrize("layer", ["s4d", "long_conv"])
def test_an_interrupted_run_resumes_to_the_same_weights(layer, tmp_path):
    """long_conv draws dropout in training: its random numbers must go on where they were."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    text = finish(start(whole, "--layer", layer))
    assert "held-out accuracy" in text and "chance 10.0%" in text and "ratio" in text
    interrupted = start(parts, "--layer", layer)
    if layer == "s4d":
        while not (parts / "versions.json").exists():  # written before the first step
            time.sleep(0.05)
        time.sleep(2)
        interrupted.send_signal(signal.SIGINT)
    else:
        interrupted.kill()
        interrupted.communicate()
        interrupted = start(parts, "--layer", layer, "--stop-after", "100")
    assert "--resume" in finish(interrupted, 130)
    state = torch.load(parts / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < 250
    finish(start(parts, "--layer", layer, "--resume"))
    one, two = (
        torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts)
    )
    assert one["step"] == two["step"] == 250
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name
    assert (
        one["means"] == two["means"] and one["rows"][-1]["held_out"] == two["rows"][-1]["held_out"]
    )
    assert {p.name for p in parts.iterdir()} == {
        "checkpoint.pt",
        "curve.png",
        "kernels.png",
        "metrics.csv",
        "versions.json",
    }
    with open(parts / "metrics.csv") as file:
        (row,) = csv.DictReader(file)
    assert int(row["step"]) == 250 and 0.1 < float(row["held_out"]) <= 1
    facts = json.loads((parts / "versions.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["operator"].startswith("cpu (")
    wrong = finish(start(parts, "--layer", layer, "--resume", "--seed", "5"), 1)
    assert "seed was 0, now 5" in wrong


def test_messages(tmp_path):
    assert "there is no" in finish(start(tmp_path, "--resume"), 1)
    assert "invalid choice" in finish(start(tmp_path, "--layer", "s4"), 2)
    fallback = subprocess.run(
        COMMAND,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"SEQCONV_BACKEND": "reference"},
    )
    assert fallback.returncode == 1 and "kernels are not in use" in fallback.stderr


def test_digits():
    from bench import demo

    x, y, x_held, y_held = demo.load()
    assert (
        x.shape == (4000, 784, 1)
        and x_held.shape == (1000, 784, 1)
        and x.min() == -1
        and x.max() == 1
    )
    assert y.bincount().tolist() == [400] * 10 and y_held.bincount().tolist() == [100] * 10
    again = demo.load()
    assert torch.equal(again[0], x) and torch.equal(again[3], y_held)
    rows = {tuple(row) for row in x[..., 0].mul(127.5).round().int().tolist()}
    shared = sum(tuple(row) in rows for row in x_held[..., 0].mul(127.5).round().int().tolist())
    assert shared == 0  # nothing held out is also learnt
