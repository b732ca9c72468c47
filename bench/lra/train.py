"""Trains and evaluates one run with Lightning."""

import copy
import json
import os
import pickle
import platform
import statistics
import subprocess
import time
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

import seqconv
from bench.lra import files, options, pictures, plan, recipes
from bench.lra.batches import EvalBatches, TrainBatches, same, tensors
from bench.lra.compare import compare_step, synchronize
from bench.lra.journal import Diverged, Journal, Stopped, console, peak_mib
from bench.lra.model import SequenceClassifier, loss_of
from bench.lra.quiet import (
    MeanMetric,
    MulticlassAccuracy,
    TensorBoardLogger,
    TorchCheckpointIO,
    WandbLogger,
    lightning,
    quiet,
)

WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))


class Training(lightning.LightningModule):
    """The steps; `window` and `evaluated` give mean loss and accuracy over all processes and start anew."""

    def __init__(self, model: SequenceClassifier, classes: int, optim: options.Optim, plan):
        super().__init__()
        self.model, self.optim, self.plan = model, optim, plan
        for split in ("train", "eval"):
            accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
            self.add_module(f"{split}_accuracy", accuracy)
            self.add_module(f"{split}_loss", MeanMetric(nan_strategy="disable"))
        self.resumed = None  # what this process goes on with

    def _step(self, batch, split: str):
        x, lengths, labels = batch
        logits = self.model(x, lengths)
        loss = loss_of(logits, labels)
        getattr(self, f"{split}_accuracy").update(logits.detach(), labels)
        getattr(self, f"{split}_loss").update(loss.detach(), len(labels))
        return loss

    def training_step(self, batch, index):
        return self._step(batch, "train")

    def validation_step(self, batch, index):
        self._step(batch, "eval")

    test_step = validation_step

    def _means(self, split: str) -> tuple[float, float]:
        metrics = getattr(self, f"{split}_loss"), getattr(self, f"{split}_accuracy")
        with warnings.catch_warnings():
            # A process may have had no sample, or have resumed at the end of a window.
            warnings.simplefilter("ignore")
            values = tuple(metric.compute().item() for metric in metrics)
        for metric in metrics:
            metric.reset()
        return values

    def window(self) -> tuple[float, float]:
        return self._means("train")

    def evaluated(self) -> tuple[float, float]:
        return self._means("eval")

    def configure_optimizers(self):
        groups = seqconv.param_groups(self.model, self.optim.lr, self.optim.weight_decay)
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.plan.factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # ---- random numbers and running means go on where they were, in every process ----

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        for name in ("train_loss", "train_accuracy"):
            state[name] = {k: v.cpu() for k, v in getattr(self, name).metric_state.items()}
        states = [state]
        if self.trainer.world_size > 1:
            states = [None] * self.trainer.world_size
            dist.all_gather_object(states, state)
        checkpoint["processes"] = states

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        states = checkpoint["processes"]
        # With another number of processes there is nothing to go on with.
        self.resumed = states[RANK] if len(states) == WORLD else None

    def on_train_batch_start(self, batch, index) -> None:
        if self.resumed is None:
            return
        state, self.resumed = self.resumed, None
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        for name in ("train_loss", "train_accuracy"):
            for key, value in state[name].items():
                setattr(getattr(self, name), key, value.to(self.device))


class AtomicCheckpoints(TorchCheckpointIO):
    """Whole or not at all, on the disk before the old one is gone; plain tensors and numbers only."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        files.atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path, map_location="cpu", weights_only=True):
        return torch.load(path, map_location="cpu", weights_only=True)


def open_task(name: str, root: str):
    """Info and splits; a data set that is missing ends the program with the loader's message."""
    from bench.lra import data

    if WORLD > 1 and RANK > 0:
        dist.barrier()  # the first process packs, the others open
    try:
        opened = data.open_task(name, Path(root))
    except data.DataError as error:
        raise SystemExit(str(error)) from None
    if WORLD > 1 and RANK == 0:
        dist.barrier()
    return opened


