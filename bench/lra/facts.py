"""What a run was: versions, commit, machine and the operator that its layers used."""

import hashlib
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml

import seqconv
from bench.lra import options, plan
from bench.lra.journal import console
from bench.lra.model import SequenceClassifier
from bench.lra.process import WORLD
from bench.lra.quiet import lightning


def describe(config, info, splits, model, schedule, recipe, device) -> dict:
    """What run.json says of a run from its start on."""
    threads = torch.get_num_threads()
    name = f"{processor()}, {threads} thread{'s' * (threads > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    return {
        "task": config.task,
        "layer": config.layer,
        "seed": config.run.seed,
        "config": asdict(config),
        "plan": asdict(schedule),
        "classes": info.classes,
        "chance": info.chance,
        "majority": info.majority,
        "generated": info.generated,
        "published": recipe.published,
        "source": recipe.source,
        "ours": recipe.ours,
        "changed": changed(config, recipe),
        "samples": {name: len(split) for name, split in splits.items()},
        "data": fingerprint(info, splits),
        "parameters": sum(p.numel() for p in model.parameters()),
        "operator": operator(model, info, config.optim.batch // config.optim.accumulate, device),
        "device": name,
        "processes": WORLD,
        "threads": threads,
        "seqconv": seqconv.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


def changed(config: options.Config, recipe) -> dict:
    """The options that are not the recipe's."""
    given = {group: asdict(getattr(recipe, group)) for group in ("model", "kernel", "optim")}
    return {
        f"{group}.{name}": value
        for group, values in given.items()
        for name, value in asdict(getattr(config, group)).items()
        if value != values[name]
    }


def fingerprint(info, splits) -> str:
    """Changes with the samples of a task, or their order."""
    digest = hashlib.sha256(f"{info.vocab} {info.channels} {info.l_max}".encode())
    for name, split in splits.items():
        some = np.linspace(0, len(split) - 1, min(64, len(split))).astype(int)
        digest.update(f"{name} {len(split)}".encode())
        for part in (split.labels, split.lengths, split.batch(some)[0]):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def operator(model: SequenceClassifier, info, batch: int, device: torch.device) -> str:
    """How the layers' convolutions are carried out."""
    layer = model.layers[0]
    width, heads = layer.d_model, getattr(layer, "heads", 1)
    if isinstance(layer, seqconv.ButterflyConv):
        return (
            f"{device.type}: learned butterfly of {2 * info.l_max} points or the next power of two"
        )
    u = torch.zeros(1, 1, 1, device=device).expand(batch, info.l_max, width)
    k = torch.zeros(1, 1, 1, device=device).expand(heads, width, info.l_max)
    rev = k if getattr(layer, "bidirectional", False) else None
    return str(seqconv.explain(u, k, k_rev=rev, layout="blh"))


def commit() -> str | None:
    try:
        command = ["git", "rev-parse", "HEAD"]
        folder = Path(__file__).parent
        found = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except OSError:  # there is no git
        return None
    return found.stdout.strip() or None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def config_yaml(config: options.Config) -> str:
    """What --config reads."""
    values = asdict(config)
    values |= values.pop("run")
    # Where and how, not what: for the next run to say.
    for name in ("resume", "overwrite", "stop_after", "stop_minutes"):
        del values[name]
    values["out"] = config.out
    return yaml.safe_dump(values, sort_keys=False)


def announce(facts: dict, config: options.Config, schedule: plan.Plan, notes) -> None:
    samples = facts["samples"]
    for note in notes:  # before any accuracy is shown beside a published one
        console.print(f"{facts['task']}: {note}")
    console.print(
        f"{facts['task']}, {facts['layer']}: {facts['parameters']:,} parameters, {samples['train']:,} samples to "
        f"learn, {samples['val']:,} to validate, {samples['test']:,} to test; {facts['operator']}"
    )
    published = f", published {facts['published']}%" if facts["published"] else ""
    generated = " Generated data, not the published set." if facts["generated"] else ""
    console.print(
        f"{schedule.steps:,} steps, {schedule.share:.1%} of the recipe's; chance {facts['chance']:.1%}, "
        f"majority {facts['majority']:.1%}{published}.{generated} Writing to {config.out}."
    )
