"""Problems for the CUDA kernels of sums of exponentials, and what is right: the dense formula in float64."""

import math

import torch
from accuracy import rel_l2

from seqconv.backends.cuda import ssm

SIZES = [
    (1, 1, 1, 1),
    (2, 3, 2, 2),
    (1, 3, 3, 63),
    (2, 1, 32, 64),
    (1, 1, 33, 65),
    (2, 2, 100, 1000),
    (1, 3, 4, 2047),
    (2, 1, 5, 2049),
    (2, 3, 17, 5000),
    (1, 1, 3001, 130),
]


def dense(a, w, length):
    """The definition: (c, h, length) from every term of it, in float64."""
    t = torch.arange(length, dtype=torch.float64, device=a.device)
    terms = torch.exp(torch.view_as_complex(a)[..., None] * t)  # (h n l)
    return (torch.view_as_complex(w)[..., None] * terms).real.sum(-2)


def problem(c, h, n, decay=(1e-4, 0.3), turn=3.0):
    """Modes of any damping, log-uniform between the two, and of any frequency up to `turn`."""
    low, high = map(math.log, decay)
    re = -torch.exp(low + (high - low) * torch.rand(h, n, dtype=torch.float64))
    im = turn * torch.rand(h, n, dtype=torch.float64)
    return torch.stack([re, im], -1), torch.randn(c, h, n, 2, dtype=torch.float64)


def results(device, a, w, dk):
    k, da, dw = dk.new_empty(dk.shape), torch.full_like(a, torch.nan), torch.full_like(w, torch.nan)
    ssm.forward(device, k, a, w)
    ssm.backward(device, da, dw, dk, a, w)
    return k, da, dw


def expected(a, w, dk):
    a, w = a.clone().requires_grad_(), w.clone().requires_grad_()
    k = dense(a, w, dk.shape[-1])
    return k.detach(), *torch.autograd.grad(k, (a, w), dk.double())


def check(device, a, w, dk, bound=5e-7):
    found, exact = results(device, a, w, dk), expected(a, w, dk)
    for name, value, oracle in zip(("k", "da", "dw"), found, exact, strict=True):
        assert torch.isfinite(value).all(), name
        if oracle.any():  # position 0 alone leaves nothing of da
            assert rel_l2(value, oracle) < bound, name
        else:
            assert not value.any(), name
    return found
