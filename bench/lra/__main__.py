"""python -m bench.lra: trains and evaluates, without importing torch for anything that does not need it."""

import dataclasses
import re
import sys
from pathlib import Path

from bench.lra import options, recipes

COMMANDS = {
    "fit": "TASK --layer LAYER    train by the recipe, any value of which can be overridden",
    "eval": "RUN                  accuracy of a run's best checkpoint",
    "report": "FOLDER...         a table of all runs found there",
    "sweep": "TASK... --layers    several tasks, layers and seeds one after the other; resumable",
    "gpu": "[TASK...]            the generated tasks on a GPU, in sessions of --minutes; resumable",
    "data": "make|check TASK     prepare or examine a data set",
}


def usage() -> str:
    tasks = [*(t for t in recipes.TASKS if t != "ucr"), "ucr:NAME", *recipes.ALIASES]
    lines = [__doc__, "", *(f"  {name:7}{text}" for name, text in COMMANDS.items()), ""]
    lines += [f"Layers: {', '.join(options.KERNELS)}", f"Tasks: {', '.join(tasks)}", ""]
    lines += [
        "python -m bench.lra COMMAND --help lists a command's options; fit TASK --layer LAYER --help,"
    ]
    return "\n".join([*lines, "the recipe's values."])


def refuse(command: str, message: str):
    print(f"python -m bench.lra {command}: {message}".replace("  ", " "), file=sys.stderr)
    raise SystemExit(2)


