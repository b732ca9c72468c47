"""The table of runs."""

import dataclasses
import json
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest
from lra_run import ROOT

from bench import files, pictures
from bench.facts import RESULTS
from bench.lra import __main__ as bench_lra
from bench.lra import curve
from bench.lra.arguments import parse_fit
from bench.lra.recipes import BARS, recipe
from bench.lra.report import details, keep, load, report, summary
from bench.synthetics.command import PAGE, rows_of, table


def write_run(
    folder: Path, task: str, layer: str, seed: int, accuracy: float | None, options=(), **facts
) -> None:
    config = parse_fit([task, "--layer", layer, "--seed", str(seed), *options])
    r = recipe(task, layer)
    values = {
        "task": task,
        "layer": layer,
        "seed": seed,
        "config": dataclasses.asdict(config),
        "plan": {"share": 0.25, "steps": 100},
        "chance": 0.1,
        "majority": 0.17,
        "generated": "gen" in task,
        "published": r.published,
        "source": r.source,
        "ours": r.ours,
        "parameters": 1000,
        "device": "a processor",
    }
    folder = folder / f"{task}-{layer}-{seed}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(values))
    if accuracy is not None:
        done = {"status": "done", "test_accuracy": accuracy, "seconds": 60.0} | facts
        done |= {"sequences_per_second": 100.0, "peak_mib": 200.0}
        (folder / "result.json").write_text(json.dumps(values | done))


def test_report(tmp_path):
    for seed, accuracy in enumerate((0.58, 0.60, 0.18)):
        write_run(tmp_path, "listops-gen", "s4d", seed, accuracy)
    write_run(tmp_path, "listops-gen", "sgconv", 0, None)
    columns = "step,seconds,val_accuracy,sequences_per_second,waiting\n"
    metrics = columns + "20,9,0.4,50,0.2\n40,30,0.45,70,0.4\n52,36,,60,0.3\n"
    (tmp_path / "listops-gen-sgconv-0/metrics.csv").write_text(metrics)
    write_run(tmp_path, "image", "long_conv", 0, 0.881)
    text = report(load([tmp_path]))
    kept = tmp_path / "kept.jsonl"
    keep(load([tmp_path]), kept)
    assert report(load([kept])) == text and len(load([kept, tmp_path])) == 10
    mean, spread = np.mean([58, 60, 18]), np.std([58, 60, 18], ddof=1)
    summary, details = (part.splitlines() for part in text.split("\n\n")[1:3])
    assert summary[0] == "| task | chance | majority | long_conv | s4d | sgconv |"
    assert summary[2] == "| image | 10.0 | 17.0 | 88.10 [88.3] | - | - |"
    cell = f"{mean:.2f} ± {spread:.2f} (3 seeds, 1 of 3 failed) [60.52]"
    going = "- (1 unfinished, 45 in validation so far)"
    row = f"| listops-gen (generated data) | 10.0 | 17.0 | - | {cell} | {going} [61.45] |"
    assert summary[3] == row and "over seeds (1 unless a cell says otherwise)" in text
    line = next(x for x in details if "s4d" in x)
    assert "| 0, 1, 2 |" in line and "| 18.00 |" in line and "25% of the published" in line
    line = next(x for x in details if "sgconv" in x)
    assert f"| {going} | - |" in line and "13% of the published (so far 52 of 100 steps)" in line
    assert "| 0.6 | - | 60 | 30.0% |" in line
    assert "not the published files" in text
    assert not load([tmp_path / "nothing"])


def test_report_does_not_mix_unlike_runs(tmp_path):
    write_run(
        tmp_path / "a", "digits", "s4d", 0, 0.9, device="a GPU", plan={"share": 0.019, "steps": 9}
    )
    write_run(
        tmp_path / "a", "digits", "s4d", 1, 0.8, device="a GPU", plan={"share": 0.5, "steps": 9}
    )
    write_run(tmp_path / "b", "digits", "s4d", 0, 0.7)
    write_run(tmp_path / "c", "digits", "s4d", 0, 0.1)  # another run of the same seed
    write_run(tmp_path / "d", "digits", "s4d", 0, 0.6, changed={"model.d_model": 16})
    runs = load([tmp_path / name for name in "abc"])
    text = report(runs)
    assert "| 85.00 ± 7.07†; 70.00† (1 seed) |" in text and "| 1.9 to 50% of ours |" in text
    write_run(tmp_path / "e", "digits", "s4d", 0, 0.69, operator="reference: fallback")
    text = report(load([tmp_path / "b", tmp_path / "e"]))
    assert "| 10.0 | 17.0 | 70.00† |" in text and text.count("32-true, on torch.fft |") == 1
    assert "seqconv's kernels minus torch.fft, on the same seeds: digits s4d +1.00." in text
    assert "| 69.00† |" in report(load([tmp_path / "e"]))
    text = report(load([tmp_path / "d"]))
    assert "| 60.00*† |" in text and "25% of ours, with model.d_model 16" in text


