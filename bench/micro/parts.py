"""The parts of a layer's step, each by itself, forward and backward: python -m bench.layers --parts

The convolution is fftconv with its activation on the layer's own kernel, the generator makes that kernel from the
parameters, and what follows is the linear map with GLU. The rest is the difference to the whole step.
"""

from functools import partial

import torch
from torch import Tensor

from bench.micro.timing import Clock, interleaved, summary
from seqconv import fftconv

LAYERS = ("S4D", "LongConv", "SGConv")
PARTS = ("convolution", "kernel", "linear map and GLU")
WHOLE = "whole"


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def functions(layer, x: Tensor, dy: Tensor, whole) -> dict:
    """Name of a part -> its forward and backward pass."""
    length, generator = x.shape[1], layer.kernel
    k = generator(length)
    inputs = leaf(x), leaf(k), leaf(layer.skip)
    options = {"activation": layer.activation, "layout": "blh"}
    v = fftconv(*inputs, **options)
    mixed, weights = leaf(v.flatten(-2)), list(layer.linear.parameters())
    dk, dv = torch.randn_like(k), torch.randn_like(v)
    made_of = list(generator.parameters())

    def part(forward, inputs, gradient):
        return lambda: torch.autograd.grad(forward(), inputs, gradient)

    return {
        "convolution": part(lambda: fftconv(*inputs, **options), inputs, dv),
        "kernel": part(lambda: generator(length), made_of, dk),
        "linear map and GLU": part(lambda: layer._mix(mixed), [mixed, *weights], dy),
        WHOLE: whole,
    }


def measure(job: dict, problem, step, clock: Clock):
    """Yields a row for each part, from interleaved rounds with the whole step."""
    layer, x, dy = problem(job)
    runs = functions(layer, x, dy, partial(step, layer, x, dy))
    for name, times in interleaved(runs, job["budget"], clock).items():
        yield {"part": name} | summary(times)


def readme_table(rows: list[dict], named) -> tuple[list[str], list[list[str]]]:
    """Header and lines: milliseconds of every part, and its share of the whole."""
    found = {(r["layer"], r["length"], r["part"]): 1e3 * r["median"] for r in rows}
    lines = []
    for layer, length in dict.fromkeys((layer, length) for layer, length, _ in found):
        whole = found[layer, length, WHOLE]
        times = [found[layer, length, part] for part in PARTS]
        times.append(whole - sum(times))
        cells = [f"{ms:.1f} ms ({100 * ms / whole:.0f}%)" for ms in times]
        lines.append([layer, named(length), f"{whole:.1f} ms", *cells])
    header = ["", "length", "step", "convolution, gelu", "kernel", "linear map, GLU", "rest"]
    return header, lines