def _parser(command: str, description: str):
    """A jsonargparse parser that answers an unknown key with the nearest known ones."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message, ex=None):
            known = [a.dest for a in self._actions if a.option_strings and a.dest != "help"]
            unknown = re.search(
                r"(?:[Uu]nrecognized arguments: --|[Kk]ey '|[Oo]ption ')([\w.]+)", str(message)
            )
            if unknown and unknown[1] not in known:
                message = f"unknown option --{unknown[1]}{recipes.suggest(unknown[1], known)}"
            refuse(command, str(message).strip())

    return Parser(
        prog=f"python -m bench.lra {command}", description=description, allow_abbrev=False
    )


def underscored(argv: list[str]) -> list[str]:
    """--max-minutes as --max_minutes; values stay as they are."""
    return [
        re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), a)
        if a.startswith("--")
        else a
        for a in argv
    ]


def _peek(argv: list[str]) -> tuple[str | None, str | None, dict, list[str]]:
    """Task, layer, the file of --config, and the arguments without the task: what the other options'
    defaults depend on."""
    task, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    found, file = {}, {}
    for name in ("config", "layer", "task"):
        for i, argument in enumerate(rest):
            if argument == f"--{name}" and i + 1 < len(rest):
                found[name] = rest[i + 1]
            elif argument.startswith(f"--{name}="):
                found[name] = argument.split("=", 1)[1]
    if "config" in found:
        import yaml

        try:
            file = yaml.safe_load(Path(found["config"]).read_text())
        except (OSError, yaml.YAMLError) as error:
            refuse("fit", f"--config {found['config']} cannot be read: {error}")
        if not isinstance(file, dict):
            refuse("fit", f"--config {found['config']} must be a YAML mapping")
        found = {k: file[k] for k in ("task", "layer") if k in file} | found
    return task or found.get("task"), found.get("layer"), file, rest


def parse_fit(argv: list[str]) -> options.Config:
    """The recipe of the task and layer, with what the arguments override."""
    task, layer, file, rest = _peek(underscored(argv))
    wants_help = {"-h", "--help"} & set(rest)
    if task is None and not wants_help:
        refuse("fit", "which task? python -m bench.lra --help lists them")
    layer = layer or "s4d"
    try:
        recipe = recipes.recipe(task or "listops", layer)
    except ValueError as error:
        refuse("fit", str(error))
    name = f"{task or 'TASK (values shown: listops)'} --layer {layer}"
    published = f"published {recipe.published}% ({recipe.source})" if recipe.published else ""
    described = [f"Trains by the recipe for {name}", published, recipe.note]
    described += ["settings are ours"] if recipe.ours else []
    parser = _parser("fit", "; ".join(filter(None, described)) + ".")
    parser.add_argument(
        "--config", action="config", help="YAML file of options, as config.yaml of a run"
    )
    parser.add_argument("--task", default=task, help="or as the first argument")
    parser.add_argument("--layer", default=layer, help=", ".join(options.KERNELS))
    groups = {"": options.Run(), "model": recipe.model, "kernel": recipe.kernel}
    groups["optim"] = recipe.optim
    for group, values in groups.items():
        hints = options.hints(type(values))
        for f in dataclasses.fields(values):
            flag = {"action": "store_true"} if hints[f.name] is bool and not group else {}
            default = getattr(values, f.name)
            flag = flag or {"type": hints[f.name], "default": default}
            dest = f"{group}.{f.name}" if group else f.name
            parser.add_argument(f"--{dest}", help=f.metadata["help"], **flag)
    chosen = parser.parse_args(rest)
    parts = {
        group or "run": type(values)(
            **{
                f.name: chosen[f"{group}.{f.name}" if group else f.name]
                for f in dataclasses.fields(values)
            }
        )
        for group, values in groups.items()
    }
    parts["optim"] = _scaled(parts["optim"], recipe.optim, file.get("optim") or {}, rest)
    config = options.Config(task, layer, **parts)
    try:
        options.check(config)
    except ValueError as error:
        refuse("fit", str(error))
    return config


def _scaled(optim, recipe, file: dict, arguments: list[str]):
    """`optim` with the cosine of the file or else of the recipe, as much longer as there are more epochs."""
    if any(a.partition("=")[0] == "--optim.schedule_steps" for a in arguments):
        return optim
    epochs, steps = recipe.epochs, recipe.schedule_steps
    if "schedule_steps" in file:
        epochs, steps = file.get("epochs", epochs), file["schedule_steps"]
    if steps is None or optim.epochs == epochs:
        return optim
    return dataclasses.replace(optim, schedule_steps=max(1, round(steps * optim.epochs / epochs)))


def fit(argv: list[str]) -> None:
    config = parse_fit(argv)
    from bench.lra.train import fit

    fit(config)


def evaluate(argv: list[str]) -> None:
    parser = _parser("eval", "Accuracy of a run's checkpoint, with chance and majority beside it.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--split", default="test", help="train, val or test")
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="best.ckpt or last.ckpt; null: the tested one",
    )
    parser.add_argument(
        "--data", type=str | None, default=None, help="folder of the data sets; null: the run's"
    )
    parser.add_argument(
        "--batch", type=int | None, default=None, help="samples at once; null: the run's"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    chosen = parser.parse_args(underscored(argv))
    from bench.lra.evaluate import evaluate

    where = chosen.data, chosen.batch, chosen.device
    evaluate(Path(chosen.run), chosen.split, chosen.checkpoint, *where)


def report(argv: list[str]) -> None:
    parser = _parser(
        "report", "A table of all runs in folders: mean, spread and failures over seeds."
    )
    parser.add_argument(
        "places", nargs="*", default=["runs"], help="folders, or files of --json (default: runs)"
    )
    parser.add_argument("--out", type=str | None, default=None, help="write the Markdown there too")
    parser.add_argument("--json", type=str | None, default=None, help="keep the runs in a file")
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
        from bench.report import replace_between

        replace_between(Path(chosen.readme), "lra", summary(runs))


def sweep(argv: list[str]) -> None:
    from bench.lra.sweep import main

    main(underscored(argv), _parser, parse_fit)


def gpu(argv: list[str]) -> None:
    from bench.lra.gpu import main

    main(underscored(argv), _parser, parse_fit)


def data(argv: list[str]) -> None:
    from bench.lra.data.__main__ import main

    main(underscored(argv), _parser)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    commands = {"fit": fit, "eval": evaluate, "report": report, "sweep": sweep, "gpu": gpu}
    commands["data"] = data
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
        refuse(argv[0], f"{error.name} is not installed: pip install '.[lra]'")


if __name__ == "__main__":
    main()
