"""Draws every layer's kernels before and after the demo's training, and what new and trained layers see.

python -m bench.gallery [--epochs 3] [--families s4d sgconv] [--out FOLDER]

It trains mnist5k's classifier once with each layer, causal. A layer whose run is in --runs is only drawn
again. One more picture has all layers at initialisation, and another one compares S4D with S4, whose kernels
differ and whose responses do not.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import pictures
from bench.facts import RESULTS
from bench.gallery.hippo import apart, hippo, kernel, response
from bench.gallery.initial import draw_initial
from bench.lra import options, sweep
from bench.lra.arguments import parse_fit
from bench.lra.model import SequenceClassifier
from bench.lra.run import reopen
from bench.micro.worker import refuse_fallback
from bench.terminal import plain

TITLES = {
    "s4d": "S4D",
    "long_conv": "LongConv",
    "sgconv": "SGConv",
    "hyena": "Hyena",
    "butterfly": "ButterflyConv (taps)",
}


def trained(family: str, epochs: int, runs: Path) -> Path:
    """Returns the run folder of this layer. It is trained to the end now if it was not before."""
    from bench.lra.train import fit

    out = runs / f"{family}-{epochs}"
    extra = sweep.pending(out)
    if extra is not None:
        arguments = ["mnist5k", "--layer", family, "--optim.epochs", str(epochs)]
        if "bidirectional" in {f.name for f in fields(options.KERNELS[family])}:
            arguments += ["--kernel.bidirectional", "false"]
        fit(parse_fit([*arguments, "--out", str(out), *extra]))
    return out


def sensitivity(model: SequenceClassifier, x: Tensor, y: Tensor) -> Tensor:
    """Returns (length,): how much the score of the right class at the last position depends on the pixel at each lag.

    It is the root mean square of the gradient over the digits.
    """
    model.eval()
    x = x.clone().requires_grad_()
    scores = model.decoder(model.features(x)[:, -1])
    (gradient,) = torch.autograd.grad(scores.gather(1, y[:, None]).sum(), x)
    return gradient[..., 0].square().mean(0).sqrt().flip(0)


def draw_family(family: str, args) -> Path:
    run = trained(family, args.epochs, args.runs)
    _, info, splits, initial, model = reopen(run)
    test = splits["test"]
    picked = np.linspace(0, len(test) - 1, min(args.digits, len(test))).round().astype(int)
    x, _, y = (torch.from_numpy(np.ascontiguousarray(part)) for part in test.batch(picked))
    models = {"initialised": initial, "trained": model}
    right = json.loads((run / "result.json").read_text())["test_accuracy"]
    path = args.out / f"{family}.png"
    pictures.plot_family(
        TITLES[family],
        {when: m.kernels(info.l_max) for when, m in models.items()},
        {when: sensitivity(m, x, y) for when, m in models.items()},
        f"{args.epochs} epochs of digits, {right:.1%} right",
        path,
    )
    return path


def draw_limit(args) -> Path:
    """Draws S4-LegS beside S4D-LegS with half of B, for growing states."""
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
    pictures.plot_limit(columns, 0.002, u, dt, path)
    return path


def main() -> None:
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.gallery", description=summary)
    parser.add_argument("--families", nargs="*", default=list(TITLES), choices=TITLES)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--digits", type=int, default=100, help="the gradient is averaged over these"
    )
    parser.add_argument("--states", type=int, nargs="*", default=[16, 64, 256], help="S4's sizes N")
    parser.add_argument("--out", type=Path, default=RESULTS / "gallery")
    parser.add_argument("--runs", type=Path, default=Path("runs/gallery"), help="run folders")
    args = parser.parse_args()
    if min(args.epochs, args.digits, *args.states, 10) < 1:
        parser.error("--epochs, --digits and --states must be >= 1")
    refuse_fallback()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.states:
        plain.print(f"Written: {draw_limit(args)}")
    if args.families:
        draw_initial(args.families, TITLES, args.out / "initial.png")
        plain.print(f"Written: {args.out / 'initial.png'}")
    for family in args.families:
        plain.print(f"[bold]{TITLES[family]}[/bold]")
        plain.print(f"Written: {draw_family(family, args)}")


if __name__ == "__main__":
    main()
