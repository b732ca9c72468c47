"""Trains a two-layer classifier on 5,000 handwritten digits, each read as a sequence of 784 pixels, on the CPU.

python -m bench.demo [--layer s4d | long_conv] [--resume]

Writes metrics.csv, curve.png, kernels.png, versions.json and checkpoint.pt to the run folder.
Ctrl-C leaves a checkpoint from which --resume continues to the very weights of an uninterrupted
run.
"""

import argparse
import csv
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import seqconv
from bench.lra.data import DataError, packaged
from bench.plots import plot_curve, plot_kernels
from seqconv import S4D, LongConv, param_groups, reference
from seqconv._layer import KernelGenerator

WIDTH, DEPTH, LENGTH, BATCH = 32, 2, 784, 16
CLASSES = 10
LR, WEIGHT_DECAY, WARMUP = 1e-2, 0.01, 200
LAYERS = {
    "s4d": lambda: S4D(WIDTH),
    "long_conv": lambda: LongConv(WIDTH, l_max=LENGTH),
}
console = Console(highlight=False, soft_wrap=True)


def load(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs (4000, 784, 1) in [-1, 1] and labels (4000,); the same of 1,000 held-out digits.

    The split is stratified, 400 and 100 of each digit, and fixed by the seed.
    """
    try:
        pixels, labels = packaged.mnist5k_table(seed)
    except DataError as error:
        raise SystemExit(str(error)) from None
    held = torch.from_numpy(packaged.stratified(labels, 0.2) == 0)
    x, y = torch.from_numpy(pixels / np.float32(127.5) - 1).unsqueeze(-1), torch.from_numpy(labels)
    return x[~held], y[~held], x[held], y[held]


class Classifier(nn.Module):
    """Linear encoder, DEPTH x (layer, residual, LayerNorm), mean over time, linear decoder."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.encoder = nn.Linear(1, WIDTH)
        self.layers = nn.ModuleList(make() for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))
        self.decoder = nn.Linear(WIDTH, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.features(x).mean(1))


def kernels(model: Classifier) -> list[Tensor]:
    """Each layer's kernel (channels, length), without dropout."""
    model.eval()
    generators = [
        next(m for m in layer.modules() if isinstance(m, KernelGenerator)) for layer in model.layers
    ]
    with torch.no_grad():
        return [generator(LENGTH)[0] for generator in generators]


class Run:
    """Everything that a checkpoint restores."""

    def __init__(self, config: dict, layers: dict[str, Callable] = LAYERS):
        self.config = config
        torch.manual_seed(config["seed"])
        self.model = Classifier(layers[config["layer"]])
        self.initial_kernels = kernels(self.model)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, LR, WEIGHT_DECAY))
        self.step = 0
        self.rows: list[dict] = []
        self.seconds = 0.0
        self.loss = self.accuracy = math.nan  # running means over the last steps

    def save(self, path: Path) -> None:
        state = {
            "config": self.config,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "seconds": self.seconds,
            "means": (self.loss, self.accuracy),
            "rng": torch.get_rng_state(),
        }
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise SystemExit(f"--resume: {path} cannot be read: {error!r}") from None
        changed = [key for key in self.config if state["config"].get(key) != self.config[key]]
        if changed:
            what = ", ".join(
                f"{key} was {state['config'].get(key)!r}, now {self.config[key]!r}"
                for key in changed
            )
            raise SystemExit(f"--resume: {path} belongs to another run: {what}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows, self.seconds = state["step"], state["rows"], state["seconds"]
        self.loss, self.accuracy = state["means"]
        torch.set_rng_state(state["rng"])


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / total))


def running(mean: float, value: float) -> float:
    return value if math.isnan(mean) else 0.95 * mean + 0.05 * value


def train_step(run: Run, x: Tensor, y: Tensor, total: int) -> None:
    for group in run.optimizer.param_groups:
        base = group.setdefault("base_lr", group["lr"])
        group["lr"] = base * learning_rate_factor(run.step, total)
    logits = run.model(x)
    loss = F.cross_entropy(logits, y)
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    run.step += 1
    run.loss = running(run.loss, loss.item())
    run.accuracy = running(run.accuracy, (logits.argmax(1) == y).float().mean().item())


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    hits = sum(
        (model(part).argmax(1) == truth).sum().item()
        for part, truth in zip(x.split(100), y.split(100), strict=True)
    )
    model.train()
    return hits / len(y)


