"""The training step as Lightning wants it, the trainer, and checkpoints that hold every process's state.

Lightning and torchmetrics are imported here only, without the advice that they print.
"""

import contextlib
import logging
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import seqconv
from bench import files
from bench.lra import options
from bench.lra.model import SequenceClassifier, loss_of
from bench.lra.run import RANK, WORLD

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.fabric.plugins.io import TorchCheckpointIO
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from torchmetrics import Metric
    from torchmetrics.classification import MulticlassAccuracy

for _name in ("lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # the import sets another level


MEANS = ("train_loss", "train_accuracy")  # of the steps since the last row


@contextlib.contextmanager
def quiet():
    """Hides the warnings of these libraries. Errors, and the warnings of other libraries, come through."""
    with warnings.catch_warnings():
        for module in ("lightning", "torchmetrics", "tensorboard", "torch.utils.tensorboard"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
        for text in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*"):
            warnings.filterwarnings("ignore", message=text)
        yield


class Mean(Metric):
    """The mean over samples, in float64. (torchmetrics' own disregards the weights where it lets NaN through.)"""

    def __init__(self):
        super().__init__()
        self.set_dtype(torch.float64)
        for name in ("mean_value", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mean: torch.Tensor, count: int) -> None:
        self.mean_value += mean.double() * count
        self.weight += count

    def compute(self) -> torch.Tensor:
        return self.mean_value / self.weight


class Training(lightning.LightningModule):
    """The steps. `window` and `evaluated` return mean loss and accuracy over all processes and start anew.

    context: how many processes have the same samples, so that one of them counts them and each differentiates its
    share of their loss.
    """

    def __init__(
        self, model: SequenceClassifier, classes: int, optim: options.Optim, plan, context
    ):
        super().__init__()
        self.model, self.optim, self.plan, self.context = model, optim, plan, context
        for split in ("train", "eval"):
            accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
            self.add_module(f"{split}_accuracy", accuracy)
            self.add_module(f"{split}_loss", Mean())
        self.resumed = None  # the state from which this process continues

    def _step(self, batch, split: str):
        logits, labels = self.model(*batch.inputs), batch.labels
        loss = loss_of(logits, labels)
        if RANK % self.context == 0:
            getattr(self, f"{split}_accuracy").update(logits.detach(), labels)
            getattr(self, f"{split}_loss").update(loss.detach(), len(labels))
        return loss / self.context

    def training_step(self, batch, index):
        return self._step(batch, "train")

    def validation_step(self, batch, index):
        self._step(batch, "eval")

    test_step = validation_step

    def _means(self, split: str) -> tuple[float, float]:
        metrics = getattr(self, f"{split}_loss"), getattr(self, f"{split}_accuracy")
        with warnings.catch_warnings():
            # A process may have had no sample, or may have resumed at the end of a window.
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
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- random numbers and running means continue where they were, in every process ----

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        for name in MEANS:
            state[name] = {k: v.cpu() for k, v in getattr(self, name).metric_state.items()}
        states = [state]
        if self.trainer.world_size > 1:
            states = [None] * self.trainer.world_size
            dist.all_gather_object(states, state)
        checkpoint["processes"] = states

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        states = checkpoint["processes"]
        if len(states) == WORLD:
            self.resumed = states[RANK]
        elif RANK == 0:
            # Another number of processes has no use for their random numbers, but their sums go on in the first one.
            kept = {name: [state[name] for state in states] for name in MEANS}
            self.resumed = {n: {k: sum(s[k] for s in of) for k in of[0]} for n, of in kept.items()}

    def on_train_batch_start(self, batch, index) -> None:
        if self.resumed is None:
            return
        state, self.resumed = self.resumed, None
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        for name in MEANS:
            for key, value in state[name].items():
                setattr(getattr(self, name), key, value.to(self.device))


class AtomicCheckpoints(TorchCheckpointIO):
    """Each is whole or not there, and on the disk before the old one is gone. It holds plain tensors and numbers."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        files.atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path, map_location="cpu", weights_only=True):
        return torch.load(path, map_location="cpu", weights_only=True)


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
        options = {"name": out.name, "save_dir": out, "config": config.identity()}
        loggers.append(WandbLogger(project=config.run.wandb, **options))
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
