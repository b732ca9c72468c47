"""python -m bench.lra: trains and evaluates, without importing torch for anything that does not need it."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

from bench.lra import files, options, recipes

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
                message = (
                    f"unknown option --{unknown[1]}{recipes.suggest_option(unknown[1], known)}"
                )
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


def _peek(argv: list[str], command: str) -> tuple[dict, dict, list[str]]:
    """What the other options' defaults depend on, wherever it stands; the file of --config; and the arguments without
    the task."""
    found = {"task": argv[0]} if argv and not argv[0].startswith("-") else {}
    rest, file = argv[len(found) :], {}
    names = ("config", "layer", "out", "seed", *(() if found else ("task",)))
    for i, argument in enumerate(rest):
        name, given, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in names and (given or i + 1 < len(rest)):
            found[name] = value if given else rest[i + 1]
    if "config" in found:
        import yaml

        try:
            file = yaml.safe_load(Path(found["config"]).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            refuse(command, f"--config {found['config']} cannot be read: {error}")
        if not isinstance(file, dict):
            refuse(command, f"--config {found['config']} must be a YAML mapping")
        kinds = {"task": str, "layer": str, "model": dict, "kernel": dict, "optim": dict}
        for key, kind in kinds.items():
            if not isinstance(file.get(key, kind()), kind):
                what = "a word" if kind is str else "a mapping"
                refuse(
                    command, f"--config {found['config']}: {key} must be {what}, got {file[key]}"
                )
        found = {k: file[k] for k in names if file.get(k) is not None} | found
    found["resume"] = "--resume" in rest or file.get("resume") is True
    return found, file, rest


def _recorded(found: dict) -> options.Config | None:
    """The options of the run that --resume goes on with; None where none has been written down yet."""
    if not found["resume"] or not ("out" in found or "task" in found):
        return None
    name = found.get("task"), found.get("layer", "s4d"), found.get("seed", 0)
    out = Path(found.get("out") or options.run_folder(*name))
    try:
        was = options.from_dict(json.loads((out / "run.json").read_text())["config"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse("fit", f"--resume: {out / 'run.json'} holds no options that can be read: {error}")
    for name in ("task", "layer"):
        if found.get(name, getattr(was, name)) != getattr(was, name):
            refuse(
                "fit", f"--resume: {out} is a run of {was.task}, {was.layer}, not of {found[name]}"
            )
    return dataclasses.replace(was, run=options.continued(was.run, str(out)))


def parse_fit(argv: list[str], command: str = "fit") -> options.Config:
    """The recipe of the task and layer, or the options of the run that is resumed, with what the arguments override.

    command: what refuses.
    """
    found, file, rest = _peek(underscored(argv), command)
    was = _recorded(found)
    task = was.task if was else found.get("task")
    layer = was.layer if was else found.get("layer", "s4d")
    wants_help = {"-h", "--help"} & set(rest)
    if task is None and not wants_help:
        refuse(command, "which task? python -m bench.lra --help lists them")
    try:
        recipe = recipes.recipe(task or "listops", layer)
    except ValueError as error:
        refuse(command, str(error))
    name = f"{task or 'TASK (values shown: listops)'} --layer {layer}"
    published = f"published {recipe.published}% ({recipe.source})" if recipe.published else ""
    described = [f"Trains by the recipe for {name}", published, recipe.note]
    described += ["settings are ours"] if recipe.ours else []
    parser = _parser(command, "; ".join(filter(None, described)) + ".")
    parser.add_argument(
        "--config", action="config", help="YAML file of options, as config.yaml of a run"
    )
    parser.add_argument("--task", default=task, help="or as the first argument")
    parser.add_argument("--layer", default=layer, help=", ".join(options.KERNELS))
    groups = {"": options.Run(), "model": recipe.model, "kernel": recipe.kernel}
    groups["optim"] = recipe.optim
    if was:
        groups |= {"": was.run, "model": was.model, "kernel": was.kernel, "optim": was.optim}
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
    if not was:
        parts["optim"] = _scaled(parts["optim"], recipe.optim, file.get("optim") or {}, rest)
    config = options.Config(task, layer, **parts)
    try:
        options.check(config)
    except ValueError as error:
        refuse(command, str(error))
    if was:
        _compare(was, config)
    return config


def _compare(was: options.Config, config: options.Config) -> None:
    """Refuses what makes it another run, and says what differs otherwise."""
    changed = options.differences(was.identity(), config.identity())
    if changed:
        advice = ""
        if config.run.max_minutes != was.run.max_minutes:
            advice = "; the schedule was fixed when the run began, --stop_minutes ends a session"
        refuse(
            "fit", f"--resume: {config.out} belongs to another run: {', '.join(changed)}{advice}"
        )
    run = dataclasses.asdict(config.run)
    free = {name: run[name] for name in ("data", "device", "checkpoint_steps", "wandb", "compare")}
    if os.environ.get("RANK", "0") == "0":
        for change in options.differences(dataclasses.asdict(was.run), free):
            print(f"--resume: {change}")


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
    devices = options.hints(options.Run)["device"]
    parser.add_argument("--device", type=devices, default="auto", help="where to compute")
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
        from bench.micro.report import replace_between

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
        refuse(argv[0], f"{error.name} is not installed: pip install --editable '.[lra]'")
    except BrokenPipeError:  # as of `report | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None and error.errno not in files.FULL:
            raise
        print(f"python -m bench.lra {argv[0]}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
