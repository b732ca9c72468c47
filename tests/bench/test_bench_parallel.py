"""The measurement of several processes: right numbers, bytes as promised, and a table that is the formula's."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.micro import parallel, ranks, timing
from bench.micro import traffic as paper
from bench.micro.parallel import ALONE, TINY, Entry
from bench.micro.worker import Worker

ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "bench.parallel"]


def command(*arguments, code=0, start=RUN) -> str:
    words = [*start, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "capture_output": True, "text": True, "env": environment}
    result = subprocess.run(words, timeout=120, **options)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout if code == 0 else result.stderr


def right(row: dict) -> None:
    """A row's gate, times and bytes."""
    assert row["gate"] and row["error_float64"] < 1e-12 and row["error_l2"] < 1e-4
    assert 0 < row["q1"] <= row["median"] <= row["q3"] and row["rounds"] == timing.MIN_ROUNDS
    assert {"device", "isa", "versions", "commit", "cores", "backend", "when"} <= set(row)
    if row["method"] == ALONE:
        assert not any(row["sent"] + row["promised"])
    elif row["work"] != "Hyena":  # whose short convolutions send beside the long one
        assert row["sent"] == row["promised"] and len(row["sent"]) == row["processes"]
    assert (sum(row["sent_backward"]) > 0) == (row["method"] != ALONE and row["op"] != "forward")


def test_a_run_of_two_processes_writes_what_it_shows(tmp_path):
    out, works = tmp_path / "new", ["short kernel", "S4D"]
    text = command("--quick", "--processes", 2, "--works", *works, "--length", 1001, "--out", out)
    rows = [json.loads(line) for line in (out / "parallel.jsonl").read_text().splitlines()]
    for row in rows:
        right(row)
    scaling = [r for r in rows if r["tag"] == "scaling"]
    shapes = {(r["length"], r["processes"]) for r in scaling}
    assert shapes == {(1001, 1), (1001, 2), (500, 1), (1000, 2)}
    for work, methods in (("short kernel", {"halo", "a2a"}), ("S4D", {"state", "a2a"})):
        for op in ("forward", "forward+backward"):
            own = [r for r in scaling if (r["work"], r["op"]) == (work, op)]
            assert {r["method"] for r in own if r["length"] == 1001} == methods | {ALONE}
    strong = [r for r in scaling if r["method"] != ALONE and r["length"] == 1001]
    assert all(r["strong"][1] > 0 and "weak" not in r for r in strong)
    weak = [r for r in scaling if r["length"] == 1000]
    assert weak and all(r["weak"][1] > 0 and "strong" not in r for r in weak)
    # By hand: one sample of 8 channels in float32; 501 steps are on rank 0 and 500 on rank 1.
    sent = {
        r["method"]: r["sent"]
        for r in strong
        if (r["work"], r["op"]) == ("short kernel", "forward")
    }
    assert sent["halo"] == [8 * 127 * 4, 0]
    assert sent["a2a"] == [4 * 4 * (501 + 500)] * 2
    (state,) = [r["sent"] for r in strong if (r["method"], r["op"]) == ("state", "forward")]
    assert state == [8 * 32 * 16] * 2
    meetings = [r for r in rows if r["tag"] == "meeting"]
    assert {(r["work"], r["known"]) for r in meetings} == {
        (w, k) for w in works for k in (True, False)
    }
    assert all(("meeting" in r) == (not r["known"]) for r in meetings)
    assert all(r["length"] == 2 * TINY for r in meetings)
    assert (out / "parallel.png").stat().st_size > 10_000
    assert "0 of 28 results were wrong" in text and "which is no network" in text
    assert "halo" in text and "meeting before a call" in text


