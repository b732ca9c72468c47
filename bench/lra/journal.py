"""What happens around the steps of a run: rows of metrics, checkpoints, the progress bar, and stopping."""

import math
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench import files
from bench.lra.module import lightning
from bench.lra.report import levels
from bench.lra.run import WORLD
from bench.lra.schedule import synchronize
from bench.terminal import plain

COLUMNS = ("step", "epoch", "seconds", "loss", "accuracy", "val_loss", "val_accuracy", "lr")
COLUMNS += ("sequences_per_second", "waiting", "peak_mib")
NEXT_BEST = "best.next.ckpt"
TOGETHER = 5  # steps after which several processes ask each other whether to stop


class Stopped(Exception):
    """A stop was asked for. The last checkpoint is complete."""


class Diverged(Exception):
    """The loss is no longer finite."""


class Journal(lightning.Callback):
    """Writes metrics.csv, last.ckpt and best.ckpt, and feeds loggers and the progress bar. Its state is in every
    checkpoint, so that a resumed run forgets the rows behind its checkpoint.

    last.ckpt is written every checkpoint_steps and after each evaluation. best.ckpt is written after an
    evaluation better than all before it, under another name until last.ckpt knows of it.
    `waiting` is the share of the time spent on waiting for data, `seconds` the time of training
    without evaluations. `saved` is called after each checkpoint.
    """

    def __init__(self, config, plan, info, batches, out: Path, per_epoch: int):
        self.config, self.plan, self.info, self.batches = config, plan, info, batches
        self.out, self.per_epoch = out, per_epoch
        self.rows: list[dict] = []
        self.seconds = 0.0
        self.best = -1.0
        self.best_step = 0
        self.asked: list[int] = []
        self.started = time.perf_counter()
        self.progress = None
        self.saved: Callable[[], None] = lambda: None

    def state_dict(self) -> dict:
        return {
            "rows": self.rows,
            "seconds": self.seconds,
            "best": self.best,
            "best_step": self.best_step,
            # Lightning restores the state of a loader only within an epoch.
            "batches": self.batches.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.rows, self.seconds = list(state["rows"]), state["seconds"]
        self.best, self.best_step = state["best"], state["best_step"]
        self.batches.load_state_dict(state["batches"])

    # ---- stopping ----

    def listen(self):
        """From now on the first Ctrl-C or SIGTERM asks for a stop. A second Ctrl-C interrupts a single process at
        once. (Several do not heed it: torchrun repeats to its processes the signal that the terminal has sent them.)"""
        self.previous = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        self._take_signals()

    def _take_signals(self) -> None:
        def handler(number, frame):
            self.asked.append(number)
            if WORLD == 1:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in self.previous:
            signal.signal(number, handler)

    def unlisten(self):
        for number, previous in self.previous.items():
            signal.signal(number, previous)

    def _stopping(self, trainer) -> bool:
        run, step = self.config.run, trainer.global_step
        late = run.stop_minutes and time.perf_counter() - self.started > 60 * run.stop_minutes
        asked = bool(late or self.asked)
        if WORLD > 1:  # all stop together, and asking the others takes time
            asked = step % TOGETHER == 0 and any_process(asked)
        return (asked or step >= (run.stop_after or math.inf)) and step < self.plan.steps

    # ---- hooks ----

    def on_fit_start(self, trainer, module) -> None:
        if trainer.is_global_zero:
            columns = (
                TextColumn("step"),
                BarColumn(None),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=plain)
            self.progress.start()
            self.bar = self.progress.add_task("", total=self.plan.steps, shown="")

    def on_train_start(self, trainer, module) -> None:
        self._take_signals()  # Lightning has just installed handlers of its own
        if self.progress:
            self.progress.update(self.bar, completed=trainer.global_step)
        self.mark = self.window = time.perf_counter()
        self.window_step, self.window_waited = trainer.global_step, self.batches.waited

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if (batch_idx + 1) % self.config.optim.accumulate:
            return
        step, now = trainer.global_step, time.perf_counter()
        self.seconds += now - self.mark
        self.mark = now
        last = step % self.plan.period == 0
        if step % self.config.run.log_steps == 0 or last:
            self._log(trainer, module, step)
        if self.progress:
            self.progress.update(self.bar, completed=step)
        if last:
            return  # the checkpoint comes after the evaluation
        stop = self._stopping(trainer)
        if stop or step % self.config.run.checkpoint_steps == 0:
            self._save(trainer)
        if stop:
            raise Stopped

    def _log(self, trainer, module, step: int) -> None:
        synchronize(module.device)
        loss, accuracy = module.window()
        elapsed = time.perf_counter() - self.window
        steps = step - self.window_step
        row = {
            "step": step,
            "epoch": step / self.per_epoch,
            "seconds": self.seconds,
            "loss": loss,
            "accuracy": accuracy,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "sequences_per_second": steps * self.config.optim.batch / elapsed,
            "waiting": (self.batches.waited - self.window_waited) / elapsed,
            "peak_mib": peak_mib(module.device),
        }
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if k != "step"}, step)
        self.window, self.window_step = time.perf_counter(), step
        self.window_waited = self.batches.waited
        if self.progress:
            shown = f"loss {loss:.3f}  accuracy {accuracy:.1%} "
            shown += f"{row['sequences_per_second']:.0f} sequences/s"
            self.progress.update(self.bar, shown=shown)
        if trainer.is_global_zero:
            files.write_csv(self.out / "metrics.csv", self.rows, COLUMNS)
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {step}")

    def on_validation_epoch_end(self, trainer, module) -> None:
        row = self.rows[-1]
        row["val_loss"], row["val_accuracy"] = module.evaluated()
        for logger in trainer.loggers:
            logger.log_metrics({k: row[k] for k in ("val_loss", "val_accuracy")}, row["step"])
        if not trainer.is_global_zero:
            return
        files.write_csv(self.out / "metrics.csv", self.rows, COLUMNS)
        if row["val_accuracy"] > self.best:
            self.best, self.best_step = row["val_accuracy"], row["step"]
            facts = {"step": row["step"], "val_accuracy": self.best}
            state = {"model": module.model.state_dict(), **facts}
            files.atomically(self.out / NEXT_BEST, lambda file: torch.save(state, file))
        beside = levels(self.info.chance, self.info.majority, self.info.generated)
        plain.print(
            f"step {row['step']}/{self.plan.steps}  epoch {row['epoch']:.1f}  loss {row['loss']:.3f}  "
            f"accuracy {row['accuracy']:.1%}  validation {row['val_accuracy']:.1%} ({beside})  "
            f"{row['sequences_per_second']:.0f} sequences/s  {self.seconds:.0f} s"
        )

    def on_train_epoch_end(self, trainer, module) -> None:
        self._save(trainer)
        if trainer.is_global_zero and (self.out / NEXT_BEST).exists():
            os.replace(self.out / NEXT_BEST, self.out / "best.ckpt")
        trainer.strategy.barrier()  # the other processes load it for the test
        if self._stopping(trainer):
            raise Stopped
        self.mark = self.window = time.perf_counter()

    def _save(self, trainer) -> None:
        trainer.save_checkpoint(self.out / "last.ckpt")
        self.saved()

    def close(self) -> None:
        if self.progress:
            self.progress.stop()

    def summary(self) -> dict:
        """Returns what result.json says of the whole run."""
        found = {"best_step": self.best_step, "seconds": self.seconds}
        if self.rows:
            accuracies = [r["val_accuracy"] for r in self.rows if "val_accuracy" in r]
            found["peak_mib"] = max(r["peak_mib"] for r in self.rows)  # also of earlier sessions
            for name in ("sequences_per_second", "waiting"):
                found[name] = statistics.median(r[name] for r in self.rows)
            found["val_accuracy"] = accuracies[-1] if accuracies else None
            found["best_val_accuracy"] = self.best if accuracies else None
        return found


def any_process(value: bool) -> bool:
    told = torch.tensor(int(value))  # on the CPU, even where gradients are on GPUs
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def peak_mib(device: torch.device) -> float:
    """Returns the most memory so far, of the GPU's tensors or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
