"""Converted checkpoints against their repositories' formulas, written out here in float64 as direct sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqconv.convert import load_longconv, load_s4d, load_sgconv

D, N, L, BATCH = 6, 5, 24, 2  # channels, stored modes, length
F64 = {"dtype": torch.float64}


def rand(*shape):
    return torch.randn(*shape, **F64)


def convolve(u, k, k_rev=None):
    """y[b, c, h, t] = sum_{s<=t} u[s] k[t-s] + sum_{s>t} u[s] k_rev[s-t-1], tap by tap."""
    y = torch.zeros(len(u), *k.shape[:2], u.shape[-1], **F64)
    for t in range(u.shape[-1]):
        for s in range(u.shape[-1]):
            taps, lag = (k, t - s) if s <= t else (k_rev, s - t - 1)
            if taps is not None and lag < taps.shape[-1]:
                y[..., t] += u[:, None, :, s] * taps[..., lag]
    return y


def block(x, state, k, k_rev=None, linear="output_linear.0."):
    """GELU, linear and (if the checkpoint has the rows for it) GLU; x (batch, length, channels)."""
    u = x.mT
    skip = state.get("D", state.get("layer.D"))
    y = convolve(u, k, k_rev) + u[:, None] * skip.reshape(-1, D, 1)
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    weight = state[linear + "weight"].reshape(-1, y.shape[1] * D)
    y = torch.einsum("oi,bil->blo", weight, y.flatten(1, 2)) + state[linear + "bias"].reshape(-1)
    if len(weight) == D:
        return y
    return y[..., :D] / (1 + torch.exp(-y[..., D:]))


def common(heads=1, *, glu=True, width_1=False):
    """D and output_linear; the latter as nn.Linear, or with the axis of a convolution of width 1."""
    rows = 2 * D if glu else D
    weight, bias = rand(rows, heads * D) / math.sqrt(heads * D), rand(rows)
    name = "output_linear.0." if glu else "output_linear."
    weight = weight.unsqueeze(-1) if width_1 else weight
    return {"D": rand(heads, D), name + "weight": weight, name + "bias": bias}


def under(prefix, state):
    """state as a part of a larger model's."""
    rest = {"encoder.weight": rand(3), "layers.1.layer.D": rand(D), "layers.0.norm.weight": rand(D)}
    return rest | {prefix + name: tensor for name, tensor in state.items()}


def check(layer, wanted, x, tolerance=1e-9):
    y = layer.eval()(x)
    assert y.dtype == torch.float64 and wanted.std() > 0.1
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)


def modes(dt, A, B, C):
    """2 Re sum_n C B (exp(dt A) - 1) / A exp(dt A l), zero-order hold; dt (h 1) or (h n), A, B (h n), C (c h n)."""
    a = dt * A
    steps = torch.exp(a.unsqueeze(-1) * torch.arange(L))  # (h n l)
    return 2 * torch.einsum("chn,hnl->chl", C * B * (a.exp() - 1) / A, steps).real


# ---- S4D ----


def minimal(width_1=True):
    state = common(width_1=width_1)
    return state | {
        "D": rand(D),
        "kernel.C": rand(D, N, 2),
        "kernel.log_dt": rand(D) - 2,
        "kernel.log_A_real": rand(D, N),
        "kernel.A_imag": math.pi * torch.arange(N, **F64).repeat(D, 1) + rand(D, N),
    }


def minimal_kernel(state):
    A = torch.complex(-state["kernel.log_A_real"].exp(), state["kernel.A_imag"])
    C = torch.view_as_complex(state["kernel.C"])
    return modes(state["kernel.log_dt"].exp()[:, None], A, torch.ones_like(A), C[None])


@pytest.mark.parametrize("width_1", [True, False])
@pytest.mark.parametrize("prefix", ["", "layers.0.layer."])
def test_minimal_s4d(width_1, prefix):
    state, x = minimal(width_1), rand(BATCH, L, D)
    wanted = block(x, state, minimal_kernel(state))
    given = under(prefix, state) if prefix else state
    check(load_s4d(given, prefix=prefix), wanted, x)