@pytest.mark.slow
def test_one_process_alone():
    text = command("--quick", "--processes", 1, "--works", "long kernel")
    assert "0 of 2 results were wrong" in text and "network" not in text


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_every_work_in_four_processes(tmp_path):
    text = command("--quick", "--processes", 3, 4, "--length", 1200, "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "parallel.jsonl").read_text().splitlines()]
    for row in rows:
        right(row)
    assert {r["work"] for r in rows} == set(parallel.WORKS)
    assert {r["processes"] for r in rows} == {1, 3, 4}
    if rows[0]["cores"] < 4:
        assert "show no scaling" in text


@pytest.mark.slow
def test_processes_of_torchrun_take_part():
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start += ["-m", "bench.parallel"]
    text = command("--quick", "--works", "short kernel", start=start)
    assert text.count("0 of 10 results were wrong") == 1  # one rank reports


WRONG = {
    "--length must be >= 128": ["--length", "100", "--processes", "2"],
    "--processes must be >= 1": ["--processes", "0"],
    "--batch and --d-model must be >= 1": ["--batch", "0"],
    "--processes must be <= 0, a GPU for each": ["--device", "cuda", "--processes", "2"],
    "invalid choice: 'tablet'": ["--works", "tablet"],
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_options_end_with_a_message(message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.parallel", *WRONG[message]])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as caught:
        parallel.main()
    assert message in str(caught.value) + capsys.readouterr().err


class OneRank:
    """What a Measurement needs of processes, where there is one."""

    device, rank, groups = torch.device("cpu"), 0, {1: None}

    def tell(self, values, group=None):
        return [list(map(float, values))]

    def seconds(self, part):
        part()
        return 1.0

    def first_says(self, over):
        return over


@pytest.mark.parametrize("fault", ["zeros", "shift", "skip", "nan", "a gradient", None])
def test_a_wrong_result_gets_no_time(monkeypatch, fault):
    right_ones, calls = parallel.results, []

    def broken(op, model, x, dy, *rest):
        y, *grads = right_ones(op, model, x, dy, *rest)
        calls.append(op)
        if len(calls) == 1:  # what the others are compared with
            return [y, *grads]
        y = y.clone()
        if fault == "zeros":
            y = y * 0
        if fault == "shift":
            y = y.roll(1, 1)
        if fault == "skip":
            y = y - model.skip * x
        if fault == "nan":
            y[0, 0, 0] = float("nan")
        if fault == "a gradient":
            grads[-1] = grads[-1] * (1 + 1e-11)
        return [y, *grads]

    monkeypatch.setattr(parallel, "results", broken)
    job = {"work": "long kernel", "d_model": 3, "batch": 2, "budget": 0.0}
    entry = Entry(100, 1, ALONE, "forward+backward")
    (row,) = parallel.Measurement(OneRank(), job).rows([entry])
    assert row["gate"] == (fault is None) and (row["median"] is None) == (fault is not None)


def test_ratios_are_those_of_the_same_work_alone():
    one, part, own, met = (
        Entry(80, 1, ALONE, "forward"),
        Entry(40, 1, ALONE, "forward"),
        Entry(80, 2, "halo", "forward"),
        Entry(80, 2, "halo", "forward", False),
    )
    times = {one: [8.0] * 5, part: [3.0] * 5, own: [6.0] * 5, met: [7.0] * 5}
    row = parallel.compared(own, times)
    assert (row["strong"][1], row["weak"][1]) == (8 / 6, 3 / 6) and "meeting" not in row
    assert parallel.compared(met, times)["meeting"] == (1.0, 1.0, 1.0)
    odd = Entry(81, 2, "halo", "forward")
    assert not {"strong", "weak"} & set(parallel.compared(odd, times | {odd: [1.0] * 5}))


def test_a_rank_that_ends_ends_the_command(monkeypatch):
    class Dead(Worker):
        def __init__(self, module, allocator, threads, rank, **settings):
            super().__init__(module, allocator, threads, rank=rank, **settings)
            if rank == 1:
                self.process.kill()
                self.process.wait()

    monkeypatch.setattr(ranks, "Worker", Dead)
    job = {"work": "long kernel", "d_model": 3, "batch": 1, "budget": 0.0, "entries": []}
    begin = time.monotonic()
    with pytest.raises(SystemExit, match=r"died: a rank of bench\.parallel"):
        with ranks.local("bench.parallel", [1, 2], "cpu") as answer:
            answer(job)
    assert time.monotonic() - begin < 60 < ranks.PATIENCE.total_seconds()


# ---- on paper ----


def cells(gpus: int, steps: str) -> list[str]:
    rows = [line.strip("| ").split(" | ") for line in paper.paper((gpus,)).splitlines()]
    return next(row[2:] for row in rows if row[:2] == [steps, f"{gpus:,}"])


def test_the_table_on_paper_has_the_formulas_numbers():
    """By hand: 1M steps on 64 GPUs, 4096 channels of 2 bytes, 50 bytes a nanosecond."""
    steps, channels = 2**20 // 64, 4096
    a2a = 2 * steps * (channels - channels // 64) * 2
    halo = [taps * channels * 2 for taps in (127, 65535)]
    state = channels * 32 * 16 * 63
    assert list(paper.sent(64, 2**20).values()) == [a2a, *halo, state]
    assert a2a == 264_241_152 and state == 132_120_576
    wanted = ["264.2 MB, 5.28 ms", "1.0 MB, 0.02 ms", "536.9 MB, 11 ms", "132.1 MB, 2.64 ms"]
    assert cells(64, "1M") == [*wanted, "halo", "a2a", "state"]
    assert cells(1024, "1M")[-3:] == ["halo", "a2a", "a2a"]
    assert cells(1024, "1G")[-3:] == ["halo", "halo", "state"]
    assert "All-to-all ends at 4,096 GPUs" in paper.assumed()
    assert paper.on_paper(5000, 2**20, 128).channel_sizes[4096:] == [0] * 904


def test_the_command_prints_the_table():
    assert command("--paper").strip() == paper.paper().strip()


def test_several_clocks_end_after_the_same_round():
    asked = []
    agreed = lambda over: asked.append(over) or len(asked) > 2  # noqa: E731
    found = timing.interleaved({"a": int}, 1e9, lambda part: 1.0, agreed=agreed)
    assert len(found["a"]) == timing.MIN_ROUNDS + 2 and asked == [False] * 3
