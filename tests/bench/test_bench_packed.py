"""The benchmark of packed rows: all ways compute the same, a wrong one gets no time, and its bars are decided."""

import json
from dataclasses import asdict

import pytest
import torch

import seqconv
from bench.micro import fftconv, jobs, packed, requirements, timing
from bench.micro.contenders import Case

WAYS = {"seqconv", "seqconv, row by row", "seqconv, padded", "torch.fft"}
NAMES = tuple(WAYS)


def measured(case: Case) -> dict[str, dict]:
    rows = packed.measure(case, NAMES, 0.0, timing.Clock("cpu"), 1e9)
    return {row["contender"]: row for row in rows}


@pytest.mark.parametrize("layout", ["bhl", "blh"])
@pytest.mark.parametrize("op", ["forward", "forward+backward"])
@pytest.mark.parametrize("mode", ["packed", "packed_equal"])
def test_all_ways_are_right_and_timed(mode, op, layout):
    case = Case(mode, layout=layout, batch=6, channels=3, length=300, op=op)
    rows = measured(case)
    assert set(rows) == (WAYS if mode == "packed" else WAYS - {"seqconv, row by row"})
    for row in rows.values():
        assert row["gate"] and 0 < row["q1"] <= row["median"] <= row["q3"] and row["ratio"] > 0
        assert 0 < row["error_l2"] < 1e-6 and row["floor_copy"] > 0 and row["floor_flops"] > 0
    against = rows["seqconv"]["against"]
    assert set(against) == set(rows) - {"seqconv"}
    assert against["torch.fft"][1] == rows["seqconv"]["ratio"]


@pytest.mark.parametrize("fault", ["offsets", "last row", "kernel"])
def test_a_wrong_pack_gets_no_time(monkeypatch, fault):
    right = seqconv.fftconv

    def broken(u, k, skip, cu_seqlens=None, **options):
        if cu_seqlens is None:
            return right(u, k, skip, **options)
        if fault == "offsets":  # the second row sees the first one
            cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[2:]])
        y = right(u, k * (1 + 1e-5 * (fault == "kernel")), skip, cu_seqlens=cu_seqlens, **options)
        if fault == "last row":
            y[..., -1] = 0
        return y

    monkeypatch.setattr(packed.seqconv, "fftconv", broken)
    rows = measured(Case("packed", batch=6, channels=3, length=300))
    assert not rows["seqconv"]["gate"] and rows["seqconv"]["median"] is None
    assert "against" not in rows["seqconv"] and "ratio" not in rows["seqconv"]
    assert all(rows[name]["gate"] for name in WAYS - {"seqconv"})


def test_rows_spread_over_all_lengths():
    case = Case("packed", batch=64, channels=64, length=16384)
    lengths = sorted(case.lengths)
    assert case.lengths == case.lengths != lengths and len(lengths) == 64
    assert 32 <= lengths[0] < 36 and lengths[-1] == 16384
    for low, high in ((32, 152), (152, 724), (724, 3444), (3444, 16385)):  # equal logarithms
        assert 15 <= sum(low <= n < high for n in lengths) <= 17
    assert case.elements == 64 * sum(lengths)
    assert Case("packed_equal", batch=5, length=9).lengths == [9] * 5
    assert Case(batch=5, channels=2, length=9).elements == 90
    one, two = (Case("packed", batch=1, channels=4, length=n).flops() for n in (64, 128))
    assert Case("packed", batch=2, channels=4, length=128).flops() > max(one, two)
    assert one == Case(batch=1, channels=4, length=64).flops()


def test_rows_one_by_one_have_their_own_taps(monkeypatch):
    """Else their gradients of the kernel would be as long as the longest row's."""
    taps, right = [], seqconv.fftconv

    def watched(u, k, *rest, **options):
        taps.append((u.shape, k.shape[-1]))
        return right(u, k, *rest, **options)

    monkeypatch.setattr(packed.seqconv, "fftconv", watched)
    case = Case("packed", batch=4, channels=2, length=90, op="forward+backward")
    packed.ways(packed.make_pack(case))["seqconv, row by row"].run()
    assert taps == [((1, 2, n), n) for n in case.lengths]


