"""The operator behind S4DKernel: from its parameters to its kernel in one step, without one for every formula."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv.backends import fallback
from seqconv.layers.s4d_init import POSITIVE
from seqconv.ops.register import Operator, empty_like, plain_gradients, plain_result
from seqconv.ops.sharding import SUM
from seqconv.ops.ssm import Modes, weighted_modes


class Parameters(NamedTuple):
    """The generator's, in their shapes there; inv_A_imag is left out with is_real=True."""

    C: Tensor
    B: Tensor
    inv_dt: Tensor
    inv_A_real: Tensor
    inv_A_imag: Tensor | None = None


def system_of(
    tensors, names, copies, dt_sinh, bandlimit, rate
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What S4DKernel.system() returns. names are the discretization and the transforms of dt and of the real and
    imaginary part of A, and so many copies of every set (A, B) are shared by channels in turn."""
    C, B, inv_dt, inv_A_real, *inv_A_imag = (t.double() for t in tensors if t is not None)
    _, dt_transform, real_transform, imag_transform = names
    p = torch.sinh(inv_dt) if dt_sinh else inv_dt
    log_dt = p if dt_transform == "exp" else F.softplus(p).log()
    real = -POSITIVE[real_transform][0](inv_A_real)
    if inv_A_imag:
        imag = POSITIVE[imag_transform][0](*inv_A_imag)
    else:
        imag = torch.zeros_like(real)
        B, C = (torch.stack([t, torch.zeros_like(t)], -1) for t in (B, C))
    A, B = torch.stack([real, imag], -1).repeat(copies, 1, 1), B.repeat(copies, 1, 1)
    if bandlimit is not None:
        dt = log_dt.exp() if log_dt.dim() == 2 else log_dt.exp().unsqueeze(-1)
        frequency = dt * A[..., 1].abs() / (2 * math.pi)
        C = torch.where((frequency < bandlimit / 2).unsqueeze(-1), C, 0.0)
    return log_dt + math.log(rate), A, B, C


def fit(tensors: list[Tensor], copies: int, is_real: bool) -> bool:
    """Whether the tensors, in the order of Parameters, have the shapes of a system and dtypes of parameters."""
    C, B, inv_dt, *A = tensors
    if C.dim() != (3 if is_real else 4) or len(A) != (1 if is_real else 2):
        return False
    _, channels, modes, *parts = C.shape
    sets = (channels // copies, modes)
    for t in A:
        if t.shape != sets:
            return False
    for t in tensors:
        if (t.dtype != torch.float32 and t.dtype != torch.float64) or t.device != C.device:
            return False
    whole = channels % copies == 0 and (is_real or parts == [2])
    return whole and B.shape == (*sets, *parts) and inv_dt.shape in ((channels,), (channels, modes))


def _modes(inputs, names, *options) -> Tensor:
    """a and w of seqconv.ops.ssm.Modes in one tensor, (1 + heads, d_model, modes, 2)."""
    log_dt, A, B, C = system_of(inputs, names, *options)
    a, w = weighted_modes(log_dt, A, B, C, names[0])
    return torch.cat([a.unsqueeze(0), w])


def _plain(inputs, length: int, single: bool, fused: bool, *options) -> Tensor:
    modes = _modes(inputs, *options)
    dtype = torch.float32 if single else torch.float64
    return fallback.mode_sum(modes[0], modes[1:], length, dtype)


def _empty(inputs, length: int, single: bool, *options) -> Tensor:
    dtype = torch.float32 if single else torch.float64
    return inputs.C.new_empty(*inputs.C.shape[:2], length, dtype=dtype)


def _modes_by(backend, inputs, options) -> tuple[Tensor, bool]:
    """The tensor of _modes, and whether the backend has made it."""
    heads, channels, modes = inputs.C.shape[:3]
    both = inputs.C.new_empty(1 + heads, channels, modes, 2, dtype=torch.float64)
    if backend.s4d_modes(both[0], both[1:], inputs, options):
        return both, True
    return plain_result(_modes, inputs, options), False


def _forward(backend, inputs, length: int, single: bool, fused: bool, *options) -> Tensor:
    k = _empty(inputs, length, single)
    if k.numel() and inputs.C.numel():
        backend = backend if fused else fallback
        both, _ = _modes_by(backend, inputs, options)
        backend.ssm(k, Modes(both[0], both[1:]))
        return k
    return k.zero_()


def _gradients(backend, dk, inputs, length: int, single: bool, fused: bool, *options):
    *options, wanted = options
    if not (dk.numel() and inputs.C.numel()):
        return [None if g is None else g.zero_() for g in empty_like(inputs, wanted)]
    backend = backend if fused else fallback
    both, made = _modes_by(backend, inputs, options)
    grads = torch.empty_like(both)
    backend.ssm_gradients(Modes(grads[0], grads[1:]), dk, Modes(both[0], both[1:]))
    if not made:
        return plain_gradients(_modes, grads, inputs, options, wanted)
    found = empty_like(inputs, [True] * len(inputs))
    backend.s4d_modes_gradients(found, grads[0], grads[1:], inputs, options)
    return [grad if want else None for grad, want in zip(found, wanted, strict=True)]


def _shardings(inputs, length, single, fused, names, copies, *rest, ranks: int) -> list[tuple]:
    channels = {"C": 1} | dict.fromkeys(("B", "inv_dt", "inv_A_real", "inv_A_imag"), 0)
    return [(0, {"C": 0}), (SUM, {"C": SUM})] + ([(1, channels)] if copies == 1 else [])


s4d_kernel = Operator(
    "s4d_kernel",
    Parameters,
    "SymInt length, bool single, bool fused, str[] names, int copies, bool dt_sinh, float? bandlimit, float rate",
    _plain,
    forward=_forward,
    gradients=_gradients,
    empty=_empty,
    shardings=_shardings,
)
