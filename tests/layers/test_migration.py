"""What docs/migration.md says of calls: other packages' calls and ours compute the same, from the same defaults."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seqconv import S4D, LongConv, SGConv, fftconv, nested

D, L, BATCH = 6, 24, 2  # channels, length


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


README = (Path(__file__).parents[2] / "docs/migration.md").read_text()


def test_calls_of_other_packages():
    u, k, k_rev, bias, w = rand(BATCH, D, L), rand(D, L), rand(D, L), rand(D), rand(D, 4)

    def transformed(spectrum, n):
        return torch.fft.irfft(torch.fft.rfft(u, n) * spectrum, n)[..., :L]

    # A transform of n points wraps at n.
    long = torch.cat([k, k_rev], -1)
    for n, taps, ours in [
        (L, k, fftconv(u, k, mode="circular")),
        (2 * L, k, fftconv(u, k)),
        (2 * L, long, fftconv(u, long[:, :L], k_rev=long[:, L:].flip(-1))),
    ]:
        torch.testing.assert_close(ours, transformed(torch.fft.rfft(taps, n), n))
    # safari adds the conjugate of k_rev's spectrum, D u and GELU.
    spectrum = torch.fft.rfft(k, 2 * L) + torch.fft.rfft(k_rev, 2 * L).conj()
    theirs = F.gelu(transformed(spectrum, 2 * L) + bias[:, None] * u)
    first = F.pad(k_rev[:, :1], (0, k.shape[1] - 1))
    ours = fftconv(u, k + first, bias, k_rev=k_rev[:, 1:], activation="gelu")
    torch.testing.assert_close(ours, theirs)
    theirs = F.silu(F.conv1d(u, w[:, None], bias, padding=3, groups=D)[..., :L])
    torch.testing.assert_close(fftconv(u, w.flip(-1), bias=bias, activation="silu"), theirs)
    # causal-conv1d's states are the inputs before the first step and the last ones; numbers of rows part a pack.
    before = rand(BATCH, D, 3)
    whole = torch.cat([before, u], -1)
    theirs = F.conv1d(whole, w[:, None], groups=D), whole[..., -3:]
    ours = fftconv(u, w.flip(-1), history=before, return_history=True)
    torch.testing.assert_close(ours, theirs)
    rows = torch.tensor([[0] * 9 + [1] * (L - 9)], dtype=torch.int32)
    parts = [F.conv1d(F.pad(x, (3, 0)), w[:, None], groups=D) for x in u[:1].split([9, L - 9], -1)]
    ours = fftconv(u[0], w.flip(-1), cu_seqlens=nested.rows_from_seq_idx(rows))[None]
    torch.testing.assert_close(ours, torch.cat(parts, -1))


S4 = {"d_state": 64, "heads": 1, "bidirectional": False, "discretization": "zoh", "postact": "glu"}

S4 |= {
    "real_transform": "exp",
    "dt_min": 1e-3,
    "dt_max": 1e-1,
    "dropout": 0.0,
    "activation": "gelu",
}

TAPS = {"bidirectional": False, "dropout": 0.0, "activation": "gelu"}

CALLS = {  # the README's, and what the originals have by default
    "S4D(d, d_state=64, train_B=False)": S4
    | {"init": "lin", "train_B": False, "B_init": None, "n_ssm": None, "dt_transform": "exp"},
    'S4D(d, init="legs")': S4 | {"init": "legs", "n_ssm": None, "dt_transform": "exp"},
    'S4D(d, n_ssm=1, dt_transform="softplus")': S4
    | {"init": "lin", "n_ssm": 1, "dt_transform": "softplus", "kernel_lr": 1e-3},
    'LongConv(d, l_max=l_max, heads=2, init="random", lam=0.1, kernel_dropout=0.0)': TAPS
    | {"heads": 2, "init": "random", "lam": 0.1, "smooth": None, "kernel_dropout": 0.0}
    | {"postact": "glu"},
    'LongConv(d, l_max=l_max, heads=2, init="random", lam=0.001, kernel_dropout=0.0)': TAPS
    | {"heads": 2, "init": "random", "lam": 0.001, "smooth": None, "kernel_dropout": 0.0}
    | {"postact": "glu"},
    "SGConv(d, l_max=l_max, kernel_dim=32, postact=None)": TAPS
    | {"heads": 1, "kernel_dim": 32, "init_scale": 0, "combine": "cat", "upsample": "linear"}
    | {"init": "randn", "decay": "geometric", "decay_min": 2.0, "decay_max": 2.0, "postact": None},
}


@pytest.mark.parametrize("call", CALLS)
def test_layers_of_other_packages(call):
    assert f"`{call}" in README or f"= {call}(x)`" in README

    def bind(layer):
        return lambda *sizes, **options: inspect.signature(layer).bind(*sizes, **options)

    bound = eval(
        call, {n.__name__: bind(n) for n in (S4D, LongConv, SGConv)} | {"d": D, "l_max": L}
    )
    bound.apply_defaults()
    ours = {name: bound.arguments[name] for name in CALLS[call]}
    assert ours == CALLS[call]