def test_the_jobs():
    small = fftconv.parse(["--modes", "packed", "--threads", "1", "2", "--elements", "70000"])
    made = jobs.sample(small)
    assert {job["tag"] for job in made} == {"packed"} and len(made) == 2 * 2 * 2 * 2
    assert {job["case"].channels for job in made} == {1}
    assert {(job["case"].mode, job["case"].length) for job in made} == {
        ("packed", 16384),
        ("packed_equal", 64),
    }
    both = jobs.sample(fftconv.parse(["--modes", "packed", "causal", "--allocators", "tuned"]))
    assert {job["case"].mode for job in both} == {"packed", "packed_equal", "causal"}
    full = [job for job in jobs.full(1.0) if job["tag"] == "packed"]
    assert len(full) == 8 and {job["case"].channels for job in full} == {64}
    keys = {jobs.key_of(job) for job in full}
    assert len(keys) == 8
    row = {"allocator": "tuned", "threads": 1, "tag": "packed"} | asdict(full[0]["case"])
    assert jobs.key_of(row | {"against": {"x": 1}}) in keys  # what is measured is not repeated


def rows_of(mode, batch, length, **against) -> list[dict]:
    names = {"alone": "seqconv, row by row", "padded": "seqconv, padded", "fft": "torch.fft"}
    case = asdict(Case(mode, batch=batch, channels=64, length=length))
    row = {"tag": "packed", "allocator": "tuned", "threads": 1, "contender": "seqconv"} | case
    row |= {"gate": True, "median": 0.5, "device": "a processor", "isa": "avx2", "commit": "abc"}
    row |= {"versions": {"torch": "2"}}
    return [
        row | {"against": {names[n]: [v - 0.1, v, v + 0.1] for n, v in values.items()}}
        for values in (
            against,
            {n: v * 2 for n, v in against.items()},
            {n: v / 2 for n, v in against.items()},
        )
    ]


def test_the_bars_and_the_table():
    rows = rows_of("packed", 64, 16384, alone=0.75, padded=4.5, fft=30.0)
    rows += rows_of("packed_equal", 1000, 64, padded=0.8, fft=5.0)
    found = {what.split(",")[0]: rest for what, *rest in requirements.packed_requirements(rows)}
    assert found == {
        "packed beside row by row": ["<= 1.25x", "1.33x", False],
        "padded torch.fft beside packed": [">= 8x", "30x", True],
        "padded beside packed": [">= 4x", "4.5x", True],
        "packed beside a batch": ["<= 1.3x", "1.25x", True],
    }
    for change in ({"gate": False}, {"channels": 3}, {"batch": 23}, {"length": 8192}):
        assert not requirements.packed_requirements([row | change for row in rows])
    usual = requirements.requirements(rows)
    assert len(usual) == 5 and usual[0][0] == "every result of seqconv is right"
    text = requirements.packed_table(rows)
    first = (
        "| 64 rows of up to 16,384 steps, forward, 1 thread | 500.0 ms | 0.75x | 4.50x | 30.00x |"
    )
    second = "| 1,000 rows of 64 steps, forward, 1 thread | 500.0 ms | - | 0.80x | 5.00x |"
    assert first in text and second in text and "169,786 steps" in text


def test_packs_measured_alone_leave_the_other_tables(monkeypatch, tmp_path):
    """At another commit than the rest, too."""
    kept = fftconv.RESULTS / "fftconv.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    (tmp_path / "docs").mkdir()
    page = (fftconv.ROOT / "docs/benchmarks.md").read_text()
    (tmp_path / "docs/benchmarks.md").write_text(page)
    monkeypatch.setattr(fftconv, "ROOT", tmp_path)
    monkeypatch.setattr(fftconv, "RESULTS", tmp_path)
    monkeypatch.setattr(fftconv.pictures, "plot_fftconv", lambda *_: None)
    usual = [row for row in rows if row["tag"] != "packed"]
    fftconv.write_tables(usual, tmp_path / "picture")
    text = (tmp_path / "docs/benchmarks.md").read_text()
    lines = (tmp_path / "fftconv.md").read_text().splitlines()
    packs = rows_of("packed", 64, 16384, alone=0.75, padded=4.5, fft=30.0)
    fftconv.write_tables([*usual, *packs], tmp_path / "picture")
    after = (tmp_path / "docs/benchmarks.md").read_text()
    assert (
        "30.00x" in after
        and after.split("<!-- packed bench -->")[0] == (text.split("<!-- packed bench -->")[0])
    )
    more = (tmp_path / "fftconv.md").read_text().splitlines()
    assert len(more) == len(lines) + 3
