"""Measures fftconv in onnxruntime: as matrix products, beside onnxruntime's Conv and DFT and beside torch.

python -m bench.onnx                      prints the table, in a few minutes
python -m bench.onnx --lengths 512 4096   some lengths only
python -m bench.onnx --layers             every layer instead, exported with a constant kernel, beside torch
python -m bench.onnx --write              both tables into docs/export.md

All contenders run in one process, in turn, with one thread. Kernels are constants of the model, so that onnxruntime
transforms them once when it loads it. Every output is compared with float64 first. The floor is the products'
floating point operations at the rate that torch reaches here in a square product of 1,024 rows.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqconv
from bench.facts import ROOT, commit, processor, versions
from bench.files import markdown, replace_between
from bench.micro.timing import Clock, interleaved
from bench.terminal import console, show_requirements
from seqconv import reference
from seqconv.backends import products

LENGTHS = 128, 512, 1024, 4096, 16384, 65536
LAYER_LENGTH = 4096
ELEMENTS = 1 << 20  # of the input, batch x channels x length, or one sample of all channels
CHANNELS = 64
LONGEST_CONV = 4096  # Its time grows with the square of the length.
ERROR = 2e-5  # the largest relative error in float32


class Convolution(nn.Module):
    """fftconv with a constant kernel."""

    def __init__(self, k: Tensor):
        super().__init__()
        self.register_buffer("k", k)

    def forward(self, u: Tensor) -> Tensor:
        return seqconv.fftconv(u, self.k)


class Conv(Convolution):
    """The same sum as torch's convolution, which becomes ONNX's Conv."""

    def forward(self, u: Tensor) -> Tensor:
        channels, taps = self.k.shape
        weight = self.k.flip(-1).unsqueeze(1)
        return F.conv1d(F.pad(u, (taps - 1, 0)), weight, groups=channels)


class Transforms(Convolution):
    """The same through torch.fft, which becomes ONNX's DFT."""

    def forward(self, u: Tensor) -> Tensor:
        length = u.shape[-1]
        n = 2 * length
        return torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(self.k, n), n)[..., :length]


def session(model: nn.Module, x: Tensor):
    """Exports the model with a dynamic batch. Returns it as a function, and its size in bytes."""
    import onnxruntime

    import seqconv.onnx as own

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        # torch takes a batch of one for a constant.
        example = x if x.shape[0] > 1 else x.expand(2, *x.shape[1:])
        torch.onnx.export(
            model,
            (example,),
            file,
            dynamo=True,
            verbose=False,
            external_data=False,
            dynamic_shapes=({0: "batch"},),
            custom_translation_table=own.translations(),
        )
        size = file.stat().st_size
        made = onnxruntime.InferenceSession(str(file), options)
    (name,) = [i.name for i in made.get_inputs()]
    array = x.numpy()
    return lambda: torch.from_numpy(made.run(None, {name: array})[0]), size


def rate() -> float:
    """Floating point operations a second of a square product."""
    a, b = torch.randn(2, 1024, 1024)
    (seconds,) = interleaved({"product": lambda: a @ b}, 0.5, Clock("cpu")).values()
    return 2 * 1024**3 / median(seconds)


