"""Calls of every operator in sizes that no number of processes divides, and calls of fftconv in every form."""

import torch
from operator_table import normal
from toy_operator import Inputs as ToyInputs
from toy_operator import decayed_sum

from seqconv.layers import s4d_kernel, sgconv
from seqconv.ops import butterfly, fftconv, packed, ssm

B, C, L, H = 5, 7, 11, 3


def convolution(
    activation="none",
    *,
    heads=0,
    per_sample=False,
    k_rev=True,
    skip="h",
    bias="",
    gates=(),
    last=False,
    exact_causal=False,
):
    leading = (*[B] * per_sample, *[heads] * (heads > 0), C)
    out = (B, *[heads] * (heads > 0), C, L)
    inputs = fftconv.Inputs(
        u=normal(B, C, L),
        k=normal(*leading, L),
        k_rev=normal(*leading, 4) if k_rev else None,
        skip={"h": normal(C), "ch": normal(heads, C), "": None}[skip],
        pre_gate=normal(B, C, L) if "pre_gate" in gates else None,
        post_gate=normal(*out) if "post_gate" in gates else None,
        bias={"h": normal(C), "ch": normal(heads, C), "": None}[bias],
    )
    return fftconv.operator, inputs, (activation, last, exact_causal)


def _packed(activation="none", *, heads=0, per_row=False, skip="h", bias="", gates=()):
    several = [heads] * (heads > 0)
    leading, out = (*[3] * per_row, *several, C), (*several, C, L)
    inputs = packed.PackedInputs(
        u=normal(C, L),
        k=normal(*leading, L),
        k_rev=normal(*leading, 4),
        skip={"h": normal(C), "ch": normal(heads, C)}[skip],
        pre_gate=normal(C, L) if "pre_gate" in gates else None,
        post_gate=normal(*out) if "post_gate" in gates else None,
        bias={"h": normal(C), "ch": normal(heads, C), "": None}[bias],
        cu_seqlens=torch.tensor([0, 4, 4, L]),
    )
    return packed.operator, inputs, (activation, False, -1)


def _ssm():
    a = torch.stack([-torch.rand(C, 5).double() - 0.1, normal(C, 5)], -1)
    return ssm.operator, ssm.Modes(a, normal(H, C, 5, 2)), (9, False, True)


def _butterfly(heads=1, channels=C):
    matrices = 0.3 * normal(heads, 16 * 16 + 2 * 2, 2)
    return butterfly.operator, butterfly.Inputs(normal(B, channels, 30), matrices), ([16, 2],)


def _s4d_kernel(copies=1, is_real=False):
    parts = () if is_real else (2,)
    sets = C // copies
    shapes = [(H, C, 5, *parts), (sets, 5, *parts), (C,), (sets, 5), (sets, 5)]
    inputs = s4d_kernel.Parameters(*[normal(*shape) for shape in shapes[: 4 if is_real else 5]])
    options = 9, False, True, ["zoh", "exp", "exp", "none"], copies, False, None, 1.0
    return s4d_kernel.s4d_kernel, inputs, options


def _taps(two_sided=False):
    inputs = sgconv.Parts(normal(3, 4, C, 4), normal(C).abs() + 1, normal(4, C, 1).abs() + 1)
    return sgconv._taps_op, inputs, (["linear", "cat", "geometric"], 0, two_sided, 0.5, 16)


def _product():
    inputs = butterfly.Spectra(normal(B, C, 8, 2), normal(H, C, 8, 2))
    return butterfly.product, inputs, (4,)


BOTH = ("pre_gate", "post_gate")
CASES = {
    "toy": lambda: (decayed_sum, ToyInputs(normal(B, C, L), -normal(C).abs()), (2.0,)),
    "fftconv": convolution,
    "fftconv gelu": lambda: convolution("gelu", gates=BOTH),
    "fftconv gates": lambda: convolution(gates=BOTH, skip="", last=True),
    "fftconv pre": lambda: convolution(gates=["pre_gate"], k_rev=False),
    "fftconv post": lambda: convolution(gates=["post_gate"], k_rev=False),
    "fftconv heads": lambda: convolution("silu", heads=H, skip="ch", gates=BOTH),
    "fftconv heads, one skip": lambda: convolution(heads=H, gates=["pre_gate"], last=True),
    "fftconv per sample": lambda: convolution("relu", heads=H, per_sample=True, skip="ch"),
    "fftconv exact": lambda: convolution("gelu", k_rev=False, gates=BOTH, exact_causal=True),
    "fftconv bias": lambda: convolution(bias="h"),
    "fftconv bias of heads": lambda: convolution("gelu", heads=H, bias="ch", gates=BOTH),
    "fftconv bias, pre": lambda: convolution(gates=["pre_gate"], bias="h"),
    "fftconv packed": _packed,
    "fftconv packed bias": lambda: _packed(heads=H, bias="ch"),
    "fftconv packed gelu": lambda: _packed("gelu", gates=BOTH),
    "fftconv packed heads": lambda: _packed("silu", heads=H, per_row=True, skip="ch", gates=BOTH),
    "ssm": _ssm,
    "butterfly": _butterfly,
    "butterfly heads": lambda: _butterfly(12, 24),
    "s4d_kernel": _s4d_kernel,
    "s4d_kernel shared": lambda: _s4d_kernel(7),
    "s4d_kernel real": lambda: _s4d_kernel(is_real=True),
    "sgconv_taps": _taps,
    "sgconv_taps two-sided": lambda: _taps(True),
    "butterfly_product": _product,
}
