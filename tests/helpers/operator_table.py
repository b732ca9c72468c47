"""Every operator, by name, with a small problem in float64 as the common tests make it: a new operator is a row."""

import torch
import toy_operator

from seqconv.ops import butterfly, fftconv, ssm


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
    )
    return fftconv.operator, inputs, ("gelu", False)


def _ssm():
    a = torch.stack([-torch.rand(2, 3).double() - 0.1, normal(2, 3)], -1)
    return ssm.operator, ssm.Modes(a, normal(2, 2, 3, 2)), (9, False, True)


def _butterfly():
    inputs = butterfly.Inputs(normal(2, 2, 30), 0.3 * normal(1, 16 * 16 + 2 * 2, 2))
    return butterfly.operator, inputs, ([16, 2],)


def _toy():
    return toy_operator.decayed_sum, toy_operator.Inputs(normal(2, 3, 9), -normal(3).abs()), (2.0,)


OPERATORS = {"toy": _toy, "fftconv": _fftconv, "ssm": _ssm, "butterfly": _butterfly}
