"""Matrices for the CUDA kernels of the learned butterfly, and a check of them against the reference."""

import math

import torch
from accuracy import rel_l2

from seqconv import reference
from seqconv.backends.cuda import butterfly


def exact(radix: int, heads: int = 1) -> torch.Tensor:
    index = torch.arange(radix)
    turn = (index[:, None] * index % radix) * (-2 * math.pi / radix)
    return torch.view_as_real(torch.polar(torch.ones_like(turn), turn)).expand(heads, -1, -1, -1)


def learned(radix: int, heads: int) -> torch.Tensor:
    return exact(radix, heads) + 0.1 * torch.randn(heads, radix, radix, 2)


def check_learned_matrices(device, radices, dtype):
    n, heads = math.prod(radices), 2
    x = torch.randn(9, 4, n // 2 + 1).to(dtype)
    factors = {r: learned(r, heads) for r in radices}
    z = butterfly.transform(device, x, factors, radices)
    dz = torch.randn_like(z)
    dx, grads = butterfly.gradients(device, dz, x, factors, radices)

    x64 = x.double().requires_grad_()
    factors64 = {r: f.double().clone().requires_grad_() for r, f in factors.items()}
    z64 = reference.butterfly(x64, factors64, radices)
    dx64, *grads64 = torch.autograd.grad(z64, (x64, *factors64.values()), dz.double())
    assert rel_l2(z, z64.detach()) < 5e-7
    assert dx.dtype == dtype and rel_l2(dx, dx64) < (5e-7 if dtype == torch.float32 else 3e-3)
    for r, grad64 in zip(factors64, grads64, strict=True):
        assert grads[r].shape == factors[r].shape and rel_l2(grads[r], grad64) < 1e-6
