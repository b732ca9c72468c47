"""safari's HyenaOperator: a random state_dict, and its formulas in float64 with direct sums."""

import math

import torch

D, L, WIDTH = 4, 30, 5  # channels, l_max, width of the filter's network
F64 = {"dtype": torch.float64}


def rand(*shape):
    return torch.randn(*shape, **F64)


def features(emb_dim, length=L):
    """z: time, and cos and -sin of 2 pi f l / l_max for the frequencies f of linspace(1e-4, bands - 1, bands)."""
    bands, z = (emb_dim - 1) // 2, torch.zeros(length, emb_dim, **F64)
    for step in range(length):
        z[step, 0] = step / (length - 1)
        for i in range(bands):
            f = 1e-4 + i * (bands - 1 - 1e-4) / max(bands - 1, 1)
            z[step, 1 + i] = math.cos(2 * math.pi * f * step / length)
            z[step, 1 + bands + i] = -math.sin(2 * math.pi * f * step / length)
    return z


def checkpoint(order=2, emb_dim=5, inner=2, prefix=""):
    """The state_dict of a HyenaOperator with random numbers."""
    wide, out = (order + 1) * D, (order - 1) * D
    sizes = [emb_dim, *[WIDTH] * (inner + 1)]
    freq = rand(1, WIDTH) + 2
    filters = {"bias": rand(out), "pos_emb.z": features(emb_dim)[None]}
    filters["pos_emb.t"] = torch.linspace(0, 1, L, **F64).reshape(1, L, 1)
    filters["modulation.deltas"] = -4 * rand(1, 1, out).abs()
    for i in range(inner + 1):
        filters[f"implicit_filter.{2 * i}.weight"] = rand(WIDTH, sizes[i]) / sizes[i] ** 0.5
        filters[f"implicit_filter.{2 * i}.bias"] = rand(WIDTH)
        filters[f"implicit_filter.{2 * i + 1}.freq"] = freq
    filters[f"implicit_filter.{2 * inner + 2}.weight"] = rand(out, WIDTH) / WIDTH**0.5
    state = {
        "in_proj.weight": rand(wide, D) / D**0.5,
        "in_proj.bias": rand(wide),
        "short_filter.weight": rand(wide, 1, 3),
        "short_filter.bias": rand(wide),
        "out_proj.weight": rand(D, D) / D**0.5,
        "out_proj.bias": rand(D),
    }
    state |= {"filter_fn." + name: t for name, t in filters.items()}
    return {prefix + name: t for name, t in state.items()}


def kernel(state, length, shift, modulate=True):
    """(length, order - 1 times D), one time after the other, as the filter's network has its outputs."""
    rows, inner = [], sum(name.endswith("freq") for name in state)
    for step in range(length):
        h = state["filter_fn.pos_emb.z"][0, step]
        for i in range(inner):
            name = f"filter_fn.implicit_filter.{2 * i}."
            h = state[name + "weight"] @ h + state[name + "bias"]
            h = torch.sin(state["filter_fn.implicit_filter.1.freq"][0] * h)
        h = state[f"filter_fn.implicit_filter.{2 * inner}.weight"] @ h
        t = state["filter_fn.pos_emb.t"][0, step, 0]
        window = torch.exp(-t * state["filter_fn.modulation.deltas"][0, 0].abs()) + shift
        rows.append(h * window if modulate else h)
    return torch.stack(rows)


def operator(state, x, shift, *, interleaved=False, modulate=True, bias=True):
    """HyenaOperator on x (batch, length, D), one output after the other."""
    length = x.shape[1]
    order = len(state["in_proj.weight"]) // D - 1
    u = x @ state["in_proj.weight"].T + state["in_proj.bias"]
    short = torch.zeros_like(u)
    for t in range(length):
        for j in range(3):  # a correlation: the last weight is the present's
            if t - 2 + j >= 0:
                short[:, t] += state["short_filter.weight"][:, 0, j] * u[:, t - 2 + j]
    short += state["short_filter.bias"]
    *gates, v = short.split(D, dim=-1)
    taps, skips = kernel(state, length, shift, modulate), state["filter_fn.bias"] * bias

    def of(t, o):
        """The values of the filter o, of D (order - 1)."""
        return t[..., o :: order - 1] if interleaved else t[..., o * D : (o + 1) * D]

    for o, gate in enumerate(reversed(gates[1:])):
        v, k = v * gate, of(taps, o)
        y = of(skips, o) * v
        for t in range(length):
            for s in range(t + 1):
                y[:, t] += k[t - s] * v[:, s]
        v = y
    return (v * gates[0]) @ state["out_proj.weight"].T + state["out_proj.bias"]
