"""bench.lra's runs: what their folders hold, resuming, stopping, several at once."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lra_run import TINY, checkpoint, finish, rows, start

from bench.lra.arguments import parse_fit
from bench.lra.module import Mean
from bench.lra.report import load, report


def assert_same(one: Path, two: Path) -> None:
    a, b = checkpoint(one), checkpoint(two)
    assert a["global_step"] == b["global_step"] == 72
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    for p, q in zip(*(c["optimizer_states"][0]["state"].values() for c in (a, b)), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)
    assert rows(one) == rows(two)
    best, again = (checkpoint(folder, "best.ckpt") for folder in (one, two))
    assert all(torch.equal(t, again["model"][name]) for name, t in best["model"].items())
    first, second = (json.loads((f / "result.json").read_text()) for f in (one, two))
    assert first["test_accuracy"] == second["test_accuracy"]


def test_a_run_learns_and_its_folder_holds_everything(tmp_path):
    out = tmp_path / "run"
    text = finish(start("fit", "digits", "--out", out, *TINY, "--compare", 2))
    assert "chance 33.3%, majority" in text and "sequences/s" in text and "torch.fft" in text
    assert not re.search("(?i)tip:|litlogger|warning|GPU available|weights_only", text), text
    assert {p.name for p in out.iterdir()} == {
        *("best.ckpt", "last.ckpt", "config.yaml", "run.json", "result.json", "metrics.csv"),
        *("curves.png", "kernels.png", "tensorboard"),
    }
    assert any("tfevents" in p.name for p in (out / "tensorboard").iterdir())
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "done" and result["test_accuracy"] > 0.9 and result["ours"]
    assert result["steps"] == 72 == result["plan"]["steps"] and result["sequences_per_second"] > 0
    assert result["operator"].startswith("cpu (") and result["torch"] == torch.__version__
    assert result["peak_mib"] > 50 and result["compared"]["difference"] < 1e-3
    table = rows(out)
    assert [int(r["step"]) for r in table][:4] == [5, 10, 12, 15] and table[2]["val_accuracy"]
    assert float(table[-1]["loss"]) < 0.7 * float(table[0]["loss"])
    assert f"{result['test_accuracy']:.2%}" in finish(start("eval", out))
    config = parse_fit(["--config", str(out / "config.yaml")])
    assert config.model.d_model == 16 and config.optim.epochs == 6


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_what_a_run_folder_refuses(tmp_path):
    out = tmp_path / "run"
    finish(start("fit", "digits", "--out", out, *TINY, "--stop_after", 3), 130)
    assert "holds a run" in finish(start("fit", "digits", "--out", out, *TINY), 1)
    wrong = finish(start("fit", "digits", "--out", out, *TINY, "--resume", "--optim.lr", 0.5), 2)
    assert "optim.lr was 0.01, now 0.5" in wrong
    (out / "last.ckpt").write_bytes((out / "last.ckpt").read_bytes()[:1000])
    assert "cannot be read" in finish(start("fit", "digits", "--out", out, *TINY, "--resume"), 1)
    (out / "last.ckpt").unlink()
    wrong = finish(start("fit", "digits", "--out", out, *TINY, "--resume", "--optim.lr", 0.5), 2)
    assert "optim.lr was 0.01, now 0.5" in wrong
    again = finish(start("fit", "digits", "--out", out, *TINY, "--resume"))
    assert "has no checkpoint yet: starting from the beginning" in again
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 72 and len(result["sessions"]) == 2
    (out / "last.ckpt").unlink()
    assert "there is no" in finish(start("fit", "digits", "--out", out, *TINY, "--resume"), 1)
    assert "data_batch_1 is missing" in finish(start("fit", "image", "--out", tmp_path / "im"), 1)


@pytest.mark.slow
@pytest.mark.one_of(2)
@pytest.mark.parametrize("layer", ["s4d", "long_conv"])
def test_a_killed_run_resumes_to_the_same_weights(layer, tmp_path):
    """Killed between checkpoints, within an epoch; stopped by Ctrl-C; and stopped exactly at an
    epoch's end. Dropout draws random numbers all the time."""
    options = (*TINY, "--layer", layer, "--model.dropout", 0.2, "--optim.accumulate", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start("fit", "digits", "--out", whole, *options))
    command = ("fit", "digits", "--out", parts, *options)
    killed = start(*command, "--stop_after", 70, delay=0.03)
    while not (parts / "last.ckpt").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    reached = checkpoint(parts)["global_step"]
    assert 0 < reached < 40 and not (parts / "result.json").exists()
    interrupted = start(*command, "--resume", delay=0.03)
    while checkpoint(parts)["global_step"] == reached:
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGINT)
    assert "Continue with the same command and --resume" in finish(interrupted, 130)
    assert reached < checkpoint(parts)["global_step"] < 60
    finish(start(*command, "--resume", "--stop_after", 60), 130)
    assert checkpoint(parts)["global_step"] == 60  # five times twelve: an epoch's end
    assert (parts / "curves.png").exists() and "60 of 72 steps" in report(load([parts]))
    finish(start(*command, "--resume"))
    assert_same(whole, parts)
    (result,) = load([parts])
    seconds = [session["seconds"] for session in result["sessions"]]
    assert len(seconds) == 4 and min(seconds) > 0 and sum(seconds) > result["seconds"]


