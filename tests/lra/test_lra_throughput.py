"""bench.lra throughput: what it times is the same computation, of samples with the lengths of the real ones."""

import json

import numpy as np
import pytest
import torch

from bench.lra import throughput
from bench.lra.__main__ import main
from bench.lra.arguments import parse_fit
from bench.lra.data import listops
from bench.lra.model import SequenceClassifier

SMALL = ("--model.depth", "1", "--model.d_model", "4", "--optim.batch", "6", "--device", "cpu")


@pytest.fixture(autouse=True)
def no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_stand_ins_have_the_lengths_of_the_sets():
    info, split = throughput.stand_in("listops", 300)
    drawn = [n for i in (0, 1) for *_, n in listops.chunk(listops.FULL, 0, i)[0]]
    assert split.lengths.tolist() == [n + 1 for n in drawn[:300]]
    assert (info.classes, info.l_max, info.vocab) == (10, 2000, 18)
    _, split = throughput.stand_in("text", 40_000)
    found = np.quantile(split.lengths - 1, (0.25, 0.5, 0.75))
    assert np.abs(found / throughput.REVIEWS[1:4] - 1).max() < 0.03
    assert split.lengths.min() > 32 and split.lengths.max() == 4096
    x, lengths, labels = split.batch(np.arange(5))
    assert ((x > 0).sum(1) == lengths).all() and x.shape[1] == lengths.max() and x.max() < 135
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert throughput.stand_in("image", 9) is None


def test_a_measurement(capsys, tmp_path):
    kept = tmp_path / "kept.jsonl"
    options = ("--batches", "2", "--rounds", "2", "--torch-fft", "--json", str(kept))
    main(["throughput", "listops-short", "--layers", "s4d,long_conv", *options, *SMALL])
    text = capsys.readouterr().out
    first, second = (json.loads(line) for line in kept.read_text().splitlines())
    assert (first["layer"], second["layer"]) == ("s4d", "long_conv")
    assert text.count("| training, padded, torch.fft |") == 2 and "random tokens" in text
    assert set(first["rows"]) == {
        *("training, packed", "training, padded", "training, padded, torch.fft"),
        *("forward, packed", "forward, padded"),
    }
    for row in first["rows"].values():
        assert 0 < row["q1"] <= row["median"] <= row["q3"]
        assert 0 < row["slower"][0] <= row["slower"][1] <= row["slower"][2]
    assert first["rows"]["training, packed"]["slower"] == [1, 1, 1]
    assert first["batches"] == 2 and first["batch"] == 6 and first["difference"] < 1e-3
    _, split = throughput.stand_in("listops-short", 512)
    order = np.random.default_rng((0, 0)).permutation(512)
    lengths = [split.lengths[order[6 * i : 6 * i + 6]] for i in range(2)]
    padded = sum(6 * some.max() for some in lengths)
    assert first["padding"] == pytest.approx(1 - sum(map(sum, lengths)) / padded)


def test_seconds_become_sequences_a_second(monkeypatch):
    """Of the batches that a round has: 2 x 6 samples."""
    times = {"packed": [1.0, 2.0, 4.0], "padded": [3.0, 8.0, 20.0]}
    monkeypatch.setattr(throughput, "time_steps", lambda *_: (times, 0.0, {}))
    config = parse_fit(["listops-short", *SMALL])
    rows = throughput.measure(config, 2, 1, False)["rows"]
    assert rows["training, packed"]["median"] == 6 and rows["training, padded"]["median"] == 1.5
    assert rows["training, padded"]["slower"] == (3.0, 4.0, 5.0)


def test_a_pack_that_computes_something_else_is_not_timed(monkeypatch):
    forward = SequenceClassifier.forward

    def broken(self, x, lengths=None, cu_seqlens=None):
        if cu_seqlens is not None:  # the first two rows are one
            cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[2:], cu_seqlens[-1:]])
        return forward(self, x, lengths, cu_seqlens)

    monkeypatch.setattr(SequenceClassifier, "forward", broken)
    with pytest.raises(SystemExit, match="gradients differ"):
        main(["throughput", "listops-short", "--batches", "1", "--rounds", "1", *SMALL])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "which tasks and layers"),
        ("text --rounds 0", "--rounds must be at least 1, got 0"),
        ("text --batchs 3", "unknown option --batchs"),
        ("text --optim.lrr 3", "did you mean --optim.lr"),
        ("text --parallel.context 2", "--parallel.context must be 1"),
    ],
)
def test_refusals(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(["throughput", *arguments.split()])
    text = capsys.readouterr().err
    assert error.value.code == 2 and message in text and "throughput: " in text


def test_a_task_without_data_or_stand_in_is_named():
    with pytest.raises(SystemExit, match="cifar-10"):
        main(["throughput", "image", *SMALL])
