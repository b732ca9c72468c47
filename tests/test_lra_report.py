"""The table of runs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from lra_run import ROOT

from bench.lra.__main__ import parse_fit
from bench.lra.recipes import recipe
from bench.lra.report import keep, load, report, summary


def write_run(
    folder: Path, task: str, layer: str, seed: int, accuracy: float | None, **facts
) -> None:
    config = parse_fit([task, "--layer", layer, "--seed", str(seed)])
    r = recipe(task, layer)
    values = {
        "task": task,
        "layer": layer,
        "seed": seed,
        "config": dataclasses.asdict(config),
        "plan": {"share": 0.25},
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
    write_run(tmp_path, "image", "long_conv", 0, 0.881)
    text = report(load([tmp_path]))
    kept = tmp_path / "kept.jsonl"
    keep(load([tmp_path]), kept)
    assert report(load([kept])) == text and len(load([kept, tmp_path])) == 10
    mean, spread = np.mean([58, 60, 18]), np.std([58, 60, 18], ddof=1)
    summary, details = (part.splitlines() for part in text.split("\n\n")[1:3])
    assert summary[0] == "| task | chance | majority | long_conv | s4d | sgconv |"
    assert summary[2] == "| image | 10.0 | 17.0 | 88.10 [88.3] | - | - |"
    cell = f"{mean:.2f} ± {spread:.2f} (1 of 3 failed) [60.52]"
    assert (
        summary[3]
        == f"| listops-gen (generated data) | 10.0 | 17.0 | - | {cell} | - (1 unfinished) [61.45] |"
    )
    line = next(x for x in details if "s4d" in x)
    assert "| 0, 1, 2 |" in line and "| 18.00 |" in line and "25% of the published" in line
    assert "- (1 unfinished)" in next(x for x in details if "sgconv" in x)
    assert "not the published files" in text
    assert not load([tmp_path / "nothing"])


def test_report_does_not_mix_unlike_runs(tmp_path):
    write_run(tmp_path / "a", "digits", "s4d", 0, 0.9, device="a GPU", plan={"share": 0.019})
    write_run(tmp_path / "a", "digits", "s4d", 1, 0.8, device="a GPU", plan={"share": 0.5})
    write_run(tmp_path / "b", "digits", "s4d", 0, 0.7)
    write_run(tmp_path / "c", "digits", "s4d", 0, 0.1)  # another run of the same seed
    write_run(tmp_path / "d", "digits", "s4d", 0, 0.6, changed={"model.d_model": 16})
    runs = load([tmp_path / name for name in "abc"])
    assert "| 85.00 ± 7.07; 70.00 |" in report(runs) and "| 1.9 to 50% of ours |" in report(runs)
    write_run(tmp_path / "e", "digits", "s4d", 0, 0.7, operator="reference: fallback")
    text = report(load([tmp_path / "b", tmp_path / "e"]))
    assert "| 70.00; 70.00 |" in text and text.count("32-true, on torch.fft |") == 1
    text = report(load([tmp_path / "d"]))
    assert "| 60.00* |" in text and "25% of ours, with model.d_model 16" in text


def test_the_readme_shows_the_runs_that_are_kept():
    results = ROOT / "bench/results"
    runs = load([results / "lra.jsonl"])
    assert summary(runs) in (ROOT / "README.md").read_text()
    assert (results / "lra.md").read_text() == report(runs) + "\n"
    for run in runs:  # nothing of where they were computed but the machine
        assert not Path(run["config"]["run"]["data"]).is_absolute()
        assert not Path(run["config"]["run"]["out"] or "").is_absolute()  # null: runs/...
