"""Pictures of every layer's kernels, before and after the demo's training, and of what they see.

python -m bench.gallery [--epochs 3] [--families s4d sgconv] [--out FOLDER]

Trains the demo's classifier once per family; a family whose checkpoint is in --runs is only drawn
again. One more picture compares S4D with S4, whose kernels differ and whose responses do not.
"""

import argparse
import math
from pathlib import Path

import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from bench import plots, report
from bench.demo import (
    LAYERS,
    LENGTH,
    WIDTH,
    Classifier,
    Run,
    accuracy,
    console,
    kernels,
    load,
    train,
)
from bench.hippo import hippo, kernel, response
from bench.worker import refuse_fallback
from seqconv import ButterflyConv, Hyena, SGConv

FAMILIES = LAYERS | {
    "sgconv": lambda: SGConv(WIDTH, l_max=LENGTH),
    "hyena": lambda: Hyena(WIDTH, l_max=LENGTH),
    "butterfly_conv": lambda: ButterflyConv(WIDTH, l_max=LENGTH),
}
TITLES = {
    "s4d": "S4D",
    "long_conv": "LongConv",
    "sgconv": "SGConv",
    "hyena": "Hyena",
    "butterfly_conv": "ButterflyConv (taps)",
}


def trained(family: str, epochs: int, runs: Path, data) -> Run:
    """The demo's run of this family, trained or, if it was before, loaded."""
    run = Run({"layer": family, "epochs": epochs, "seed": 0}, FAMILIES)
    out = runs / f"{family}-{epochs}"
    out.mkdir(parents=True, exist_ok=True)
    if (out / "checkpoint.pt").exists():
        run.load(out / "checkpoint.pt")
    if not train(run, data, out, epochs, math.inf):
        raise SystemExit(130)
    return run


def sensitivity(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """(length,): root mean square over the digits of the gradient of the last position's score of the
    right class with respect to the pixel at every lag."""
    model.eval()
    x = x.clone().requires_grad_()
    scores = model.decoder(model.features(x)[:, -1])
    (gradient,) = torch.autograd.grad(scores.gather(1, y[:, None]).sum(), x)
    return gradient[..., 0].square().mean(0).sqrt().flip(0)


def draw_family(family: str, args, data) -> Path:
    run = trained(family, args.epochs, args.runs, data)
    held = slice(None, None, max(1, len(data[2]) // args.digits))
    x, y = data[2][held], data[3][held]
    initial = Run(run.config, FAMILIES).model
    path = args.out / f"{family}.png"
    plots.plot_family(
        TITLES[family],
        {"initialised": run.initial_kernels, "trained": kernels(run.model)},
        {"initialised": sensitivity(initial, x, y), "trained": sensitivity(run.model, x, y)},
        f"{args.epochs} epochs of digits, {accuracy(run.model, *data[2:]):.1%} right",
        path,
    )
    return path


def apart(A: Tensor, normal: Tensor, b: Tensor) -> float:
    """Relative L2 distance of the kernels of (A, b) and (normal, b / 2), by the joint system's Gramian."""
    drive = torch.cat([b, b / 2])
    joint = torch.block_diag(A, normal).numpy()
    gram = solve_continuous_lyapunov(joint, -(drive[:, None] * drive).numpy())
    n = len(b)
    return ((gram[0, 0] - 2 * gram[0, n] + gram[n, n]) / gram[0, 0]) ** 0.5


def draw_limit(args) -> Path:
    """S4-LegS beside S4D-LegS with half of B, for growing states."""
    dt, u = 0.01, torch.sin(0.01 * torch.arange(1000).double())
    columns = []
    for size in args.states:
        A, b, normal = hippo(size)
        pairs = [(A, b), (normal, b / 2)]
        answers = [response(*pair, u, dt) for pair in pairs]
        error = ((answers[1] - answers[0]).norm() / answers[0].norm()).item()
        columns.append(
            {
                "size": size,
                "kernels": [kernel(*pair, 1500, 0.002) for pair in pairs],
                "responses": answers,
                "apart": apart(A, normal, b),
                "error": error,
            }
        )
    path = args.out / "s4d_limit.png"
    plots.plot_limit(columns, 0.002, u, dt, path)
    return path


def main() -> None:
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.gallery", description=summary)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--digits", type=int, default=100, help="that the gradient is averaged over"
    )
    parser.add_argument("--states", type=int, nargs="*", default=[16, 64, 256], help="S4's sizes N")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "gallery")
    parser.add_argument("--runs", type=Path, default=Path("runs/gallery"), help="checkpoints")
    args = parser.parse_args()
    if min(args.epochs, args.digits, *args.states, 10) < 1:
        parser.error("--epochs, --digits and --states must be >= 1")
    refuse_fallback()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.states:
        console.print(f"Written: {draw_limit(args)}")
    data = load() if args.families else ()
    for family in args.families:
        console.print(f"[bold]{TITLES[family]}[/bold]")
        console.print(f"Written: {draw_family(family, args, data)}")


if __name__ == "__main__":
    main()