@pytest.mark.slow
@pytest.mark.one_of(3)
@pytest.mark.parametrize("layer", ["s4d", "sgconv", "long_conv"])
def test_losses_are_those_of_the_reference(layer, tmp_path):
    """The first hundred with the compiled kernels and with torch's formulas, from the same seed."""
    options = ("--layer", layer, *TINY, "--optim.epochs", 9, "--log_steps", 1)
    folders = [tmp_path / (backend or "fused") for backend in ("", "reference")]
    for out, backend in zip(folders, ("", "reference"), strict=True):
        finish(start("fit", "digits", "--out", out, *options, backend=backend))
    operators = [json.loads((out / "run.json").read_text())["operator"] for out in folders]
    assert "fallback" not in operators[0] and "fallback" in operators[1]
    fused, plain = (np.array([float(r["loss"]) for r in rows(out)[:100]]) for out in folders)
    assert len(fused) == 100 and fused[-1] < 0.7 * fused[0]
    assert 0 < np.abs(fused - plain).max() < 1e-4


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_two_processes(tmp_path):
    """Under torchrun both processes take half of every batch: the losses are those of one process up
    to round-off, until a resume too."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    # BatchNorm and SGConv would see their own half only, or draw random numbers.
    options = (*TINY, "--model.norm", "layer")
    finish(start("fit", "digits", "--out", one, *options))
    finish(start("fit", "digits", "--out", two, *options, before=torchrun))
    a, b = (np.array([float(r["loss"]) for r in rows(f)]) for f in (one, two))
    assert len(a) == len(b) and np.abs(a[:6] - b[:6]).max() < 1e-4
    stopped = start("fit", "digits", "--out", parts, *options, "--stop_after", 17, before=torchrun)
    assert "--resume" in stopped.communicate()[0] and checkpoint(parts)["global_step"] == 17
    finish(start("fit", "digits", "--out", parts, *options, "--resume", before=torchrun))
    assert_same(two, parts)


@pytest.mark.one_of(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "task, layer", [("retrieval", "sgconv"), ("text", "hyena"), ("digits", "butterfly")]
)
def test_other_tasks_and_layers_train(task, layer, tmp_path):
    small = ("--model.d_model", 16, "--model.depth", 2, "--optim.batch", 10, "--optim.warmup", 0)
    small += ("--optim.epochs", 12, "--optim.lr", 0.01, "--optim.schedule_steps", 144)
    small += ("--model.prenorm", "true", "--optim.accumulate", 1)
    out = tmp_path / "run"
    finish(start("fit", task, "--layer", layer, "--out", out, *small))
    result = json.loads((out / "result.json").read_text())
    assert result["test_accuracy"] > result["majority"] + 0.2


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_the_budget_is_kept_and_divergence_is_a_failure(tmp_path):
    out = tmp_path / "run"
    options = ("--model.d_model", 16, "--optim.batch", 10, "--optim.epochs", 100_000)
    command = ("fit", "digits", *options, "--max_minutes", 0.15, "--out")
    finish(start(*command, out))
    (result,) = load([out])
    (session,) = result["sessions"]  # 9 s of training and evaluations, and what comes before
    assert 2 < result["seconds"] < session["seconds"] < 25 and result["plan"]["share"] < 100
    assert result["steps"] == result["plan"]["steps"] == result["plan"]["cosine"]
    # Killed, it goes on with the schedule that it had begun with.
    out = tmp_path / "killed"
    killed = start(*command, out, "--checkpoint_steps", 20, delay=0.01)
    while not (out / "last.ckpt").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    plan, reached = (checkpoint(out)[name] for name in ("plan", "global_step"))
    finish(start(*command, out, "--resume"))
    (result,) = load([out])
    assert result["plan"] == plan and result["steps"] == plan["steps"] > reached
    assert len(result["sessions"]) == 2 and sum(s["seconds"] for s in result["sessions"]) < 35
    out = tmp_path / "diverged"
    text = finish(start("fit", "digits", "--out", out, *TINY, "--optim.lr", 1e30), 1)
    assert "failed" in text
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "diverged" and "-*† (1 of 1 failed)" in report(load([out]))


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_sweep_goes_on_where_it_was(tmp_path):
    command = ("sweep", "digits", "listops-gen", "--layers", "s4d,sgconv", "--seeds", "0,1")
    command += ("--out", tmp_path, *TINY, "--model.depth", 1)
    text = finish(start(*command))
    beside = r"test accuracy [\d.]+% \(chance 33\.3%, majority [\d.]+%"
    for name, note in (("digits-s4d-0", ""), ("listops-gen-s4d-0", ", generated data")):
        # Of fit itself, and of the sweep behind it.
        both = rf"{beside}{note}\) at step [^[]*\[\d/8\] {name}: {beside}{note}\), "
        assert re.search(both, text), text
    first = (tmp_path / "digits-s4d-0" / "result.json").stat().st_mtime_ns
    (tmp_path / "digits-sgconv-1" / "result.json").unlink()
    text = finish(start(*command))
    assert text.count("already there") == 7 and text.count("resumed") == 1
    assert (tmp_path / "digits-s4d-0" / "result.json").stat().st_mtime_ns == first
    text = finish(start("report", tmp_path))
    assert "listops-gen (generated data)" in text and "±" in text and "[61.45]" in text
    assert "no such folder" in finish(start("report", tmp_path / "nothing"), 1)
    kept = tmp_path / "kept.jsonl"
    finish(start("report", tmp_path, "--json", kept, "--out", tmp_path / "table.md"))
    assert finish(start("report", kept)) == text == (tmp_path / "table.md").read_text()
    assert "did you mean" in finish(start(*command, "--optim.lrr", 1), 2)
    assert "none of a sweep's options: --layers" in finish(start(*command, "--layer", "s4d"), 2)
    assert "none of a sweep's options: --seeds" in finish(start(*command, "--seed=1"), 2)


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_what_cannot_be_is_refused_before_anything_is_lost(tmp_path):
    out = tmp_path / "run"
    fit = ("fit", "digits", "--out", out, *TINY)
    finish(start(*fit, "--stop_after", 30), 130)
    refusals = {
        ("--kernel.d_state", 3): "d_state must be even",
        ("--optim.batch", 200): "--optim.batch must be at most 120",
        ("--precision", "16-mixed"): "16-mixed needs a GPU",
    }
    for wrong, message in refusals.items():
        text = finish(start(*fit, "--overwrite", *wrong), 1)
        assert message in text and "Traceback" not in text and len(text) < 400, text
    assert "now" in finish(start(*fit, "--resume", train=80), 1)
    best = (out / "best.ckpt").read_bytes()
    (out / "best.ckpt").unlink()
    assert "needs the best weights so far" in finish(start(*fit, "--resume"), 1)
    (out / "best.next.ckpt").write_bytes(
        best
    )  # ended after last.ckpt was written, before the renaming
    finish(start(*fit, "--resume", "--precision", "32-true", "--compare", 2))
    result = json.loads((out / "result.json").read_text())
    assert len(result["sessions"]) == 2 and result["compared"]["ratio"] > 0
    assert not (out / "best.next.ckpt").exists()
    assert "cannot" not in finish(start("eval", out, "--device", "cpu", "--split", "val"))
    halved = finish(start("eval", out, "--rate", 2))
    assert "test accuracy at 1/2 of the rate" in halved
    assert "must be at least 1, got 0" in finish(start("eval", out, "--rate", 0), 2)
    assert "is no checkpoint" in finish(start("eval", out, "--checkpoint", "run.json"), 1)
    assert "holds no run" in finish(start("eval", tmp_path), 1)


@pytest.mark.slow
@pytest.mark.one_of(2)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_run_with_its_checkpoint(tmp_path, workers, number):
    """Ctrl-C reaches all processes at once, a scheduler's SIGTERM the first."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={workers}"]
    before = torchrun if workers > 1 else ()
    command = ("fit", "digits", "--out", tmp_path, *TINY, "--model.norm", "layer")
    process = start(*command, "--checkpoint_steps", 10, before=before, delay=0.05)
    while not (tmp_path / "last.ckpt").exists():
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    text = process.communicate(timeout=120)[0]
    assert "Stopped at step" in text and process.returncode != 0, text
    reached = checkpoint(tmp_path)["global_step"]
    assert f"Stopped at step {reached}" in text and 10 <= reached < 72
    assert workers > 1 or process.returncode == 130


