"""The definition of every fast function of the package, in plain torch: slow, short, differentiable.

`fftconv` is the O(L K) sum itself, `fftconv_fft` the usual torch.fft formulation (zero-padded rfft,
product, irfft); both have the signature of `seqconv.fftconv` and take any real dtype. `backward` is
the gradient of `fftconv_fft` in closed form, `butterfly_backward` that of `butterfly`. `ssm_kernel`
is the Vandermonde sum of S4D, and `ssm_step` one step of its recurrence. No argument is checked here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def fftconv(
    u,
    k,
    skip=None,
    *,
    k_rev=None,
    pre_gate=None,
    post_gate=None,
    bias=None,
    activation=None,
    mode="causal",
    layout="bhl",
):
    """The definition, term by term:

    x = pre_gate * u
    v[t] = sum_{s<=t} k[t-s] x[s] + sum_{s>t} k_rev[s-t-1] x[s] + skip * x[t]
    y = post_gate * activation(v + bias)

    In circular mode v[t] = sum_s k[(t-s) mod length] x[s] + skip * x[t].
    """

    def convolve(x, k, k_rev):
        length = x.shape[-1]
        v = torch.zeros((x.shape[0], *k.shape[1:-1], length), dtype=x.dtype, device=x.device)
        for j in range(min(k.shape[-1], length)):
            tap = k[..., j : j + 1]
            if mode == "circular":
                v = v + tap * x.roll(j, -1)
            else:
                v = v + F.pad(tap * x[..., : length - j], (j, 0))
        for j in range(1, min(0 if k_rev is None else k_rev.shape[-1], length - 1) + 1):
            v = v + F.pad(k_rev[..., j - 1 : j] * x[..., j:], (0, j))
        return v

    return _operator(convolve, u, k, skip, k_rev, pre_gate, post_gate, bias, activation, layout)


def fftconv_fft(
    u,
    k,
    skip=None,
    *,
    k_rev=None,
    pre_gate=None,
    post_gate=None,
    bias=None,
    activation=None,
    mode="causal",
    layout="bhl",
):
    """The same through torch.fft: irfft(rfft(x, n) rfft(k, n))[:length], n large enough that nothing wraps.

    No real transform has an odd size: torch's inverse of such a one is wrong on Apple's GPUs. Circular rows of
    odd length take complex transforms.
    """

    def convolve(x, k, k_rev):
        length = x.shape[-1]
        if mode == "circular" and length % 2:
            return torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(k, length)).real
        n = length if mode == "circular" else fft_size(length, *_reach(length, k, k_rev))
        product = torch.fft.rfft(x, n) * _spectrum(k, k_rev, length, n)
        return torch.fft.irfft(product, n)[..., :length]

    return _operator(convolve, u, k, skip, k_rev, pre_gate, post_gate, bias, activation, layout)


def fftconv_packed(u, k, cu_seqlens, skip=None, *, layout="bhl", **options):
    """Rows by themselves, one after another: fftconv of u[:, cu_seqlens[i] : cu_seqlens[i + 1]] for every i.

    u and pre_gate (channels, total), post_gate and y as them, or with heads (heads, channels, total); with
    layout="blh" time is the first axis. k and k_rev may have one kernel a row, (rows, heads, channels, K).
    """
    time = -1 if layout == "bhl" else 0
    found = []
    for i, (begin, end) in enumerate(
        zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    ):
        own = dict(options)
        for name in ("pre_gate", "post_gate"):
            if own.get(name) is not None:
                own[name] = own[name].narrow(time, begin, end - begin).unsqueeze(0)
        per_row = k.dim() == 4
        if own.get("k_rev") is not None and per_row:
            own["k_rev"] = own["k_rev"][i : i + 1]
        row = u.narrow(time, begin, end - begin).unsqueeze(0)
        y = fftconv(row, k[i : i + 1] if per_row else k, skip, layout=layout, **own)
        found.append(y.squeeze(0))
    heads = k.shape[-3:-2]
    if not found:
        return u.new_zeros(
            (*heads, *u.shape) if layout == "bhl" else (u.shape[0], *heads, u.shape[1])
        )
    return torch.cat(found, time)


def _operator(convolve, u, k, skip, k_rev, pre_gate, post_gate, bias, activation, layout):
    compute = torch.promote_types(u.dtype, torch.float32)
    if layout == "blh":
        u, pre_gate, post_gate = (
            t if t is None else t.movedim(1, -1) for t in (u, pre_gate, post_gate)
        )
    x = u.to(compute)
    if pre_gate is not None:
        x = x * pre_gate.to(compute)
    x = x.unsqueeze(1)  # (b 1 h l)
    heads, per_head = (k.shape[-3], True) if k.dim() > 2 else (1, False)
    k4 = _with_axes(k, 4).to(compute)  # (b c h k), leading axes may be 1
    k4_rev = None if k_rev is None else _with_axes(k_rev, 4).to(compute)
    v = convolve(x, k4, k4_rev) if u.numel() and heads else x.expand(-1, heads, -1, -1)
    if skip is not None:
        v = v + skip.to(compute).unsqueeze(-1) * x
    if bias is not None:
        v = v + bias.to(compute).unsqueeze(-1)
    y = activate(v, activation)
    if not per_head:
        y = y.squeeze(1)
    if post_gate is not None:
        y = y * post_gate.to(compute)
    y = y.to(u.dtype)
    return y.movedim(-1, 1) if layout == "blh" else y


def _with_axes(t: Tensor, axes: int) -> Tensor:
    return t.reshape((1,) * (axes - t.dim()) + t.shape)


def activate(v: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        return F.gelu(v)
    if activation == "silu":
        return F.silu(v)
    return F.relu(v) if activation == "relu" else v


def slope(v: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        cdf = 0.5 * torch.erfc(v * -math.sqrt(0.5))
        return cdf + v * torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
    if activation == "silu":
        s = torch.sigmoid(v)
        return s + v * s * (1 - s)
    return (v > 0).to(v.dtype) if activation == "relu" else torch.ones_like(v)


def _reach(length: int, k: Tensor, k_rev: Tensor | None) -> tuple[int, int]:
    """How many taps of k and of k_rev can reach an output."""
    return min(k.shape[-1], length), 0 if k_rev is None else min(
        k_rev.shape[-1], max(length - 1, 0)
    )


def fft_size(length: int, taps: int, taps_rev: int = 0) -> int:
    """Smallest even 2^a 3^b 5^c at which neither tail of the convolution reaches the first `length` outputs."""
    n = max(length + max(taps, taps_rev), 2)
    while True:
        n += n % 2
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 2


def _spectrum(k: Tensor, k_rev: Tensor | None, length: int, n: int) -> Tensor:
    """rfft of the kernel laid on a circle of n: lag j at j, lag -m at n - m. Taps that reach no output are cut."""
    k = k[..., :length]
    circle = F.pad(k, (0, n - k.shape[-1]))
    if k_rev is not None:
        k_rev = k_rev[..., : length - 1]
        circle = circle + F.pad(k_rev.flip(-1), (n - k_rev.shape[-1], 0))
    return torch.fft.rfft(circle)


def backward(dy, u, k, k_rev, skip, pre_gate, post_gate, bias, activation):
    """Gradients of fftconv_fft(layout="bhl") with respect to u, k, k_rev, skip, pre_gate, post_gate and bias.

    Returns seven tensors in the inputs' dtypes, None where the input is None. Conjugates are
    computed, never lazy: inside an opaque operator torch.compile drops the lazy flag and the sign
    with it.
    """
    compute = torch.promote_types(u.dtype, torch.float32)
    inputs = (u, k, k_rev, skip, pre_gate, post_gate, bias)
    wide = [None if t is None else t.to(compute) for t in (dy, *inputs)]
    dy, wide_u, wide_k, wide_k_rev, wide_skip, pre, post, wide_bias = wide
    length = u.shape[-1]
    x = (wide_u if pre is None else wide_u * pre).unsqueeze(1)  # (b 1 h l)
    k4 = _with_axes(wide_k, 4)
    k4_rev = None if k_rev is None else _with_axes(wide_k_rev, 4)
    taps, taps_rev = _reach(length, k, k_rev)
    n = fft_size(length, taps, taps_rev)
    x_f, k_f = torch.fft.rfft(x, n), _spectrum(k4, k4_rev, length, n)
    skip4 = None if skip is None else _with_axes(wide_skip.unsqueeze(-1), 4)

    v = torch.fft.irfft(x_f * k_f, n)[..., :length]
    if skip4 is not None:
        v = v + skip4 * x
    if bias is not None:
        v = v + _with_axes(wide_bias.unsqueeze(-1), 4)
    dv = dy.reshape(v.shape)
    dpost = None if post is None else (dv * activate(v, activation)).reshape(dy.shape)
    if post is not None:
        dv = dv * post.reshape(v.shape)
    dv = dv * slope(v, activation)

    dv_f = torch.fft.rfft(dv, n)
    dx = torch.fft.irfft((dv_f * k_f.conj_physical()).sum(1), n)[..., :length]
    if skip4 is not None:
        dx = dx + (skip4 * dv).sum(1)
    per_sample = k.dim() == 4
    dk_f = dv_f * x_f.conj_physical()
    dk = torch.fft.irfft(dk_f if per_sample else dk_f.sum(0, keepdim=True), n)
    grads = [
        dx if pre is None else dx * pre,
        F.pad(dk[..., :taps], (0, k.shape[-1] - taps)).reshape(k.shape),
        None,
        None,
        None if pre is None else dx * wide_u,
        dpost,
        None
        if bias is None
        else dv.sum((0, 3)).sum_to_size((*[1] * (2 - bias.dim()), *bias.shape)).reshape(bias.shape),
    ]
    if k_rev is not None:
        tail = dk[..., n - taps_rev :].flip(-1)
        grads[2] = F.pad(tail, (0, k_rev.shape[-1] - taps_rev)).reshape(k_rev.shape)
    if skip is not None:
        dskip = (dv * x).sum((0, 3))  # (c h)
        grads[3] = dskip if skip.dim() == 2 else dskip.sum(0)
    return tuple(None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))


def butterfly(
    x: Tensor,
    factors: dict[int, Tensor],
    radices: tuple[int, ...],
    activation: str | None = None,
) -> Tensor:
    """The transform of real rows by passes of small matrices with fixed twiddles between them; exact Fourier
    matrices give the discrete Fourier transform.

    Pass d takes the r_d points at distance s_d = r_{d+1} r_{d+2} ... through its matrix and multiplies
    result p of column j by exp(-2 pi i p j / (r_d s_d)). Source: arXiv 2302.06646, section 3.4.

    Args:
        x: (batch, channels, length), padded with zeros to n = product of radices.
        factors: for every radix (heads, radix, radix, 2), real and imaginary parts; channels are split
            evenly among heads. Shared by all passes of that radix.
        activation: of real and imaginary parts after every pass.

    Returns:
        (batch, channels, n, 2), frequencies in natural order; at least in float32.
    """
    *_, z = _butterfly_passes(x, factors, radices, activation)
    # the digits of the frequency, the first pass's lowest, lie from the slowest axis on
    z = z.reshape(*x.shape[:2], *radices).permute(0, 1, *range(len(radices) + 1, 1, -1))
    return torch.view_as_real(z.reshape(*x.shape[:2], math.prod(radices)).contiguous())


def _butterfly_passes(x, factors, radices, activation=None) -> list[Tensor]:
    """What every pass begins with, (batch, heads, channels of one, blocks, radix, s), and what the last one gives."""
    batch, channels, length = x.shape
    x = F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, math.prod(radices) - length))
    z, steps = torch.complex(x, torch.zeros_like(x)), []
    s, blocks = z.shape[-1], 1
    for radix in radices:
        matrix = _complex(factors[radix], z)
        s //= radix
        steps.append(z.reshape(batch, len(matrix), channels // len(matrix), blocks, radix, s))
        z = torch.einsum("hpi,bhcmis->bhcmps", matrix, steps[-1]) * _twiddles(radix, s, z)
        if activation is not None:
            z = torch.complex(activate(z.real, activation), activate(z.imag, activation))
        blocks *= radix
    return [*steps, z]


def _numbers(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())


def _complex(pairs: Tensor, like: Tensor) -> Tensor:
    return torch.complex(*pairs.to(like.real.dtype).unbind(-1))


def _twiddles(radix: int, s: int, like: Tensor) -> Tensor:
    """(radix, s), from float64."""
    p, j = (torch.arange(m, dtype=torch.float64, device=like.device) for m in (radix, s))
    turn = p[:, None] * j * (-2 * math.pi / (radix * s))
    return torch.polar(torch.ones_like(turn), turn).to(like.dtype)


def butterfly_backward(
    dz: Tensor, x: Tensor, factors: dict[int, Tensor], radices: tuple[int, ...]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Gradients of x and of the factors: the passes from last to first, each by its adjoint. A factor's is the
    sum of outer products with what its passes began with. No lazy conjugates: see `backward`."""
    *steps, last = _butterfly_passes(x, factors, radices)
    g = _complex(dz, last).reshape(*x.shape[:2], *radices[::-1])
    g = g.permute(0, 1, *range(len(radices) + 1, 1, -1))
    grads = {radix: torch.zeros_like(f) for radix, f in factors.items()}
    for radix, z in zip(radices[::-1], steps[::-1], strict=True):
        g = g.reshape(z.shape) * _twiddles(radix, z.shape[-1], z).conj_physical()
        dmatrix = torch.einsum("bhcmps,bhcmis->hpi", g, z.conj_physical())
        grads[radix] += torch.view_as_real(dmatrix).to(grads[radix].dtype)
        g = torch.einsum("hpi,bhcmps->bhcmis", _complex(factors[radix], z).conj_physical(), g)
    dx = g.real.reshape(*x.shape[:2], math.prod(radices))[..., : x.shape[-1]]
    return dx.to(x.dtype).contiguous(), grads


