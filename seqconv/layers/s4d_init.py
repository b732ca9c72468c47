"""Initial modes of S4D: A and B by name (arXiv 2206.11893, section 4 and table 2; FouT: 2206.12037).

N = 2 modes is the state size, n = 0 ... modes - 1; one of each conjugate pair, Im A >= 0:

    "lin"   -1/2 + i pi n                              "real"  -(n + 1)
    "inv"   -1/2 + i (N / pi) (N / (2 n + 1) - 1)      "rand"  -1/2 + i exp(standard normal)
    "inv2"  -1/2 + i (N / pi) (N / (n + 1) - 1)        "foud"  -1/2 + 2 pi i n
    "quad"  -1/2 + i (1 + 2 n)^2 / pi                  "fout"  i pi n, the normal part of HiPPO-FouT
    "legs"  the eigenvalues of the normal part of HiPPO-LegS, -1/2 + i y
    "diag"  half of the sets inv, half lin             "hippo" half legs, half fout

B is 1 but for "legs", where it is LegS's B in the eigenvectors' coordinates, rotated to be real and
positive (C takes the phase), and for "fout" and "foud", where it is 1 / sqrt(2) for n = 0, the
constant function, which has no conjugate. POSITIVE holds the maps to positive numbers under which A is trained.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv.ops.checks import check_choice, check_flag

NAMES = ("lin", "inv", "inv2", "quad", "real", "rand", "legs", "fout", "foud", "diag", "hippo")
B_NAMES = (None, "one", "normal", "alternating", "unit_cw", "unit_ccw", "legs")
_HALVES = {"diag": ("inv", "lin"), "hippo": ("legs", "fout")}

_FLOOR = 1e-4  # the least value that a positive transform has to give
POSITIVE = {  # name: (transform, inverse)
    "exp": (torch.exp, torch.log),
    "relu": (lambda p: F.relu(p) + _FLOOR, lambda x: x - _FLOOR),
    "softplus": (F.softplus, lambda x: x + torch.log(-torch.expm1(-x))),
    "sigmoid": (torch.sigmoid, torch.logit),
    "none": (torch.positive, torch.positive),  # the number itself
}


def _inverse(x: Tensor, option: str, transform: str) -> Tensor:
    """The number that `transform` maps to x. Zeros begin at 1e-4, and with "relu" so does every smaller value."""
    if transform == "sigmoid" and not (x < 1).all():
        raise ValueError(
            f"S4DKernel: {option}='sigmoid' gives values below 1, got modes up to {x.max():g} from init"
        )
    if transform != "none":
        if (x < 0).any():
            text = f"gives positive values, got modes down to {x.min():g} from init and its scale"
            raise ValueError(f"S4DKernel: {option}={transform!r} {text}; 'none' takes any sign")
        least = _FLOOR if transform == "relu" else torch.finfo(torch.float32).tiny
        x = torch.where(x < least, _FLOOR, x)
    return POSITIVE[transform][1](x)


def legs(modes: int) -> tuple[Tensor, Tensor]:
    """Im A > 0, largest first, and B > 0 of S4D-LegS: two tensors (modes,) in float64.

    A[n, k] = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it; with P[n] = sqrt(n + 1/2), A + P
    P^T is -1/2 plus a skew matrix, whose eigenvectors are unitary. Source: arXiv 2206.11893,
    section 4.1.
    """
    n = torch.arange(2 * modes, dtype=torch.float64)
    p = (n + 0.5).sqrt()
    b = (2 * n + 1).sqrt()
    skew = torch.tril(-b[:, None] * b, -1) + p[:, None] * p
    skew = torch.tril(skew, -1)
    skew = skew - skew.T
    values, vectors = torch.linalg.eigh(-1j * skew)
    values, vectors = values[:modes], vectors[:, :modes]  # ascending: the negative ones
    return -values, (vectors.mH @ b.to(vectors.dtype)).abs()


def modes(
    init: str,
    n_ssm: int,
    modes: int,
    *,
    is_real: bool = False,
    real_scale: float = 1.0,
    imag_scale: float = 1.0,
    real_random: bool = False,
    imag_random: bool = False,
    B_init: str | None = None,
    B_scale: float = 1.0,
    normalize_B: bool = False,
) -> tuple[Tensor, Tensor]:
    """A and B, two tensors (n_ssm, modes, 2) in float64.

    real_random draws Re A uniform in (-1, 0], and imag_random draws Im A uniform in [0, modes). Then the scales
    multiply both parts. B_init replaces B: it may be "one", "normal" (complex), "alternating" (1 and -1),
    "unit_cw" (z^n with z = exp(-2 pi i / N)), "unit_ccw" (z^-n) or "legs". normalize_B divides B by
    sqrt(2 sum |B / A|^2). is_real needs the init without imaginary part, "real".
    """
    check_choice("S4DKernel", "init", init, NAMES)
    check_choice("S4DKernel", "B_init", B_init, B_NAMES)
    check_flag("S4DKernel", real_random=real_random, imag_random=imag_random)
    check_flag("S4DKernel", normalize_B=normalize_B)
    if is_real and init != "real":
        raise ValueError(f"S4DKernel: init must be 'real' with is_real=True, got {init!r}")
    if init in _HALVES:
        if n_ssm % 2:
            raise ValueError(f"S4DKernel: n_ssm must be even for init={init!r}, got {n_ssm}")
        halves = [_named(name, n_ssm // 2, modes) for name in _HALVES[init]]
        A, B = (torch.cat(parts) for parts in zip(*halves, strict=True))
    else:
        A, B = _named(init, n_ssm, modes)
    if real_random:
        A[..., 0] = -torch.rand(n_ssm, modes, dtype=torch.float64)
    if imag_random:
        A[..., 1] = modes * torch.rand(n_ssm, modes, dtype=torch.float64)
    A = A * A.new_tensor([real_scale, imag_scale])
    if B_init is not None:
        B = _b(B_init, n_ssm, modes)
    B = B * B_scale
    if normalize_B:
        size = (B.square().sum(-1) / A.square().sum(-1)).sum(-1)
        if not size.isfinite().all():
            raise ValueError(
                f"S4DKernel: normalize_B wants no mode at 0, got one from init={init!r}"
            )
        B = B / (2 * size).sqrt()[:, None, None]
    return A, B


def _named(init: str, n_ssm: int, modes: int) -> tuple[Tensor, Tensor]:
    n = torch.arange(modes, dtype=torch.float64)
    size = 2 * modes
    real, imag, b = torch.full_like(n, -0.5), torch.zeros_like(n), torch.ones_like(n)
    if init == "lin":
        imag = math.pi * n
    elif init == "inv":
        imag = size / math.pi * (size / (2 * n + 1) - 1)
    elif init == "inv2":
        imag = size / math.pi * (size / (n + 1) - 1)
    elif init == "quad":
        imag = (1 + 2 * n) ** 2 / math.pi
    elif init == "real":
        real = -(n + 1)
    elif init == "rand":
        imag = torch.randn(n_ssm, modes, dtype=torch.float64).exp()
    elif init == "legs":
        imag, b = legs(modes)
    else:
        imag = math.pi * n * (1 if init == "fout" else 2)
        real = torch.zeros_like(n) if init == "fout" else real
        b[0] = math.sqrt(0.5)
    shape = (n_ssm, modes)
    pairs = [(real, imag), (b, torch.zeros_like(b))]
    A, B = (torch.stack([t.expand(shape) for t in pair], -1) for pair in pairs)
    return A.clone(), B.clone()


def _b(name: str, n_ssm: int, modes: int) -> Tensor:
    n = torch.arange(modes, dtype=torch.float64)
    zero = torch.zeros_like(n)
    if name == "normal":
        return torch.randn(n_ssm, modes, 2, dtype=torch.float64) * math.sqrt(0.5)
    turn = 2 * math.pi * n / (2 * modes) * (-1 if name == "unit_cw" else 1)
    parts = {
        "one": (zero + 1, zero),
        "alternating": (1 - 2 * (n % 2), zero),
        "unit_cw": (turn.cos(), turn.sin()),
        "unit_ccw": (turn.cos(), turn.sin()),
        "legs": (legs(modes)[1] if name == "legs" else zero, zero),
    }[name]
    return torch.stack(parts, -1).repeat(n_ssm, 1, 1)


def initial(kernel) -> dict[str, Tensor]:
    """The initial parameters of an S4DKernel with its options, by name."""
    A, B = modes(
        kernel.init,
        kernel.n_ssm,
        kernel.modes,
        is_real=kernel.is_real,
        real_scale=kernel.real_scale,
        imag_scale=kernel.imag_scale,
        real_random=kernel.real_random,
        imag_random=kernel.imag_random,
        B_init=kernel.B_init,
        B_scale=kernel.B_scale,
        normalize_B=kernel.normalize_B,
    )
    low, high = math.log(kernel.dt_min), math.log(kernel.dt_max)
    shape = (*kernel.C.shape[: 3 if kernel.is_real else -1], 2)
    if kernel.deterministic:
        log_dt = torch.linspace(low, high, kernel.d_model, dtype=torch.float64)
        log_dt = (
            log_dt.unsqueeze(-1).expand(-1, kernel.modes) if kernel.inv_dt.dim() == 2 else log_dt
        )
        C = torch.zeros(shape, dtype=kernel.C.dtype)
        C[..., 0, 0] = 1
    else:
        log_dt = torch.empty(kernel.inv_dt.shape, dtype=torch.float64).uniform_(low, high)
        C = torch.randn(shape, dtype=kernel.C.dtype) * (1 if kernel.is_real else math.sqrt(0.5))
    inv_dt = log_dt if kernel.dt_transform == "exp" else POSITIVE["softplus"][1](log_dt.exp())
    values = {
        "inv_dt": torch.asinh(inv_dt) if kernel.dt_sinh else inv_dt,
        "inv_A_real": _inverse(-A[..., 0], "real_transform", kernel.real_transform),
        "B": B,
        "C": C,
    }
    if kernel.is_real:
        return values | {"B": B[..., 0], "C": C[..., 0]}
    return values | {"inv_A_imag": _inverse(A[..., 1], "imag_transform", kernel.imag_transform)}
