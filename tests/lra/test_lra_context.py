"""bench.lra with --parallel.context: processes that divide the steps compute what one process does."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lra_context import KERNELS, fits, models_agree
from lra_run import ENVIRONMENT, ROOT, checkpoint, finish, rows
from processes import run, run_fresh

from bench.lra import options, recipes, report, train
from bench.lra.arguments import parse_fit

NORMS, POOLS = ("layer", "batch"), ("mean", "last")
LENGTHS = (13, 4, 1)  # an uneven division, and shards without a step
KINDS = ("tokens", "pair", "real")
CASES = [
    (layer, norm, pool, i % 3 > 0, KINDS[(i + i // 3) % 3], LENGTHS if i % 2 else LENGTHS[:1])
    for i, (layer, norm, pool) in enumerate(itertools.product(KERNELS, NORMS, POOLS))
]
SMALL = ("--model.d_model", 6, "--model.depth", 2, "--optim.batch", 12, "--optim.epochs", 1)
SMALL += ("--optim.warmup", 0, "--optim.lr", 0.01, "--optim.accumulate", 1, "--model.dropout", 0)


def trained(world: int, commands: dict[Path, tuple], timeout: float = 100) -> None:
    """Runs `fit` for each folder: the words of its command."""
    words = [[*map(str, command), "--out", str(out)] for out, command in commands.items()]
    outcomes = run_fresh(world, fits, words, timeout=timeout)
    assert not any(o.failed for o in outcomes), next(o for o in outcomes if o.failed)
    stopping = [130 if "--stop_after" in command else 0 for command in commands.values()]
    assert all(o.value == stopping for o in outcomes)


def curves(out: Path) -> torch.Tensor:
    """The numbers of all rows, and those of the test."""
    result = json.loads((out / "result.json").read_text())
    tested = [result["test_loss"], result["test_accuracy"]]
    numbers = [[float(v or -1) for v in row.values()] for row in rows(out)]
    return torch.tensor([v for row in numbers for v in row] + tested, dtype=torch.float64)


def assert_alike(one: Path, two: Path, bound: float) -> None:
    a, b = curves(one), curves(two)
    assert a.shape == b.shape and torch.allclose(a, b, rtol=bound, atol=bound), (a - b).abs().max()
    found, wanted = (checkpoint(out)["state_dict"] for out in (one, two))
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        error = (found[name].double() - t.double()).abs().max()
        assert error < 100 * bound * t.double().abs().max(), f"{name} is {error:.1e} off"


@pytest.mark.parametrize(
    "world, cases", [(2, CASES[1::3]), pytest.param(3, CASES, marks=pytest.mark.slow)]
)
def test_steps_in_training_are_those_of_one_process(world, cases):
    assert {case[0] for case in cases} == set(KERNELS)
    assert {case[4] for case in cases} == set(KINDS)
    assert {case[1:3] for case in cases} == set(itertools.product(NORMS, POOLS))
    run(world, models_agree, cases)


def test_a_run_is_one_process_s(tmp_path):
    """Two processes write the same rows, results and weights, with padding, BatchNorm and a shortened last batch."""
    command = ("text", *SMALL, "--precision", "64-true", "--log_steps", 3)
    one, two = tmp_path / "one", tmp_path / "two"
    trained(1, {one: command})
    trained(2, {two: (*command, "--parallel.context", 2, "--compare", 1)})
    assert_alike(two, one, 1e-11)
    record = json.loads((two / "result.json").read_text())
    assert record["config"]["parallel"] == {"context": 2} and record["context"] == 2
    assert record["processes"] == 2 and record["compared"]["ratio"] > 0
    assert (two / "kernels.png").exists()
    assert parse_fit(["--config", str(two / "config.yaml")]).parallel.context == 2


RUNS = {
    "s4d": ("text", "batch", "mean", "32-true"),
    "sgconv": ("digits", "layer", "last", "64-true"),
    "long_conv": ("listops", "batch", "last", "64-true"),
    "hyena": ("retrieval", "layer", "mean", "64-true"),
    "butterfly": ("text", "layer", "mean", "64-true"),
}


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_loss_curves_are_those_of_one_process(tmp_path):
    """Four processes, of which two divide the steps, are one process where each sample has its own statistics, and
    two processes where a batch norm sees the samples of its own process."""
    commands = {}
    for layer, (task, norm, pool, precision) in RUNS.items():
        command = (task, "--layer", layer, *SMALL, "--model.norm", norm, "--model.pool", pool)
        command += ("--precision", precision, "--log_steps", 1, "--optim.schedule_steps", 20)
        if hasattr(KERNELS[layer], "kernel_dropout"):
            command += ("--kernel.kernel_dropout", 0)
        commands[layer] = command
    batch = [layer for layer, (_, norm, *_) in RUNS.items() if norm == "batch"]
    trained(1, {tmp_path / f"one-{layer}": c for layer, c in commands.items()})
    trained(2, {tmp_path / f"ddp-{layer}": commands[layer] for layer in batch})
    divided = {layer: (*c, "--parallel.context", 2) for layer, c in commands.items()}
    trained(2, {tmp_path / f"two-{layer}": c for layer, c in divided.items()})
    trained(4, {tmp_path / f"four-{layer}": c for layer, c in divided.items()})
    for layer, (*_, precision) in RUNS.items():
        bound = 1e-10 if precision == "64-true" else 1e-4
        assert_alike(tmp_path / f"two-{layer}", tmp_path / f"one-{layer}", bound)
        wanted = tmp_path / f"{'ddp' if layer in batch else 'one'}-{layer}"
        assert_alike(tmp_path / f"four-{layer}", wanted, bound)


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_a_run_goes_on_with_any_number_of_processes(tmp_path):
    """It is stopped between two rows, whose means are over the steps of two sessions."""
    command = ("text", *SMALL, "--precision", "64-true", "--log_steps", 4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(1, {whole: command})
    trained(2, {parts: (*command, "--parallel.context", 2, "--stop_after", 2)})
    again = ("--resume", "--parallel.context")
    trained(1, {parts: (*again, 1, "--stop_after", 6)})
    trained(3, {parts: (*again, 3)})
    assert_alike(parts, whole, 1e-10)
    sessions = json.loads((parts / "run.json").read_text())["sessions"]
    assert [(s["processes"], s["context"]) for s in sessions] == [(2, 2), (1, 1), (3, 3)]


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_pathx_is_trained_by_two_processes(tmp_path):
    """The command of the documentation, with few samples, a time limit and random dropout of all kinds."""
    lra = ["-m", "bench.lra"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    pipes |= {"env": ENVIRONMENT, "start_new_session": True}
    making = [*lra, "data", "make", "pathx-gen", "--n", "40", "--workers", "1", "--root"]
    finish(subprocess.Popen([sys.executable, *making, str(tmp_path)], **pipes))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = ["--parallel.context", 2, "--layer", "long_conv", "--data", tmp_path]
    options += ["--out", tmp_path / "run", "--model.d_model", 4, "--model.depth", 2]
    options += ["--model.dropout", 0.1, "--optim.batch", 4, "--optim.epochs", 1, "--log_steps", 1]
    options += ["--optim.accumulate", 1, "--max_minutes", 0.2]
    fit = [*torchrun, *lra, "fit", "pathx-gen", *map(str, options)]
    text = finish(subprocess.Popen(fit, **pipes))
    assert "test accuracy" in text
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "done" and result["steps"] > 0 and result["context"] == 2


# ---- options ----


def test_what_cannot_be_is_named(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        parse_fit(["listops", "--parallel.context", "0"])
    assert "--parallel.context must be positive, got 0" in capsys.readouterr().err
    config = parse_fit(["listops", "--parallel.context", "2"])
    for world in (1, 3):
        monkeypatch.setattr(train, "WORLD", world)
        text = f"--parallel.context must divide the number of processes, {world}, got 2: torchrun"
        with pytest.raises(SystemExit, match=text):
            train.fit(config)


def test_a_run_may_go_on_with_another_number(tmp_path, capsys):
    began = parse_fit(["listops", "--parallel.context", "2"])
    record = {"config": dataclasses.asdict(began), "task": "listops", "layer": "s4d"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    again = ["--out", str(tmp_path), "--resume"]
    assert parse_fit(again).parallel.context == 2 and not capsys.readouterr().out
    assert parse_fit([*again, "--parallel.context", "4"]).parallel.context == 4
    assert capsys.readouterr().out == "--resume: parallel.context was 2, now 4\n"
    assert began.identity() == parse_fit(["listops"]).identity()
    old = dataclasses.asdict(began)
    del old["parallel"]  # as in runs that have not recorded it
    assert options.from_dict(old).parallel == options.Parallel(1)
    runs = [{"config": old}, {"config": old | {"parallel": {"context": 1}}, "context": 1}]
    assert len({report.settings(run) for run in runs}) == 1
    assert len({report.settings(run | {"context": n}) for run in runs for n in (1, 2)}) == 2
    assert recipes.recipe("listops", "s4d").optim == began.optim
