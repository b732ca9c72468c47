"""Sums of exponentials, k[c,h,l] = sum_n Re(w[c,h,n] exp(a[h,n] l)): the operators, their gradients and backends.

a (channels, modes, 2) and w (heads, channels, modes, 2) are float64, real and imaginary part; k is
(heads, channels, length), float32 if `single`, else float64. With S_p[c,h,n] = sum_l l^p dk[c,h,l]
exp(a[h,n] l) the gradients are dw = conj(S_0) and da = conj(sum_c w S_1). No tensor is complex and
none is (channels, modes, length).
"""

import torch
from torch import Tensor
from torch.autograd import Function

from seqconv.backends import cpu, cuda
from seqconv.backends.explanation import Explanation
from seqconv.ops import operators, transforms

operators.library.define(
    "ssm_fwd(Tensor a, Tensor w, SymInt length, bool single, bool fused) -> Tensor"
)
operators.library.define("ssm_bwd(Tensor dk, Tensor a, Tensor w, bool fused) -> (Tensor, Tensor)")
fwd = torch.ops.seqconv.ssm_fwd.default
bwd = torch.ops.seqconv.ssm_bwd.default

_CHUNK = 1 << 22  # elements of a table of the torch formulation


def mode_sum(a: Tensor, w: Tensor, length: int, single: bool, backend: str = "auto") -> Tensor:
    if backend == "keops":
        return keops(a, w, length).to(torch.float32 if single else torch.float64)
    if _plain(a, w):
        return _chunked(a, w, length, single)
    return fwd(a, w, length, single, backend != "torch")


transformed = transforms.transformed


def _plain(*tensors: Tensor) -> bool:
    """Torch's own operations are closed under every transform, which these operators are not."""
    return not torch.compiler.is_compiling() and transforms.transformed(tensors)


def moments(a: Tensor, u: Tensor) -> Tensor:
    """S_0[b,h,n] = sum_l u[b,h,l] exp(a[h,n] l) for u (batch, channels, length), as (b, h, n, 2)."""
    none = a.new_zeros(u.shape[0], *a.shape)
    grads = _chunked_bwd(u, a, none) if _plain(a, u) else bwd(u, a, none, True)
    return grads[1] * a.new_tensor([1.0, -1.0])


# ---- torch: the blocked product that the CPU kernels do, through bmm ----


def _dtype(single: bool) -> torch.dtype:
    return torch.float32 if single else torch.float64


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


def blocked(a: Tensor, w: Tensor, length: int, single: bool) -> Tensor:
    """The sum as one product of a (rows, 2 modes) and a (2 modes, columns) matrix per channel.

    Exponents and phases are formed in float64 and rounded once.
    """
    columns, rows = _shape(length)
    q_re, q_im = _powers(a, rows, columns)  # (h n q)
    w_re, w_im = w.unsqueeze(-2).unbind(-1)  # (c h n 1)
    left = torch.cat([w_re * q_re - w_im * q_im, -(w_re * q_im + w_im * q_re)], -2)
    right = torch.cat(_powers(a, columns, 1), -2)  # (h 2n r)
    with torch.autocast(a.device.type, enabled=False):
        k = left.mT.to(_dtype(single)) @ right.to(_dtype(single))  # (c h q r)
    return k.flatten(-2)[..., :length]


