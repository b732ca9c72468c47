"""Training, with checkpoints from which it goes on as if it had not been stopped."""

import math
import time
from pathlib import Path

import torch
from rich.console import Console

from bench import files
from bench.language.corpus import digest, split, text
from bench.language.model import LanguageModel, as_tokens
from bench.terminal import plain, progress
from seqconv.optim import param_groups

CHECKPOINT = "last.ckpt"
# Without these a checkpoint is another run's.
RUN = ("layer", "width", "depth", "context", "batch", "steps", "lr", "dropout", "seed")
CHUNK = 4096  # bytes that the evaluation takes at once


class Training:
    """A run in the folder `out`. Batches and dropout are drawn by the seed and the number of the step, so that a run
    that was stopped and one that was not are the same."""

    def __init__(self, options: dict, out: Path):
        self.options, self.out = {name: options[name] for name in RUN}, out
        whole = text()
        self.digest = digest(whole)
        self.train_text, self.tail = split(whole)
        self.tokens = as_tokens(self.train_text)
        o = self.options
        torch.manual_seed(o["seed"])
        shape = (o["layer"], o["width"], o["depth"], o["context"], o["dropout"])
        self.model = LanguageModel(*shape)
        groups = param_groups(self.model, lr=o["lr"], weight_decay=0.05)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        share = lambda step: _share(step, o["steps"])  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        self.step, self.seconds, self.losses = 0, 0.0, []
        path = out / CHECKPOINT
        if path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        kept = torch.load(path, weights_only=True)
        other = [
            f"{n}={kept['options'][n]!r}" for n in RUN if kept["options"][n] != self.options[n]
        ]
        other += ["another text"] if kept["text"] != self.digest else []
        if other:
            raise SystemExit(
                f"{path} has another run, with {', '.join(other)}: choose another --out"
            )
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(kept[name])
        self.step, self.seconds, self.losses = kept["step"], kept["seconds"], kept["losses"]

    def save(self) -> None:
        parts = {n: getattr(self, n).state_dict() for n in ("model", "optimizer", "schedule")}
        facts = {"step": self.step, "seconds": self.seconds, "losses": self.losses}
        kept = {"options": self.options, "text": self.digest, **facts, **parts}
        self.out.mkdir(parents=True, exist_ok=True)
        files.atomically(self.out / CHECKPOINT, lambda file: torch.save(kept, file))

    def batch(self, step: int) -> torch.Tensor:
        """(batch, context + 1) tokens, drawn from anywhere."""
        o = self.options
        generator = torch.Generator().manual_seed(1_000_003 * o["seed"] + step)
        last = len(self.tokens) - o["context"]
        start = torch.randint(last, (o["batch"], 1), generator=generator)
        return self.tokens[start + torch.arange(o["context"] + 1)]

    def run(self, minutes: float, every: int, console: Console = plain) -> bool:
        """Trains until all steps are done or the time is up, and returns whether they are done. Writes a checkpoint
        after `every` steps and at the end."""
        o, deadline = self.options, time.perf_counter() + 60 * minutes
        self.model.train()
        with progress(console) as bar:
            task = bar.add_task("training", total=o["steps"], completed=self.step)
            while self.step < o["steps"] and time.perf_counter() < deadline:
                start = time.perf_counter()
                torch.manual_seed(1_000_003 * o["seed"] + self.step)
                loss = self.model.loss(self.batch(self.step))
                if not loss.isfinite():
                    raise SystemExit(f"the loss is {loss.item()} at step {self.step}")
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.step += 1
                self.losses.append(loss.item() / math.log(2))
                self.seconds += time.perf_counter() - start
                recent = self.losses[-20:]
                shown = f"training, {sum(recent) / len(recent):.3f} bits per byte"
                bar.update(task, completed=self.step, description=shown)
                if self.step % every == 0:
                    self.save()
        self.save()
        return self.step == o["steps"]


def _share(step: int, steps: int) -> float:
    """The learning rate over the highest one: it rises for a twentieth of the steps, and falls as a cosine."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def bits_per_byte(model: LanguageModel, before: bytes, tail: bytes) -> float:
    """Of `tail` as it follows `before`, which comes in chunks: the state carries what is past."""
    known = as_tokens(before[-max(1, model.context) :])
    tokens = torch.cat([known, as_tokens(tail)])
    model.eval()
    total = 0.0
    with torch.no_grad():
        state = model.init_state(1)
        logits, state = model.prefill(known.unsqueeze(0), state)
        last = logits[:, -1:]
        for chunk in tokens[len(known) :].unsqueeze(0).split(CHUNK, 1):
            logits, state = model.prefill(chunk, state)
            guesses = torch.cat([last, logits[:, :-1]], 1)[0]
            total += torch.nn.functional.cross_entropy(guesses, chunk[0], reduction="sum").item()
            last = logits[:, -1:]
    return total / math.log(2) / len(tail)
