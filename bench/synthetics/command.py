"""Trains small models on tasks with made-up tokens, and shows accuracies beside published ones.

python -m bench.lra synthetics [TASK...] [--layers s4d,hyena] [--seeds 0 1 2] [--json FILE]
python -m bench.lra synthetics --table        the table in docs/long_range_arena.md, of the stored results

The models have the sizes of the sources: for the tasks of safari two blocks of width 32 with networks four times as
wide; for those of zoology four layers of width 64 without networks, of which each run takes hours on a processor. A
command that was stopped goes on where it was, and runs that --json has already are left out.
"""

import argparse
import itertools
import math
from pathlib import Path
from statistics import mean

from bench import files
from bench.facts import RESULTS, ROOT, commit, now, processor
from bench.synthetics.tasks import RECALL, TASKS

PUBLISHED = {  # (task, layer) -> accuracy, by safari's code
    ("associative-recall", "s4d"): 32.4,
    ("induction-head", "s4d"): 8.8,
}
PAGE = ROOT / "docs/long_range_arena.md"


def rows_of(path: Path) -> list[dict]:
    return files.read([path]) if path.exists() else []


def amount(row: dict) -> tuple[int, int]:
    """Samples and epochs of training."""
    return row.get("samples", TASKS[row["task"]].train), row["epochs"]


def best(rows: list[dict]) -> list[dict]:
    """Of each seed the row of the best learning rate, by the accuracy in the test, as zoology has it."""
    found: dict = {}
    for row in rows:
        if row["seed"] not in found or row["accuracy"] > found[row["seed"]]["accuracy"]:
            found[row["seed"]] = row
    return [*found.values()]


def table(rows: list[dict]) -> str:
    lines = []
    for task in TASKS:
        of_task = [row for row in rows if row["task"] == task]
        for layer, training in dict.fromkeys((row["layer"], amount(row)) for row in of_task):
            some = best([r for r in of_task if (r["layer"], amount(r)) == (layer, training)])
            found = [row["accuracy"] for row in some]
            spread = f"{mean(found):.1f} ({min(found):.1f}-{max(found):.1f})"
            published = PUBLISHED.get((task, layer))
            minutes = mean(row["seconds"] for row in some) / 60
            lines.append(
                [
                    task,
                    layer,
                    f"{training[0]:,} x {training[1]}",
                    f"{TASKS[task].chance:.1f}",
                    spread if len(found) > 1 else f"{found[0]:.1f}",
                    "" if published is None else f"{published}",
                    str(len(found)),
                    f"{minutes:.1f}",
                ]
            )
    head = ["task", "layer", "samples x epochs", "chance %", "test accuracy %", "published"]
    return files.markdown([*head, "seeds", "minutes"], lines)


def said(row: dict) -> str:
    rate = f", learning rate {row['lr']:g}" if "lr" in row else ""
    text = f"{row['task']}, {row['layer']}, seed {row['seed']}{rate}: {row['accuracy']:.1f} %"
    return f"{text} (chance {TASKS[row['task']].chance:.1f} %)"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lra synthetics", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "tasks", nargs="*", help=f"of {', '.join(TASKS)}; none: {', '.join(RECALL)}"
    )
    parser.add_argument(
        "--layers",
        default="s4d,long_conv,sgconv,hyena",
        help="with commas; also s4d-two-sided, and attention for the tasks of zoology",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=None, help="instead of the task's")
    parser.add_argument(
        "--samples", type=int, default=None, help="of training, instead of the task's"
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=None, help="learning rates, instead of the task's"
    )
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "synthetics.jsonl", help="where results are kept"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs/synthetics", help="checkpoints")
    parser.add_argument(
        "--table",
        action="store_true",
        help="write the table of --json into docs/long_range_arena.md, and train nothing",
    )
    args = parser.parse_args(argv)
    if args.table:
        rows = rows_of(args.json)
        if not rows:
            parser.error(f"--json: there are no results in {args.json}")
        commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
        processors = ", ".join(
            dict.fromkeys(row.get("processor", "processor not recorded") for row in rows)
        )
        text = f"{table(rows)}\n\n{processors}, one thread, commits {commits}."
        files.replace_between(PAGE, "synthetics", text)
        print(f"wrote the table of {args.json} into {PAGE}")
        return
    import torch

    from bench.synthetics.training import LAYERS, Run, refused
    from bench.terminal import plain, progress

    tasks, layers = args.tasks or list(RECALL), args.layers.split(",")
    for what, names, known in (("task", tasks, TASKS), ("layer", layers, LAYERS)):
        for name in names:
            if name not in known:
                parser.error(f"unknown {what} {name!r}; there are {', '.join(known)}")
    # Runs take hours: a mistake shows before the first.
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    for rate in args.rates or ():
        if not 0 < rate < math.inf:
            parser.error(f"--rates must be positive, got {rate}")
    for task in tasks:
        setting = TASKS[task].setting
        if args.samples is not None and args.samples < setting.batch:
            parser.error(f"--samples must be at least {setting.batch}, a batch, got {args.samples}")
        if len(setting.rates) == 1 and (args.samples or args.rates):
            parser.error(f"--samples and --rates are for the tasks of zoology, and not for {task}")
        for layer in layers:
            if reason := refused(layer, TASKS[task]):
                parser.error(f"{task}: {reason}")
    torch.set_num_threads(1)  # The models are so small that more threads only wait for one another.
    for task, layer, seed in itertools.product(tasks, layers, args.seeds):
        several = len(TASKS[task].setting.rates) > 1
        for lr in args.rates or TASKS[task].setting.rates:
            wanted = {"task": task, "layer": layer, "seed": seed}
            wanted["epochs"] = args.epochs or TASKS[task].epochs
            if several:
                wanted |= {"lr": lr, "samples": args.samples or TASKS[task].train}
            there = [row for row in rows_of(args.json) if wanted.items() <= row.items()]
            if there:
                plain.print(f"{said(there[0])}, from {args.json}")
                continue
            run = Run(task, layer, seed, args.epochs, args.out, lr, args.samples)
            with progress(plain) as bar:
                shown = bar.add_task(f"{task}, {layer}, seed {seed}", total=run.epochs)
                row = run.run(lambda epoch, of, b=bar, s=shown: b.update(s, completed=epoch))
            files.append(
                args.json,
                row | {"commit": commit(), "processor": processor()["model name"], "when": now()},
            )
            plain.print(said(row))
