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
    """Mean and standard deviation of all tests, how many of the runs failed, and what is not finished."""
    ended = [r for r in runs if r["status"] != "unfinished"]
    done = [100 * r["test_accuracy"] for r in ended if r["status"] == "done"]
    count = sum(map(failed, ended))
    notes = [f"{count} of {len(ended)} failed"] if count else []
    notes += [f"{len(runs) - len(ended)} unfinished"] if len(ended) < len(runs) else []
    text = f"{statistics.mean(done):.2f}" if done else "-"
    if len(done) > 1:
        text += f" ± {statistics.stdev(done):.2f}"
    if any(r.get("changed") for r in runs):
        text += "*"
    return text + (f" ({', '.join(notes)})" if notes else "")


def settings(run: dict) -> str:
    """What a group of runs shares: data, machine, and all options but the seed and what does not matter."""
    config = {k: v for k, v in run["config"].items() if k != "run"}
    kept = {k: run["config"]["run"].get(k) for k in ("max_minutes", "precision", "eval_steps")}
    facts = {k: run.get(k) for k in ("device", "operator", "processes", "samples", "data")}
    return json.dumps([config, kept, facts], sort_keys=True)


def grouped(runs: list[dict]) -> dict[tuple, list[dict]]:
    """By task, layer and settings, one run of a seed in each: the first that is finished."""
    groups = defaultdict(dict)
    for run in runs:
        seeds = groups[label(run), run["layer"], settings(run)]
        if run["seed"] not in seeds or seeds[run["seed"]]["status"] == "unfinished":
            seeds[run["seed"]] = run
    return {key: [seeds[s] for s in sorted(seeds)] for key, seeds in groups.items()}


def summary(runs: list[dict]) -> str:
    """One line per task: chance, majority, and every layer's mean beside its published accuracy."""
    layers = list(dict.fromkeys(r["layer"] for r in runs))
    tasks = list(dict.fromkeys(label(r) for r in runs))
    groups, rows = grouped(runs), []
    for task in tasks:
        of_task = [r for r in runs if label(r) == task]
        row = [task, f"{100 * of_task[0]['chance']:.1f}", f"{100 * of_task[0]['majority']:.1f}"]
        for layer in layers:
            cells = [cell(g) for key, g in groups.items() if key[:2] == (task, layer)]
            published = [r["published"] for r in of_task if r["layer"] == layer and r["published"]]
            text = "; ".join(cells) or "-"
            row.append(text + (f" [{published[0]:g}]" if published else ""))
        rows.append(row)
    return markdown(["task", "chance", "majority", *layers], rows)


def spread(values: list[float]) -> str:
    """One value, or the least and the greatest."""
    return " to ".join(dict.fromkeys(f"{v:.3g}" for v in (min(values), max(values))))


def details(runs: list[dict]) -> str:
    """One line per task, layer and settings: the worst seed, how much of the schedule, and what it cost."""
    rows = []
    for (task, layer, _), group in grouped(runs).items():
        done = [r for r in group if r["status"] == "done"]

        def mean(name, form, scale=1.0, done=done):
            values = [r[name] for r in done if r.get(name) is not None]
            return format(statistics.mean(values) * scale, form) if values else "-"

        first = group[0]
        changed = ", ".join(f"{k} {v}" for k, v in first.get("changed", {}).items())
        source = f"{first['published']:g} ({first['source']})" if first["published"] else "-"
        share = spread([100 * r["plan"]["share"] for r in group])
        torch_fft = ", on torch.fft" if "fallback" in first.get("operator", "") else ""
        whose = "ours" if first["ours"] else "the published"
        rows.append(
            [
                task,
                layer,
                ", ".join(str(r["seed"]) for r in group),
                cell(group),
                format(min(100 * r["test_accuracy"] for r in done), ".2f") if done else "-",
                source,
                f"{share}% of {whose}" + (f", with {changed}" if changed else ""),
                f"{first['parameters']:,}",
                mean("seconds", ".1f", 1 / 60),
                mean("sequences_per_second", ".0f"),
                mean("peak_mib", ".0f"),
                f"{first['device']}, {first['config']['run']['precision']}{torch_fft}",
            ]
        )
    header = ["task", "layer", "seeds", "test accuracy", "worst", "published", "schedule"]
    header += ["parameters", "minutes", "sequences/s", "peak MiB", "device"]
    return markdown(header, rows)


def report(runs: list[dict]) -> str:
    parts = [
        "Test accuracy in percent of the checkpoint that was best in validation (the last one where the validation "
        "split is not one of its own: Text, UCR): mean ± standard deviation over seeds "
        "[published], * with options that are not the recipe's. A run fails if it diverges, and has no accuracy then, "
        f"or stays within {100 * MARGIN:g} points of chance or of the commonest class, and counts in the mean. Of "
        "several runs of a seed with the same options, data and machine the first that ended counts.",
        summary(runs),
        details(runs),
    ]
    if any(r["generated"] for r in runs):
        text = "Generated data is made here, not the published files; pathfinder32-easy and listops-short are "
        parts.append(text + "easier tasks of our own.")
    return "\n\n".join(parts)
