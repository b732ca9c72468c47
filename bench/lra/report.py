"""Tables of finished and failed runs like the papers': layers by tasks, with mean and spread over seeds."""

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bench import files
from bench.facts import plural
from bench.files import markdown
from bench.lra import recipes

MARGIN = (
    0.02  # a run has learnt nothing if its accuracy is within this of the commonest class's share
)


def load(places: list[Path]) -> list[dict]:
    """Returns every run below the folders, or in the files that `keep` wrote, ordered by task, layer and seed.

    A run that is not finished has the status "unfinished" and what its metrics say.
    """
    runs = []
    for kept in filter(Path.is_file, places):
        for number, line in enumerate(kept.read_text().splitlines(), 1):
            runs.append(_parsed(line, f"{kept}:{number}"))
    for path in sorted({p for place in places for p in place.rglob("run.json")}):
        result = path.with_name("result.json")
        read = result if result.exists() else path
        run = _parsed(read.read_text(), str(read))
        runs.append(run if "status" in run else run | reached(path.with_name("metrics.csv")))
    order = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
    rank = {task: i for i, task in enumerate(order)}
    return sorted(
        runs, key=lambda r: (rank.get(r["task"], len(order)), r["task"], r["layer"], r["seed"])
    )


def _parsed(text: str, place: str) -> dict:
    try:
        run = json.loads(text)
    except ValueError as error:
        raise SystemExit(f"{place} is damaged: {error}") from None
    if not isinstance(run, dict) or not {"task", "layer", "config"} <= run.keys():
        raise SystemExit(f"{place} holds no run")
    return run


def reached(metrics: Path) -> dict:
    """Returns what an unfinished run has recorded of itself."""
    rows = list(csv.DictReader(metrics.read_text().splitlines())) if metrics.exists() else []
    found = {"status": "unfinished", "steps": 0}
    if rows:
        found |= {"steps": int(rows[-1]["step"]), "seconds": float(rows[-1]["seconds"])}
        for name in ("sequences_per_second", "waiting"):
            found[name] = statistics.median(float(r[name]) for r in rows)
        tested = [float(r["val_accuracy"]) for r in rows if r["val_accuracy"]]
        found["val_accuracy"] = tested[-1] if tested else None
    return found


def keep(runs: list[dict], path: Path) -> None:
    """Writes one line of JSON for each run."""
    files.write_text(path, "".join(json.dumps(run) + "\n" for run in runs))


def failed(run: dict) -> bool:
    if run["status"] != "done":
        return True
    return run["test_accuracy"] <= max(run["chance"], run["majority"]) + MARGIN


def levels(chance: float, majority: float, generated: bool) -> str:
    """Returns what stands in brackets behind every accuracy."""
    note = ", generated data" if generated else ""
    return f"chance {chance:.1%}, majority {majority:.1%}{note}"


def label(run: dict) -> str:
    return run["task"] + (" (generated data)" if run["generated"] else "")


def accuracies(runs: list[dict]) -> list[float]:
    return [100 * r["test_accuracy"] for r in runs if r["status"] == "done"]


def below(runs: list[dict]) -> bool:
    """Decides whether the mean misses the bar. It does if all runs have failed."""
    bar, done = recipes.BARS.get((runs[0]["task"], runs[0]["layer"])), accuracies(runs)
    if bar is None or all(r["status"] == "unfinished" for r in runs):
        return False
    return not done or round(statistics.mean(done), 6) < bar


def cell(runs: list[dict], seeds: int | None = None) -> str:
    """Returns mean and standard deviation of all tests, how many runs failed and how many are not finished. The
    number of seeds is named unless it is `seeds`."""
    ended = [r for r in runs if r["status"] != "unfinished"]
    going = [r for r in runs if r["status"] == "unfinished"]
    done, count = accuracies(ended), sum(map(failed, ended))
    notes = [plural(len(runs), "seed")] if seeds not in (None, len(runs)) else []
    notes += [f"{count} of {len(ended)} failed"] if count else []
    if going:
        tested = [100 * r["val_accuracy"] for r in going if r.get("val_accuracy") is not None]
        so_far = f", {spread(tested)} in validation so far" if tested else ""
        notes.append(f"{len(going)} unfinished{so_far}")
    text = f"{statistics.mean(done):.2f}" if done else "-"
    if len(done) > 1:
        text += f" ± {statistics.stdev(done):.2f}"
    if any(r.get("changed") for r in runs):
        text += "*"
    if below(runs):
        text += "†"
    return text + (f" ({', '.join(notes)})" if notes else "")