def test_packed_runs_are_told_apart_and_compared(tmp_path):
    for seed, (packed, padded) in enumerate(((0.80, 0.70), (0.81, 0.72))):
        write_run(tmp_path / "packed", "r8", "s4d", seed, packed, ("--packed",))
        write_run(tmp_path / "padded", "r8", "s4d", seed, padded)
    runs = load([tmp_path])
    for run in runs:
        if not run["config"]["run"]["packed"]:
            del run["config"]["run"]["packed"]  # as in runs of before
    text = report(runs)
    assert "| 71.00 ± 1.41† |" in summary(runs)
    assert "Packed samples minus padded ones, on the same seeds: r8 s4d +9.50." in text
    assert text.count("a processor, 32-true, packed |") == 1
    assert "| 80.50 ± 0.71† |" in summary(load([tmp_path / "packed"]))


def test_bars(tmp_path):
    for seed, (low, high) in enumerate(((0.95, 0.97), (0.96, 0.95), (0.96, 0.97))):
        for layer in ("s4d", "sgconv"):
            write_run(tmp_path, "mnist5k", layer, seed, low)
        for layer in ("s4d", "long_conv"):
            write_run(tmp_path, "digits", layer, seed, high + 0.02)
        write_run(tmp_path, "ucr:GunPoint", "s4d", seed, None)
    text = summary(load([tmp_path]))
    assert "98.33 ± 1.15 | 98.33 ± 1.15 | - |" in text  # one of three below it, not the mean
    assert "| 95.67 ± 0.58† | 95.67 ± 0.58 |" in text and "- (3 unfinished) |" in text
    assert text.endswith("† below the bar that was set beforehand: mnist5k 96.")
    small = ("digits", "ucr:GunPoint", "r8", "listops-short", "pathfinder32-easy")
    bars = dict(zip(small, (98, 98, 85, 40, 92), strict=True))
    layers = ("s4d", "sgconv", "long_conv")
    assert BARS == {(t, x): bar for t, bar in bars.items() for x in layers} | {
        ("mnist5k", "s4d"): 96
    }


def test_precisions_are_told_apart_and_compared(tmp_path):
    for seed, (half, whole) in enumerate(((0.59, 0.60), (0.58, 0.61), (0.3, None))):
        for name, accuracy in (("bf16-mixed", half), ("32-true", whole)):
            facts = {"waiting": 0.04, "compared": {"ratio": 1.5}}
            facts["sessions"] = [{"seconds": 60.0 * minutes} for minutes in (30, 45)]
            options = ("--precision", name)
            write_run(tmp_path / name, "listops-gen", "s4d", seed, accuracy, options, **facts)
    text = report(load([tmp_path]))
    assert (
        "bf16-mixed minus 32-true, on the same seeds: listops-gen (generated data) s4d -2.00."
        in text
    )
    assert "; bf16-mixed: 49.00 ± " in text or "| bf16-mixed: 49.00 ± " in text
    assert "32-true: 60.50 ± 0.71 (1 unfinished)" in text
    assert text.count("| 1.0 | 1 h 15 min | 100 | 4.0% | 200 | 1.50 |") == 2
    old = load([tmp_path / "bf16-mixed"])
    del old[0]["sessions"][0]["seconds"]
    assert "| 1.0 | 1 h 15 min |" in details(old)  # of the others
    del old[1]["sessions"], old[2]["sessions"][1]["seconds"]
    text = report(old)
    assert "| 1.0 | - |" in text and "bf16-mixed: " not in text and "minus" not in text


