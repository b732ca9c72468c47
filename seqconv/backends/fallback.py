"""Everything in torch, on any device: torch.fft and torch.bmm, slower with the same answers."""

import sys

import torch
from torch import Tensor

from seqconv import reference
from seqconv.backends import exact
from seqconv.backends.inputs import IS_SIGNAL
from seqconv.backends.offsets import offsets_of
from seqconv.backends.pack import alike, dense_rows, reach
from seqconv.backends.protocol import Explanation, Request
from seqconv.backends.tiles import spectra as stream_spectra  # noqa: F401
from seqconv.backends.tiles import step as stream_step  # noqa: F401

name = "reference"
always = frozenset(
    (
        *("fftconv", "fftconv_packed", "ssm", "s4d_kernel", "ssm_step", "stream"),
        *("butterfly", "butterfly_product"),
    )
)


def why_not(request: Request) -> None:
    return None


def stream_name() -> str:
    return name


def explain(request: Request) -> Explanation:
    threads = torch.get_num_threads()
    if request.operator == "fftconv_packed":
        lengths = offsets_of(request.inputs.cu_seqlens, request.inputs.u.shape[-1]).diff()
        longest = int(lengths.max()) if len(lengths) else 0
        _, k, k_rev, *_ = request.inputs
        n = reference.fft_size(longest, *reach(longest, k, k_rev))
        plan = f"{len(lengths)} rows of {len(lengths.unique())} lengths, each length by itself"
        return Explanation("reference", "torch.fft", n, 1, None, threads, None, plan)
    if request.operator != "fftconv":
        return Explanation("torch", "matrix product", None, 1, None, threads, None)
    if request.options[2:] == (True,):
        return exact.explain(_this, request)
    u, k, k_rev, *_ = request.inputs
    n = reference.fft_size(u.shape[-1], *reach(u.shape[-1], k, k_rev))
    return Explanation("reference", "torch.fft", n, 1, None, threads, None)


def fftconv(y: Tensor, inputs, activation: str) -> None:
    y.copy_(reference.fftconv_fft(**inputs._asdict(), activation=activation))


def _write(grads, values) -> None:
    for grad, value in zip(grads, values, strict=True):
        if grad is not None:
            grad.copy_(value)


def fftconv_gradients(grads, dy: Tensor, inputs, activation: str) -> None:
    _write(grads, reference.backward(dy, *inputs, activation))


_this = sys.modules[__name__]


def fftconv_exact(y: Tensor, inputs, activation: str) -> None:
    exact.forward(_this, y, inputs, activation)


def fftconv_exact_gradients(grads, dy: Tensor, inputs, activation: str) -> None:
    exact.gradients(_this, grads, dy, inputs, activation)


def _packed(t: Tensor) -> Tensor:
    """(rows, ..., length) -> (..., steps), row by row."""
    return t.movedim(0, -2).flatten(-2)


def reads_offsets(offsets: Tensor) -> bool:
    return False  # they are checked, and then on the host


def fftconv_packed(y: Tensor, inputs, offsets: Tensor, activation: str) -> None:
    for rows, length, place in alike(offsets, y.device):
        dense = dense_rows(inputs, rows, length, place)
        y[..., place] = _packed(reference.fftconv_fft(**dense._asdict(), activation=activation))


def fftconv_packed_gradients(grads, dy: Tensor, inputs, offsets: Tensor, activation: str) -> None:
    sums = [None if g is None else g.new_zeros(g.shape, dtype=_wide(g)) for g in grads]
    for rows, length, place in alike(offsets, dy.device):
        dense = dense_rows(inputs, rows, length, place)
        part_dy = dense_rows(inputs._replace(u=dy), rows, length, place).u
        # Gradients of kernels are added up unrounded.
        wide = [t if t is None else t.to(_wide(t)) for t in dense]
        for total, part, signal in zip(
            sums, reference.backward(part_dy, *wide, activation), IS_SIGNAL, strict=True
        ):
            if total is None:
                continue
            if signal:
                total[..., place] = _packed(part)
            elif total.dim() == 4:
                total[rows] = part
            else:
                total += part
    _write(grads, sums)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def butterfly(z: Tensor, inputs, radices: tuple[int, ...]) -> None:
    z.copy_(reference.butterfly(inputs.x, split(inputs.matrices, radices), radices))


def butterfly_gradients(grads, dz: Tensor, inputs, radices: tuple[int, ...]) -> None:
    x, matrices = inputs
    dx, factors = reference.butterfly_backward(dz, x, split(matrices, radices), radices)
    _write(grads, (dx, join(factors, radices)))


def butterfly_product(v: Tensor, inputs) -> None:
    v.copy_(reference.butterfly_product(*inputs, v.shape[-1]))


def butterfly_product_gradients(grads, dv: Tensor, inputs) -> None:
    _write(grads, reference.butterfly_product_backward(dv, *inputs))


def radix_sizes(radices) -> list[int]:
    """The sizes that occur, each once."""
    return list(dict.fromkeys(radices))


def split(matrices: Tensor, radices) -> dict[int, Tensor]:
    """(heads, size, size, 2) of every size, from all of them flattened, (heads, sum of size^2, 2)."""
    sizes = radix_sizes(radices)
    parts = matrices.split([size * size for size in sizes], 1)
    return {s: p.unflatten(1, (s, s)) for s, p in zip(sizes, parts, strict=True)}


def join(factors: dict[int, Tensor], radices) -> Tensor:
    """What `split` takes apart."""
    return torch.cat([factors[size].flatten(1, 2) for size in radix_sizes(radices)], 1)


def s4d_modes(a: Tensor, w: Tensor, inputs, options) -> bool:
    return False