def _channels_at_once(a: Tensor, heads: int, length: int) -> int:
    columns, rows = _shape(length)
    return max(1, _CHUNK // (2 * a.shape[1] * (columns + heads * rows)))


def _chunked(a: Tensor, w: Tensor, length: int, single: bool) -> Tensor:
    if length == 0 or w.numel() == 0:
        nothing = 0 * (a.sum() + w.sum()).to(_dtype(single))  # a node of the graph
        return w.new_zeros(*w.shape[:2], length, dtype=_dtype(single)) + nothing
    step = _channels_at_once(a, w.shape[0], length)
    pairs = zip(a.split(step), w.split(step, 1), strict=True)
    return torch.cat([blocked(x, y, length, single) for x, y in pairs], 1)


def _chunked_bwd(dk: Tensor, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    step = _channels_at_once(a, w.shape[0], dk.shape[-1])
    parts = zip(dk.split(step, 1), a.split(step), w.split(step, 1), strict=True)
    with torch.autocast(a.device.type, enabled=False):
        grads = [_blocked_bwd(*part) for part in parts]
    return torch.cat([g[0] for g in grads]), torch.cat([g[1] for g in grads], 1)


def _blocked_bwd(dk: Tensor, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
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


# ---- PyKeOps ----


def keops(a: Tensor, w: Tensor, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The sum as PyKeOps reduces it: every exponential computed anew, none stored. In float32 the phases
    of long kernels are off by their rounding."""
    if torch.compiler.is_compiling():
        raise ValueError("ssm_kernel: backend='keops' does not work inside torch.compile")
    try:
        import pykeops
        from pykeops.torch import LazyTensor
    except ImportError as error:
        raise ImportError(
            "ssm_kernel: backend='keops' needs PyKeOps: pip install 'pykeops>=2.3'"
        ) from error
    pykeops.set_verbose(False)
    channels, modes, _ = a.shape
    if length == 0 or w.numel() == 0:
        return _chunked(a, w, length, dtype == torch.float32)
    a, w = a.to(dtype), w.to(dtype)
    # (h l 1) and (h n .) tensors, the batch spelt out on both sides: a missing one is not broadcast.
    steps = torch.arange(length, dtype=dtype, device=a.device)
    l_i = LazyTensor(steps.view(1, length, 1, 1).expand(channels, length, 1, 1).contiguous())
    weight = w.permute(1, 2, 3, 0).contiguous()  # (h n 2 c)
    a_re, a_im = (LazyTensor(t.reshape(channels, 1, modes, 1).contiguous()) for t in a.unbind(-1))
    w_re, w_im = (LazyTensor(weight[:, None, :, i].contiguous()) for i in range(2))
    phase = a_im * l_i
    k = ((a_re * l_i).exp() * (w_re * phase.cos() - w_im * phase.sin())).sum(dim=2)  # (h l c)
    return k.permute(2, 0, 1)


# ---- the operators ----


def _fused(t: Tensor, dtype: torch.dtype):
    """The backend with kernels for tensors where t is, None if there is none."""
    if operators.fallback_reason(t.device, dtype) is not None:
        return None
    return cpu if t.device.type == "cpu" else cuda


def how(device: torch.device, single: bool, backend: str) -> Explanation:
    product, threads = "matrix product", torch.get_num_threads()
    if backend == "keops":
        return Explanation("keops", "every exponential", None, 1, None, threads, None)
    reason = None if backend == "torch" else operators.fallback_reason(device, _dtype(single))
    if backend == "torch" or reason is not None:
        return Explanation("torch", product, None, 1, None, threads, reason)
    if device.type == "cuda":
        return Explanation("cuda", product, None, 1, cuda.arch(device), cuda.ssm.THREADS, None)
    return Explanation("cpu", product, None, 1, cpu.isa(), cpu.threads(), None)


def _fwd(a: Tensor, w: Tensor, length: int, single: bool, fused: bool) -> Tensor:
    if length == 0 or w.numel() == 0:
        return w.new_zeros(*w.shape[:2], length, dtype=_dtype(single))
    backend = _fused(a, _dtype(single)) if fused else None
    if backend is None:
        return _chunked(a, w, length, single)
    k = w.new_empty(*w.shape[:2], length, dtype=_dtype(single))
    backend.ssm_forward(k, a.contiguous(), w.contiguous())
    return k


def _bwd(dk: Tensor, a: Tensor, w: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    if dk.numel() == 0 or w.numel() == 0:
        return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (a, w))
    backend = _fused(a, dk.dtype) if fused else None
    if backend is None:
        return _chunked_bwd(dk, a, w)
    da, dw = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, w))
    backend.ssm_backward(da, dw, dk, a.contiguous(), w.contiguous())
    return da, dw


def _fwd_fake(a, w, length, single, fused):
    return w.new_empty(*w.shape[:2], length, dtype=_dtype(single))


def _bwd_fake(dk, a, w, fused):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, w))


operators.library.impl("ssm_fwd", _fwd, "CompositeExplicitAutograd")
operators.library.impl("ssm_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("seqconv::ssm_fwd", _fwd_fake, lib=operators.library)
torch.library.register_fake("seqconv::ssm_bwd", _bwd_fake, lib=operators.library)


class _Forward(Function):
    @staticmethod
    def forward(ctx, a, w, length, single, fused):
        ctx.save_for_backward(a, w)
        ctx.fused = fused
        with operators.below_autograd():
            return fwd(a, w, length, single, fused)

    @staticmethod
    def backward(ctx, dk):
        return (*bwd(dk, *ctx.saved_tensors, ctx.fused), None, None, None)


class _Backward(Function):
    @staticmethod
    def forward(ctx, dk, a, w, fused):
        ctx.save_for_backward(dk, a, w)
        with operators.below_autograd():
            return bwd(dk, a, w, fused)

    @staticmethod
    def backward(ctx, *grads):
        """Second derivatives and higher, composed of the torch formulation."""
        needed, create = ctx.needs_input_grad[:3], torch.is_grad_enabled()
        with torch.enable_grad():
            own = [transforms.as_node(t) for t in ctx.saved_tensors]
            dk, a, w = own
            k = _chunked(a, w, dk.shape[-1], dk.dtype == torch.float32)
            outputs = torch.autograd.grad(k, (a, w), dk, create_graph=True)
        asked = [t for t, need in zip(own, needed, strict=True) if need]
        options = {"create_graph": create, "allow_unused": True}
        found = iter(torch.autograd.grad(outputs, asked, grads, **options))
        return (*(next(found) if need else None for need in needed), None)


operators.library.impl("ssm_fwd", transforms.kernel(fwd, _Forward), "Autograd")
operators.library.impl("ssm_bwd", transforms.kernel(bwd, _Backward), "Autograd")
