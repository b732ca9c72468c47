"""A run: its process, data and model, the facts that run.json keeps of it, and a finished run opened again."""

import hashlib
import json
import os
import pickle
import platform
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml

import seqconv
from bench.facts import git, plural, processor, versions
from bench.lra import data, options
from bench.lra.batches import EvalBatches, thinned
from bench.lra.model import SequenceClassifier
from bench.lra.report import levels
from bench.lra.schedule import Schedule
from bench.terminal import plain

WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))


def together(make):
    """Calls make() in the first process and returns its value in all of them."""
    box = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def open_task(name: str, root: str):
    """Returns info and splits. If the data set is missing, the program ends with the loader's message."""
    if dist.is_initialized() and RANK > 0:
        dist.barrier()  # the first process packs the data, the others open it
    try:
        opened = data.open_task(name, Path(root))
    except data.DataError as error:
        raise SystemExit(str(error)) from None
    if dist.is_initialized() and RANK == 0:
        dist.barrier()
    return opened


def device_for(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def classifier(config: options.Config, info) -> SequenceClassifier:
    """Returns the model of a seed, the same on every device. Options that a layer refuses end the program."""
    torch.manual_seed(config.run.seed)
    with warnings.catch_warnings():
        # LongConv's published settings squash most taps from the start, and it warns of that.
        warnings.filterwarnings("ignore", message="LongConvKernel: lam=")
        try:
            return SequenceClassifier(
                config.layer,
                config.model,
                config.kernel,
                classes=info.classes,
                l_max=info.l_max,
                channels=info.channels,
                vocab=info.vocab,
                pair=info.pair,
            )
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{config.task}, {config.layer}: {error}") from None


# ---- what run.json says ----


def describe(config, info, splits, model, schedule: Schedule, recipe, device) -> dict:
    """Returns what run.json says of a run from its start."""
    threads = torch.get_num_threads()
    name = f"{processor()['model name']}, {plural(threads, 'thread')}"
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
        "context": config.parallel.context,
        "threads": threads,
        "seqconv": seqconv.__version__,
        "commit": git("rev-parse", "HEAD") or None,
        "torch": torch.__version__,
        "lightning": versions(["lightning"])["lightning"],
        "python": platform.python_version(),
    }


def changed(config: options.Config, recipe) -> dict:
    """Returns the options that differ from the recipe."""
    given = {group: asdict(getattr(recipe, group)) for group in ("model", "kernel", "optim")}
    return {
        f"{group}.{name}": value
        for group, values in given.items()
        for name, value in asdict(getattr(config, group)).items()
        if value != values[name]
    }


def fingerprint(info, splits) -> str:
    """Returns a digest that changes with the samples of a task, or with their order."""
    digest = hashlib.sha256(f"{info.vocab} {info.channels} {info.l_max}".encode())
    for name, split in splits.items():
        some = np.linspace(0, len(split) - 1, min(64, len(split))).astype(int)
        digest.update(f"{name} {len(split)}".encode())
        for part in (split.labels, split.lengths, split.batch(some)[0]):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def operator(model: SequenceClassifier, info, batch: int, device: torch.device) -> str:
    """Returns how the layers' convolutions are carried out."""
    layer = model.layers[0]
    width, heads = layer.d_model, getattr(layer, "heads", 1)
    if isinstance(layer, seqconv.ButterflyConv):
        points = f"{2 * info.l_max} points or the next power of two"
        return f"{device.type}: learned butterfly of {points}"
    u = torch.zeros(1, 1, 1, device=device).expand(batch, info.l_max, width)
    k = torch.zeros(1, 1, 1, device=device).expand(heads, width, info.l_max)
    rev = k if getattr(layer, "bidirectional", False) else None
    return str(seqconv.explain(u, k, k_rev=rev, layout="blh"))


def config_yaml(config: options.Config) -> str:
    """Returns what --config reads."""
    values = asdict(config)
    values |= values.pop("run")
    # These say where and how the run was made, which the next run decides for itself.
    for name in ("resume", "overwrite", "stop_after", "stop_minutes"):
        del values[name]
    values["out"] = config.out
    return yaml.safe_dump(values, sort_keys=False)


