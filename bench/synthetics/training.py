"""Training on a task, with a checkpoint after every tenth of it, from which a run goes on as if it had not stopped."""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import seqconv
from bench import files
from bench.language import model as language
from bench.synthetics.tasks import TASKS, UNASKED, samples
from seqconv.optim import param_groups

WIDTH, DEPTH, BATCH, LR, WEIGHT_DECAY = 32, 2, 32, 5e-4, 0.1
TWO_SIDED = "s4d-two-sided"  # the control, which does see the future
LAYERS = ("s4d", "long_conv", "sgconv", "hyena", TWO_SIDED)


def made(layer: str, task) -> language.LanguageModel:
    shape = WIDTH, DEPTH, task.length
    found = language.LanguageModel("s4d" if layer == TWO_SIDED else layer, *shape, vocab=task.vocab)
    if layer == TWO_SIDED:
        for block in found.blocks:
            block.layer = seqconv.S4D(WIDTH, bidirectional=True)
    return found


def share(step: int, steps: int, cosine: bool) -> float:
    """The learning rate over the highest one: it rises for a tenth of the steps, then falls."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    left = (steps - step) / max(1, steps - rise)
    return 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * left)) if cosine else left


class Run:
    """One task, layer and seed. The model, the samples and their order depend on the seed alone."""

    def __init__(self, task: str, layer: str, seed: int, epochs: int | None, folder: Path):
        self.name, self.task, self.layer, self.seed = task, TASKS[task], layer, seed
        self.epochs = self.task.epochs if epochs is None else epochs
        splits = samples(self.task, seed)
        self.train, self.test = (
            tuple(torch.from_numpy(t) for t in splits[split]) for split in ("train", "test")
        )
        torch.manual_seed(seed)
        self.model = made(layer, self.task)
        groups = param_groups(self.model, lr=LR, weight_decay=WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups)
        self.per_epoch = len(self.train[0]) // BATCH
        steps = self.epochs * self.per_epoch
        factor = lambda step: share(step, steps, self.task.cosine)  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.epoch, self.seconds = 0, 0.0
        self.path = folder / f"{task}-{layer}-{seed}-{self.epochs}.ckpt"
        if self.path.exists():
            self._load()

    def _parts(self) -> tuple:
        return self.model, self.optimizer, self.schedule

    def save(self) -> None:
        kept = {"epoch": self.epoch, "seconds": self.seconds}
        kept["parts"] = [part.state_dict() for part in self._parts()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.atomically(self.path, lambda file: torch.save(kept, file))

    def _load(self) -> None:
        kept = torch.load(self.path, weights_only=True)
        for part, state in zip(self._parts(), kept["parts"], strict=True):
            part.load_state_dict(state)
        self.epoch, self.seconds = kept["epoch"], kept["seconds"]

    def run(self, done=lambda epoch, epochs: None) -> dict:
        """Trains to the end, and returns the result: accuracies in percent."""
        tokens, targets = self.train
        while self.epoch < self.epochs:
            start = time.perf_counter()
            self.model.train()
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
            order = torch.randperm(len(tokens), generator=generator)
            for i in range(self.per_epoch):
                chosen = order[i * BATCH : (i + 1) * BATCH]
                loss = loss_of(self.model(tokens[chosen]), targets[chosen])
                if not loss.isfinite():
                    raise SystemExit(f"{self.name}, {self.layer}: the loss is {loss.item()}")
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
            self.epoch += 1
            self.seconds += time.perf_counter() - start
            if self.epoch % max(1, self.epochs // 10) == 0:
                self.save()
            done(self.epoch, self.epochs)
        count = len(self.test[0])
        return {
            "task": self.name,
            "layer": self.layer,
            "seed": self.seed,
            "epochs": self.epochs,
            "accuracy": accuracy(self.model, *self.test),
            "train_accuracy": accuracy(self.model, tokens[:count], targets[:count]),
            "seconds": round(self.seconds, 1),
        }


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=UNASKED)


def accuracy(model: language.LanguageModel, tokens: Tensor, targets: Tensor) -> float:
    """In percent of the tokens that are asked for."""
    model.eval()
    asked = targets != UNASKED
    with torch.no_grad():
        right = [
            (model(x).argmax(-1) == y)[a]
            for x, y, a in zip(tokens.split(256), targets.split(256), asked.split(256), strict=True)
        ]
    return 100 * torch.cat(right).float().mean().item()
