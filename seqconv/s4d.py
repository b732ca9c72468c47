"""S4D: convolution with the kernel of a diagonal state space model (arXiv 2206.11893)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqconv._check import check_flag, check_length, check_positive
from seqconv._layer import ConvLayer, KernelGenerator


def _cis(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(x + i y)."""
    size = x.exp()
    return size * y.cos(), size * y.sin()


def s4d_kernel(
    log_dt: Tensor, log_A_real: Tensor, A_imag: Tensor, C: Tensor, length: int
) -> Tensor:
    """K[head, h, t] = 2 Re sum_n C (exp(dt A) - 1) / A exp(dt A t), A = -exp(log_A_real) + i A_imag, dt = exp(log_dt).

    Zero-order hold with B = 1 (paper, section 3.2 and table 1). With t = Q p + q, q < Q, the sum
    over n is a product of a (p, n) and an (n, q) matrix: memory channels x modes x (Q + length /
    Q), not channels x modes x length. Exponents are formed in float64, where the phase dt Im(A) t
    keeps its digits, and rounded once.

    Args:
        log_dt: (channels,) logarithm of the step, in steps of the sequence.
        log_A_real, A_imag: (channels, modes), one of each conjugate pair.
        C: (heads, channels, modes, 2), real and imaginary part.
        length: of the kernel, >= 0.

    Returns:
        (heads, channels, length) in C's dtype.

    Twin: seqconv.reference.s4d_kernel.
    """
    dt = log_dt.double().exp().unsqueeze(-1)  # (h 1)
    a_re, a_im = -log_A_real.double().exp(), A_imag.double()
    x, y = dt * a_re, dt * a_im  # (h n)

    # (exp(x + i y) - 1) / A, without cancellation for small steps.
    m_re = torch.expm1(x) * y.cos() - 2 * (y / 2).sin() ** 2
    m_im = x.exp() * y.sin()
    square = a_re**2 + a_im**2
    b_re, b_im = (m_re * a_re + m_im * a_im) / square, (m_im * a_re - m_re * a_im) / square
    c_re, c_im = C.double().unbind(-1)  # (c h n)
    w_re, w_im = c_re * b_re - c_im * b_im, c_re * b_im + c_im * b_re

    # About sqrt(length); but traced graphs must serve every length, and a size of 1 would tie them
    # to it.
    fine = 64 if torch.compiler.is_compiling() or length < 1 << 15 else 512
    coarse = length // fine + 2
    q = torch.arange(fine, dtype=torch.float64, device=C.device)
    p = torch.arange(coarse, dtype=torch.float64, device=C.device) * fine
    x, y = x.unsqueeze(-1), y.unsqueeze(-1)
    q_re, q_im = _cis(x * q, y * q)  # (h n q)
    p_re, p_im = _cis(x * p, y * p)  # (h n p)
    w_re, w_im = w_re.unsqueeze(-1), w_im.unsqueeze(-1)
    left = torch.cat(
        [w_re * p_re - w_im * p_im, -(w_re * p_im + w_im * p_re)], dim=-2
    )  # (c h 2n p)
    right = torch.cat([q_re, q_im], dim=-2)  # (h 2n q)
    if torch.is_autocast_enabled(C.device.type):
        with torch.autocast(C.device.type, enabled=False):
            k = 2 * left.mT.to(C.dtype) @ right.to(C.dtype)  # (c h p q)
    else:
        k = 2 * left.mT.to(C.dtype) @ right.to(C.dtype)
    k = k.flatten(-2)
    return F.pad(
        k, (0, length - k.shape[-1])
    )  # a slice here would tie exported graphs to their length


class S4DKernel(KernelGenerator):
    """Kernel generator of S4D; S4DKernel(...)(length) -> (heads, d_model, length), any length.

    Parameters, all real, N = d_state // 2 conjugate pairs of modes:
        log_dt (d_model,): uniform in [log dt_min, log dt_max]; dt is in steps of the sequence.
        log_A_real (d_model, N): log(1/2). A_imag (d_model, N): pi n (S4D-Lin, paper eq. 9).
        C (heads, d_model, N, 2): complex standard normal.
    Optimiser: log_dt, log_A_real and A_imag take min(lr, `lr` here) and no weight decay; C is
    trained like any weight.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        heads: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        lr: float = 1e-3,
    ):
        super().__init__()
        check_positive("S4DKernel", d_model=d_model, d_state=d_state, heads=heads)
        if d_state % 2:
            raise ValueError(
                f"S4DKernel: d_state must be even (modes come in conjugate pairs), got {d_state}"
            )
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"S4DKernel: 0 < dt_min <= dt_max wanted, got dt_min={dt_min}, dt_max={dt_max}"
            )
        modes = d_state // 2
        self.log_dt = nn.Parameter(
            torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max))
        )
        self.log_A_real = nn.Parameter(torch.full((d_model, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(
            math.pi * torch.arange(modes, dtype=torch.float32).repeat(d_model, 1)
        )
        self.C = nn.Parameter(torch.randn(heads, d_model, modes, 2) * math.sqrt(0.5))
        self.overrides = {
            name: {"lr": lr, "weight_decay": 0.0} for name in ("log_dt", "log_A_real", "A_imag")
        }

    def forward(self, length: int) -> Tensor:
        check_length("S4DKernel", length)
        return s4d_kernel(self.log_dt, self.log_A_real, self.A_imag, self.C, length)


class S4D(ConvLayer):
    """Diagonal state space layer, (batch, length, d_model) -> the same.

    y = GLU(W dropout(gelu(K * x + skip x)) + b), K from S4DKernel. The state_dict does not depend
    on the length.

    Args:
        d_model: channels.
        d_state: real size N of each channel's state, even; N / 2 complex modes are stored.
        heads: kernels per channel; the linear map takes heads * d_model inputs.
        bidirectional: add as many kernels for the future, shifted by one so that lag 0 belongs to
            the past's.
        dt_min, dt_max: range of the initial steps, in steps of the sequence.
        activation: of the convolution: "gelu", "silu", "relu" or None.
        dropout: after the activation; tie_dropout: one mask per sample and channel for all times.
        postact: "glu", or None for a plain linear map.
        kernel_lr: learning rate that param_groups gives to dt and A, or its own lr if that is
            smaller; C is trained like any weight.

    dt, A and C stay float32 under .to(bfloat16) and .half().

    Source: arXiv 2206.11893. Example:
        >>> layer = S4D(8)
        >>> layer(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        heads: int = 1,
        bidirectional: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        kernel_lr: float = 1e-3,
        **block,
    ):
        check_flag("S4D", bidirectional=bidirectional)
        check_positive("S4D", d_model=d_model, d_state=d_state, heads=heads)
        options = {"d_state": d_state, "dt_min": dt_min, "dt_max": dt_max, "lr": kernel_lr}
        kernel = S4DKernel(d_model, heads=heads * (1 + bidirectional), **options)
        super().__init__(d_model, kernel, heads=heads, bidirectional=bidirectional, **block)