def announce(facts: dict, config: options.Config, schedule: Schedule, notes) -> None:
    samples = facts["samples"]
    for note in notes:  # before any accuracy is shown beside a published one
        plain.print(f"{facts['task']}: {note}")
    share = facts["context"]
    divided = f"; {share} processes divide the steps of each sample" if share > 1 else ""
    plain.print(
        f"{facts['task']}, {facts['layer']}: {facts['parameters']:,} parameters, {samples['train']:,} samples to "
        f"learn, {samples['val']:,} to validate, {samples['test']:,} to test; {facts['operator']}{divided}"
    )
    published = f", published {facts['published']}%" if facts["published"] else ""
    generated = " Generated data, not the published set." if facts["generated"] else ""
    plain.print(
        f"{schedule.steps:,} steps, {schedule.share:.1%} of the recipe's; chance {facts['chance']:.1%}, "
        f"majority {facts['majority']:.1%}{published}.{generated} Writing to {config.out}."
    )


# ---- a finished run ----


def reopen(run: Path, checkpoint: str | None = None, data: str | None = None):
    """Returns (config, info, splits, the model as it began, the model with the weights of the checkpoint).

    checkpoint: best.ckpt or last.ckpt; None for the one that was tested. data: None for the run's folder.
    """
    try:
        facts = json.loads((run / "run.json").read_text())
        if checkpoint is None:
            result = run / "result.json"
            used = json.loads(result.read_text()).get("checkpoint") if result.exists() else None
            checkpoint = f"{used or 'best'}.ckpt"
    except (OSError, ValueError) as error:
        raise SystemExit(f"{run} holds no run: {error}") from None
    state = load_checkpoint(run / checkpoint, "{path} is no checkpoint: {reason}")
    config = options.from_dict(facts["config"])
    info, splits = open_task(config.task, data or config.run.data)
    initial, model = classifier(config, info), classifier(config, info)
    weights = state.get("model") or {
        name.removeprefix("model."): value
        for name, value in state["state_dict"].items()
        if name.startswith("model.")
    }
    model.load_state_dict(weights)
    return config, info, splits, initial, model


def load_checkpoint(path: Path, message: str) -> dict:
    """Returns what a checkpoint holds. One that cannot be read ends the program with the message, into which its
    path and the reason are put."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise SystemExit(message.format(path=path, reason=reason)) from None


def evaluate(
    run: Path,
    split: str,
    checkpoint: str | None,
    data: str | None,
    batch: int | None,
    device: str = "auto",
    rate: int = 1,
    told: int = 1,
) -> dict:
    """Prints the accuracy of a run's checkpoint on a split, and returns it with what it is of. rate: every so many-th
    step is read. told: the layers have the kernels of samples that are read so."""
    config, info, splits, _, model = reopen(run, checkpoint, data)
    if split not in splits:
        raise SystemExit(f"--split: {split!r} is none of {', '.join(splits)}")
    if rate > 1 and not (
        info.channels and all(getattr(x, "resamples", False) for x in model.layers)
    ):
        text = "tokens" if not info.channels else f"{config.layer}, whose taps have no time scale"
        raise SystemExit(f"--rate must be 1 for {text}, got {max(rate, told)}")
    device = device_for(device)
    model.to(device).eval()
    model.rate = float(told)
    size = batch or config.optim.batch
    batches = EvalBatches(splits[split], batch=size, packed=config.run.packed and rate == 1)
    hits = 0
    with torch.no_grad():
        for samples in (thinned(b, rate).to(device) for b in batches):
            hits += (model(*samples.inputs).argmax(1) == samples.labels).sum().item()
    accuracy = hits / len(splits[split])
    thin = f" at 1/{rate} of the rate" if rate > 1 else ""
    thin += f", with kernels of 1/{told}" if told != rate else ""
    plain.print(
        f"{config.task}, {config.layer}, seed {config.run.seed}: {split} accuracy{thin} {accuracy:.2%} "
        f"({levels(info.chance, info.majority, info.generated)})"
    )
    run_facts = {"task": config.task, "layer": config.layer, "seed": config.run.seed}
    return run_facts | {"split": split, "rate": rate, "told": told, "accuracy": accuracy}