def s4d_modes_gradients(grads, da: Tensor, dw: Tensor, inputs, options) -> None:
    raise NotImplementedError("torch differentiates the formula of the modes")


# ---- sums of exponentials: the blocked product that the CPU kernels compute, through torch.bmm ----

_CHUNK = 1 << 22  # elements of a table


def _cis(a: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(a steps), (h n) and (q) -> (h n q)."""
    size = (a[..., :1] * steps).exp()
    phase = a[..., 1:] * steps
    return size * phase.cos(), size * phase.sin()


def _powers(a: Tensor, count: int, step: int, fine: int = 16) -> tuple[Tensor, Tensor]:
    """exp(a step j), j < count, from two shorter lists: a product costs less than a sine."""
    if count <= 2 * fine:
        return _cis(a, step * torch.arange(count, dtype=torch.float64, device=a.device))
    near = torch.arange(fine, dtype=torch.float64, device=a.device) * step
    far = torch.arange(-(-count // fine), dtype=torch.float64, device=a.device) * (step * fine)
    (n_re, n_im), (f_re, f_im) = _cis(a, near), _cis(a, far)
    n_re, n_im, f_re, f_im = n_re[:, :, None], n_im[:, :, None], f_re[..., None], f_im[..., None]
    re, im = f_re * n_re - f_im * n_im, f_re * n_im + f_im * n_re
    return re.flatten(2)[..., :count], im.flatten(2)[..., :count]


def _shape(length: int) -> tuple[int, int]:
    """Columns and rows: l = columns q + r."""
    columns = 1 << max(0, (length - 1).bit_length() + 1) // 2
    return columns, -(-length // columns)


def _blocked(a: Tensor, w: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The sum as one product of a (rows, 2 modes) and a (2 modes, columns) matrix per channel.

    Exponents and phases are formed in float64 and rounded once.
    """
    columns, rows = _shape(length)
    q_re, q_im = _powers(a, rows, columns)  # (h n q)
    w_re, w_im = w.unsqueeze(-2).unbind(-1)  # (c h n 1)
    left = torch.cat([w_re * q_re - w_im * q_im, -(w_re * q_im + w_im * q_re)], -2)
    right = torch.cat(_powers(a, columns, 1), -2)  # (h 2n r)
    with torch.autocast(a.device.type, enabled=False):
        k = left.mT.to(dtype) @ right.to(dtype)  # (c h q r)
    return k.flatten(-2)[..., :length]


def _channels_at_once(a: Tensor, heads: int, length: int) -> int:
    columns, rows = _shape(length)
    return max(1, _CHUNK // (2 * a.shape[1] * (columns + heads * rows)))


def mode_sum(a: Tensor, w: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The sum of exponentials, differentiable to any order by torch itself."""
    if length == 0 or w.numel() == 0:
        nothing = 0 * (a.sum() + w.sum()).to(dtype)  # a node of the graph
        return w.new_zeros(*w.shape[:2], length, dtype=dtype) + nothing
    step = _channels_at_once(a, w.shape[0], length)
    pairs = zip(a.split(step), w.split(step, 1), strict=True)
    return torch.cat([_blocked(x, y, length, dtype) for x, y in pairs], 1)


def mode_sum_gradients(dk: Tensor, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """conj(sum_c w S_1) and conj(S_0), S_p = sum_l l^p dk[l] exp(a l)."""
    step = _channels_at_once(a, w.shape[0], dk.shape[-1])
    parts = zip(dk.split(step, 1), a.split(step), w.split(step, 1), strict=True)
    with torch.autocast(a.device.type, enabled=False):
        grads = [_blocked_gradients(*part) for part in parts]
    return torch.cat([g[0] for g in grads]), torch.cat([g[1] for g in grads], 1)


def _blocked_gradients(dk: Tensor, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    length = dk.shape[-1]
    columns, rows = _shape(length)
    g = torch.nn.functional.pad(dk, (0, rows * columns - length)).unflatten(-1, (rows, columns))
    right = torch.cat(_powers(a, columns, 1), -2).to(dk.dtype).mT  # (h r 2n)
    r = torch.arange(columns, dtype=dk.dtype, device=dk.device)
    p_re, p_im = (g @ right).double().chunk(2, -1)  # (c h q n)
    r_re, r_im = ((g * r) @ right).double().chunk(2, -1)
    z_re, z_im = (t.mT for t in _powers(a, rows, columns))  # (h q n)
    s_re, s_im = (z_re * p_re - z_im * p_im).sum(-2), (z_re * p_im + z_im * p_re).sum(-2)
    start = columns * torch.arange(rows, dtype=torch.float64, device=dk.device).unsqueeze(-1)
    m_re, m_im = r_re + start * p_re, r_im + start * p_im
    t_re, t_im = (z_re * m_re - z_im * m_im).sum(-2), (z_re * m_im + z_im * m_re).sum(-2)
    w_re, w_im = w.unbind(-1)
    da_re, da_im = (w_re * t_re - w_im * t_im).sum(0), -(w_re * t_im + w_im * t_re).sum(0)
    return torch.stack([da_re, da_im], -1), torch.stack([s_re, -s_im], -1)


def ssm(k: Tensor, inputs) -> None:
    k.copy_(mode_sum(*inputs, k.shape[-1], k.dtype))


def ssm_gradients(grads, dk: Tensor, inputs) -> None:
    _write(grads, mode_sum_gradients(dk, *inputs))


def ssm_step(y: Tensor, inputs, activation: str) -> None:
    with torch.autocast(y.device.type, enabled=False):
        found, state = reference.ssm_step(*inputs, activation)
    y.copy_(found)
    inputs.state.copy_(state)