def precision(run: dict) -> str:
    return run["config"]["run"]["precision"]


def on_torch_fft(run: dict) -> bool:
    return "fallback" in run.get("operator", "")


def packed(run: dict) -> bool:
    return run["config"]["run"].get("packed", False)  # older runs have not recorded it


def settings(run: dict, *, but: str = "") -> str:
    """Returns what a group of runs shares: data, machine, and all options but the seed and those without effect."""
    config = {k: v for k, v in run["config"].items() if k not in ("run", "parallel")}
    names = {"max_minutes", "precision", "eval_steps"} - {but}
    kept = {k: run["config"]["run"].get(k) for k in names}
    facts = {"device", "operator", "processes", "samples", "data"} - {but}
    facts = {k: run.get(k) for k in facts} | {"context": run.get("context", 1)}
    facts |= {} if but == "packed" else {"packed": packed(run)}
    return json.dumps([config, kept, facts], sort_keys=True)


def grouped(runs: list[dict]) -> dict[tuple, list[dict]]:
    """Groups runs by task, layer and settings. Each group has one run of a seed, the first that is finished."""
    groups = defaultdict(dict)
    for run in runs:
        seeds = groups[label(run), run["layer"], settings(run)]
        if run["seed"] not in seeds or seeds[run["seed"]]["status"] == "unfinished":
            seeds[run["seed"]] = run
    return {key: [seeds[s] for s in sorted(seeds)] for key, seeds in groups.items()}


def usual(runs: list[dict]) -> int:
    """Returns how many seeds most cells have."""
    return max(statistics.multimode(map(len, grouped(runs).values())))


def summary(runs: list[dict]) -> str:
    """Returns a line per task, with chance, majority, and every layer's mean beside its published accuracy, and what
    the marks in cells mean."""
    layers = list(dict.fromkeys(r["layer"] for r in runs))
    tasks = list(dict.fromkeys(label(r) for r in runs))
    groups, rows, shown, seeds = grouped(runs), [], [], usual(runs)
    for task in tasks:
        of_task = [r for r in runs if label(r) == task]
        row = [task, f"{100 * of_task[0]['chance']:.1f}", f"{100 * of_task[0]['majority']:.1f}"]
        for layer in layers:
            found = [group for key, group in groups.items() if key[:2] == (task, layer)]
            found = [g for g in found if not on_torch_fft(g[0])] or found
            found = [g for g in found if not packed(g[0])] or found
            shown += found
            several = len({precision(g[0]) for g in found}) > 1
            cells = [several * f"{precision(g[0])}: " + cell(g, seeds) for g in found]
            published = [r["published"] for r in of_task if r["layer"] == layer and r["published"]]
            text = "; ".join(cells) or "-"
            row.append(text + (f" [{published[0]:g}]" if published else ""))
        rows.append(row)
    parts = [markdown(["task", "chance", "majority", *layers], rows)]
    missed = {(g[0]["task"], g[0]["layer"]) for g in shown if below(g)}
    if missed:
        bars = dict.fromkeys(
            f"{task} {recipes.BARS[task, layer]}" for task, layer in sorted(missed)
        )
        parts.append(f"† below the bar that was set beforehand: {', '.join(bars)}.")
    for what, *how in (
        ("bf16-mixed minus 32-true", "precision", precision, "bf16-mixed", "32-true"),
        ("seqconv's kernels minus torch.fft", "operator", on_torch_fft, False, True),
        ("Packed samples minus padded ones", "packed", packed, True, False),
    ):
        found = differences(groups.values(), *how)
        if found:
            parts.append(f"{what}, on the same seeds: {', '.join(found)}.")
    return "\n\n".join(parts)


def differences(groups, aspect: str, value: Callable, one, other) -> list[str]:
    """Returns differences of accuracy in points between runs that differ in one aspect only: means over the seeds that
    ended with both of its values."""
    runs, pairs = [r for group in groups for r in group if r["status"] == "done"], defaultdict(list)
    for mine in (r for r in runs if value(r) == one):
        for theirs in (r for r in runs if value(r) == other and alike(r, mine, aspect)):
            change = 100 * (mine["test_accuracy"] - theirs["test_accuracy"])
            pairs[label(mine), mine["layer"]].append(change)
    return [f"{t} {layer} {statistics.mean(p):+.2f}" for (t, layer), p in pairs.items()]


