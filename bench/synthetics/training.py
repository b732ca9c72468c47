"""Training on a task, with a checkpoint after every tenth of it, from which a run goes on as if it had not stopped."""

import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqconv
from bench import files
from bench.language import model as language
from bench.synthetics.mixers import Attention, Mixers
from bench.synthetics.tasks import TASKS, UNASKED, Setting, Task, samples
from seqconv.optim import param_groups

TWO_SIDED, ATTENTION = "s4d-two-sided", "attention"
MAKERS = language.LAYERS | {  # name -> the layer for a width and a length
    TWO_SIDED: lambda width, length: seqconv.S4D(width, bidirectional=True),  # it sees the future
    ATTENTION: lambda width, length: Attention(width),
}
LAYERS = (*("s4d", "long_conv", "sgconv", "hyena"), TWO_SIDED, ATTENTION)


def refused(layer: str, task: Task) -> str | None:
    """Why a task has no model with that layer."""
    if layer == ATTENTION and task.setting.network:
        return f"there is no model with {ATTENTION} for it"
    return None


def made(layer: str, task: Task) -> nn.Module:
    setting = task.setting
    if not setting.network:
        attends = layer == ATTENTION  # zoology's has half as many layers, and positions
        depth = setting.depth // 2 if attends else setting.depth
        shape = setting.width, depth, task.length
        return Mixers(MAKERS[layer], *shape, vocab=task.vocab, positions=attends)
    shape = setting.width, setting.depth, task.length
    found = language.LanguageModel("s4d" if layer == TWO_SIDED else layer, *shape, vocab=task.vocab)
    if layer == TWO_SIDED:
        for block in found.blocks:
            block.layer = MAKERS[layer](setting.width, task.length)
    return found


def share(step: int, steps: int, cosine: bool, setting: Setting) -> float:
    """The learning rate over the highest one: it rises for a part of the steps, then falls."""
    rise = max(1, int(steps * setting.rise))
    if step < rise:
        return (step + 1) / rise
    left = (steps - step) / max(1, steps - rise)
    end = setting.end
    return end + (1 - end) * 0.5 * (1 - math.cos(math.pi * left)) if cosine else left


class Run:
    """One task, layer and seed. The model, the samples and their order depend on the seed and on the number of samples
    alone."""

    def __init__(
        self,
        task: str,
        layer: str,
        seed: int,
        epochs: int | None,
        folder: Path,
        lr: float | None = None,
        train: int | None = None,
    ):
        self.name, self.task, self.layer, self.seed = task, TASKS[task], layer, seed
        self.task = replace(self.task, train=train or self.task.train)
        setting = self.task.setting
        self.epochs = self.task.epochs if epochs is None else epochs
        self.lr, self.batch = lr or setting.rates[0], setting.batch
        splits = samples(self.task, seed)
        self.train, self.test = (
            tuple(torch.from_numpy(t) for t in splits[split]) for split in ("train", "test")
        )
        torch.manual_seed(seed)
        self.model = made(layer, self.task)
        groups = param_groups(self.model, lr=self.lr, weight_decay=setting.weight_decay)
        self.optimizer = torch.optim.AdamW(groups)
        self.per_epoch = len(self.train[0]) // self.batch
        steps = self.epochs * self.per_epoch
        factor = lambda step: share(step, steps, self.task.cosine, setting)  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.epoch, self.seconds = 0, 0.0
        several = f"-{self.lr:g}-{self.task.train}" if len(setting.rates) > 1 else ""
        self.path = folder / f"{task}-{layer}-{seed}-{self.epochs}{several}.ckpt"
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
                chosen = order[i * self.batch : (i + 1) * self.batch]
                loss = loss_of(self.model, tokens[chosen], targets[chosen])
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
        found = {
            "task": self.name,
            "layer": self.layer,
            "seed": self.seed,
            "epochs": self.epochs,
            "accuracy": accuracy(self.model, *self.test),
            "train_accuracy": accuracy(self.model, tokens[:count], targets[:count]),
            "seconds": round(self.seconds, 1),
        }
        if len(self.task.setting.rates) > 1:
            found |= {"lr": self.lr, "samples": self.task.train}
        return found


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    if isinstance(model, Mixers):
        asked = targets != UNASKED
        return F.cross_entropy(model(tokens, asked), targets[asked])
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=UNASKED)


def accuracy(model: nn.Module, tokens: Tensor, targets: Tensor) -> float:
    """In percent of the tokens that are asked for."""
    model.eval()
    right = []
    with torch.no_grad():
        for x, y in zip(tokens.split(256), targets.split(256), strict=True):
            asked = y != UNASKED
            logits = model(x, asked) if isinstance(model, Mixers) else model(x)[asked]
            right.append(logits.argmax(-1) == y[asked])
    return 100 * torch.cat(right).float().mean().item()
