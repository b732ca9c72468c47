"""Layers that go step by step, and what to compare them with."""

import copy

import pytest
import torch
from layer_table import EVERY, generators

STREAMS = {
    name: {"layer": layer, "options": options}
    for name, layer, options in [
        ("s4d", EVERY["s4d"], {"d_state": 8}),
        ("s4d, real, two heads", EVERY["s4d, real"], {"d_state": 8, "heads": 2}),
        ("long_conv", EVERY["long_conv"], {}),
        ("long_conv, smooth, two heads", EVERY["long_conv"], {"smooth": "time", "heads": 2}),
        ("sgconv", EVERY["sgconv"], {"heads": 2, "activation": "silu", "postact": None}),
        ("sgconv, power", EVERY["sgconv, power"], {"activation": None}),
        ("hyena", EVERY["hyena"], {}),
        ("hyena, order 3", EVERY["hyena"], {"order": 3}),
    ]
}


every_stream = pytest.mark.parametrize("name", STREAMS)


def make(name, dtype=torch.float64, **more):
    row = STREAMS[name]
    return row["layer"](**row["options"], **more).to(dtype).eval()


def forward(layer, x):
    """The outputs of x as part of an input at which the kernel has all of its taps."""
    return layer(torch.nn.functional.pad(x, (0, 0, 0, 80)))[:, : x.shape[1]]


def run(layer, x, pieces, state):
    """The outputs of x in pieces: n > 0 steps, or a chunk of -n; and the state."""
    found, t = [], 0
    for n in pieces:
        part, t = x[:, t : t + abs(n)], t + abs(n)
        if n > 0:
            for now in part.unbind(1):
                y, state = layer.step(now, state)
                found.append(y)
        else:
            y, state = layer.prefill(part, state)
            found.extend(y.unbind(1))
    return torch.stack(found, 1), state


def replace_generator(layer):
    for name, old in generators(layer).items():
        new = copy.deepcopy(old)
        taps = next(new.parameters())
        taps.mul_(1.5)
        setattr(layer, name, new)
