"""S4-LegS and S4D-LegS with their HiPPO matrices, dense (arXiv 2206.11893, section 3)."""

import torch
import torch.nn.functional as F
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor


def hippo(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns S4-LegS's A and B, and the normal matrix that S4D-LegS keeps of A."""
    n = torch.arange(size).double()
    b, p = (2 * n + 1).sqrt(), (n + 0.5).sqrt()
    A = -torch.tril(b[:, None] * b, -1) - torch.diag(n + 1)
    return A, b, A + p[:, None] * p


def response(A: Tensor, B: Tensor, u: Tensor, dt: float) -> Tensor:
    """Returns the first state of x' = A x + B u at every step, where each value of u is held for dt."""
    size = len(B)
    block = F.pad(torch.cat([A, B[:, None]], 1) * dt, (0, 0, 0, 1))
    power = torch.linalg.matrix_exp(block)
    x, out = torch.zeros(size).double(), []
    for value in u:
        x = power[:size, :size] @ x + power[:size, size] * value
        out.append(x[0])
    return torch.stack(out)


def kernel(A: Tensor, B: Tensor, count: int, dt: float) -> Tensor:
    """Returns the first state's kernel, (exp(t A) B)[0] at t = 0, dt, ..., (count - 1) dt."""
    power, x, out = torch.linalg.matrix_exp(A * dt), B, []
    for _ in range(count):
        out.append(x[0])
        x = power @ x
    return torch.stack(out)


def apart(A: Tensor, normal: Tensor, b: Tensor) -> float:
    """Returns the relative L2 distance of the kernels of (A, b) and (normal, b / 2), by the joint system's Gramian."""
    drive = torch.cat([b, b / 2])
    joint = torch.block_diag(A, normal).numpy()
    gram = solve_continuous_lyapunov(joint, -(drive[:, None] * drive).numpy())
    n = len(b)
    return ((gram[0, 0] - 2 * gram[0, n] + gram[n, n]) / gram[0, 0]) ** 0.5