def alike(a: dict, b: dict, but: str) -> bool:
    """Decides whether two runs differ in one aspect only. What an older run has not recorded counts as equal."""
    first, second = ({"data": None} | r for r in (a, b))
    if None in (first["data"], second["data"]):
        first["data"] = second["data"] = None
    same = all(a.get(k) == b.get(k) for k in ("task", "layer", "seed"))
    steps = a["plan"]["steps"] == b["plan"]["steps"]
    return same and steps and settings(first, but=but) == settings(second, but=but)


def spread(values: list[float]) -> str:
    """Returns one value, or the least and the greatest."""
    return " to ".join(dict.fromkeys(f"{v:.3g}" for v in (min(values), max(values))))


def schedule(group: list[dict]) -> str:
    """Returns the share of the recipe's schedule that was planned, and the steps so far of unfinished runs."""

    def share(run: dict) -> float:
        steps = run["plan"]["steps"]
        return 100 * run["plan"]["share"] * run.get("steps", steps) / steps

    first = group[0]
    text = f"{spread(list(map(share, group)))}% of {'ours' if first['ours'] else 'the published'}"
    going = [r for r in group if r["status"] == "unfinished"]
    if going:
        steps = " and ".join(f"{r.get('steps', 0):,} of {r['plan']['steps']:,}" for r in going)
        text += f" (so far {steps} steps)"
    changed = ", ".join(f"{k} {v}" for k, v in first.get("changed", {}).items())
    return text + (f", with {changed}" if changed else "")


def wall(run: dict) -> float | None:
    """Returns the seconds of all sessions; None if one of them has not recorded its own."""
    seconds = [s.get("seconds") for s in run.get("sessions", [])]
    return sum(seconds) if seconds and None not in seconds else None


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{seconds / 60:.1f} min"


def details(runs: list[dict]) -> str:
    """Returns a line per task, layer and settings: the worst seed, the share of the schedule, and the cost."""
    rows, compared = [], any(ratio(r) for r in runs)
    for (task, layer, _), group in grouped(runs).items():
        done = [r for r in group if r["status"] == "done"]

        def mean(take, form, these=done or group):
            values = [take(r) for r in these if take(r) is not None]
            return form(statistics.mean(values)) if values else "-"

        first = group[0]
        source = f"{first['published']:g} ({first['source']})" if first["published"] else "-"
        how = ", on torch.fft" * on_torch_fft(first) + ", packed" * packed(first)
        rows.append(
            [
                task,
                layer,
                ", ".join(str(r["seed"]) for r in group),
                cell(group),
                format(min(accuracies(done)), ".2f") if done else "-",
                source,
                schedule(group),
                f"{first['parameters']:,}",
                mean(lambda r: r.get("seconds"), lambda v: f"{v / 60:.1f}"),
                mean(wall, duration),
                mean(lambda r: r.get("sequences_per_second"), "{:.0f}".format),
                mean(lambda r: r.get("waiting"), "{:.1%}".format),
                mean(lambda r: r.get("peak_mib"), "{:.0f}".format),
                *([mean(ratio, "{:.2f}".format)] if compared else []),
                f"{first['device']}, {precision(first)}{how}",
            ]
        )
    header = ["task", "layer", "seeds", "test accuracy", "worst", "published", "schedule"]
    header += ["parameters", "minutes of training", "whole run", "sequences/s", "waiting for data"]
    header += ["peak MiB", *(["torch.fft / seqconv"] if compared else []), "device"]
    return markdown(header, rows)


def ratio(run: dict) -> float | None:
    """Returns how many times faster a training step is than on torch.fft."""
    return (run.get("compared") or {}).get("ratio")


def report(runs: list[dict]) -> str:
    parts = [
        "Test accuracy in percent of the checkpoint that was best in validation (the last one where the validation "
        f"split is not one of its own: Text, UCR): mean ± standard deviation over seeds ({usual(runs)} unless a cell "
        "says otherwise) [published], * with options that are not the recipe's. A run fails if it diverges, and has no "
        f"accuracy then, or stays within {100 * MARGIN:g} points of chance or of the commonest class, and counts in "
        "the mean. Of several runs of a seed with the same options, data and machine the first that ended counts.",
        summary(runs),
        details(runs),
    ]
    if any(r["generated"] for r in runs):
        text = "Generated data is made here, not the published files; pathfinder32-easy and listops-short are "
        parts.append(text + "easier tasks of our own.")
    return "\n\n".join(parts)
