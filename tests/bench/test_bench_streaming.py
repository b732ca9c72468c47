"""The measurement of streams: it refuses wrong outputs, counts what it says it counts, and goes on where it stopped."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import files, pictures
from bench.micro import streaming, timing
from bench.micro.streaming_contenders import (
    ANEW,
    CONTENDERS,
    DOT,
    OURS,
    RECURRENCE,
    SPREAD,
    TILES,
    WHOLE,
    Problem,
    integrated,
    positions,
    tile_counts,
)
from bench.micro.streaming_report import readme_table, requirements, show
from seqconv.streaming import StreamingConv

ROOT = Path(__file__).parents[2]
SMALL = {"threads": 1, "batch": 2, "channels": 20, "length": 100, "positions": 8, "rounds": 2}
MACHINE = {"device": "a machine", "isa": "avx2", "commit": "abc", "versions": {"torch": "2"}}


def measured(**changes) -> list[dict]:
    job = SMALL | changes
    with torch.no_grad():
        rows = list(streaming.measure(job | {"budget": 0.0}, timing.Clock("cpu")))
    return [job | row | MACHINE for row in rows]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [row for length in (64, 100) for row in measured(length=length)]


def test_every_contender_is_measured(rows):
    assert [r["contender"] for r in rows] == 2 * list(CONTENDERS)
    for row in rows:
        assert row["gate"] and 0 < row["q1"] <= row["total"] == row["median"] <= row["q3"]
        assert row["rounds"] == 2 and row["over_seqconv"] > 0
        assert (row["over_seqconv"] == 1) == (row["contender"] == OURS)
        assert 0 < row["error_l2"] < 5e-7 and row["error_max"] < 5e-6
        curve = row["curve"]
        assert curve["position"][-1] == row["length"] and len(curve["mean"]) == len(
            curve["position"]
        )
        assert min(curve["mean"]) > 0
        if row["contender"] in WHOLE:
            assert 0 < row["median_step"] < row["worst_step"] == max(curve["worst"])
            sizes = [b - a for a, b in pairwise([0, *curve["position"]])]
            total = sum(n * t for n, t in zip(sizes, curve["mean"], strict=True))
            assert 0.2 < total / row["total"] < 5
    assert all(t > 0 for t in rows[0]["tiles"].values())


FAULTS = {
    "zeros": lambda y, t: y * 0,
    "one element": lambda y, t: y + 1e-3 * (t == 70) * torch.eye(*y.shape),
    "one channel": lambda y, t: y * (1 - 1e-3 * (torch.arange(y.shape[-1]) == 1)),
    "nan": lambda y, t: torch.where(torch.eye(*y.shape) * (t == 70) > 0, torch.nan, y),
}


@pytest.mark.parametrize("fault", [*FAULTS, "no tile", "late tile", "stale kernel"])
def test_a_wrong_stream_gets_no_time(monkeypatch, fault):
    right = StreamingConv.step

    def broken(self, u, state, **gates):
        t = state.taken = getattr(state, "taken", 0) + 1
        if fault == "stale kernel" and t == 1:
            self.taps(None).spectra.mul_(1 + 1e-4)
        if fault == "late tile" and t == 65:
            state.sums.copy_(state.sums.roll(1, -1))
        y, state = right(self, u, state, **gates)
        if fault == "no tile" and t == 32:
            state.sums.zero_()
        return FAULTS.get(fault, lambda y, t: y)(y, t), state

    monkeypatch.setattr(StreamingConv, "step", broken)
    found = {r["contender"]: r for r in measured()}
    for name in CONTENDERS:
        assert found[name]["gate"] == (name not in WHOLE), name
        assert (found[name]["total"] is None) == (name in WHOLE)
        assert ("curve" in found[name]) == (name not in WHOLE)
    first, *_ = requirements(list(found.values()))
    assert first[2:] == ("2 red", False)


def test_times_at_positions_are_integrated():
    for length in (1, 2, 5, 1000, 65536):
        at = positions(length, 12)
        assert at == sorted(set(at)) and at[0] == 1 and at[-1] == length
        linear = integrated(at, [3.0 * n + 2 for n in at])
        assert linear == pytest.approx(3 * length * (length + 1) / 2 + 2 * length)
    assert len(positions(65536, 12)) in (11, 12)


@pytest.mark.parametrize("length", [32, 64, 1024, 4096])
def test_tiles_cover_every_pair_of_steps_once(length):
    pairs = sum(n * n * count for n, count in tile_counts(length).items())
    pairs -= length**2  # The tile after the last step is for outputs that follow.
    assert pairs + length // 32 * (32 * 33 // 2) == length * (length + 1) // 2


def test_the_oracle_is_the_definition():
    problem = Problem(2, 3, 50, 6)
    some, every = problem.exact()
    for t in range(50):
        x = problem.tokens[: t + 1].double().flip(0)
        wanted = torch.einsum("nbh,hn->bh", x, problem.taps[:, : t + 1].double())
        assert (every[t] - wanted[:, problem.checked]).abs().max() < 1e-13
        if t + 1 in problem.at:
            assert (some[problem.at.index(t + 1)] - wanted).abs().max() < 1e-13


def row(contender, batch=16, length=16384, **more) -> dict:
    shape = {"contender": contender, "batch": batch, "length": length, "threads": 1, "gate": True}
    return shape | more


def test_requirements_are_decided_by_the_rows():
    found = requirements(
        [
            row(OURS, total=2.0, tiles={TILES: 1.0, "tiles by fftconv": 0.5}),
            row(DOT, total=50.0, over_seqconv=25.0),
            row(DOT, batch=1, over_seqconv=11.0),
            row(DOT, length=4096, over_seqconv=1.0),
            row(SPREAD, over_seqconv=1.2, worst_step=5.0, median_step=1.0),
            row(OURS, length=4096, total=0.5),
            row(OURS, length=65536, total=0.5 * 16**1.2),
        ]
    )
    assert {
        what.replace(", 1 thread", ""): (measured, met) for what, _, measured, met in found
    } == {
        "every result is right": ("0 red", True),
        "dot product over seqconv, B=16, L=16K": ("25x", True),
        "dot product over seqconv, B=1, L=16K": ("11x", False),
        "seqconv over its tiles alone, B=16, L=16K": ("2x", True),
        "goal: seqconv over its tiles by fftconv, B=16, L=16K": ("4x", False),
        "exponent of the total, B=16, 4K to 64K": ("1.2", True),
        "spread: worst step over the median, B=16, L=16K": ("5x", False),
        "spread: total over the other mode's, B=16, L=16K": ("1.2x", True),
    }


def test_table_and_picture(rows, tmp_path):
    text = readme_table(rows)
    for name in (
        "a step, mean",
        "all inputs convolved anew",
        "S4D's recurrence",
        "worst step, spread",
    ):
        assert f"\n| 2 samples, 1 thread: {name} | " in text
    assert "|  | 64 | 100 |" in text and "A reduced run" in text and "20 channels" in text
    whole = [row(OURS, total=0.1 * n, length=n) | MACHINE for n in (4096, 16384, 65536)]
    text = readme_table([r | {"channels": 256} for r in whole])
    assert "2 of the benchmark's 2 requirements are met" in text and "reduced" not in text
    shutil.copy(ROOT / "docs/benchmarks.md", tmp_path / "page.md")
    files.replace_between(tmp_path / "page.md", "streaming bench", text)
    assert text in (tmp_path / "page.md").read_text()
    pictures.plot_streaming(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    show([*rows, rows[0] | {"gate": False}])


def test_a_run_goes_on_and_minds_the_memory(monkeypatch, tmp_path, capsys):
    jobs, fail = [], set()

    class Direct:
        def __init__(self, module, allocator, threads):
            pass

        def __call__(self, job, title):
            jobs.append((job["length"], job["batch"], job["rounds"]))
            good = job["length"] not in fail
            fields = {"rounds": job["rounds"]}
            return [fields | {"contender": name, "gate": good} for name in CONTENDERS]

        def close(self):
            pass

    monkeypatch.setattr(streaming, "Worker", Direct)
    monkeypatch.setattr(streaming, "machine", lambda: MACHINE)
    args = streaming.parse(
        ["--lengths", "64", "128", "--long", "64", "--json", str(tmp_path / "r")]
    )
    fail.add(128)
    found = streaming.run(args)
    assert jobs == [(64, 1, 7), (64, 16, 7), (128, 1, 3), (128, 16, 3)]
    assert len(found) == 4 * len(CONTENDERS) == len(files.read([args.json]))
    jobs.clear(), fail.clear()
    again = streaming.run(args)  # What was wrong is measured again.
    assert jobs == [(128, 1, 3), (128, 16, 3)] and len(again) == len(found)
    assert again[: len(found) // 2] == found[: len(found) // 2]
    jobs.clear()
    monkeypatch.setattr(streaming, "free_bytes", lambda: 1 << 20)
    args.json = tmp_path / "other"
    assert streaming.run(args) == [] and jobs == []
    assert capsys.readouterr().out.count("not measured: it needs") == 4


@pytest.mark.slow
def test_the_command_measures_and_writes_what_it_shows(tmp_path):
    results, picture = tmp_path / "new" / "r.jsonl", tmp_path / "p.png"
    options = ["--lengths", "64", "256", "--batch", "2", "--channels", "20", "--rounds", "2"]
    options += ["--budget", "0.1", "--json", str(results), "--plot", str(picture)]
    command = [sys.executable, "-m", "bench.streaming", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    kept = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(kept) == 2 * len(CONTENDERS) and all(r["gate"] for r in kept)
    assert {"device", "isa", "versions", "commit", "threads", "when"} <= set(kept[0])
    assert picture.stat().st_size > 10_000
    for name in (ANEW, DOT, RECURRENCE, "requirements", "tiles alone"):
        assert name in result.stdout
