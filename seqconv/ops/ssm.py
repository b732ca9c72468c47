"""The convolution kernel of a diagonal state space model, from its parameters (arXiv 2206.11893).

The operator beneath it is a sum of exponentials, k[c,h,l] = sum_n Re(w[c,h,n] exp(a[h,n] l)). With
S_p[c,h,n] = sum_l l^p dk[c,h,l] exp(a[h,n] l) its gradients are dw = conj(S_0) and da = conj(sum_c w
S_1). No tensor is complex and none is (channels, modes, length).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from seqconv import backends
from seqconv.backends import fallback, keops
from seqconv.backends.protocol import Explanation, Request
from seqconv.ops.checks import check_choice, check_length, check_shape, check_tensor
from seqconv.ops.register import Operator, transformed
from seqconv.ops.sharding import SUM

DISCRETIZATIONS = ("zoh", "bilinear", "dss", "dss_softmax")
BACKENDS = ("auto", "torch", "keops")
_REGULARISER = 1e-7  # of DSS's reciprocal


class Modes(NamedTuple):
    """a (channels, modes, 2) and w (heads, channels, modes, 2), float64, real and imaginary part last."""

    a: Tensor
    w: Tensor


def _dtype(single: bool) -> torch.dtype:
    return torch.float32 if single else torch.float64


def _empty(inputs: Modes, length: int, single: bool, fused: bool) -> Tensor:
    return inputs.w.new_empty(*inputs.w.shape[:2], length, dtype=_dtype(single))


def _empty_gradients(inputs: Modes, *options) -> Modes:
    return Modes(*[torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs])


def _forward(backend, inputs: Modes, length: int, single: bool, fused: bool) -> Tensor:
    k = _empty(inputs, length, single, fused)
    if not inputs.w.numel():
        return k.zero_()
    if length:
        (backend if fused else fallback).ssm(k, inputs)
    return k


def _gradients(backend, dk, inputs: Modes, length, single, fused, wanted) -> Modes:
    grads = _empty_gradients(inputs)
    if dk.numel() and inputs.w.numel():
        (backend if fused else fallback).ssm_gradients(grads, dk, inputs)
        return grads
    return Modes(*[grad.zero_() for grad in grads])


def _plain(inputs: Modes, length: int, single: bool, fused: bool) -> Tensor:
    return fallback.mode_sum(*inputs, length, _dtype(single))


_SHARDINGS = [  # channels, heads, modes; and the kernel is linear in w
    (1, {"a": 0, "w": 1}),
    (0, {"w": 0}),
    (SUM, {"a": 1, "w": 2}),
    (SUM, {"w": SUM}),
]


operator = Operator(
    "ssm",
    Modes,
    "SymInt length, bool single, bool fused",
    _plain,
    forward=_forward,
    gradients=_gradients,
    empty=_empty,
    empty_gradients=_empty_gradients,
    shardings=lambda *_, ranks: _SHARDINGS,
)


def mode_sum(a: Tensor, w: Tensor, length: int, single: bool, backend: str = "auto") -> Tensor:
    """k (heads, channels, length), float32 if `single`, else float64."""
    if backend == "keops" and length and w.numel():
        return keops.mode_sum(a, w, length).to(_dtype(single))
    return operator(Modes(a, w), length, single, backend == "auto")


def moments(a: Tensor, u: Tensor) -> Tensor:
    """S_0[b,h,n] = sum_l u[b,h,l] exp(a[h,n] l) for u (batch, channels, length), as (b, h, n, 2)."""
    none = a.new_zeros(u.shape[0], *a.shape)
    options = u.shape[-1], u.dtype == torch.float32, True
    if not torch.compiler.is_compiling() and transformed((a, u)):
        grads = fallback.mode_sum_gradients(u, a, none)
    else:
        grads = operator.raw_gradients(u, Modes(a, none), options, [False, True])
    return grads[1] * a.new_tensor([1.0, -1.0])


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """Product of complex numbers, (..., 2)."""
    (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
    return torch.stack([a * c - b * d, a * d + b * c], -1)


def divide(x: Tensor, y: Tensor) -> Tensor:
    (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
    return torch.stack([a * c + b * d, b * c - a * d], -1) / (c * c + d * d).unsqueeze(-1)


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 of complex numbers, without cancellation near zero."""
    re, im = x.unbind(-1)
    return torch.stack(
        [torch.expm1(re) * im.cos() - 2 * (im / 2).sin() ** 2, re.exp() * im.sin()], -1
    )


