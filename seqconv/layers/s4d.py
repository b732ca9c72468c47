"""S4D: convolution with the kernel of a diagonal state space model (arXiv 2206.11893)."""

import math
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from seqconv.layers import s4d_init
from seqconv.layers.base import ConvLayer, KernelGenerator, cut
from seqconv.layers.module import fill, kernel_dtype
from seqconv.layers.options import Defaults, refuse
from seqconv.layers.recurrence import Recurrent
from seqconv.layers.s4d_init import POSITIVE
from seqconv.layers.s4d_kernel import Parameters, fit, s4d_kernel, system_of
from seqconv.ops.checks import (
    check_choice,
    check_flag,
    check_learning_rate,
    check_number,
    check_positive,
    check_probability,
)
from seqconv.ops.register import exporting
from seqconv.ops.ssm import BACKENDS, DISCRETIZATIONS, mode_sum, ssm_kernel, weighted_modes


class S4DKernel(KernelGenerator):
    """Kernel generator of S4D; S4DKernel(...)(length) -> (heads, d_model, length), any length.

    The kernel is seqconv.ssm_kernel(log dt, A, C, length, B=B) with modes = d_state / 2, one of each conjugate
    pair. There are n_ssm sets of (A, B), and channel h takes the set h mod n_ssm. With "dss" and
    "dss_softmax" a mode is not half of a pair, but d_state=64 is 32 modes there, too.

    Parameters, all real:
        inv_dt (d_model,), or (d_model, modes) with dt_tie=False: dt = f(inv_dt), where f is exp or
            softplus. log dt begins uniform in [log dt_min, log dt_max]; dt is in steps of the sequence.
            With dt_sinh=True, dt = f(sinh(inv_dt)).
        inv_A_real (n_ssm, modes): Re A = -g(inv_A_real), and real_transform chooses g. inv_A_imag (n_ssm,
            modes): Im A = g'(inv_A_imag), and imag_transform chooses g'. `init` sets where both begin, see
            seqconv.layers.s4d_init.
        B (n_ssm, modes, 2): `init` or `B_init` sets where it begins. It is a buffer with train_B=False.
        C (heads, d_model, modes, 2): begins complex standard normal.
    With is_real=True there are modes = d_state real modes: no imaginary parts, B (n_ssm, modes), and C (heads,
    d_model, modes), which begins standard normal. The factor 2 of the kernel stays. With deterministic=True
    nothing is drawn: log dt is evenly spaced over the channels, and C = (1, 0, 0, ...).

    Optimiser: inv_dt, inv_A_real, inv_A_imag and B take min(lr, `lr` here) and no weight decay. With
    lr=0 they are buffers. C is trained like any weight.

    The other options are explained in S4D. Source: arXiv 2206.11893, sections 3 and 4.
    """

    shown = ("d_state", "init", "discretization")
    meaning = ("discretization", "real_transform", "imag_transform", "dt_transform", "dt_sinh")
    meaning += ("bandlimit",)
    channel_axes: ClassVar = {"C": 1, "B": 0, "inv_dt": 0, "inv_A_real": 0, "inv_A_imag": 0}
    resamples = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        heads: int = 1,
        n_ssm: int | None = None,
        init: str = "lin",
        discretization: str = "zoh",
        real_transform: str = "exp",
        imag_transform: str = "none",
        is_real: bool = False,
        real_scale: float = 1.0,
        imag_scale: float = 1.0,
        real_random: bool = False,
        imag_random: bool = False,
        B_init: str | None = None,
        B_scale: float = 1.0,
        normalize_B: bool = False,
        train_B: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_tie: bool = True,
        dt_transform: str = "exp",
        dt_sinh: bool = False,
        deterministic: bool = False,
        bandlimit: float | None = None,
        kernel_dropout: float = 0.0,
        lr: float = 1e-3,
        backend: str = "auto",
    ):
        super().__init__()
        name = "S4DKernel"
        n_ssm = d_model if n_ssm is None else n_ssm
        check_positive(name, d_model=d_model, d_state=d_state, heads=heads, n_ssm=n_ssm)
        check_choice(name, "discretization", discretization, DISCRETIZATIONS)
        check_choice(name, "real_transform", real_transform, tuple(POSITIVE))
        check_choice(name, "imag_transform", imag_transform, tuple(POSITIVE))
        check_choice(name, "dt_transform", dt_transform, ("exp", "softplus"))
        check_choice(name, "backend", backend, BACKENDS)
        check_flag(name, is_real=is_real, train_B=train_B, dt_tie=dt_tie, dt_sinh=dt_sinh)
        check_flag(name, deterministic=deterministic)
        check_learning_rate(name, lr=lr)
        check_probability(name, kernel_dropout=kernel_dropout)
        if d_state % 2 and not is_real:
            raise ValueError(
                f"S4DKernel: d_state must be even (modes come in conjugate pairs), got {d_state}"
            )
        if d_model % n_ssm:
            raise ValueError(f"S4DKernel: n_ssm must divide d_model={d_model}, got {n_ssm}")
        check_number(name, dt_min=dt_min, dt_max=dt_max)
        if not 0 < dt_min <= dt_max < math.inf:
            wanted = "0 < dt_min <= dt_max < inf wanted"
            raise ValueError(f"{name}: {wanted}, got dt_min={dt_min}, dt_max={dt_max}")
        if bandlimit is not None:
            check_number(name, bandlimit=bandlimit)
            if not bandlimit > 0:
                raise ValueError(f"{name}: bandlimit must be positive or None, got {bandlimit}")
        modes = d_state if is_real else d_state // 2
        shape = (d_model,) if dt_tie else (d_model, modes)
        parts = () if is_real else (2,)
        like: dict[str, Any] = {"dtype": kernel_dtype()}
        self.inv_dt = nn.Parameter(torch.empty(shape, **like))
        self.inv_A_real = nn.Parameter(torch.empty(n_ssm, modes, **like))
        if not is_real:
            self.inv_A_imag = nn.Parameter(torch.empty(n_ssm, modes, **like))
        B = torch.empty(n_ssm, modes, *parts, **like)
        if train_B:
            self.B = nn.Parameter(B)
        else:
            self.register_buffer("B", B)
        self.C = nn.Parameter(torch.empty(heads, d_model, modes, *parts, **like))
        self.d_model, self.d_state, self.heads = d_model, d_state, heads
        self.is_real, self.n_ssm, self.modes = is_real, n_ssm, modes
        self.discretization, self.backend = discretization, backend
        self.real_transform, self.imag_transform = real_transform, imag_transform
        self.dt_transform, self.dt_sinh, self.bandlimit = dt_transform, dt_sinh, bandlimit
        self.train_B, self.dt_tie = train_B, dt_tie
        self.init, self.real_scale, self.imag_scale = init, real_scale, imag_scale
        self.real_random, self.imag_random = real_random, imag_random
        self.B_init, self.B_scale, self.normalize_B = B_init, B_scale, normalize_B
        self.dt_min, self.dt_max, self.deterministic = dt_min, dt_max, deterministic
        self.kernel_dropout = nn.Dropout(kernel_dropout)
        self.override("inv_dt", "inv_A_real", "inv_A_imag", "B", lr=lr, weight_decay=0.0)
        self.reset_parameters()

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore  # in the base class a constant
        parts = ("C", "B", "inv_dt", "inv_A_real", "inv_A_imag")
        return parts[:-1] if self.is_real else parts

    def reset_parameters(self) -> None:
        """Draws dt, A, B and C anew, as at construction."""
        # Parameters on the meta device keep no values, but options that exclude each other are refused there, too.
        device = torch.device("cpu") if self.C.device.type == "meta" else self.C.device
        with device:
            fill(self, s4d_init.initial(self))

    def system(
        self, rate: float = 1.0, channels: slice | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The system in float64: log dt (d_model,) or (d_model, modes), A and B (d_model, modes, 2), and C (heads,
        d_model, modes, 2); or that of these channels."""
        if channels is not None:
            return system_of(*self._arguments(self.select(self.read(), channels), rate, 1))
        return system_of(*self._arguments(self.read(), rate, self.d_model // self.n_ssm))

    def _arguments(self, tensors: list[Tensor], rate: float, copies: int) -> tuple:
        """The arguments of system_of."""
        names = [self.discretization, self.dt_transform, self.real_transform, self.imag_transform]
        return tensors, names, copies, self.dt_sinh, self.bandlimit, rate

    @property
    def _own_system(self) -> bool:
        """Whether no subclass has another system(), which may read anything."""
        return type(self).system is S4DKernel.system and "system" not in vars(self)

    @property
    def makes_parts(self) -> bool:
        return super().makes_parts and self._own_system

    def select(self, tensors: list[Tensor], channels: slice) -> list[Tensor]:
        """The tensors that `reads` names, cut to these channels, each with a set (A, B) of its own."""
        C, B, inv_dt, *A = tensors
        if self.n_ssm == self.d_model:
            B, *A = (cut(t, 0, channels) for t in (B, *A))
        else:
            sets = torch.arange(self.d_model, device=B.device)[channels] % self.n_ssm
            B, *A = (t[sets] for t in (B, *A))
        return [cut(C, 1, channels), B, cut(inv_dt, 0, channels), *A]

    def generate(self, tensors: list[Tensor], length: int, rate: float) -> Tensor:
        """The kernel of the system, whose dt the rate multiplies."""
        return self._generate(tensors, length, rate, self.d_model // self.n_ssm)

    def part(self, tensors: list[Tensor], length: int, rate: float, channels: slice) -> Tensor:
        return self._generate(self.select(tensors, channels), length, rate, 1)

    def _generate(self, tensors: list[Tensor], length: int, rate: float, copies: int) -> Tensor:
        """copies is the number of channels that share a set (A, B), in turn."""
        (_, *options), C = self._arguments(tensors, rate, copies), tensors[0]
        single, fused = C.dtype != torch.float64, self.backend == "auto"
        unchanged = self._own_system
        known = unchanged and self.discretization != "dss_softmax"
        if (
            known
            and self.backend != "keops"
            and fit(tensors, copies, self.is_real)
            and not exporting()
            and (torch.compiler.is_compiling() or not torch._C._is_tracing())
        ):
            k = s4d_kernel(Parameters(*tensors), length, single, fused, *options)
            return self.kernel_dropout(k)
        log_dt, A, B, c = system_of(tensors, *options) if unchanged else self.system(rate)
        fits = A.shape == B.shape == c.shape[1:] and log_dt.shape in (A.shape[:1], A.shape[:2])
        if known and fits:
            a, w = weighted_modes(log_dt, A, B, c, self.discretization)
            return self.kernel_dropout(mode_sum(a, w, length, single, self.backend))
        options = {"discretization": self.discretization, "backend": self.backend}
        k = ssm_kernel(log_dt, A, c.to(C.dtype), length, B=B, **options)
        return self.kernel_dropout(k)


KERNEL, BLOCK = Defaults(S4DKernel), Defaults(ConvLayer)


class S4D(Recurrent):
    """Diagonal state space layer, (batch, length, d_model) -> the same.

    y = GLU(W dropout(gelu(K * x + skip x)) + b), K[l] = 2 Re sum_n C_n Bbar_n Abar_n^l, the response of
    x' = A x + B u, y = 2 Re C x with A diagonal, in steps of dt, by `discretization`:

        "zoh"          Abar = exp(dt A)                        Bbar = B (exp(dt A) - 1) / A
        "bilinear"     Abar = (1 + dt A / 2) / (1 - dt A / 2)  Bbar = B dt / (1 - dt A / 2)
        "dss"          as "zoh", K without the factor 2
        "dss_softmax"  as "dss", Bbar divided by exp(dt A length) - 1; more of it in seqconv.ssm_kernel

    The sum has modes = d_state / 2 terms, one of each conjugate pair. "dss" and "dss_softmax" have as many
    terms, but they are not halves of pairs. `init` sets A, with N = d_state and n = 0 ... modes - 1:

        "lin"   -1/2 + i pi n                              "real"  -(n + 1)
        "inv"   -1/2 + i (N / pi) (N / (2 n + 1) - 1)      "rand"  -1/2 + i exp(standard normal)
        "inv2"  -1/2 + i (N / pi) (N / (n + 1) - 1)        "foud"  -1/2 + 2 pi i n
        "quad"  -1/2 + i (1 + 2 n)^2 / pi                  "fout"  i pi n
        "legs"  -1/2 + i y, with i y the eigenvalues of HiPPO-LegS's skew part
        "diag"  half of the sets inv, half lin             "hippo" half legs, half fout

    Where a transform gives positive values only, zeros begin at 1e-4, and with "relu" so does every smaller value.
    B is 1, except for "legs", "fout" and "foud": see seqconv.layers.s4d_init. The state_dict does not depend on
    the length. It loads into a layer of the same options only.

    Parameters, all real. The following take min(lr, kernel_lr) and no weight decay: kernel.inv_dt (d_model,), which is
    log dt and begins uniform in [log dt_min, log dt_max]; inv_A_real (n_ssm, modes), which is log(-Re A);
    inv_A_imag (n_ssm, modes), which is Im A; and B (n_ssm, modes, 2). `init` sets where the last three begin. The
    following are trained like any weight: C (heads, d_model, modes, 2), with twice the heads if bidirectional, which
    begins complex standard normal; skip (heads, d_model), which begins as N(0, 1); and the weight (2 d_model,
    heads d_model) and bias of linear, which begin as torch's. S4DKernel describes the variants.

    Args:
        d_model: the number of channels.
        d_state: the real size of each channel's state, which is even: twice the number of modes.
        heads: the number of kernels per channel. The linear map takes heads * d_model inputs.
        bidirectional: True adds as many kernels for the future. They are shifted by one, because lag 0
            belongs to the kernels for the past.
        n_ssm: the number of sets of (A, B), which the channels share in turn. It must divide d_model; None
            gives each channel a set of its own.
        init, discretization: as above. "dss_softmax" depends on the length and has no step().
        real_transform, imag_transform: the functions that give -Re A and Im A from their parameters: "exp",
            "relu", "softplus", "sigmoid" or "none". With "none" for the real part a layer may become unstable.
        is_real, real_scale, imag_scale, real_random, imag_random, B_init, B_scale, normalize_B, deterministic:
            variants of the initialisation, see S4DKernel and seqconv.layers.s4d_init.
        train_B: False keeps B as it is.
        dt_min, dt_max: the range of the initial dt, in steps of the sequence. dt_tie: True gives all modes of
            a channel one dt. dt_transform: "exp" or "softplus". dt_sinh: see S4DKernel.
        bandlimit: modes whose dt |Im A| / pi is not below it are left out. 1 is the Nyquist limit.
        kernel_dropout: the probability of dropout of single taps, in training.
        activation: the function after the convolution: "gelu", "silu", "relu" or None.
        dropout: the probability of dropout after the activation. tie_dropout: True draws one mask per sample
            and channel for all times.
        postact: "glu", or None for a plain linear map.
        kernel_lr: the learning rate that param_groups gives to dt, A and B, without weight decay, unless its
            own lr is smaller. With 0 they are buffers.
        backend: the backend of seqconv.ssm_kernel.

    dt, A, B and C stay float32 under .to(bfloat16) and .half(). layer(x, rate=2.0) takes inputs that are
    sampled half as often as those of training. init_state, step and prefill run a causal layer as
    a recurrence, without kernel dropout.

    Source: arXiv 2206.11893. Example:
        >>> layer = S4D(8)
        >>> layer(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    generator = S4DKernel

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = KERNEL.d_state,
        heads: int = KERNEL.heads,
        bidirectional: bool = False,
        activation: str | None = BLOCK.activation,
        dropout: float = BLOCK.dropout,
        tie_dropout: bool = BLOCK.tie_dropout,
        postact: str | None = BLOCK.postact,
        kernel_lr: float = KERNEL.lr,
        n_ssm: int | None = KERNEL.n_ssm,
        init: str = KERNEL.init,
        discretization: str = KERNEL.discretization,
        real_transform: str = KERNEL.real_transform,
        imag_transform: str = KERNEL.imag_transform,
        is_real: bool = KERNEL.is_real,
        real_scale: float = KERNEL.real_scale,
        imag_scale: float = KERNEL.imag_scale,
        real_random: bool = KERNEL.real_random,
        imag_random: bool = KERNEL.imag_random,
        B_init: str | None = KERNEL.B_init,
        B_scale: float = KERNEL.B_scale,
        normalize_B: bool = KERNEL.normalize_B,
        train_B: bool = KERNEL.train_B,
        dt_min: float = KERNEL.dt_min,
        dt_max: float = KERNEL.dt_max,
        dt_tie: bool = KERNEL.dt_tie,
        dt_transform: str = KERNEL.dt_transform,
        dt_sinh: bool = KERNEL.dt_sinh,
        deterministic: bool = KERNEL.deterministic,
        bandlimit: float | None = KERNEL.bandlimit,
        kernel_dropout: float = KERNEL.kernel_dropout,
        backend: str = KERNEL.backend,
        **unknown: NoReturn,
    ):
        options = locals()
        refuse(self, S4D, unknown)
        check_flag("S4D", bidirectional=bidirectional)
        check_positive("S4D", d_model=d_model, d_state=d_state, heads=heads)
        directions = heads * (1 + bidirectional)
        kernel = S4DKernel(d_model, **KERNEL.among(options, heads=directions, lr=kernel_lr))
        super().__init__(d_model, kernel, **BLOCK.among(options))
