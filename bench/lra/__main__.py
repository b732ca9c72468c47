"""python -m bench.lra: trains and evaluates. What does not need torch does not import it."""

import os
import sys
from pathlib import Path

from bench import files
from bench.lra import options, recipes
from bench.lra.arguments import make_parser, parse_fit, refuse, underscored

COMMANDS = {
    "fit": "TASK --layer LAYER    trains by the recipe, any value of which can be overridden",
    "eval": "RUN                  shows the accuracy of a run's best checkpoint",
    "report": "FOLDER...            shows a table of all runs in these folders",
    "curve": "RUN                  shows the accuracy of a run after each epoch, finished or not",
    "sweep": "TASK... --layers     trains several tasks, layers and seeds in turn; resumable",
    "gpu": "[TASK...]            trains the generated tasks on a GPU in sessions; resumable",
    "throughput": "TASK...              times training on packed samples beside padded ones",
    "synthetics": " [TASK...]     trains small models to recall made-up tokens; resumable",
    "data": "make|check TASK     generates or examines a data set",
}
DATA_COMMANDS = {
    "make": "Generates a set. Goes on where it was stopped.",
    "check": "Shows statistics of a set and what is suspicious about it.",
}


def usage() -> str:
    tasks = [*(t for t in recipes.TASKS if t != "ucr"), "ucr:NAME", *recipes.ALIASES]
    return "\n".join(
        [
            __doc__,
            "",
            *(f"  {name:11}{text}" for name, text in COMMANDS.items()),
            "",
            f"Layers: {', '.join(options.KERNELS)}",
            f"Tasks: {', '.join(tasks)}",
            "",
            "python -m bench.lra COMMAND --help lists the options of a command.",
            "python -m bench.lra fit TASK --layer LAYER --help shows the recipe's values.",
        ]
    )


def fit(argv: list[str]) -> None:
    config = parse_fit(argv)
    from bench.lra.train import fit

    fit(config)


def evaluate(argv: list[str]) -> None:
    parser = make_parser(
        "eval", "Shows the accuracy of a run's checkpoint, with chance and majority beside it."
    )
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--split", default="test", help="train, val or test")
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="best.ckpt or last.ckpt; null: the checkpoint that was tested",
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help="folder of the data sets; null: the run's"
    )
    parser.add_argument(
        "--batch", type=int | None, default=None, help="samples at once; null: the run's"
    )
    devices = options.hints(options.Run)["device"]
    parser.add_argument("--device", type=devices, default="auto", help="where to compute")
    parser.add_argument(
        "--rate", type=int, default=1, help="2: half of the samples a second; S4D and SGConv"
    )
    parser.add_argument(
        "--told",
        type=int | None,
        default=None,
        help="the rate that the layers are told; null: --rate",
    )
    parser.add_argument(
        "--json", type=str | None, default=None, help="a file that gets a line with the result"
    )
    chosen = parser.parse_args(underscored(argv))
    told = chosen.rate if chosen.told is None else chosen.told
    for name, rate in (("rate", chosen.rate), ("told", told)):
        if rate < 1:
            parser.error(f"--{name} must be at least 1, got {rate}")
    from bench.lra.run import evaluate

    where = chosen.data, chosen.batch, chosen.device
    rates = chosen.rate, told
    found = evaluate(Path(chosen.run), chosen.split, chosen.checkpoint, *where, *rates)
    if chosen.json:
        files.append(Path(chosen.json), found)


def report(argv: list[str]) -> None:
    parser = make_parser(
        "report", "Shows all runs in folders: mean, spread and failures over seeds."
    )
    parser.add_argument(
        "places", nargs="*", default=["runs"], help="folders, or files of --json (default: runs)"
    )
    parser.add_argument("--out", type=str | None, default=None, help="also write the Markdown here")
    parser.add_argument("--json", type=str | None, default=None, help="keep the runs in this file")
    parser.add_argument(
        "--readme", type=str | None, default=None, help="put the first table between its lra marks"
    )
    chosen = parser.parse_args(underscored(argv))
    from bench.lra.report import keep, load, report, summary

    absent = [place for place in chosen.places if not Path(place).exists()]
    if absent:
        raise SystemExit(f"no such folder or file: {', '.join(absent)}")
    runs = load([Path(place) for place in chosen.places])
    if not runs:
        raise SystemExit(f"no runs in {', '.join(chosen.places)}")
    print(report(runs))
    if chosen.out:
        Path(chosen.out).write_text(report(runs) + "\n")
    if chosen.json:
        keep(runs, Path(chosen.json))
    if chosen.readme:
        files.replace_between(Path(chosen.readme), "lra", summary(runs))


def curve(argv: list[str]) -> None:
    parser = make_parser(
        "curve", "Shows the accuracy of a run after each of its epochs, also before it is finished."
    )
    parser.add_argument("run", nargs="?", help="the run folder")
    parser.add_argument("--test", action="store_true", help="also test the best checkpoint")
    parser.add_argument("--json", type=str | None, default=None, help="append to this file")
    parser.add_argument(
        "--table",
        action="store_true",
        help="write the tables of bench/results/curves.jsonl into docs/long_range_arena.md instead",
    )
    chosen = parser.parse_args(underscored(argv))
    from bench.lra.curve import show, write_tables

    if chosen.table:
        return write_tables()
    if not chosen.run:
        parser.error("the run's folder is missing: python -m bench.lra curve runs/NAME")
    if not (Path(chosen.run) / "run.json").exists():
        parser.error(f"{chosen.run} is not the folder of a run: it has no run.json")
    return show(Path(chosen.run), chosen.test, chosen.json and Path(chosen.json))


