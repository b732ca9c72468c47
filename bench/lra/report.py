"""A table of finished and failed runs like the papers': layers by tasks, mean and spread over seeds."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from bench.lra import files

MARGIN = 0.02  # a test accuracy within this of the commonest class's share is a failure: nothing was learnt


def load(places: list[Path]) -> list[dict]:
    """Every run below the folders, or in the files that `keep` wrote, by task, layer and seed; a run that is
    not finished has the status "unfinished"."""
    runs = []
    for kept in filter(Path.is_file, places):
        runs += map(json.loads, kept.read_text().splitlines())
    for path in sorted({p for place in places for p in place.rglob("run.json")}):
        result = path.with_name("result.json")
        run = json.loads((result if result.exists() else path).read_text())
        runs.append({"status": "unfinished"} | run)
    order = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
    rank = {task: i for i, task in enumerate(order)}
    return sorted(
        runs, key=lambda r: (rank.get(r["task"], len(order)), r["task"], r["layer"], r["seed"])
    )


def keep(runs: list[dict], path: Path) -> None:
    """One line of JSON for each run."""
    files.write_text(path, "".join(json.dumps(run) + "\n" for run in runs))


def failed(run: dict) -> bool:
    if run["status"] != "done":
        return True
    return run["test_accuracy"] <= max(run["chance"], run["majority"]) + MARGIN


def label(run: dict) -> str:
    return run["task"] + (" (generated data)" if run["generated"] else "")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(runs: list[dict]) -> str:
    """Mean and standard deviation of the tests that succeeded, the worst, and how many of all failed."""
    done = [100 * r["test_accuracy"] for r in runs if r["status"] == "done"]
    count = sum(map(failed, runs))
    if not done:
        return f"failed ({count} of {len(runs)})"
    text = f"{statistics.mean(done):.2f}"
    if len(done) > 1:
        text += f" ± {statistics.stdev(done):.2f}"
    return text + (f" ({count} of {len(runs)} failed)" if count else "")


def settings(run: dict) -> str:
    """What a group of runs shares: all options but the seed and what does not matter."""
    config = {k: v for k, v in run["config"].items() if k != "run"}
    kept = {k: run["config"]["run"].get(k) for k in ("max_minutes", "precision", "eval_steps")}
    return json.dumps([config, kept], sort_keys=True)


def summary(runs: list[dict]) -> str:
    """One line per task: chance, majority, and every layer's mean beside its published accuracy."""
    layers = list(dict.fromkeys(r["layer"] for r in runs))
    tasks = list(dict.fromkeys(label(r) for r in runs))
    rows = []
    for task in tasks:
        of_task = [r for r in runs if label(r) == task]
        row = [task, f"{100 * of_task[0]['chance']:.1f}", f"{100 * of_task[0]['majority']:.1f}"]
        for layer in layers:
            of_layer = [r for r in of_task if r["layer"] == layer and r["status"] != "unfinished"]
            published = [r["published"] for r in of_task if r["layer"] == layer and r["published"]]
            groups = defaultdict(list)
            for run in of_layer:
                groups[settings(run)].append(run)
            text = "; ".join(map(cell, groups.values())) or "-"
            row.append(text + (f" [{published[0]:g}]" if published else ""))
        rows.append(row)
    return markdown(["task", "chance", "majority", *layers], rows)


def details(runs: list[dict]) -> str:
    """One line per task, layer and settings: the worst seed, how much of the schedule, and what it cost."""
    groups = defaultdict(list)
    for run in runs:
        groups[label(run), run["layer"], settings(run)].append(run)
    rows = []
    for (task, layer, _), group in groups.items():
        done = [r for r in group if r["status"] == "done"]
        unfinished = sum(r["status"] == "unfinished" for r in group)

        def mean(name, scale=1.0, done=done):
            values = [r[name] for r in done if r.get(name) is not None]
            return statistics.mean(values) * scale if values else None

        def shown(value, form):
            return "-" if value is None else format(value, form)

        worst = min((100 * r["test_accuracy"] for r in done), default=None)
        finished = [r for r in group if r["status"] != "unfinished"]
        rows.append(
            [
                task,
                layer,
                ", ".join(str(r["seed"]) for r in group),
                cell(finished) if finished else "-",
                shown(worst, ".2f"),
                f"{sum(map(failed, finished))}/{len(finished)}"
                + (f", {unfinished} unfinished" if unfinished else ""),
                f"{group[0]['published']:g} ({group[0]['source']})"
                if group[0]["published"]
                else "-",
                f"{group[0]['plan']['share']:.0%} of "
                + ("ours" if group[0]["ours"] else "the published"),
                f"{group[0]['parameters']:,}",
                shown(mean("seconds", 1 / 60), ".1f"),
                shown(mean("sequences_per_second"), ".0f"),
                shown(mean("peak_mib"), ".0f"),
                f"{group[0]['device']}, {group[0]['config']['run']['precision']}",
            ]
        )
    header = ["task", "layer", "seeds", "test accuracy", "worst", "failed", "published", "schedule"]
    header += ["parameters", "minutes", "sequences/s", "peak MiB", "device"]
    return markdown(header, rows)


def report(runs: list[dict]) -> str:
    parts = [
        "Test accuracy in percent of the checkpoint that was best in validation (the last one where the validation "
        "split is not one of its own: Text, UCR): mean ± standard deviation over seeds "
        "[published]. A run fails if it diverges or stays within "
        f"{100 * MARGIN:g} points of chance or of the commonest class.",
        summary(runs),
        details(runs),
    ]
    if any(r["generated"] for r in runs):
        parts.append("Generated data is made here by the published rules: not the published files.")
    return "\n\n".join(parts)