def test_the_readme_shows_the_runs_that_are_kept():
    results = ROOT / "bench/results"
    runs = load([results / "lra.jsonl"])
    assert summary(runs) in (ROOT / "docs/long_range_arena.md").read_text()
    assert (results / "lra.md").read_text() == report(runs) + "\n"
    assert all(run["waiting"] < 0.5 for run in runs if "waiting" in run)  # for data
    for run in runs:  # nothing of where they were computed but the machine
        assert not Path(run["config"]["run"]["data"]).is_absolute()
        assert not Path(run["config"]["run"]["out"] or "").is_absolute()  # null: runs/...


def test_a_picture_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(figure, file, **options):
        (open(file, "wb") if isinstance(file, Path) else file).write(b"\x89PNG")
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures.plt.Figure, "savefig", killed)
    info = SimpleNamespace(chance=0.1, majority=0.1, generated=False)
    with pytest.raises(KeyboardInterrupt):
        pictures.plot_curves([], info, None, "", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_the_table_of_rates_is_that_of_the_results():
    rows = files.read([RESULTS / "rates.jsonl"])
    text = (ROOT / "docs/long_range_arena.md").read_text()
    for task, layer in {(row["task"], row["layer"]) for row in rows}:
        cells = []
        for rate, told in ((1, 1), (2, 2), (4, 4), (2, 1)):
            wanted = {"task": task, "layer": layer, "rate": rate, "told": told}
            found = [row for row in rows if wanted.items() <= row.items()]
            assert {row["seed"] for row in found} == {0, 1, 2} and len(found) == 3
            cells.append(f"{100 * mean(row['accuracy'] for row in found):.1f}")
        assert f"| {task} | {layer} | {' | '.join(cells)} |" in text


def test_the_table_of_made_up_tokens_is_that_of_the_results():
    assert table(rows_of(RESULTS / "synthetics.jsonl")) in PAGE.read_text()


def test_the_tables_of_curves_are_those_of_the_results():
    assert curve.tables(curve.KEPT) in PAGE.read_text()
    rows = files.read([curve.KEPT])
    assert rows
    for row in rows:
        found = [p["accuracy"] for p in row["points"]]
        assert len(found) >= 3 and max(found) > 2 * 0.173  # the commonest class's share


def test_a_curve_has_every_evaluation_of_a_run(tmp_path, capsys):
    write_run(tmp_path, "listops-gen", "s4d", 1, None, ["--data.packed", "true"])
    run = tmp_path / "listops-gen-s4d-1"
    path = run / "run.json"
    session = {"commit": "0123456789", "seconds": 60.0}
    facts = {
        "threads": 2,
        "processes": 1,
        "device": "a processor, 2 threads",
        "torch": "2.13.0",
        "changed": {},
    }
    facts["sessions"] = [session | {"device": "a processor, 2 threads"}] * 2
    facts |= {"published": 60.52, "generated": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    text = "step,epoch,seconds,loss,accuracy,val_loss,val_accuracy,lr,sequences_per_second\n"
    main = bench_lra.main
    with pytest.raises(SystemExit, match="not been evaluated yet, and has no row of metrics"):
        main(["curve", str(run)])
    (run / "metrics.csv").write_text(text + "50,0.5,900,2.3,0.1,,,0.01,40\n")
    with pytest.raises(SystemExit, match=r"not been evaluated yet, after 0\.5 epochs"):
        main(["curve", str(run)])
    text += "50,0.5,900,2.3,0.1,,,0.01,40\n100,1.0,1800,2,0.2,1.9,0.25,0.01,50\n"
    (run / "metrics.csv").write_text(text + "200,2.0,3600,2,0.2,1.8,0.375,0.01,60\n")
    main(["curve", str(run), "--json", str(tmp_path / "curves.jsonl")])
    shown = capsys.readouterr().out
    assert "| 1 | 0.50 | 1.00 | 1.900 | 25.0 |\n| 2 | 1.00 | 2.00 | 1.800 | 37.5 |\n\n" in shown
    assert "listops-gen, s4d, seed 1, packed; 50 sequences a second. a processor" in shown
    assert curve.tables(tmp_path / "curves.jsonl") == shown.strip()
    told = json.loads(path.read_text())
    told["sessions"][0]["device"] = "a processor, 1 thread"
    path.write_text(json.dumps(told))
    main(["curve", str(run)])
    assert "| 1 | 0.50 | - | 1.900 | 25.0 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["curve", str(tmp_path / "none")])
    assert "is not the folder of a run: it has no run.json" in capsys.readouterr().err