def device_for(config: options.Config) -> torch.device:
    wanted = config.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def classifier(config: options.Config, info) -> SequenceClassifier:
    """The model of a seed, the same on every device."""
    torch.manual_seed(config.run.seed)
    with warnings.catch_warnings():
        # LongConv's published settings squash most taps from the start, and it warns of that.
        warnings.filterwarnings("ignore", message="LongConvKernel: lam=")
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


def measure(model, config, splits, device: torch.device) -> plan.Timing:
    """Times a few steps and evaluation batches of a copy; no random number is drawn from the run's."""
    model = copy.deepcopy(model).to(device)
    optim = config.optim
    part = max(1, optim.batch // optim.accumulate // WORLD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    rng = torch.Generator().manual_seed(0)

    def seconds(split, train: bool, repeats: int) -> float:
        found = []
        for _ in range(repeats + 2):
            indices = torch.randint(len(split), (min(part, len(split)),), generator=rng).numpy()
            start = time.perf_counter()
            x, lengths, labels = move(tensors(split, indices), device)
            with torch.autocast(device.type, *autocast(config.run.precision)):
                with torch.set_grad_enabled(train):
                    loss = loss_of(model(x, lengths), labels)
            if train:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            synchronize(device)
            found.append(time.perf_counter() - start)
        return statistics.median(found[2:])

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        step = seconds(splits["train"], True, 10) * optim.accumulate
        model.eval()
        per_batch = seconds(splits["val"], False, 3)
    per_sample = per_batch / (part * WORLD)
    return plan.Timing(step, len(splits["val"]) * per_sample, len(splits["test"]) * per_sample)


def autocast(precision: str) -> tuple[torch.dtype, bool]:
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return half.get(precision, torch.bfloat16), precision in half


def move(batch, device: torch.device):
    return tuple(None if part is None else part.to(device) for part in batch)


def together(make):
    """The first process's value on all of them."""
    box = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def config_yaml(config: options.Config) -> str:
    """What --config reads."""
    values = asdict(config)
    values |= values.pop("run")
    # Where and how, not what: for the next run to say.
    for name in ("resume", "overwrite", "stop_after", "stop_minutes"):
        del values[name]
    values["out"] = config.out
    return yaml.safe_dump(values, sort_keys=False)


def prepare(config: options.Config, out: Path) -> dict | None:
    """The checkpoint to go on from, after checking that it is this run's; None for a new run."""
    last = out / "last.ckpt"
    if not config.run.resume:
        if (out / "run.json").exists() and not config.run.overwrite:
            text = f"{out} holds a run: --resume continues it, --overwrite starts anew"
            raise SystemExit(f"{text}, --out names another folder")
        for old in ("last.ckpt", "best.ckpt", "result.json", "metrics.csv", "run.json"):
            (out / old).unlink(missing_ok=True)
        return None
    if not last.exists():
        raise SystemExit(f"--resume: there is no {last}")
    try:
        state = torch.load(last, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise SystemExit(f"--resume: {last} cannot be read: {error!r}") from None
    was, now = state["identity"], config.identity()
    changed = [f"{k} was {was.get(k)!r}, now {now[k]!r}" for k in now if was.get(k) != now[k]]
    if changed:
        raise SystemExit(f"--resume: {last} belongs to another run: {', '.join(changed)}")
    return state


def fit(config: options.Config) -> dict:
    """Trains to the end of the schedule and tests the checkpoint that is best in validation, or the last one
    where validation has no split of its own; returns what result.json holds."""
    if config.run.wandb and find_spec("wandb") is None:
        raise SystemExit("--wandb: wandb is not installed: pip install wandb")
    device = device_for(config)
    if WORLD == 1:
        return _fit(config, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        return _fit(config, device)
    finally:
        # Gloo's threads abort a process that ends while they run.
        dist.destroy_process_group()


def _fit(config: options.Config, device: torch.device) -> dict:
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    info, splits = open_task(config.task, config.run.data)
    if config.optim.batch > len(splits["train"]):
        most = len(splits["train"])
        raise SystemExit(
            f"--optim.batch must be at most {most}, the samples, got {config.optim.batch}"
        )
    recipe = recipes.recipe(config.task, config.layer)
    state = prepare(config, out) if RANK == 0 else None
    state = together(lambda: state and {k: state[k] for k in ("identity", "plan", "global_step")})
    model = classifier(config, info)
    initial = model.kernels(info.l_max) if RANK == 0 else None

    def planned() -> dict:
        timing = measure(model, config, splits, device) if config.run.max_minutes else None
        return asdict(plan.make(config, len(splits["train"]), recipe.optim.epochs, timing))

    schedule = plan.Plan(**(state["plan"] if state else together(planned)))
    facts = describe(config, info, splits, model, schedule, recipe, device)
    if config.run.compare and "fallback" in facts["operator"]:
        text = "The compiled kernels are not in use, so --compare would show nothing"
        raise SystemExit(f"{text}: {facts['operator']}")
    if RANK == 0:
        files.write_text(out / "config.yaml", config_yaml(config))
        files.write_json(out / "run.json", facts)
        announce(facts, config, schedule)

    per_epoch = len(splits["train"]) // config.optim.batch
    accumulate = config.optim.accumulate
    shares = {"rank": RANK, "world": WORLD, "pin": device.type == "cuda"}
    batches = TrainBatches(
        splits["train"],
        batch=config.optim.batch,
        period=schedule.period,
        seed=config.run.seed,
        accumulate=accumulate,
        **shares,
    )
    part = config.optim.batch // accumulate
    held_out = {s: EvalBatches(splits[s], batch=part, **shares) for s in ("val", "test")}
    training = Training(model, info.classes, config.optim, schedule)
    journal = Journal(config, schedule, info, batches, out, per_epoch)
    checkpoint = {"identity": config.identity(), "plan": asdict(schedule)}
    trainer = make_trainer(config, out, device, schedule, [journal, Stamp(checkpoint)], state)
    torch.manual_seed((config.run.seed << 16) + RANK + 1)  # of dropout
    result = facts | {"status": "done"}
    journal.listen()
    try:
        with quiet():
            last = out / "last.ckpt" if state else None
            trainer.fit(training, batches, held_out["val"], ckpt_path=last)
    except Stopped:
        journal.close()
        if RANK == 0:
            console.print(
                f"Stopped at step {trainer.global_step}; the checkpoint is {out / 'last.ckpt'}. "
                "Continue with the same command and --resume."
            )
        raise SystemExit(130) from None
    except Diverged as error:
        result |= {"status": "diverged", "error": str(error), "test_accuracy": None}
    finally:
        journal.close()
        journal.unlisten()
    result |= {"best_step": journal.best_step, "seconds": journal.seconds}
    result |= {"steps": trainer.global_step, "peak_mib": peak_mib(device)}
    if journal.rows:
        evaluated = [r for r in journal.rows if "val_accuracy" in r]
        rates = [r["sequences_per_second"] for r in journal.rows]
        result["sequences_per_second"] = statistics.median(rates)
        result["waiting"] = statistics.median(r["waiting"] for r in journal.rows)
        result["val_accuracy"] = evaluated[-1]["val_accuracy"] if evaluated else None
        result["best_val_accuracy"] = journal.best if evaluated else None
    if result["status"] == "done":
        # Chosen by a split of its own only: Text's validation split is its test split, and the small
        # UCR sets have none.
        twin = next((s for s in ("test", "train") if same(splits["val"], splits[s])), None)
        result |= {"checkpoint": "last" if twin else "best", "validation_is": twin}
        if twin is None:
            best = torch.load(out / "best.ckpt", map_location=device, weights_only=True)
            model.load_state_dict(best["model"])
        with quiet():
            trainer.test(training, held_out["test"], verbose=False)
        result["test_loss"], result["test_accuracy"] = training.evaluated()
    if RANK == 0:
        finish(config, result, model, initial, info, recipe, splits, journal.rows, out, device)
    if result["status"] != "done":
        raise SystemExit(1)
    return result


class Stamp(lightning.Callback):
    """Puts what identifies the run into its checkpoints."""

    def __init__(self, values: dict):
        self.values = values

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        checkpoint |= self.values


def make_trainer(config, out: Path, device, schedule, callbacks, state) -> lightning.Trainer:
    purge = {"purge_step": state["global_step"]} if state else {}
    loggers = [TensorBoardLogger(out, name="", version="tensorboard", **purge)]
    if config.run.wandb:
        loggers.append(WandbLogger(project=config.run.wandb, name=out.name, save_dir=out))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
    return lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=local,
        num_nodes=WORLD // local,
        strategy="ddp" if WORLD > 1 else "auto",
        precision=config.run.precision,
        max_epochs=schedule.steps // schedule.period,
        accumulate_grad_batches=config.optim.accumulate,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpoints()],
        default_root_dir=out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        log_every_n_steps=1,
    )


def describe(config, info, splits, model, schedule, recipe, device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
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
        "samples": {name: len(split) for name, split in splits.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "operator": operator(model, info, config.optim.batch // config.optim.accumulate, device),
        "device": name,
        "processes": WORLD,
        "threads": torch.get_num_threads(),
        "seqconv": seqconv.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def announce(facts: dict, config: options.Config, schedule: plan.Plan) -> None:
    samples = facts["samples"]
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


def finish(config, result, model, initial, info, recipe, splits, rows, out, device) -> None:
    """Pictures, the comparison with torch.fft, result.json and the last lines."""
    title = f"{config.task}, {config.layer}"
    if rows:
        pictures.plot_curves(rows, info, recipe.published, title, out / "curves.png")
    if result["status"] != "done":
        files.write_json(out / "result.json", result)
        console.print(f"[bold]failed[/bold]: {result['error']}")
        return
    from bench.plots import plot_kernels

    model = model.to(device)
    plot_kernels(initial, model.kernels(info.l_max), config.layer, out / "kernels.png")
    when = f"at step {result['best_step']}, the best in validation,"
    if result["checkpoint"] == "last":
        when = f"at the last step, as the validation split is the {result['validation_is']} split,"
    console.print(
        f"[bold]test accuracy {result['test_accuracy']:.1%}[/bold] (chance {info.chance:.1%}, majority "
        f"{info.majority:.1%}) {when} after {result['seconds']:.0f} s"
    )
    if config.run.compare:
        part = config.optim.batch // config.optim.accumulate
        batch = move(tensors(splits["train"], torch.arange(part).numpy()), device)
        try:
            result["compared"] = times = compare_step(model, batch, config.run.compare)
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
        console.print(
            f"one training step (forward and backward, batch {part}, {torch.get_num_threads()} threads): "
            f"seqconv {times['seqconv']:.1f} ms, torch.fft {times['torch.fft']:.1f} ms, ratio {times['ratio']:.2f} "
            f"(median of {config.run.compare} interleaved rounds; gradients agree to {times['difference']:.0e})"
        )
    files.write_json(out / "result.json", result)
    console.print(f"Written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))


def evaluate(
    run: str, split: str, checkpoint: str | None, data: str | None, batch: int | None
) -> float:
    """Prints and returns the accuracy of a run's checkpoint on a split."""
    out = Path(run)
    try:
        facts = json.loads((out / "run.json").read_text())
        if checkpoint is None:
            result = out / "result.json"
            used = json.loads(result.read_text()).get("checkpoint") if result.exists() else None
            checkpoint = f"{used or 'best'}.ckpt"
        state = torch.load(out / checkpoint, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{out} is not a run with a {checkpoint}: {error}") from None
    config = options.from_dict(facts["config"])
    info, splits = open_task(config.task, data or config.run.data)
    if split not in splits:
        raise SystemExit(f"--split: {split!r} is none of {', '.join(splits)}")
    model = classifier(config, info)
    weights = state.get("model") or {
        name.removeprefix("model."): value
        for name, value in state["state_dict"].items()
        if name.startswith("model.")
    }
    model.load_state_dict(weights)
    device = device_for(config)
    model.to(device).eval()
    batches = EvalBatches(splits[split], batch=batch or config.optim.batch)
    hits = 0
    with torch.no_grad():
        for x, lengths, labels in (move(b, device) for b in batches):
            hits += (model(x, lengths).argmax(1) == labels).sum().item()
    accuracy = hits / len(splits[split])
    generated = ", generated data" if info.generated else ""
    console.print(
        f"{config.task}, {config.layer}, seed {config.run.seed}: {split} accuracy {accuracy:.2%} "
        f"(chance {info.chance:.1%}, majority {info.majority:.1%}{generated})"
    )
    return accuracy