def butterfly_product(u: Tensor, k: Tensor, length: int) -> Tensor:
    """Re ifft(u k)[:length], (batch, heads, channels, length): u (batch, channels, n, 2) and k (heads, channels, n, 2)
    are spectra, real and imaginary parts last, which need not be those of real signals."""
    product = _numbers(u).unsqueeze(1) * _numbers(k)
    # torch.fft refuses to transform nothing.
    return (torch.fft.ifft(product) if product.numel() else product).real[..., :length]


def butterfly_product_backward(dv: Tensor, u: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of u and k. That of the product is fft(dv) / n. No lazy conjugates: see `backward`."""
    g = torch.fft.fft(dv, u.shape[2], norm="forward")
    du = (g * _numbers(k).conj_physical()).sum(1)
    dk = (g * _numbers(u).conj_physical().unsqueeze(1)).sum(0)
    return torch.view_as_real(du), torch.view_as_real(dk)


def ssm_kernel(log_dt, A, C, length, *, B=None, discretization="zoh"):
    """seqconv.ssm_kernel by its definition, in complex float64; takes memory channels x modes x length."""
    a, c = (torch.view_as_complex(t.double().contiguous()) for t in (A, C))
    dt = log_dt.double().exp()
    dt = dt if dt.dim() == 2 else dt.unsqueeze(-1)
    log, b = dt * a, torch.expm1(dt * a) / a
    if discretization == "bilinear":
        log, b = torch.log((1 + dt * a / 2) / (1 - dt * a / 2)), dt / (1 - dt * a / 2)
    if B is not None:
        b = b * torch.view_as_complex(B.double().contiguous())
    powers = torch.exp(log.unsqueeze(-1) * torch.arange(length, device=C.device))  # (h n l)
    if discretization == "dss_softmax":
        powers = powers / powers.sum(-1, keepdim=True)
        b = b / torch.expm1(dt * a)
    k = torch.einsum("chn,hn,hnl->chl", c, b, powers).real
    k = k if discretization.startswith("dss") else 2 * k
    return k if C.dtype == torch.float64 else k.float()


def ssm_step(state, x, skip, power, input, output, activation=None):
    """One step of a diagonal state space model: y (batch, heads channels) in x's dtype, and the new state.

    new = power state + input x,  y = activation(Re sum_n output new + skip x)

    state (batch, channels, modes, 2), power and input (channels, modes, 2) and output (heads, channels, modes, 2)
    hold real and imaginary parts in float64. x is (batch, channels), skip (heads, channels), in any dtype.
    """
    u = x.to(state.dtype)
    re, im = state.unbind(-1)
    turned = torch.stack([-im, re], -1)
    new = power[..., :1] * state + (power[..., 1:] * turned + input * u[..., None, None])
    weights = output * output.new_tensor([1.0, -1.0])
    v = torch.einsum("chm,bhm->bch", weights.flatten(-2), new.flatten(-2))
    return activate(v + skip * u.unsqueeze(1), activation).flatten(1).to(x.dtype), new