def test_options_reach_the_layer():
    layer = load_s4d(minimal(), dropout=0.3, tie_dropout=True, activation="silu", kernel_lr=1e-4)
    assert layer.dropout.p == 0.3 and layer.activation == "silu"
    assert layer.kernel.overrides["inv_dt"]["lr"] == 1e-4
    assert "B" not in dict(layer.kernel.named_parameters())  # the minimal S4D has none to train
    with pytest.raises(TypeError, match="unknown"):
        load_s4d(minimal(), unknown=1)


def test_complex_and_half_checkpoints():
    state, x = minimal(), rand(BATCH, L, D)
    wanted = block(x, state, minimal_kernel(state))
    check(load_s4d(state | {"kernel.C": torch.view_as_complex(state["kernel.C"])}), wanted, x)
    half = load_s4d({name: t.to(torch.bfloat16) for name, t in state.items()})
    assert half.skip.dtype == torch.bfloat16 and half.kernel.C.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16


TRANSFORMS = {
    "exp": torch.exp,
    "softplus": lambda p: torch.log1p(torch.exp(p)),
    "relu": lambda p: p.clamp(min=0) + 1e-4,
    "sigmoid": lambda p: 1 / (1 + torch.exp(-p)),
    "none": lambda p: p,
}


@pytest.mark.parametrize("heads, two_sided", [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize("dt", ["exp", "softplus", "untied", "sinh"])
@pytest.mark.parametrize("sets, real", list(zip([1, 2, D, 2, 1], TRANSFORMS, strict=True)))
def test_s4block(heads, two_sided, dt, sets, real):
    """A, B tied over channels or not (channel h has set h mod sets); the stored imaginary part is -Im A."""
    names = common(heads)
    state = {
        "layer.D": names.pop("D"),
        **names,
        "layer.kernel.inv_dt": rand(D, N if dt == "untied" else 1) - 2,
        "layer.kernel.A_real": rand(sets, N).abs() + 0.1,
        "layer.kernel.A_imag": 3 * rand(sets, N),
        "layer.kernel.B": rand(1, sets, N, 2),
        "layer.kernel.C": rand(heads * (1 + two_sided), D, N, 2),
    }
    x = rand(BATCH, L, D)
    A = torch.complex(
        -TRANSFORMS[real](state["layer.kernel.A_real"]), -state["layer.kernel.A_imag"]
    )
    B, C = (torch.view_as_complex(state[f"layer.kernel.{n}"]) for n in "BC")
    channel = torch.arange(D) % sets
    step = state["layer.kernel.inv_dt"]
    step = TRANSFORMS["softplus" if dt == "softplus" else "exp"](
        step.sinh() if dt == "sinh" else step
    )
    k = modes(step, A[channel], B[0, channel], C)
    wanted = block(x, state, k[:heads], k[heads:] if two_sided else None)
    options = {"real_transform": real, "dt_transform": "softplus" if dt == "softplus" else "exp"}
    layer = load_s4d(state, dt_sinh=dt == "sinh", **options)
    assert (layer.heads, layer.bidirectional, layer.kernel.n_ssm) == (heads, two_sided, sets)
    check(layer, wanted, x)
    with pytest.raises(ValueError, match="dt_transform must be 'exp' or 'softplus'"):
        load_s4d(state)


@pytest.mark.parametrize("variant", ["real", "bilinear", "imag_exp", "bandlimit"])
def test_s4block_variants(variant):
    names, sets = common(), 3
    state = {
        "layer.D": names.pop("D"),
        **names,
        "layer.kernel.inv_dt": rand(D, 1) - 1,
        "layer.kernel.A_real": rand(sets, N),
        "layer.kernel.A_imag": rand(sets, N) + 1,
        "layer.kernel.B": rand(1, sets, N, 2),
        "layer.kernel.C": rand(1, D, N, 2),
    }
    imag = state["layer.kernel.A_imag"]
    imag = imag.exp() if variant == "imag_exp" else imag
    A = torch.complex(-state["layer.kernel.A_real"].exp(), -imag)
    B, C = (torch.view_as_complex(state[f"layer.kernel.{n}"]) for n in "BC")
    if variant == "real":
        A, B, C = (t.real + 0j for t in (A, B, C))
        del state["layer.kernel.A_imag"]
        state |= {"layer.kernel.B": B.real, "layer.kernel.C": C.real}
    channel, dt = torch.arange(D) % sets, state["layer.kernel.inv_dt"].exp()
    A, B, options = A[channel], B[0, channel], {"dt_transform": "exp"}
    if variant == "bandlimit":
        options["bandlimit"] = 0.3
        kept = dt * A.imag.abs() / (2 * math.pi) < 0.15
        assert 0 < kept.sum() < kept.numel()
        C = C * kept
    k = modes(dt, A, B, C)
    if variant == "bilinear":
        options["discretization"] = "bilinear"
        half = dt * A / 2
        powers = ((1 + half) / (1 - half)).unsqueeze(-1) ** torch.arange(L)
        k = 2 * torch.einsum("chn,hnl->chl", C * B * dt / (1 - half), powers).real
    elif variant == "imag_exp":
        options["imag_transform"] = "exp"
    x = rand(BATCH, L, D)
    check(load_s4d(state, **options), block(x, state, k), x)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("glu", [True, False])
def test_s4_before_version_4(old, glu):
    """log_dt (h,), Im A itself, and in the oldest B folded into C and other names for A."""
    real, imag = ("log_w_real", "w_imag") if old else ("inv_A_real", "A_imag")
    state = common(2, glu=glu, width_1=True) | {
        "kernel.kernel.log_dt": rand(D) - 2,
        f"kernel.kernel.{real}": rand(D, N),
        f"kernel.kernel.{imag}": 3 * rand(D, N),
        "kernel.kernel.C": rand(2, D, N, 2),
    }
    state["output_linear.0.bias" if glu else "output_linear.bias"].unsqueeze_(-1)
    A = torch.complex(-state[f"kernel.kernel.{real}"].exp(), state[f"kernel.kernel.{imag}"])
    B = torch.ones_like(A)
    if not old:
        state["kernel.kernel.B"] = rand(D, N, 2)
        B = torch.view_as_complex(state["kernel.kernel.B"])
    dt, C = state["kernel.kernel.log_dt"].exp(), torch.view_as_complex(state["kernel.kernel.C"])
    x = rand(BATCH, L, D)
    linear = "output_linear.0." if glu else "output_linear."
    check(load_s4d(state), block(x, state, modes(dt[:, None], A, B, C), linear=linear), x)


# ---- LongConv ----


@pytest.mark.parametrize("heads, two_sided", [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize("prefix", ["", "layers.0.layer."])
def test_longconv(heads, two_sided, prefix):
    state = common(heads) | {"kernel.kernel": 0.5 * rand(heads * (1 + two_sided), D, L)}
    x, lam = rand(BATCH, L, D), 0.2
    k = state["kernel.kernel"]
    k = torch.where(k.abs() > lam, k - lam * k.sign(), 0.0)
    wanted = block(x, state, k[:heads], k[heads:] if two_sided else None)
    given = under(prefix, state) if prefix else state
    check(load_longconv(given, prefix=prefix, lam=lam, kernel_dropout=0.4), wanted, x)
    with pytest.raises(TypeError, match="lam"):
        load_longconv(state)


@pytest.mark.parametrize("window", [3, 7])
def test_smoothed_longconv(window):
    """A moving average over zeros beyond the ends, before the squash."""
    state = common() | {"kernel.kernel": rand(1, D, L)}
    k, lam = F.pad(state["kernel.kernel"], (window // 2, window // 2)), 0.1
    k = sum(k[..., i : i + L] for i in range(window)) / window
    k = torch.where(k.abs() > lam, k - lam * k.sign(), 0.0)
    x, options = rand(BATCH, L, D), {"smooth": "time", "smooth_window": window}
    check(load_longconv(state, lam=lam, **options), block(x, state, k), x, 1e-6)


def test_standalone_longconv():
    """Its 2 l_max taps meet a transform of 2 l_max points: y[t] = sum_s u[s] k[(t - s) mod 2 l_max]."""
    state = common(2) | {"kernel": 0.5 * rand(2, D, 2 * L)}
    k, lam = state["kernel"], 0.2
    k = torch.where(k.abs() > lam, k - lam * k.sign(), 0.0)
    x = rand(BATCH, L, D)
    future = torch.stack([k[..., -1 - lag] for lag in range(L)], -1)
    spectrum = torch.fft.fft(x.mT, 2 * L)[:, None] * torch.fft.fft(k)
    circular = torch.fft.ifft(spectrum).real[..., :L]
    torch.testing.assert_close(convolve(x.mT, k[..., :L], future), circular)
    check(load_longconv(state, lam=lam), block(x, state, k[..., :L], future), x)


# ---- SGConv ----


def upsampled(w, factor, linear):
    """Repeated, or interpolated between points at the middle of each stretch, constant beyond the ends."""
    out = torch.zeros(*w.shape[:-1], w.shape[-1] * factor, **F64)
    for t in range(out.shape[-1]):
        place = (t + 0.5) / factor - 0.5
        low = math.floor(place)
        left, right = (w[..., min(max(i, 0), w.shape[-1] - 1)] for i in (low, low + 1))
        share = place - low
        out[..., t] = (1 - share) * left + share * right if linear else w[..., t // factor]
    return out


@pytest.mark.filterwarnings("ignore:.*steps or more away")
@pytest.mark.parametrize("heads, two_sided", [(1, False), (2, True)])
@pytest.mark.parametrize("init_scale", [0, 1])
@pytest.mark.parametrize(
    "mode",
    ["cat_randn", "sum_randn", "cat_nearest_cos", "cat_randn_learnable", "sum_cos_learnable_fixed"],
)
@pytest.mark.parametrize("scales, old_norm", [(3, False), (1, True)])
def test_sgconv(heads, two_sided, init_scale, mode, scales, old_norm):
    kernels, dim = heads * (1 + two_sided), 4
    pieces = [rand(kernels, D, dim) for _ in range(scales)]
    learnable = "learnable" in mode
    multiplier = torch.linspace(1.5, 3, D, **F64).reshape(1, D, 1)
    parts = []
    for i, w in enumerate(pieces):
        factor = 2 ** ((i if "sum" in mode else max(i - 1, 0)) + init_scale)
        part = upsampled(w, factor, "nearest" not in mode)
        parts.append(part if learnable else part * multiplier ** (scales - 1 - i))
    if "sum" in mode:
        k = sum(F.pad(part, (0, parts[-1].shape[-1] - part.shape[-1])) for part in parts)
    else:
        k = torch.cat(parts, -1)
    state = common(heads) | {f"kernel_list.{i}": w for i, w in enumerate(pieces)}
    if learnable:
        multiplier, state["decay"] = torch.tensor(1.0, **F64), rand(D).abs()
        k = k * (torch.arange(k.shape[-1], **F64) + 1) ** -state["decay"].unsqueeze(-1)
    norm = rand(D, 1).abs() + 1 if old_norm else k.norm(dim=-1, keepdim=True) * 1.3
    k = k / norm
    state |= {"multiplier": multiplier, "kernel_norm": norm}
    state["kernel_norm_initialized"] = torch.tensor(True)
    x = rand(BATCH, L, D)
    wanted = block(x, state, k[:heads], k[heads:] if two_sided else None)
    layer = load_sgconv(state, mode=mode, init_scale=init_scale)
    check(layer, wanted, x)
    assert isinstance(layer.kernel.decay, nn.Parameter) == (learnable and "fixed" not in mode)
    with pytest.raises(ValueError, match="kernel_norm must be set by a first forward"):
        load_sgconv(state | {"kernel_norm_initialized": torch.tensor(False)}, mode=mode)
    with pytest.raises(ValueError, match=r"unknown keys in state_dict: 'kernel_list\.5'"):
        load_sgconv(state | {"kernel_list.5": pieces[0]}, mode=mode, init_scale=init_scale)


# ---- refusals ----


def test_refusals():
    state = minimal()

    def without(name):
        return {n: t for n, t in state.items() if n != name}

    for name in state:
        with pytest.raises(
            ValueError, match=rf"load_s4d: state_dict must have .*{name.split('.')[-1]}"
        ):
            load_s4d(without(name))
    with pytest.raises(ValueError, match=r"must have 'a\.D' or 'a\.layer\.D'"):
        load_s4d({"a." + n: t for n, t in without("D").items()}, prefix="a.")
    with pytest.raises(
        ValueError, match=r"must have 'D' .*, got 'a\..*; prefix='a\.' may be meant"
    ):
        load_s4d({"a." + n: t for n, t in state.items()})
    with pytest.raises(ValueError, match="a key that starts with '', got none"):
        load_s4d({})
    with pytest.raises(TypeError, match="bidirectional must be left out, the checkpoint decides"):
        load_s4d(state, bidirectional=True)
    with pytest.raises(ValueError, match=r"a key that starts with 'layers\.7\.'"):
        load_s4d(state, prefix="layers.7.")
    with pytest.raises(ValueError, match=r"unknown keys in state_dict: 'kernel\.P', 'norm\.m'"):
        load_s4d(state | {"kernel.P": rand(1, D, N, 2), "norm.m": rand(1)})
    wrong = {
        "D": (rand(D, 2, 2), r"D must be \(heads, d_model\)"),
        "kernel.C": (rand(3, D, N, 2), "C must hold heads=1 kernels or twice as many .* got 3"),
        "kernel.log_dt": (rand(D + 1), r"dt must be \(d_model=6,\) or .* got \(7,\)"),
        "kernel.log_A_real": (rand(4, N), "A must have sets that divide d_model=6, got 4"),
        "kernel.A_imag": (rand(D, N - 1), "A's imaginary part must be .*modes=5"),
        "kernel.B": (rand(2, D, N, 2), "B must be .*sets=6, modes=5"),
        "output_linear.0.weight": (rand(2 * D, D + 1), "output_linear's weight must be .*got"),
        "output_linear.0.bias": (rand(D), r"output_linear's bias must be \(rows of its weight=12"),
    }
    for name, (tensor, text) in wrong.items():
        with pytest.raises(ValueError, match=f"load_s4d: {text}"):
            load_s4d(state | {name: tensor})
    with pytest.raises(ValueError, match="real_transform must be one of"):
        load_s4d(state, real_transform="square")
    with pytest.raises(ValueError, match="mode must be the layer's, with 'cat' or 'sum' in it"):
        load_sgconv(state, mode="randn")
    with pytest.raises(ValueError, match="lam must be >= 0, got nan"):
        load_longconv(state, lam=math.nan)
    with pytest.raises(ValueError, match="kernel must have an even number of taps, got 7"):
        load_longconv(common() | {"kernel": rand(1, D, 7)}, lam=0.1)
    with pytest.raises(ValueError, match=r"unknown keys in state_dict: 'kernel\.kernel'"):
        load_longconv(common() | {"kernel": rand(1, D, 8), "kernel.kernel": rand(1)}, lam=0.1)