@contextmanager
def stop_on_interrupt():
    """Yields a list that becomes non-empty on the first Ctrl-C; a second one interrupts at once."""
    asked: list[int] = []

    def handler(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


def train(run: Run, data, out: Path, epochs: int, stop_after: float) -> bool:
    """Runs to the end of the schedule; False if stopped before, by Ctrl-C or after `stop_after` steps."""
    x, y, x_held, y_held = data
    per_epoch = len(x) // BATCH
    total = epochs * per_epoch
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(None),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}"),
        TextColumn("{task.fields[rate]:.0f} sequences/s"),
        TimeRemainingColumn(),
    )
    rate = math.nan
    with Progress(*columns, console=console) as progress, stop_on_interrupt() as interrupted:
        shown = {
            "epoch": run.step // per_epoch + 1,
            "loss": run.loss,
            "accuracy": run.accuracy,
            "rate": rate,
        }
        task = progress.add_task("", total=total, completed=run.step, **shown)
        run.model.train()
        while run.step < total:
            epoch, index = divmod(run.step, per_epoch)
            order = torch.randperm(
                len(x), generator=torch.Generator().manual_seed(1000 * run.config["seed"] + epoch)
            )
            for i in range(index, per_epoch):
                start = time.perf_counter()
                batch = order[i * BATCH : (i + 1) * BATCH]
                train_step(run, x[batch], y[batch], total)
                elapsed = time.perf_counter() - start
                run.seconds += elapsed
                rate = running(rate, BATCH / elapsed)
                shown = {
                    "epoch": epoch + 1,
                    "loss": run.loss,
                    "accuracy": run.accuracy,
                    "rate": rate,
                }
                progress.update(task, completed=run.step, **shown)
                if interrupted or run.step >= stop_after:
                    break
            if run.step % per_epoch == 0:
                held = accuracy(run.model, x_held, y_held)
                row = {
                    "epoch": epoch + 1,
                    "step": run.step,
                    "loss": run.loss,
                    "accuracy": run.accuracy,
                    "held_out": held,
                }
                run.rows.append(row | {"seconds": run.seconds, "sequences_per_second": rate})
                write_metrics(run.rows, out / "metrics.csv")
                console.print(
                    f"epoch {epoch + 1}/{epochs}  loss {run.loss:.3f}  accuracy {run.accuracy:.1%}  "
                    f"held-out {held:.1%}  {rate:.0f} sequences/s  {run.seconds:.0f} s"
                )
            stopped = run.step < total and (interrupted or run.step >= stop_after)
            if stopped or run.step % per_epoch == 0:
                run.save(out / "checkpoint.pt")
            if stopped:
                return False
    return True


def write_metrics(rows: list[dict], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def versions(model: nn.Module) -> dict:
    u, k = torch.zeros(BATCH, LENGTH, WIDTH), torch.zeros(1, WIDTH, LENGTH)
    try:
        command = ["git", "rev-parse", "HEAD"]
        folder = Path(__file__).parent
        commit = subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return {
        "seqconv": seqconv.__version__,
        "commit": commit or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "operator": str(seqconv.explain(u, k, layout="blh")),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def compare_step(run: Run, data, rounds: int) -> None:
    """Times one training step with seqconv's operator and with the torch.fft formulation, A B A B."""
    x, y = data[0][:BATCH], data[1][:BATCH]
    model = run.model
    model.eval()  # no dropout: both must compute the same

    def step(formulation) -> tuple[float, list[Tensor]]:
        with mock.patch("seqconv._layer.fftconv", formulation):
            start = time.perf_counter()
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            return time.perf_counter() - start, [p.grad for p in model.parameters()]

    contenders = (seqconv.fftconv, reference.fftconv_fft)
    ours, theirs = (step(f)[1] for f in contenders)
    worst = max(
        ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
        for a, b in zip(ours, theirs, strict=True)
    )
    if not worst < 1e-3:
        raise SystemExit(
            f"gradients differ by {worst:.1e} (relative L2) between the two operators: no time is shown"
        )
    times = [[step(f)[0] for f in contenders] for _ in range(rounds)]
    fast, slow = (1e3 * median(t[i] for t in times) for i in range(2))
    ratio = median(t[1] / t[0] for t in times)
    console.print(
        f"one training step (forward and backward, batch {BATCH}, {torch.get_num_threads()} threads): "
        f"seqconv {fast:.1f} ms, torch.fft {slow:.1f} ms, ratio {ratio:.2f} (median of {rounds} interleaved rounds; "
        f"gradients agree to {worst:.0e})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--layer", choices=sorted(LAYERS), default="s4d")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run folder's checkpoint"
    )
    parser.add_argument(
        "--stop-after",
        type=int,
        default=math.inf,
        metavar="STEPS",
        help="stop there, as Ctrl-C would",
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the timing at the end")
    args = parser.parse_args()
    if min(args.epochs, args.rounds, args.stop_after) < 1:
        parser.error("--epochs, --rounds and --stop-after must be >= 1")

    run = Run({"layer": args.layer, "epochs": args.epochs, "seed": args.seed})
    facts = versions(run.model)
    if "fallback" in facts["operator"]:
        raise SystemExit(
            f"The compiled CPU kernels are not in use, so this would show nothing: {facts['operator']}"
        )
    data = load()
    checkpoint = args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        if not checkpoint.exists():
            raise SystemExit(f"--resume: there is no {checkpoint}")
        run.load(checkpoint)
    (args.out / "versions.json").write_text(json.dumps(facts, indent=2) + "\n")
    console.print(
        f"{facts['parameters']} parameters, {len(data[0])} digits to learn, {len(data[2])} held out; "
        f"{facts['operator']}"
    )

    if not train(run, data, args.out, args.epochs, args.stop_after):
        console.print(
            f"Stopped at step {run.step}; the checkpoint is {checkpoint}. Continue with the same command and --resume."
        )
        raise SystemExit(130)
    held = accuracy(run.model, *data[2:])
    console.print(
        f"[bold]held-out accuracy {held:.1%}[/bold] (chance 10.0%) after {run.seconds:.0f} s of training"
    )
    plot_curve(run.rows, args.out / "curve.png")
    plot_kernels(run.initial_kernels, kernels(run.model), args.layer, args.out / "kernels.png")
    compare_step(run, data, args.rounds)
    console.print(
        f"Written to {args.out}: " + ", ".join(sorted(p.name for p in args.out.iterdir()))
    )


if __name__ == "__main__":
    main()