def expm1_over(a: Tensor) -> Tensor:
    """(exp(a) - 1) / a of complex numbers, 1 at zero; derivatives there too."""
    near = (a.abs() < 1e-3).all(-1, keepdim=True)
    series = one = a.new_tensor([1.0, 0.0])
    small = torch.where(near, a, 0.0)
    for n in (5, 4, 3, 2):  # 1 + a/2 (1 + a/3 (1 + a/4 (1 + a/5)))
        series = one + multiply(small, series) / n
    far = torch.where(near, one, a)
    return torch.where(near, series, divide(expm1(far), far))


def discretize(log_dt: Tensor, A: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """(a, b): x[t + 1] = exp(a) x[t] + b u[t + 1] follows x' = A x + u, sampled dt apart.

    log_dt (channels,) or (channels, modes), A (channels, modes, 2), any dtype; a and b (channels,
    modes, 2) in float64.
    """
    dt = log_dt.double().exp()
    dt = (dt if dt.dim() == 2 else dt.unsqueeze(-1)).unsqueeze(-1)  # (h n 1)
    a = dt * A.double()
    if discretization == "bilinear":
        one = a.new_tensor([1.0, 0.0])
        # log((1 + a/2) / (1 - a/2)), whose real part cancels as it stands.
        x, y = a.unbind(-1)
        below = (1 - x / 2) ** 2 + y * y / 4
        size = 0.5 * torch.log1p((2 * x / below).clamp(min=-1 + 1e-16))
        log = torch.stack([size, torch.atan2(y, 1 - (x * x + y * y) / 4)], -1)
        return log, divide(dt * one, one - a / 2)
    return a, dt * expm1_over(a)


def weighted_modes(log_dt, A, B, C, discretization: str) -> tuple[Tensor, Tensor]:
    """a and w in k[l] = sum_n Re(w exp(a l)), float64; not for "dss_softmax", whose w depend on the length."""
    a, b = discretize(log_dt, A, discretization)
    w = multiply(C.double(), b if B is None else multiply(b, B.double()))
    return a, w if discretization == "dss" else 2 * w


def ssm_kernel(
    log_dt: Tensor,
    A: Tensor,
    C: Tensor,
    length: int,
    *,
    B: Tensor | None = None,
    discretization: str = "zoh",
    backend: str = "auto",
) -> Tensor:
    """K[c, h, l] = 2 Re sum_n C[c, h, n] Bbar[h, n] Abar[h, n]^l, l = 0 ... length - 1.

    For x' = A x + B u, y = 2 Re C x, with steps dt = exp(log_dt):

        "zoh"          Abar = exp(dt A)                    Bbar = B (exp(dt A) - 1) / A
        "bilinear"     Abar = (1 + dt A/2) / (1 - dt A/2)  Bbar = B dt / (1 - dt A/2)
        "dss"          as "zoh", without the factor 2: modes are not halves of conjugate pairs
        "dss_softmax"  "dss" with mode n divided by exp(dt A length) - 1, in which exp(dt A l) is a
                       softmax over l; modes that grow run backwards from the last tap, so that
                       nothing overflows. The kernel depends on length.

    Args:
        log_dt: (channels,) or (channels, modes), logarithm of the step.
        A: (channels, modes, 2), real and imaginary part; one of each conjugate pair.
        C: (heads, channels, modes, 2).
        length: of the kernel, >= 0.
        B: (channels, modes, 2); 1 if None.
        backend: "auto" is the fused operator (on a CPU the compiled kernels); "torch" the same
            blocking through torch.bmm; "keops" PyKeOps, which computes every exponential anew and
            compiles on first use.

    Returns:
        (heads, channels, length) in float64 if C is float64, else in float32. dt A and all weights
        are formed in float64, so that phases of millions of turns keep their digits: the relative
        error in float32 is below 5e-7. Every tensor has gradients of every order ("keops": first).
        Pass parameters as they are: rounding them to a half precision changes K by tens of percent.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.

    With l = columns q + r, columns about sqrt(length), exp(a l) = exp(a columns q) exp(a r): K is a
    matrix product, 4 modes flops per element. Memory O(channels modes + heads channels length),
    also backward, where powers are formed anew. (Under torch.func, and for derivatives of higher
    order, tables of channels modes sqrt(length).)

    Source: arXiv 2206.11893, section 3; DSS: 2203.14343. Twin: seqconv.reference.ssm_kernel. Example:
        >>> A = torch.tensor([[[-0.5, 0.0]]])
        >>> ssm_kernel(torch.zeros(1), A, torch.tensor([[[[1.0, 0.0]]]]), 3)
        tensor([[[1.5739, 0.9546, 0.5790]]])
    """
    _validate(log_dt, A, B, C, discretization, backend)
    check_length("ssm_kernel", length)
    single = C.dtype != torch.float64
    return kernel_of_system(log_dt, A, B, C, length, single, discretization, backend)


def kernel_of_system(log_dt, A, B, C, length, single, discretization, backend) -> Tensor:
    """`ssm_kernel` of arguments that are known to be right; float32 if `single`, else float64."""
    if discretization != "dss_softmax":
        modes = weighted_modes(log_dt, A, B, C, discretization)
        return mode_sum(*modes, length, single, backend)
    # A growing mode is a decaying one from the end, exp(a (l - length + 1)): a softmax ignores the scale.
    grows = A[..., :1] > 0
    falling, b = discretize(log_dt, torch.where(grows, -A, A), discretization)
    total = expm1(falling * length)
    conjugate = total * total.new_tensor([1.0, -1.0])
    inverse = conjugate / ((total**2).sum(-1, keepdim=True) + _REGULARISER)
    share = multiply(torch.where(grows, -b, b), inverse)
    weight = multiply(C.double(), share if B is None else multiply(share, B.double()))
    none = torch.zeros_like(weight)
    both = torch.cat([torch.where(grows, none, weight), torch.where(grows, weight, none)])
    first, last = mode_sum(falling, both, length, single, backend).chunk(2)
    return first + last.flip(-1)


def explain_ssm_kernel(
    log_dt: Tensor,
    A: Tensor,
    C: Tensor,
    length: int,
    *,
    B: Tensor | None = None,
    discretization: str = "zoh",
    backend: str = "auto",
) -> Explanation:
    """Which backend `ssm_kernel` takes for these arguments, and why not a faster one. Computes nothing.

    Example:
        >>> A, C = torch.zeros(4, 32, 2), torch.zeros(1, 4, 32, 2)
        >>> explain_ssm_kernel(torch.zeros(4), A, C, 1000, backend="torch").algorithm
        'matrix product'
    """
    _validate(log_dt, A, B, C, discretization, backend)
    check_length("ssm_kernel", length)
    if backend == "keops":
        threads = torch.get_num_threads()
        return Explanation("keops", "every exponential", None, 1, None, threads, None)
    options = length, C.dtype != torch.float64, backend == "auto"
    request = Request("ssm", Modes(A, C), options)
    explanation = backends.explain(request)
    if backend == "auto":
        return explanation
    return replace(fallback.explain(request), fallback=None)


def _validate(log_dt, A, B, C, discretization, backend) -> None:
    name = "ssm_kernel"
    check_tensor(name, "A", A)
    modes = (("channels", None), ("modes", None), ("real and imaginary", 2))
    check_shape(name, "A", A, modes)
    channels, count, _ = A.shape
    c, n, parts = ("channels", channels), ("modes", count), ("real and imaginary", 2)
    check_tensor(name, "log_dt", log_dt, device=A.device)
    check_shape(name, "log_dt", log_dt, (c,), (c, n))
    check_tensor(name, "C", C, device=A.device)
    check_shape(name, "C", C, (("heads", None), c, n, parts))
    if B is not None:
        check_tensor(name, "B", B, device=A.device)
        check_shape(name, "B", B, (c, n, parts))
    check_choice(name, "discretization", discretization, DISCRETIZATIONS)
    check_choice(name, "backend", backend, BACKENDS)