def measure(length: int, budget: float) -> dict:
    """Returns nanoseconds an element of every contender, by name, and errors as "error of NAME"."""
    batch = max(1, ELEMENTS // (CHANNELS * length))
    u = torch.randn(batch, CHANNELS, length)
    k = torch.randn(CHANNELS, length) / length**0.5
    wanted = reference.fftconv_fft(u.double(), k.double())
    models = {"products": Convolution(k), "DFT": Transforms(k)}
    if length <= LONGEST_CONV:
        models["Conv"] = Conv(k)
    functions, row = {}, {"length": length, "batch": batch}
    for name, model in models.items():
        functions[name], size = session(model, u)
        if name == "products":
            row["model"] = size
    functions["torch.fft"] = lambda: reference.fftconv_fft(u, k)
    functions["fftconv"] = lambda: seqconv.fftconv(u, k)
    for name, function in functions.items():
        row[f"error of {name}"] = float((function() - wanted).norm() / wanted.norm())
    for name, seconds in interleaved(functions, budget, Clock("cpu")).items():
        row[name] = median(seconds) / u.numel() * 1e9
    return row


def layers(length: int, budget: float) -> list[list[str]]:
    """Returns a line for every layer: its error, milliseconds in onnxruntime, and those in torch."""
    made = {
        "S4D": seqconv.S4D(CHANNELS),
        "S4D, two-sided": seqconv.S4D(CHANNELS, bidirectional=True),
        "LongConv": seqconv.LongConv(CHANNELS, l_max=length),
        "SGConv": seqconv.SGConv(CHANNELS, l_max=length),
        "Hyena": seqconv.Hyena(CHANNELS, l_max=length),
        "ButterflyConv": seqconv.ButterflyConv(CHANNELS, l_max=length),
    }
    lines = []
    for name, layer in made.items():
        x = torch.randn(max(1, ELEMENTS // (CHANNELS * length)), length, CHANNELS)
        frozen = seqconv.freeze(layer, length)
        there, _ = session(frozen, x)
        with torch.no_grad():
            wanted = frozen(x)
            error = float((there() - wanted).norm() / wanted.norm())
            functions = {"onnxruntime": there, "torch": partial(frozen, x)}
            found = interleaved(functions, budget, Clock("cpu"))
        own, torchs = (median(found[n]) * 1e3 for n in ("onnxruntime", "torch"))
        lines.append([name, f"{error:.1e}", f"{own:.1f}", f"{torchs:.1f}", f"{own / torchs:.1f}x"])
    return lines


def table(rows: list[dict], flops: float) -> str:
    lines = []
    for row in rows:
        floor = products.flops(row["length"]) / flops * 1e9
        times = [f"{row[n]:.1f}" if n in row else "" for n in ("products", "Conv", "DFT")]
        others = [f"{row[n]:.1f}" for n in ("torch.fft", "fftconv")]
        last = f"{row['model'] / 1e6:.1f}", f"{row['error of products']:.1e}"
        shape = f"({row['batch']}, {CHANNELS}, {row['length']:,})"
        lines.append([shape, *times, f"{floor:.1f}", *others, *last])
    head = ["input", "products", "Conv", "DFT", "floor", "torch.fft", "fftconv", "MB", "error"]
    return markdown(head, lines)


def layers_table(length: int, budget: float) -> str:
    head = ["layer", "error", "ms in onnxruntime", "ms in torch", "ratio"]
    return markdown(head, layers(length, budget))


def origin() -> str:
    found = versions(("torch", "onnxruntime"))
    parts = [processor()["model name"], *[f"{p} {found[p]}" for p in ("torch", "onnxruntime")]]
    return ", ".join([*parts, f"commit {commit()}"])


def requirements(rows: list[dict]) -> list[tuple[str, str, str, bool]]:
    checks = []
    for row in rows:
        at = f"at {row['length']:,} steps"
        error = row["error of products"]
        checks.append((f"relative error {at}", f"<= {ERROR}", f"{error:.1e}", error <= ERROR))
        if "Conv" in row and row["length"] >= 512:
            gain = row["Conv"] / row["products"]
            checks.append((f"faster than Conv {at}", "> 1", f"{gain:.1f}", gain > 1))
        gain = row["DFT"] / row["products"]
        checks.append((f"faster than DFT {at}", ">= 10", f"{gain:.0f}", gain >= 10))
        times = row["products"] / row["torch.fft"]
        checks.append((f"time over torch.fft {at}", "<= 3", f"{times:.1f}", times <= 3))
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.onnx", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for one length or layer")
    parser.add_argument("--layers", action="store_true", help="layers instead, of 4,096 steps")
    parser.add_argument("--write", action="store_true", help="both tables into docs/export.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.layers:
        console.print(layers_table(LAYER_LENGTH, options.budget), markup=False)
        return
    flops = rate()
    if min(options.lengths) < 2:
        parser.error(f"--lengths must be at least 2, got {min(options.lengths)}")
    rows = [measure(length, options.budget) for length in options.lengths]
    first = table(rows, flops)
    console.print(f"ns an element, forward, 1 thread; floor at {flops / 1e9:.0f} GFLOP/s")
    console.print(first, markup=False)
    show_requirements(requirements(rows))
    if options.write:
        rate_text = f"The floor is the products' operations at {flops / 1e9:.0f} GFLOP/s."
        text = f"{first}\n\n1 thread; {origin()}. {rate_text}"
        replace_between(ROOT / "docs/export.md", "onnx bench", text)
        second = layers_table(LAYER_LENGTH, options.budget)
        replace_between(ROOT / "docs/export.md", "onnx layers bench", second)
