"""Every operator, by name, with a small problem in float64 as the common tests make it: a new operator is a row."""

import torch
import toy_operator

from seqconv.layers import s4d_kernel, sgconv
from seqconv.ops import butterfly, fftconv, packed, ssm


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _fftconv():
    inputs = fftconv.Inputs(
        u=normal(2, 2, 7),
        k=normal(2, 2, 5),
        k_rev=normal(2, 2, 3),
        skip=normal(2),
        pre_gate=normal(2, 2, 7),
        post_gate=normal(2, 2, 2, 7),
        bias=normal(2),
    )
    return fftconv.operator, inputs, ("gelu", False, False)


def _exact():
    inputs = fftconv.Inputs(
        u=normal(2, 2, 40),  # more than the taps that are summed directly
        k=normal(2, 2, 36),
        k_rev=None,
        skip=normal(2),
        pre_gate=normal(2, 2, 40),
        post_gate=normal(2, 2, 2, 40),
        bias=normal(2, 2),
    )
    return fftconv.operator, inputs, ("gelu", False, True)


def _packed():
    inputs = packed.PackedInputs(
        u=normal(2, 12),
        k=normal(2, 2, 5),
        k_rev=normal(2, 2, 3),
        skip=normal(2),
        pre_gate=normal(2, 12),
        post_gate=normal(2, 2, 12),
        bias=normal(2),
        cu_seqlens=torch.tensor([0, 5, 5, 12]),
    )
    return packed.operator, inputs, ("gelu", False, -1)


def _ssm():
    a = torch.stack([-torch.rand(2, 3).double() - 0.1, normal(2, 3)], -1)
    return ssm.operator, ssm.Modes(a, normal(2, 2, 3, 2)), (9, False, True)


def _butterfly():
    inputs = butterfly.Inputs(normal(2, 2, 30), 0.3 * normal(1, 16 * 16 + 2 * 2, 2))
    return butterfly.operator, inputs, ([16, 2],)


def _toy():
    return toy_operator.decayed_sum, toy_operator.Inputs(normal(2, 3, 9), -normal(3).abs()), (2.0,)


def _s4d_kernel():
    shapes = (2, 2, 3, 2), (2, 3, 2), (2,), (2, 3), (2, 3)
    inputs = s4d_kernel.Parameters(*[normal(*shape) for shape in shapes])
    names = ["zoh", "exp", "exp", "none"]
    return s4d_kernel.s4d_kernel, inputs, (9, False, True, names, 1, False, None, 1.0)


def _taps():
    inputs = sgconv.Parts(normal(3, 2, 2, 4), normal(2).abs() + 1, normal(2, 2, 1).abs() + 1)
    return sgconv._taps_op, inputs, (["linear", "cat", "geometric"], 0, False, 1.0, 16)


def _product():
    inputs = butterfly.Spectra(normal(2, 2, 8, 2), normal(3, 2, 8, 2))
    return butterfly.product, inputs, (4,)


OPERATORS = {
    "toy": _toy,
    "fftconv": _fftconv,
    "fftconv_exact_causal": _exact,
    "fftconv_packed": _packed,
    "ssm": _ssm,
    "butterfly": _butterfly,
    "butterfly_product": _product,
    "s4d_kernel": _s4d_kernel,
}
IN_GRAPHS = {  # those that only layers call, and only in graphs that torch.compile makes
    "sgconv_taps": _taps,
}
