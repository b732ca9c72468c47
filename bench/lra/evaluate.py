"""A finished run, opened again."""

import json
import pickle
from pathlib import Path

import torch

from bench.lra import options
from bench.lra.batches import EvalBatches
from bench.lra.journal import console
from bench.lra.process import classifier, device_for, move, open_task
from bench.lra.report import levels


def reopen(run: Path, checkpoint: str | None = None, data: str | None = None):
    """(config, info, splits, model as it began, model with the weights of the checkpoint: the tested ones
    unless named)."""
    try:
        facts = json.loads((run / "run.json").read_text())
        if checkpoint is None:
            result = run / "result.json"
            used = json.loads(result.read_text()).get("checkpoint") if result.exists() else None
            checkpoint = f"{used or 'best'}.ckpt"
    except (OSError, ValueError) as error:
        raise SystemExit(f"{run} holds no run: {error}") from None
    try:
        state = torch.load(run / checkpoint, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"{run / checkpoint} is no checkpoint: {reason}") from None
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


def evaluate(
    run: Path,
    split: str,
    checkpoint: str | None,
    data: str | None,
    batch: int | None,
    device: str = "auto",
) -> float:
    """Prints and returns the accuracy of a run's checkpoint on a split."""
    config, info, splits, _, model = reopen(run, checkpoint, data)
    if split not in splits:
        raise SystemExit(f"--split: {split!r} is none of {', '.join(splits)}")
    device = device_for(device)
    model.to(device).eval()
    batches = EvalBatches(splits[split], batch=batch or config.optim.batch)
    hits = 0
    with torch.no_grad():
        for x, lengths, labels in (move(b, device) for b in batches):
            hits += (model(x, lengths).argmax(1) == labels).sum().item()
    accuracy = hits / len(splits[split])
    console.print(
        f"{config.task}, {config.layer}, seed {config.run.seed}: {split} accuracy {accuracy:.2%} "
        f"({levels(info.chance, info.majority, info.generated)})"
    )
    return accuracy
