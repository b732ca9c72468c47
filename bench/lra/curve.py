"""The accuracy of one run against its epochs, finished or not, and the table of it in the documentation."""

import csv
import json
import statistics
from pathlib import Path

from bench import files
from bench.facts import RESULTS, ROOT, now
from bench.files import markdown
from bench.lra import options

KEPT = RESULTS / "curves.jsonl"
PAGE = ROOT / "docs/long_range_arena.md"


def curve(run: Path) -> dict:
    """Returns what a run folder says of its evaluations: for each the epoch, the hours of training up to it, and loss
    and accuracy in validation. cores: of a run on a processor, where all sessions have had as many."""
    facts = json.loads((run / "run.json").read_text())
    metrics = run / "metrics.csv"
    rows = list(csv.DictReader(metrics.read_text().splitlines())) if metrics.exists() else []
    points = [
        {
            "epoch": float(row["epoch"]),
            "hours": float(row["seconds"]) / 3600,
            "loss": float(row["val_loss"]),
            "accuracy": float(row["val_accuracy"]),
        }
        for row in rows
        if row["val_accuracy"]
    ]
    if not points:
        reached = f"after {rows[-1]['epoch']} epochs" if rows else "and has no row of metrics"
        raise SystemExit(f"{run} has not been evaluated yet, {reached}")
    config, sessions = options.from_dict(facts["config"]), facts.get("sessions", [facts])
    devices = {(session["device"], session.get("processes", 1)) for session in sessions}
    alike = len(devices) == 1 and "thread" in facts["device"]
    names = ("task", "layer", "seed", "device", "published", "generated", "changed", "torch")
    return {name: facts.get(name) for name in names} | {
        "packed": config.run.packed,
        "epochs": config.optim.epochs,
        "sessions": len(sessions),
        "cores": facts["threads"] * facts.get("processes", 1) if alike else None,
        "commits": list(dict.fromkeys((s["commit"] or "unknown")[:7] for s in sessions)),
        "sequences_per_second": statistics.median(float(r["sequences_per_second"]) for r in rows),
        "points": points,
        "when": now(),
    }


def table(row: dict) -> str:
    """Of a row that `curve` returned."""
    cores = row["cores"]
    lines = [
        [
            f"{p['epoch']:.4g}",
            f"{p['hours']:.2f}",
            f"{cores * p['hours']:.2f}" if cores else "-",
            f"{p['loss']:.3f}",
            f"{100 * p['accuracy']:.1f}",
        ]
        for p in row["points"]
    ]
    head = ["epoch", "hours", "core-hours", "validation loss", "validation accuracy %"]
    told = f"{row['task']}, {row['layer']}, seed {row['seed']}{', packed' if row['packed'] else ''}"
    if row.get("test_accuracy") is not None:
        told += f"; test accuracy {100 * row['test_accuracy']:.1f} % of the best checkpoint"
    speed = f"{row['sequences_per_second']:.0f} sequences a second"
    where = f"{row['device']}, torch {row['torch']}, commit {', '.join(row['commits'])}"
    return "\n\n".join([markdown(head, lines), f"{told}; {speed}. {where}."])


def show(run: Path, test: bool, to: Path | None) -> None:
    row = curve(run)
    if test:
        from bench.lra.run import evaluate

        row["test_accuracy"] = evaluate(run, "test", "best.ckpt", None, None)["accuracy"]
    print(table(row))
    if to:
        files.append(to, row)


def write_tables(kept: Path = KEPT, page: Path = PAGE) -> None:
    """Puts the last row of each run in `kept` into the page."""
    files.replace_between(page, "curves", tables(kept))


def tables(kept: Path = KEPT) -> str:
    last = {}
    for row in files.read([kept]):
        changed = json.dumps(row["changed"], sort_keys=True)
        last[row["task"], row["layer"], row["seed"], row["packed"], changed] = row
    return "\n\n".join(map(table, last.values()))
