"""Measures what Python takes before and between the launches of a call on a GPU. It needs no GPU.

python -m bench.overhead    prints medians and least times of interleaved rounds, in microseconds

A device whose launches do nothing takes the place of the CUDA driver. The tensors lie in the CPU's memory, and hardly
anything is computed of them. The time is that of the process itself, so that other programs do not count.
Beside a call its parts are measured, and an autograd.Function that saves as much and allocates as much as the call,
but does nothing.
"""

import argparse
import time
from statistics import median

import torch

from bench.files import markdown
from bench.micro.timing import interleaved
from seqconv import fftconv, use_backend
from seqconv.backends.cuda import Cuda
from seqconv.backends.cuda.problem import H100
from seqconv.backends.cuda.tables import Tables
from seqconv.backends.inputs import Inputs
from seqconv.ops.fftconv import check

CALLS = 20  # in a row, as a model with as many layers makes them


class Bare(Cuda):
    """The CUDA backend for CPU tensors, on a device that launches nothing."""

    limits = H100

    def __init__(self):
        self.launched = 0
        self.table = Tables(lambda words: words, lambda: False)

    def launch(self, kernel, grid, threads, shared, arguments) -> None:
        self.launched += 1

    def device(self, place) -> "Bare":
        return self

    def missing(self, place) -> None:
        return None

    def on(self, place, function, *arguments) -> None:
        function(self, *arguments)


class Nothing(torch.autograd.Function):
    """Takes the time that torch itself needs around a call."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx, dy):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def functions(device: Bare, dtype: torch.dtype) -> dict:
    """Returns what is timed, by name. The tensors are small, since sums on the CPU would count as Python's time."""
    u, k, skip = torch.randn(2, 4, 256).to(dtype), torch.randn(4, 256), torch.randn(4)
    leaves = [t.clone().requires_grad_() for t in (u, k, skip)]
    y, dy = torch.empty_like(u), torch.randn(2, 4, 256).to(dtype)
    inputs = Inputs(u, k, None, skip, None, None)
    du, dk, dskip = (torch.empty_like(t) for t in (u, k, skip))
    grads = Inputs(du, dk, None, dskip, None, None)
    return {
        "forward": lambda: fftconv(u, k, skip),
        "of it: checks": lambda: check(inputs, None, "causal", "bhl"),
        "of it: backend": lambda: device.fftconv(y, inputs, "none"),
        "forward, recorded": lambda: fftconv(*leaves),
        "torch's own, forward": lambda: Nothing.apply(*leaves),
        "forward+backward": lambda: torch.autograd.grad(fftconv(*leaves), leaves, dy),
        "of it: backend of backward": lambda: device.fftconv_gradients(grads, dy, inputs, "none"),
        "of that: without the skip's": lambda: device.fftconv_gradients(
            grads._replace(skip=None), dy, inputs, "none"
        ),
        "torch's own, forward+backward": lambda: torch.autograd.grad(
            Nothing.apply(*leaves), leaves, dy
        ),
        "one torch.empty": lambda: torch.empty(2, 4, 256),
    }


def repeated(function):
    def run():
        for _ in range(CALLS):
            function()

    return run


def own_seconds(function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(dtype: torch.dtype, budget: float) -> dict[str, list[float]]:
    """Returns the seconds of one call, in every round, for each function."""
    device = Bare()
    made = {name: repeated(function) for name, function in functions(device, dtype).items()}
    with use_backend(device):
        found = interleaved(made, budget, own_seconds)
    assert device.launched, "the calls took another road"
    return {name: [t / CALLS for t in times] for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--budget", type=float, default=5.0, help="seconds (default: 5)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(getattr(torch, options.dtype), options.budget)
    rows = [
        [name, f"{median(times) * 1e6:.1f}", f"{min(times) * 1e6:.1f}"]
        for name, times in found.items()
    ]
    print(markdown([options.dtype, "median, us", "least, us"], rows))


if __name__ == "__main__":
    main()
