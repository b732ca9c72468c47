"""Trains small models on tasks with made-up tokens, and shows accuracies beside published ones.

python -m bench.lra synthetics [TASK...] [--layers s4d,hyena] [--seeds 0 1 2] [--json FILE]
python -m bench.lra synthetics --table        the table in docs/long_range_arena.md, of the stored results

The models are those of the sources: for the tasks of safari two blocks of width 32 with networks four times as wide, in
batches of 32; for those of zoology four layers of width 64 without networks, in batches of 512, of which each run
takes hours on a processor. A command that was stopped goes on where it was, and runs that --json has already are left
out.
"""

import argparse
import itertools
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


def best(rows: list[dict]) -> list[dict]:
    """Of each seed, number of samples and of epochs the row of the best learning rate."""
    found: dict = {}
    for row in rows:
        key = row["seed"], row.get("samples"), row["epochs"]
        if key not in found or row["accuracy"] > found[key]["accuracy"]:
            found[key] = row
    return [*found.values()]


def table(rows: list[dict]) -> str:
    lines = []
    for task in TASKS:
        for layer in dict.fromkeys(row["layer"] for row in rows if row["task"] == task):
            some = best([r for r in rows if r["task"] == task and r["layer"] == layer])
            found = [row["accuracy"] for row in some]
            spread = f"{mean(found):.1f} ({min(found):.1f}-{max(found):.1f})"
            published = PUBLISHED.get((task, layer))
            minutes = mean(row["seconds"] for row in some) / 60
            lines.append(
                [
                    task,
                    layer,
                    f"{TASKS[task].chance:.1f}",
                    spread if len(found) > 1 else f"{found[0]:.1f}",
                    "" if published is None else f"{published}",
                    str(len(found)),
                    f"{minutes:.1f}",
                ]
            )
    head = ["task", "layer", "chance %", "test accuracy %", "published", "seeds", "minutes"]
    return files.markdown(head, lines)


def said(row: dict) -> str:
    rate = f", learning rate {row['lr']:g}" if "lr" in row else ""
    text = f"{row['task']}, {row['layer']}, seed {row['seed']}{rate}: {row['accuracy']:.1f} %"
    return f"{text} (chance {TASKS[row['task']].chance:.1f} %)"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.lra synthetics", description=__doc__.split("\n")[0]
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
        text = f"{table(rows)}\n\n{processor()['model name']}, commit {rows[-1]['commit']}."
        files.replace_between(PAGE, "synthetics", text)
        print(f"wrote the table of {args.json} into {PAGE}")
        return
    import torch

    from bench.synthetics.training import LAYERS, Run
    from bench.terminal import plain, progress

    tasks, layers = args.tasks or list(RECALL), args.layers.split(",")
    for what, names, known in (("task", tasks, TASKS), ("layer", layers, LAYERS)):
        for name in names:
            if name not in known:
                parser.error(f"unknown {what} {name!r}; there are {', '.join(known)}")
    torch.set_num_threads(1)  # The models are so small that more threads only wait for one another.
    for task in tasks:
        for layer in layers:
            rates = args.rates or TASKS[task].setting.rates
            for seed, lr in itertools.product(args.seeds, rates):
                wanted = {"task": task, "layer": layer, "seed": seed}
                wanted["epochs"] = args.epochs or TASKS[task].epochs
                if len(TASKS[task].setting.rates) > 1:
                    wanted |= {"lr": lr, "samples": args.samples or TASKS[task].train}
                elif args.samples or args.rates:
                    parser.error(f"{task} has the samples and the learning rate of its source")
                there = [row for row in rows_of(args.json) if wanted.items() <= row.items()]
                if there:
                    plain.print(f"{said(there[0])}, from {args.json}")
                    continue
                run = Run(task, layer, seed, args.epochs, args.out, lr, args.samples)
                with progress(plain) as bar:
                    shown = bar.add_task(f"{task}, {layer}, seed {seed}", total=run.epochs)
                    row = run.run(lambda epoch, of, b=bar, s=shown: b.update(s, completed=epoch))
                files.append(args.json, row | {"commit": commit(), "when": now()})
                plain.print(said(row))