def sweep(argv: list[str]) -> None:
    from bench.lra.sweep import sweep

    sweep(underscored(argv))


def gpu(argv: list[str]) -> None:
    from bench.lra.sweep import gpu

    gpu(underscored(argv))


def throughput(argv: list[str]) -> None:
    parser = make_parser(
        "throughput",
        "Times training steps and forward passes of packed samples beside the same ones padded, in interleaved rounds. "
        "Trains nothing. Options that throughput does not have itself change the recipe, as those of fit do.",
    )
    parser.add_argument("tasks", nargs="*", help="tasks, separated by blanks")
    parser.add_argument("--layers", default="s4d", help="separated by commas")
    parser.add_argument("--batches", type=int, default=4, help="batches in a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every contender")
    parser.add_argument(
        "--torch_fft", action="store_true", help="also time padded samples with torch.fft"
    )
    parser.add_argument("--json", type=str | None, default=None, help="append to this file")
    from bench.lra.sweep import listed, split_arguments

    known = {"--layers", "--batches", "--rounds", "--torch_fft", "--json"}
    own, rest = split_arguments(underscored(argv), known)
    chosen = parser.parse_args(own)
    if not chosen.tasks or not listed(chosen.layers):
        parser.error("which tasks and layers? python -m bench.lra --help lists them")
    for name in ("batches", "rounds"):
        if chosen[name] < 1:
            parser.error(f"--{name} must be at least 1, got {chosen[name]}")
    runs = [(task, layer) for task in chosen.tasks for layer in listed(chosen.layers)]
    configs = [parse_fit([task, "--layer", x, *rest], "throughput") for task, x in runs]
    if any(config.parallel.context > 1 for config in configs):
        parser.error("--parallel.context must be 1: packed samples are not divided")
    from bench.lra.throughput import compare

    compare(configs, chosen.batches, chosen.rounds, chosen.torch_fft, chosen.json)


def synthetics(argv: list[str]) -> None:
    from bench.synthetics.command import main

    main(argv)


def data(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print("python -m bench.lra data make|check TASK: generates a data set, or examines one.\n")
        print(*(f"  {name:7}{text}" for name, text in DATA_COMMANDS.items()), sep="\n")
        print("\npython -m bench.lra data COMMAND --help lists the options of a command.")
        return
    if command not in DATA_COMMANDS:
        nearest = recipes.suggest(command, DATA_COMMANDS)
        refuse("data", f"unknown command {command!r}{nearest}")
    from bench.lra.data import GENERATED, TASKS, DataError, known, make
    from bench.lra.data.checks import check

    parser = make_parser(f"data {command}", DATA_COMMANDS[command])
    tasks = ", ".join(GENERATED if command == "make" else TASKS)
    parser.add_argument("task", metavar="TASK", help=tasks)
    parser.add_argument("--root", default="data", help="folder of the data sets")
    if command == "make":
        parser.add_argument(
            "--n",
            type=int | None,
            default=None,
            help="samples of all splits together; null: as many as are published",
        )
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument(
            "--workers", type=int | None, default=None, help="processes; null: one for each core"
        )
    else:
        parser.add_argument(
            "--seconds", type=float, default=60.0, help="how long a CNN trains on Pathfinder images"
        )
    chosen = parser.parse_args(underscored(argv[1:]))
    try:
        known(chosen.task)
    except DataError as error:
        parser.error(str(error))
    if command == "check" and chosen.seconds <= 0:
        parser.error(f"--seconds must be positive, got {chosen.seconds}")
    root = Path(chosen.root)
    try:
        if command == "make":
            sizes = {name: chosen[name] for name in ("n", "seed", "workers")}
            print(f"{chosen.task} is in {make(chosen.task, root, **sizes)}")
        elif not check(chosen.task, root, seconds=chosen.seconds):
            sys.exit(1)
    except DataError as error:
        sys.exit(str(error))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    commands = {"fit": fit, "eval": evaluate, "report": report, "sweep": sweep, "gpu": gpu}
    commands |= {"throughput": throughput, "synthetics": synthetics, "data": data, "curve": curve}
    if argv[0] not in commands:
        refuse("", f"unknown command {argv[0]!r}{recipes.suggest(argv[0], commands)}")
    try:
        commands[argv[0]](argv[1:])
    except KeyboardInterrupt:
        print(f"python -m bench.lra {argv[0]}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("bench", "seqconv", "torch"):
            raise
        refuse(argv[0], f"{error.name} is not installed: pip install --editable '.[lra]'")
    except BrokenPipeError:  # nobody reads on, as in `report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None and error.errno not in files.FULL:
            raise
        print(f"python -m bench.lra {argv[0]}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
