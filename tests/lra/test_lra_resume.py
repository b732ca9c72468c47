"""bench.lra --resume needs no other word: what it takes from the run, what it refuses, where nothing is there yet."""

import dataclasses
import io
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lra_run import TINY, checkpoint, finish, rows, start
from rich.console import Console

from bench.lra import journal, train
from bench.lra.arguments import parse_fit

OPTIONS = ("--layer", "long_conv", "--optim.epochs", "7", "--max_minutes", "1.5", "--seed", "3")
OPTIONS += ("--kernel.lam", "0.5", "--model.norm", "batch", "--device", "cpu", "--wandb", "w")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder as it is left behind, with options of its own."""
    config = parse_fit(["listops", *OPTIONS, "--stop_minutes", "2", "--stop_after", "9"])
    (tmp_path / "run").mkdir()
    record = {"config": dataclasses.asdict(config), "task": "listops", "layer": "long_conv"}
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    return tmp_path / "run"


def test_every_option_comes_from_the_run(run, capsys, monkeypatch):
    began = parse_fit(["listops", *OPTIONS])
    assert began.optim.schedule_steps == 14_000  # scaled with the epochs, once
    wanted = dataclasses.replace(began.run, resume=True, out=str(run))
    wanted = dataclasses.replace(began, run=wanted)
    for more in ((), ("--layer", "long_conv"), OPTIONS, ("--optim.epochs=7",), ("--overwrite",)):
        config = parse_fit(["listops", "--out", str(run), "--resume", *more])
        overwrite = "--overwrite" in more
        assert config == dataclasses.replace(
            wanted, run=dataclasses.replace(wanted.run, overwrite=overwrite)
        )
    assert parse_fit(["--resume", "--out", str(run)]) == wanted  # not even the task
    # In the usual place, which task, layer and seed name.
    monkeypatch.chdir(run.parent)
    Path("runs").mkdir()
    run.rename("runs/listops-long_conv-3")
    config = parse_fit(["listops", "--layer=long_conv", "--seed", "3", "--resume"])
    assert config.optim == began.optim and config.run.out == "runs/listops-long_conv-3"
    assert config.run.stop_minutes is config.run.stop_after is None  # of the last session
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "options, message",
    [
        (("--optim.lr", "0.5"), "belongs to another run: optim.lr was 0.01, now 0.5"),
        (("--max_minutes", "3"), "max_minutes was 1.5, now 3.0; the schedule was fixed when"),
        (("--max_minutes", "null"), "max_minutes was 1.5, now null"),
        (("--seed", "4"), "seed was 3, now 4"),
        (("--kernel.bidirectional", "true"), "kernel.bidirectional was false, now true"),
        (("--layer", "s4d"), "is a run of listops, long_conv, not of s4d"),
        (("--task", "text"), "is a run of listops, long_conv, not of text"),
        (("--optim.lrr", "1"), "did you mean --optim.lr"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "sweep"])  # a sweep's mistakes are none of fit's
def test_what_makes_another_run_is_refused(run, capsys, command, options, message):
    with pytest.raises(SystemExit) as error:
        parse_fit(["--out", str(run), "--resume", *options], command)
    text = capsys.readouterr().err
    assert error.value.code == 2 and message in text
    assert text.startswith(f"python -m bench.lra {command}: ")


def test_what_is_harmless_is_taken_with_a_word(run, capsys):
    more = ("--device", "auto", "--data=elsewhere", "--compare", "5", "--stop_minutes", "4")
    config = parse_fit(["--out", str(run), "--resume", *more])
    assert (config.run.device, config.run.data, config.run.compare) == ("auto", "elsewhere", 5)
    assert config.run.stop_minutes == 4 and config.run.max_minutes == 1.5
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "--resume: data was data, now elsewhere",
        "--resume: device was cpu, now auto",
        "--resume: compare was 0, now 5",
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": {"layer": "s4"}}'])
def test_a_record_that_cannot_be_read_is_named(run, capsys, content):
    (run / "run.json").write_text(content)
    with pytest.raises(SystemExit):
        parse_fit(["listops", "--out", str(run), "--resume"])
    assert f"{run / 'run.json'} holds no options that can be read" in capsys.readouterr().err


def test_nothing_is_shown_of_a_loss_that_nobody_has_seen(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(journal, "plain", Console(file=text, force_terminal=True, width=99))
    run = journal.Journal(None, SimpleNamespace(steps=72), None, None, Path("."), 12)
    run.on_fit_start(SimpleNamespace(is_global_zero=True), None)
    run.progress.refresh()
    run.close()
    assert "0/72" in text.getvalue() and "nan" not in text.getvalue()


@pytest.mark.slow
@pytest.mark.one_of(2)
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_run_goes_on_without_its_options(tmp_path, precision):
    options = (*TINY, "--layer", "sgconv", "--model.dropout", 0.2, "--optim.lr", 0.02)
    options += ("--precision", precision)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start("fit", "digits", "--out", whole, *options))
    finish(start("fit", "digits", "--out", parts, *options, "--stop_after", 30), 130)
    finish(start("fit", "--out", parts, "--resume"))
    one, two = checkpoint(whole), checkpoint(parts)
    assert one["global_step"] == two["global_step"] == 72 and rows(whole) == rows(parts)
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name


SLOW = [
    pytest.param(moment, marks=pytest.mark.slow)
    for moment in ("no folder", "empty folder", "record")
]


@pytest.mark.one_of(2)
@pytest.mark.parametrize("moment", [*SLOW, "checkpoint"])
def test_resume_begins_where_nothing_has_begun(tmp_path, moment):
    out = tmp_path / "run"
    options = ("digits", "--out", out, *TINY, "--optim.lr", 0.02)
    if moment == "empty folder":
        out.mkdir()
    if moment in ("record", "checkpoint"):
        name = {"record": "run.json", "checkpoint": "last.ckpt"}[moment]
        killed = start("fit", *options, delay=0.2 if moment == "record" else 0.03)
        while not (out / name).exists():
            assert killed.poll() is None, killed.communicate()
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert (out / "last.ckpt").exists() is (moment == "checkpoint")
        options = ("digits", "--out", out)
    text = finish(start("fit", *options, "--resume"))
    said = "has no checkpoint yet: starting from the beginning" in text
    assert said is (moment != "checkpoint")
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 72 and result["config"]["optim"]["lr"] == 0.02


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_a_full_disk_stops_a_run_with_a_word_and_loses_no_checkpoint(tmp_path):
    options = ("fit", "digits", "--out", tmp_path / "run", *TINY)
    finish(start(*options, "--stop_after", 10), 130)
    before = (tmp_path / "run/last.ckpt").read_bytes()
    # No file may grow beyond some KiB, which is how a full disk looks to the program.
    limit = ["bash", "-c", f'ulimit -f 20; exec {sys.executable} "$@"', "bash"]
    text = finish(start(*options, "--resume", before=limit), 1)
    assert "Traceback" not in text and "File too large" in text and ".ckpt" in text, text
    assert (tmp_path / "run/last.ckpt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))
    finish(start(*options, "--resume"))
    assert checkpoint(tmp_path / "run")["global_step"] == 72


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_folders_that_cannot_be_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    text = finish(start("fit", "digits", "--out", tmp_path / "file", *TINY), 1)
    assert "Traceback" not in text and str(tmp_path / "file") in text
    finish(start("fit", "digits", "--out", tmp_path / "run", *TINY, "--stop_after", 5), 130)
    text = finish(start("report", tmp_path / "run", "--out", tmp_path / "no/table.md"), 1)
    assert "Traceback" not in text and "no/table.md" in text
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    (tmp_path / "torn/run.json").write_text('{"task": ')
    text = finish(start("report", tmp_path), 1)
    assert "Traceback" not in text and "torn/run.json is damaged" in text
    (tmp_path / "runs.jsonl").write_text("{}\n")
    assert "runs.jsonl:1 holds no run" in finish(start("report", tmp_path / "runs.jsonl"), 1)


def test_a_run_does_not_go_on_with_other_files():
    was = {"optim.lr": 0.1, "data": "a", train.FILES: "b"}
    train.same_run(was, was, Path("run"))
    older = {name: value for name, value in was.items() if name != train.FILES}
    train.same_run(older, was, Path("run"))
    with pytest.raises(SystemExit, match="the digest of the data's files was b, now c"):
        train.same_run(was, was | {train.FILES: "c"}, Path("run"))
