"""Trains one run with Lightning, from its options to its result."""

import json
import os
import shutil
import time
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from bench import files, pictures
from bench.lra import options, recipes, schedule
from bench.lra.batches import EvalBatches, TrainBatches, same, tensors
from bench.lra.context import Context
from bench.lra.journal import NEXT_BEST, Diverged, Journal, Stopped, peak_mib
from bench.lra.module import Stamp, Training, make_trainer, quiet
from bench.lra.report import levels
from bench.lra.run import (
    RANK,
    WORLD,
    announce,
    classifier,
    config_yaml,
    describe,
    device_for,
    fingerprint,
    load_checkpoint,
    open_task,
    together,
)
from bench.terminal import plain

# Part of a run's identity, beside the fingerprint of some samples.
FILES = "the digest of the data's files"
PACKED = "run.packed"


def fit(config: options.Config) -> dict:
    """Trains to the end of the schedule and tests a checkpoint: the best in validation, or the last one where
    validation has no split of its own. Returns what result.json holds."""
    if config.run.wandb and find_spec("wandb") is None:
        raise SystemExit("--wandb: wandb is not installed: pip install wandb")
    device = device_for(config.run.device)
    if config.run.precision == "16-mixed" and device.type == "cpu":
        raise SystemExit("--precision 16-mixed needs a GPU; a CPU has bf16-mixed")
    share = config.parallel.context
    if WORLD % share:
        text = f"--parallel.context must divide the number of processes, {WORLD}, got {share}"
        raise SystemExit(
            f"{text}: torchrun --nproc_per_node={share} -m bench.lra fit ... has as many"
        )
    if WORLD == 1:
        return _fit(config, device, None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        return _fit(config, device, Context(share) if share > 1 else None)
    finally:
        # Gloo's threads abort a process that ends while they run.
        dist.destroy_process_group()


def _fit(config: options.Config, device: torch.device, context: Context | None) -> dict:
    began = time.perf_counter()
    out, optim = Path(config.out), config.optim
    info, splits = open_task(config.task, config.run.data)
    recipe = recipes.recipe(config.task, config.layer)
    samples = len(splits["train"])
    model = classifier(config, info)
    identity = config.identity() | {"data": fingerprint(info, splits), FILES: info.content}
    state = prepare(config, out, identity) if RANK == 0 else None
    state = together(lambda: state and {k: state[k] for k in ("identity", "plan", "global_step")})
    initial = model.kernels(info.l_max) if RANK == 0 else None

    share = config.parallel.context
    world = WORLD // share

    def planned() -> dict:
        timing = None
        if config.run.max_minutes:
            timing = schedule.measure(model, config, splits, device, world, context)
        whole = recipes.whole(config.task, config.layer, samples)
        plan = asdict(schedule.make(config, samples, whole, timing))
        return together(lambda: plan)

    shares = {"rank": RANK // share, "world": world, "pin": device.type == "cuda"}
    shares["packed"] = config.run.packed
    order = {"batch": optim.batch, "seed": config.run.seed, "accumulate": optim.accumulate}
    try:
        batches = TrainBatches(splits["train"], **order, **shares)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    plan = schedule.Schedule(**(state["plan"] if state else planned()))
    batches.set_period(plan.period)
    part = optim.batch // optim.accumulate
    held_out = {s: EvalBatches(splits[s], batch=part, **shares) for s in ("val", "test")}
    facts = describe(config, info, splits, model, plan, recipe, device)
    if config.run.compare and "fallback" in facts["operator"]:
        text = "The compiled kernels are not in use, so --compare would show nothing"
        raise SystemExit(f"{text}: {facts['operator']}")

    def clock() -> None:
        # A session that is killed later has lasted until its last checkpoint.
        facts["sessions"][-1]["seconds"] = time.perf_counter() - began
        files.write_json(out / "run.json", facts)

    facts["identity"] = identity
    if RANK == 0:
        if not config.run.resume:
            clear(out)
        facts["sessions"] = sessions(out, facts)
        if not state:
            clear(out)
        files.write_text(out / "config.yaml", config_yaml(config))
        clock()
        announce(facts, config, plan, info.notes)
    journal = Journal(config, plan, info, batches, out, samples // optim.batch)
    if RANK == 0:
        journal.saved = clock
    stamp = Stamp({"identity": identity, "plan": asdict(plan)})
    trainer = make_trainer(config, out, device, plan, [journal, stamp], state)
    if config.run.precision == "64-true":
        model.double()  # Lightning does so only after it has loaded a checkpoint, which would be rounded.
    if context is not None:
        context.divide(model)
    training = Training(model, info.classes, optim, plan, share)
    result = facts | learn(training, trainer, journal, held_out, splits, device, bool(state))
    if RANK == 0:
        clock()
        files.write_json(out / "result.json", result)
        if context is not None:
            # The first process goes on alone, with whole rows.
            weights = model.state_dict()
            model = classifier(config, info).to(next(iter(weights.values())).dtype)
            model.load_state_dict(weights)
        finish(config, result, model, initial, info, splits, journal, device)
    if result["status"] != "done":
        raise SystemExit(1)
    return result


def learn(training, trainer, journal, held_out, splits, device, resumed: bool) -> dict:
    """Trains and tests the model and returns the result."""
    out, seed = journal.out, journal.config.run.seed
    torch.manual_seed((seed << 16) + RANK + 1)  # of dropout
    result = {"status": "done"}
    journal.listen()
    try:
        with quiet():
            last = out / "last.ckpt" if resumed else None
            trainer.fit(training, journal.batches, held_out["val"], ckpt_path=last)
    except Stopped:
        journal.close()
        if RANK == 0:
            curves(journal)
            plain.print(
                f"Stopped at step {trainer.global_step}; the checkpoint is {out / 'last.ckpt'}. "
                "Continue with the same command and --resume."
            )
        raise SystemExit(130) from None
    except Diverged as error:
        result |= {"status": "diverged", "error": str(error), "test_accuracy": None}
    finally:
        journal.close()
        journal.unlisten()
    result |= {"steps": trainer.global_step, "peak_mib": peak_mib(device)} | journal.summary()
    if result["status"] == "done":
        result |= choose(splits, training.model, out, device)
        with quiet():
            trainer.test(training, held_out["test"], verbose=False)
        result["test_loss"], result["test_accuracy"] = training.evaluated()
    return result


def choose(splits, model, out: Path, device: torch.device) -> dict:
    """Puts the weights to be tested into the model: the best in validation, or the last ones where the validation
    split is no split of its own (Text's is its test split, and the small UCR sets have none)."""
    twin = next((s for s in ("test", "train") if same(splits["val"], splits[s])), None)
    if twin is None:
        best = torch.load(out / "best.ckpt", map_location=device, weights_only=True)
        model.load_state_dict(best["model"])
    return {"checkpoint": "last" if twin else "best", "validation_is": twin}


def prepare(config: options.Config, out: Path, identity: dict) -> dict | None:
    """Returns the checkpoint from which this run continues, after a check that it is this run's; None for a new run."""
    last = out / "last.ckpt"
    if not config.run.resume:
        if (out / "run.json").exists() and not config.run.overwrite:
            text = f"{out} holds a run: --resume continues it, --overwrite starts anew"
            raise SystemExit(f"{text}, --out names another folder")
        return None
    if not last.exists():
        if (out / "result.json").exists():
            raise SystemExit(f"--resume: {out} holds a result, but there is no {last}")
        if (out / "run.json").exists():
            same_run(json.loads((out / "run.json").read_text()).get("identity", {}), identity, out)
        plain.print(f"{out} has no checkpoint yet: starting from the beginning.")
        return None
    state = load(last)
    same_run(state["identity"], identity, last)
    step = next(s for name, s in state["callbacks"].items() if name.startswith("Journal"))[
        "best_step"
    ]
    best, newer = out / "best.ckpt", out / NEXT_BEST
    if newer.exists() and load(newer)["step"] == step:  # it ended between the two
        os.replace(newer, best)
    if step and not (best.exists() and load(best)["step"] == step):
        raise SystemExit(
            f"--resume: {last} needs the best weights so far, of step {step}, in {best}"
        )
    return state


def same_run(was: dict, identity: dict, place: Path) -> None:
    was = {FILES: identity[FILES], PACKED: False} | was  # older runs have not recorded them
    changed = options.differences(was, identity)
    if changed:
        raise SystemExit(f"--resume: {place} belongs to another run: {', '.join(changed)}")


def load(path: Path) -> dict:
    return load_checkpoint(path, "--resume: {path} cannot be read: {reason}")


def clear(out: Path) -> None:
    """Deletes the files of an earlier run."""
    out.mkdir(parents=True, exist_ok=True)
    names = "last.ckpt", "best.ckpt", NEXT_BEST, "result.json", "metrics.csv", "run.json"
    for old in (*names, "curves.png", "kernels.png"):
        (out / old).unlink(missing_ok=True)
    shutil.rmtree(out / "tensorboard", ignore_errors=True)


def sessions(out: Path, facts: dict) -> list[dict]:
    """Returns where each session of the run was computed. This one is the last."""
    earlier = out / "run.json"
    before = json.loads(earlier.read_text()).get("sessions", []) if earlier.exists() else []
    names = ("device", "processes", "context", "commit", "torch", "seqconv", "operator")
    return [*before, {name: facts[name] for name in names}]


def curves(journal: Journal) -> None:
    config = journal.config
    published = recipes.recipe(config.task, config.layer).published
    where = f"{config.task}, {config.layer}", journal.out / "curves.png"
    if journal.rows:
        pictures.plot_curves(journal.rows, journal.info, published, *where)


def finish(config, result, model, initial, info, splits, journal, device) -> None:
    """Draws pictures, compares with torch.fft, and prints the last lines."""
    out = Path(config.out)
    curves(journal)
    if result["status"] != "done":
        plain.print(f"[bold]failed[/bold]: {result['error']}")
        return
    model = model.to(device)
    kernels = initial, model.kernels(info.l_max), config.layer
    files.atomically(out / "kernels.png", partial(pictures.plot_kernels, *kernels))
    when = f"at step {result['best_step']}, the best in validation,"
    if result["checkpoint"] == "last":
        when = f"at the last step, as the validation split is the {result['validation_is']} split,"
    beside = levels(info.chance, info.majority, info.generated)
    plain.print(
        f"[bold]test accuracy {result['test_accuracy']:.1%}[/bold] ({beside}) {when} "
        f"after {result['seconds']:.0f} s"
    )
    if config.run.compare:
        part = config.optim.batch // config.optim.accumulate
        first = splits["train"], np.arange(part)
        padded = tensors(*first).to(device)
        ours = tensors(*first, packed=True).to(device) if config.run.packed else padded
        try:
            rounds = config.run.compare
            times = schedule.compare_step(model, ours, rounds, config.run.precision, padded)
        except RuntimeError as error:  # this includes a lack of memory
            result["compared"] = {"error": str(error)}
            plain.print(f"--compare failed: {error}")
        else:
            result["compared"] = times
            plain.print(
                f"one training step (with dropout and AdamW, batch {part}, {torch.get_num_threads()} threads): "
                f"seqconv {times['seqconv']:.1f} ms, torch.fft {times['torch.fft']:.1f} ms, ratio {times['ratio']:.2f} "
                f"(median of {config.run.compare} interleaved rounds; gradients agree to {times['difference']:.0e})"
            )
        files.write_json(out / "result.json", result)
    plain.print(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))
