"""bench.lra synthetics: the tasks ask for what they say, causal layers cannot see the future, runs continue exactly."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from bench.lra.__main__ import main
from bench.synthetics import tasks, training
from bench.synthetics.command import table
from bench.synthetics.tasks import TASKS, UNASKED


@pytest.fixture(autouse=True)
def one_thread():
    """The models are so small that more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(name, split="test"):
    return tasks.samples(TASKS[name], 0)[split]


def test_associative_recall_asks_for_the_value_of_a_key():
    tokens, targets = made("associative-recall")
    assert tokens.shape == (500, 22) and (targets[:, :-1] == UNASKED).all()
    for row, target in zip(tokens, targets[:, -1], strict=True):
        assert row[20] == 8  # the mark
        value_of = dict(zip(row[:20:2], row[1:20:2], strict=True))
        assert value_of[row[21]] == target and set(value_of) <= set(range(4))
        assert all(
            value == value_of[key] for key, value in zip(row[:20:2], row[1:20:2], strict=True)
        )
    assert len(np.unique(targets[:, -1])) == 4


def test_induction_head_asks_for_what_followed_the_mark():
    tokens, targets = made("induction-head")
    assert tokens.shape == (500, 31) and (targets[:, :-1] == UNASKED).all()
    for row, target in zip(tokens, targets[:, -1], strict=True):
        (first,) = np.flatnonzero(row[:-1] == 18)
        assert row[-1] == 18 and row[first + 1] == target


def test_training_asks_for_every_token_and_splits_share_no_sequence():
    for name in ("associative-recall", "induction-head"):
        tokens, targets = made(name, "train")
        assert (tokens[:, 1:] == targets[:, :-1]).all()
        seen = {row.tobytes() for row in tokens}
        assert not [row for row in made(name)[0] if row.tobytes() in seen]


def test_many_queries_ask_at_each_key_for_its_value():
    sizes = {"vocab": 64, "length": 40, "pairs": 6}
    tokens, targets = tasks.many_queries(4000, np.random.default_rng(0), False, **sizes)
    assert tokens.shape == targets.shape == (4000, 40)
    for row, target in zip(tokens, targets, strict=True):
        keys, values = row[:12:2], row[1:12:2]
        assert len(set(keys)) == len(set(values)) == 6
        assert set(keys) <= set(range(1, 32)) and set(values) <= set(range(32, 64))
        (asked,) = np.flatnonzero(target != UNASKED)[None]
        assert len(asked) == 6 and (asked >= 12).all() and (asked % 2 == 0).all()
        value_of = dict(zip(keys, values, strict=True))
        assert [value_of[key] for key in row[asked]] == list(target[asked])
        rest = np.setdiff1d(np.arange(12, 40), asked)
        assert not row[rest].any()
    # A first key's gap g has a probability in proportion to (g + 1)^-0.99.
    first = (tokens[:, 12:] == tokens[:, :1]).argmax(1) // 2
    weights = np.arange(1, 15) ** -0.99
    assert abs((first == 0).mean() - weights[0] / weights.sum()) < 0.03
    assert (first == 13).any()


def test_many_queries_are_answered_by_attention(monkeypatch, tmp_path):
    """Small enough for a test; the answers are neither chance nor one of the values of the sample."""
    sizes = {"vocab": 16, "length": 16}
    make = partial(tasks.many_queries, **sizes, pairs=3)
    setting = replace(tasks.ZOOLOGY, width=32, batch=64, rates=(3e-3, 1e-2))
    task = tasks.Task("many", make, **sizes, chance=12.5, train=6400, test=300, setting=setting)
    monkeypatch.setitem(tasks.TASKS, "many", task)
    row = training.Run("many", training.ATTENTION, 0, 20, tmp_path).run()
    assert row["accuracy"] > 90 and row["lr"] == 3e-3 and row["samples"] == 6400


def test_the_best_rate_of_each_seed_counts():
    made = [(0, 1e-3, 20.0, 100), (0, 1e-2, 90.0, 100), (1, 1e-3, 30.0, 100), (0, 1e-3, 7.0, 9)]
    rows = [
        {"task": "mqar-64", "layer": "hyena", "epochs": 4, "samples": samples, "seconds": 60.0}
        | {"seed": seed, "lr": lr, "accuracy": accuracy}
        for seed, lr, accuracy, samples in made
    ]
    text = table(rows)
    assert "| mqar-64 | hyena | 100 x 4 | 0.0 | 60.0 (30.0-90.0) |  | 2 | 1.0 |" in text
    assert "| mqar-64 | hyena | 9 x 4 | 0.0 | 7.0 |  | 1 | 1.0 |" in text


@pytest.mark.parametrize("layer", [x for x in training.LAYERS if x != training.ATTENTION])
def test_no_causal_layer_sees_the_future(layer, monkeypatch, tmp_path):
    """The two-sided control does, so that the test can fail."""
    sizes = {"vocab": 4, "length": 32}
    make = partial(tasks.future, **sizes)
    task = tasks.Task("future", make, **sizes, chance=25.0, train=4800, test=400)
    monkeypatch.setitem(tasks.TASKS, "future", task)
    found = training.Run("future", layer, 0, 1, tmp_path).run()["accuracy"]
    if layer == training.TWO_SIDED:
        assert found > 60
    else:
        assert found < 27  # 12,800 questions; their spread is 0.4


def test_a_run_continues_exactly(tmp_path):
    def run(folder):
        one = training.Run("induction-head", "s4d", 3, 3, folder)
        one.train = tuple(t[:320] for t in one.train)
        one.per_epoch = 10
        return one

    whole = run(tmp_path / "whole").run()
    broken = run(tmp_path / "broken")

    def stop(epoch, epochs):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run(stop)
    again = run(tmp_path / "broken")
    assert again.epoch == 2
    assert again.run() | {"seconds": 0} == whole | {"seconds": 0}


def test_the_command(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    given = ["synthetics", "associative-recall", "--layers", "hyena", "--epochs", "1"]
    given += ["--json", str(file), "--out", str(tmp_path)]
    main(given)
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["task"] == "associative-recall" and row["epochs"] == 1 and row["accuracy"] > 15
    main(given)  # It is there already.
    assert len(file.read_text().splitlines()) == 1
    wrong = {
        ("recall",): "unknown task 'recall'",
        ("future", "--layers", "s4"): "unknown layer 's4'",
        (
            "mqar-64",
            "future",
            "--samples",
            "600",
        ): "--samples and --rates are for the tasks of zoology",
        ("mqar-64", "--samples", "500"): "--samples must be at least 512, a batch, got 500",
        ("future", "--epochs", "0"): "--epochs must be at least 1, got 0",
        ("mqar-64", "--rates", "-1"): "--rates must be positive, got -1.0",
        ("--table", "--json", str(tmp_path / "none.jsonl")): "there are no results in",
        ("future", "--layers", "attention"): "there is no model with attention for it",
    }
    for words, text in wrong.items():
        with pytest.raises(SystemExit):
            main(["synthetics", *words])
        assert text in capsys.readouterr().err
