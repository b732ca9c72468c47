"""The command line of a training run as typed options. Importing this needs no torch."""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

from bench.lra import options, recipes


def refuse(command: str, message: str):
    """Ends the program with a message that begins with the command."""
    print(f"{f'python -m bench.lra {command}'.strip()}: {message}", file=sys.stderr)
    raise SystemExit(2)


def make_parser(command: str, description: str):
    """Returns a jsonargparse parser that answers an unknown key with the nearest known ones."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message, ex=None):
            known = [a.dest for a in self._actions if a.option_strings and a.dest != "help"]
            unknown = re.search(
                r"(?:[Uu]nrecognized arguments: --|[Kk]ey '|[Oo]ption ')([\w.]+)", str(message)
            )
            if unknown and unknown[1] not in known:
                nearest = recipes.suggest_option(unknown[1], known)
                message = f"unknown option --{unknown[1]}{nearest}"
            text = re.sub(r"Parser key ['\"]([\w.]+)['\"]:", r"--\1:", str(message))
            refuse(command, text.strip())

    return Parser(
        prog=f"python -m bench.lra {command}", description=description, allow_abbrev=False
    )


def underscored(argv: list[str]) -> list[str]:
    """Writes --max-minutes as --max_minutes, and --data.packed true as --packed. Other values stay as they are."""
    argv = _flag(argv, "--data.packed", "--packed")

    def spelled(argument: str) -> str:
        name, given, value = argument.partition("=")
        return f"--{name[2:].replace('-', '_')}{given}{value}"

    return [spelled(a) if a.startswith("--") else a for a in argv]


def _flag(argv: list[str], name: str, flag: str) -> list[str]:
    """Writes an option with the value true or false as a flag that is there or not."""
    found, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        start, given, value = argument.partition("=")
        if start != name:
            found.append(argument)
            continue
        value = value if given else rest.pop(0) if rest else "nothing"
        if value.lower() not in ("true", "false"):
            refuse("", f"{name} must be true or false, got {value}")
        found += [flag] * (value.lower() == "true")
    return found


def _peek(argv: list[str], command: str) -> tuple[dict, dict, list[str]]:
    """Returns the options on which the defaults of others depend, the content of --config, and the arguments
    without the task."""
    found = {"task": argv[0]} if argv and not argv[0].startswith("-") else {}
    rest, file = argv[len(found) :], {}
    names = ("config", "layer", "out", "seed", *(() if found else ("task",)))
    for i, argument in enumerate(rest):
        name, given, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in names and (given or i + 1 < len(rest)):
            found[name] = value if given else rest[i + 1]
    if "config" in found:
        import yaml

        place = f"--config {found['config']}"
        try:
            file = yaml.safe_load(Path(found["config"]).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            refuse(command, f"{place} cannot be read: {error}")
        if not isinstance(file, dict):
            refuse(command, f"{place} must be a YAML mapping")
        kinds = {"task": str, "layer": str, "model": dict, "kernel": dict, "optim": dict}
        kinds["parallel"] = dict
        for key, kind in kinds.items():
            if not isinstance(file.get(key, kind()), kind):
                what = "a word" if kind is str else "a mapping"
                refuse(command, f"{place}: {key} must be {what}, got {file[key]}")
        found = {k: file[k] for k in names if file.get(k) is not None} | found
    found["resume"] = "--resume" in rest or file.get("resume") is True
    return found, file, rest


def _recorded(found: dict, command: str) -> options.Config | None:
    """Returns the options of the run that --resume continues; None where no run has been recorded yet."""
    if not found["resume"] or not ("out" in found or "task" in found):
        return None
    name = found.get("task"), found.get("layer", "s4d"), found.get("seed", 0)
    out = Path(found.get("out") or options.run_folder(*name))
    try:
        was = options.from_dict(json.loads((out / "run.json").read_text())["config"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{out / 'run.json'} holds no options that can be read"
        refuse(command, f"--resume: {text}: {error}")
    for name in ("task", "layer"):
        if found.get(name, getattr(was, name)) != getattr(was, name):
            text = f"{out} is a run of {was.task}, {was.layer}, not of {found[name]}"
            refuse(command, f"--resume: {text}")
    return dataclasses.replace(was, run=options.continued(was.run, str(out)))


def parse_fit(argv: list[str], command: str = "fit") -> options.Config:
    """Returns the recipe of the task and layer, or the options of the run that is resumed, with what the arguments
    override.

    command: the name under which errors are reported.
    """
    found, file, rest = _peek(underscored(argv), command)
    was = _recorded(found, command)
    task = was.task if was else found.get("task")
    layer = was.layer if was else found.get("layer", "s4d")
    wants_help = {"-h", "--help"} & set(rest)
    if task is None and not wants_help:
        refuse(command, "which task? python -m bench.lra --help lists them")
    try:
        recipe = recipes.recipe(task or "listops", layer)
    except ValueError as error:
        refuse(command, str(error))
    name = f"{task or 'TASK (the values shown are those of listops)'} --layer {layer}"
    published = f"published {recipe.published}% ({recipe.source})" if recipe.published else ""
    described = [f"Trains by the recipe for {name}", published, recipe.note]
    described += ["the settings are ours"] if recipe.ours else []
    parser = make_parser(command, "; ".join(filter(None, described)) + ".")
    parser.add_argument(
        "--config", action="config", help="YAML file of options, like config.yaml of a run"
    )
    parser.add_argument("--task", default=task, help="may also be the first argument")
    parser.add_argument("--layer", default=layer, help=", ".join(options.KERNELS))
    groups = {"": options.Run(), "model": recipe.model, "kernel": recipe.kernel}
    groups |= {"optim": recipe.optim, "parallel": options.Parallel()}
    if was:
        groups |= {group: getattr(was, group or "run") for group in groups}
    dests = {
        group: {f.name: f"{group}.{f.name}".lstrip(".") for f in dataclasses.fields(values)}
        for group, values in groups.items()
    }
    for group, values in groups.items():
        hints = options.hints(type(values))
        for f in dataclasses.fields(values):
            if hints[f.name] is bool and not group:
                kind = {"action": "store_true", "default": getattr(values, f.name)}
            else:
                kind = {"type": hints[f.name], "default": getattr(values, f.name)}
            parser.add_argument(f"--{dests[group][f.name]}", help=f.metadata["help"], **kind)
    chosen = parser.parse_args(rest)
    parts = {
        group or "run": type(values)(**{f: chosen[dest] for f, dest in dests[group].items()})
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
        _compare(was, config, command)
    return config


def _compare(was: options.Config, config: options.Config, command: str) -> None:
    """Refuses options that make it another run, and prints the other differences."""
    changed = options.differences(was.identity(), config.identity())
    if changed:
        advice = ""
        if config.run.max_minutes != was.run.max_minutes:
            advice = "; the schedule was fixed when the run began, --stop_minutes ends a session"
        text = f"{config.out} belongs to another run: {', '.join(changed)}{advice}"
        refuse(command, f"--resume: {text}")
    names = ("data", "device", "checkpoint_steps", "wandb", "compare")
    before, now = (
        {name: getattr(c.run, name) for name in names} | {"parallel.context": c.parallel.context}
        for c in (was, config)
    )
    if os.environ.get("RANK", "0") == "0":
        for change in options.differences(before, now):
            print(f"--resume: {change}")


def _scaled(optim, recipe, file: dict, arguments: list[str]):
    """Stretches the cosine of the file, or else of the recipe, by the same factor as the epochs."""
    if any(a.partition("=")[0] == "--optim.schedule_steps" for a in arguments):
        return optim
    epochs, steps = recipe.epochs, recipe.schedule_steps
    if "schedule_steps" in file:
        epochs, steps = file.get("epochs", epochs), file["schedule_steps"]
    if steps is None or optim.epochs == epochs:
        return optim
    return dataclasses.replace(optim, schedule_steps=max(1, round(steps * optim.epochs / epochs)))