@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_with_a_checkpoint(tmp_path):
    process = start("sweep", "digits", "--layers", "s4d", "--out", tmp_path, *TINY, delay=0.05)
    folder = tmp_path / "digits-s4d-0"
    while not (folder / "last.ckpt").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    text = finish(process, 130)
    assert "Traceback" not in text and "stopped; the same command goes on" in text
    assert f"Stopped at step {checkpoint(folder)['global_step']}" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_says_at_once_that_there_is_none(tmp_path):
    text = finish(start("gpu", "--data", tmp_path), 2)
    assert "torch finds no CUDA device here" in text and not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_gpu_runs_in_sessions(tmp_path):
    """On the processor, of a small set: both precisions, a session that is over, and one that goes on."""
    made = tmp_path / "data/generated/pathx-gen/generated.json"
    made.parent.mkdir(parents=True)
    made.write_text('{"whole": true}')
    command = (
        "gpu",
        "pathx-gen",
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--data",
        tmp_path / "data",
    )
    text = finish(start(*command, "--minutes", 0.15, delay=0.05), 130)
    assert "[1/2] pathx-gen-s4d-0-bf16-mixed: stopped; the same command goes on" in text
    folder = tmp_path / "pathx-gen-s4d-0-bf16-mixed"
    config = json.loads((folder / "run.json").read_text())["config"]["run"]
    assert config["max_minutes"] == 10 and config["precision"] == "bf16-mixed"
    reached = checkpoint(folder)["global_step"]
    text = finish(start(*command, "--minutes", 0.2, delay=0.05), 130)
    assert "resumed" in text and checkpoint(folder)["global_step"] > reached


def test_means_are_over_samples():
    """Also where the last batch is smaller, and nothing hides a loss that is not finite."""
    mean = Mean()
    mean.update(torch.tensor(1.0), 3)
    mean.update(torch.tensor(5.0), 1)
    assert mean.compute().item() == 2
    mean.update(torch.tensor(torch.nan), 1)
    assert mean.compute().isnan()
