"""The long convolution as matrix products: for runtimes without a Fourier transform, or with a slow one.

Rows of n real numbers are multiplied modulo x^n - i, in which n points hold both halves of a product of length 2n: its
first n terms are the real part, and what wraps around becomes the imaginary part. So n is at least the length, and
there are no zeros behind the rows. Taps for the future, x^-m = -i x^(n-m), belong to the imaginary part of the kernel.

The transform takes n = r_1 r_2 ... r_m points in m passes. Pass j is one product with a matrix of r_j points for
every combination of the frequencies before it, which holds all its twiddles as well. Real and imaginary parts are
rows of real matrices. The frequencies come out in the order of the passes, which the inverse, the same products
transposed, takes back. The tables are made of integers by sines and cosines in float64, inside of the graph: a
runtime that folds constants makes them once, when it loads the model.
"""

import math
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from seqconv.backends.inputs import Inputs
from seqconv.reference import activate

DIRECT = 32  # taps up to which the sum itself is taken, by torch's convolution
_SIZES = (
    2,
    4,
    *range(8, 65, 8),
)  # of passes but the first: a matrix of other sizes leaves vectors half empty
_PASS = 350  # operations a point that take as long as what a pass reads, writes and loses in small products, on a CPU


@lru_cache(256)
def radices(length: int) -> tuple[int, ...]:
    """Sizes of passes whose product is at least `length`, of the least work; the last is not the largest, since the
    tables hold 4 n times as many numbers."""
    best, found = math.inf, (2, 2)
    for count in (2, 3, 4):
        for rest in product(_SIZES, repeat=count - 1):
            first = max(2, -(-length // math.prod(rest)))
            if first > 128 or rest[-1] > max(first, 8):
                continue
            n, whole = first * math.prod(rest), -(-first // 8) * 8
            work = n * (5 * whole + 8 * sum(rest) + _PASS * count)
            if work < best:
                best, found = work, (first, *rest)
    if best == math.inf:
        raise ValueError(f"fftconv: length must be at most 2**24 as matrix products, got {length}")
    return found


def flops(length: int) -> float:
    """Floating point operations of the products, for one element of one row of a kernel that is known."""
    first, *rest = radices(length)
    n = math.prod((first, *rest))
    return n / length * (8 * first + 16 * sum(rest))


def _matrices(sizes: tuple[int, ...], like: Tensor, turned: bool = True) -> list[Tensor]:
    """Of every pass (frequencies before it, 2 r, 2 r): its matrix times its twiddles, on (real and imaginary parts, r)
    rows; the first takes real rows, (2 r, r), and the last multiplies from the right. turned: modulo x^n - i, and
    modulo x^n - 1 otherwise."""
    n = s = math.prod(sizes)
    before = torch.zeros(1, dtype=torch.int64, device=like.device)
    step, found = 1, []
    for number, r in enumerate(sizes):
        s //= r
        index = torch.arange(r, dtype=torch.int64, device=like.device)
        t = index * s
        f = (before.unsqueeze(1) + step * index).unsqueeze(1)  # (before, 1, r)
        # exp(-2 pi i t f / n), and exp(pi i t / 2n), by which modulo x^n - i becomes modulo x^n - 1
        turn = (4 * t.unsqueeze(1) * f - int(turned) * t.unsqueeze(1)) % (4 * n)
        angle = turn.to(torch.float64) * (-math.pi / (2 * n))
        cos, sin = angle.cos().to(like.dtype), angle.sin().to(like.dtype)  # (before, t, f)
        if number == 0:
            table = torch.stack([cos[0].T, sin[0].T], 1).flatten(0, 1)  # ((f, parts), t)
        elif number < len(sizes) - 1:
            first, second = torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)
            table = torch.stack([first.mT, second.mT], 2).flatten(1, 2)  # ((f, parts), (parts, t))
        else:
            first, second = torch.cat([cos, sin], 2), torch.cat([-sin, cos], 2)
            table = torch.cat([first, second], 1)  # ((parts, t), (parts, f))
        found.append(table)
        before, step = f.flatten(), step * r
    return found


def _transform(rows: Tensor, tables: list[Tensor], sizes: tuple[int, ...]) -> Tensor:
    """(rows, n) -> (frequencies of all passes but the last, rows, 2 r): real parts, then imaginary ones."""
    n = math.prod(sizes)
    done, x = sizes[0], tables[0] @ rows.reshape(-1, sizes[0], n // sizes[0])
    for table, r in zip(tables[1:-1], sizes[1:-1], strict=True):
        x = table @ x.reshape(-1, done, 2 * r, n // (done * r))
        done *= r
    return x.reshape(-1, done, 2 * sizes[-1]).transpose(0, 1) @ tables[-1]


def _inverse(x: Tensor, tables: list[Tensor], sizes: tuple[int, ...]) -> Tensor:
    """The real part of the inverse of _transform, n times it."""
    n, s = math.prod(sizes), sizes[-1]
    x, done = (x @ tables[-1].mT).transpose(0, 1), n // s
    for table, r in zip(tables[-2:0:-1], sizes[-2:0:-1], strict=True):
        done //= r
        x = table.mT @ x.reshape(-1, done, 2 * r, s)
        s *= r
    return (tables[0].mT @ x.reshape(-1, 2 * sizes[0], s)).reshape(-1, n)


def inverse(y: Tensor, length: int) -> Tensor:
    """Re ifft(y)[:length] of y (..., n, 2), where n is a power of two."""
    *rows, n, _ = y.shape
    bits = n.bit_length() - 1
    count = max(2, -(-bits // 5))
    sizes = tuple(1 << (bits + i) // count for i in range(count))
    # Of the frequency f = f_1 + r_1 (f_2 + r_2 (...)) the last digit comes first.
    digits = y.reshape(-1, *reversed(sizes), 2)
    order = [*range(count, 1, -1), 0, count + 1, 1]
    x = digits.permute(order).reshape(n // sizes[-1], -1, 2 * sizes[-1]) / n
    return _inverse(x, _matrices(sizes, y, turned=False), sizes).reshape(*rows, n)[..., :length]


def butterfly(x: Tensor, factors: dict[int, Tensor], radices, activation: str | None) -> Tensor:
    """seqconv.reference.butterfly by products of real matrices, with real and imaginary parts as rows."""
    wide = torch.promote_types(x.dtype, torch.float32)
    *_, channels, length = x.shape
    n = s = math.prod(radices)
    z = F.pad(x.to(wide), (0, n - length)).unsqueeze(2)
    z, blocks = torch.cat([z, torch.zeros_like(z)], 2), 1
    for r in radices:
        re, im = factors[r].to(wide).unbind(-1)  # (heads, f, t)
        first, second = torch.cat([re, -im], 2), torch.cat([im, re], 2)
        table = torch.stack([first, second], 2).flatten(1, 2)[
            :, None, None
        ]  # ((f, parts), (parts, t))
        heads = table.shape[0]
        s //= r
        z = table @ z.reshape(-1, heads, channels // heads, blocks, 2 * r, s)
        f, t = (torch.arange(count, dtype=wide, device=x.device).double() for count in (r, s))
        angle = f.unsqueeze(1) * t * (-2 * math.pi / (r * s))
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)  # (f, t)
        re, im = z.reshape(-1, channels, blocks, r, 2, s).unbind(4)
        parts = re * cos - im * sin, re * sin + im * cos
        z = torch.stack([activate(part, activation) for part in parts], 4)
        blocks *= r
    order = [0, 1, *range(len(radices) + 1, 1, -1), len(radices) + 2]
    return z.reshape(-1, channels, *radices, 2).permute(order).reshape(-1, channels, n, 2)


def convolve(x: Tensor, k: Tensor, k_rev: Tensor | None) -> Tensor:
    """k (+ k_rev) * x: x (batch, channels, length), k (batch or 1, heads, channels, K) -> (batch, heads, channels,
    length)."""
    channels, length = x.shape[-2:]
    heads, k = k.shape[1], k[..., :length]
    k_rev = None if k_rev is None else k_rev[..., : max(length - 1, 0)]
    sizes = radices(length)
    n, tables = math.prod(sizes), _matrices(sizes, x)

    def transform(t: Tensor, before: int = 0) -> Tensor:
        count = n - t.shape[-1] - before
        return _transform(F.pad(t, (before, count)).reshape(-1, n), tables, sizes)

    spectrum = transform(k / n)
    re, im = spectrum.chunk(2, -1)
    if k_rev is not None and k_rev.shape[-1]:
        again = transform(k_rev.flip(-1) / n, n - k_rev.shape[-1])
        also_re, also_im = again.chunk(2, -1)  # times -i
        re, im = re + also_im, im - also_re
    re, im = (t.reshape(n // sizes[-1], -1, heads, channels, sizes[-1]) for t in (re, im))
    u = transform(x).reshape(n // sizes[-1], -1, 1, channels, 2 * sizes[-1])
    u_re, u_im = u.chunk(2, -1)
    y = torch.cat([u_re * re - u_im * im, u_re * im + u_im * re], -1)
    y = _inverse(y.reshape(n // sizes[-1], -1, 2 * sizes[-1]), tables, sizes)
    return y.reshape(-1, heads, channels, n)[..., :length]


def direct(x: Tensor, k: Tensor, k_rev: Tensor | None) -> Tensor:
    """The same by torch's convolution, of one kernel for all samples, k (1, heads, channels, K)."""
    channels, length = x.shape[-2:]
    heads, k = k.shape[1], k[0, ..., :length]
    weight, after = k.flip(-1), 0
    if k_rev is not None:
        k_rev = k_rev[0, ..., : max(length - 1, 0)]
        weight, after = torch.cat([weight, k_rev], -1), k_rev.shape[-1]
    weight = weight.transpose(0, 1).reshape(channels * heads, 1, -1)
    y = F.conv1d(F.pad(x, (k.shape[-1] - 1, after)), weight, groups=channels)
    return y.reshape(-1, channels, heads, length).transpose(1, 2)


def fftconv(inputs: Inputs, activation: str) -> Tensor:
    """seqconv.reference.fftconv of these inputs, (batch, channels, length), by matrix products. Sizes but for the batch
    are constants."""
    u, k, k_rev, skip, pre_gate, post_gate, bias = inputs
    channels, length = u.shape[-2:]
    for name, size in (("length", length), ("channels", channels), ("taps", k.shape[-1])):
        if not isinstance(size, int):
            text = f"must be a constant where fftconv becomes matrix products, got {size}"
            raise ValueError(f"fftconv: {name} {text}")
    wide = torch.promote_types(u.dtype, torch.float32)
    x = u.to(wide) if pre_gate is None else u.to(wide) * pre_gate.to(wide)
    k4, k4_rev = (t if t is None else _four(t, wide) for t in (k, k_rev))
    taps = min(k.shape[-1], length) + (0 if k_rev is None else min(k_rev.shape[-1], length - 1))
    if not length or not taps:
        v = x.unsqueeze(1) * x.new_zeros(k4.shape[1], 1, 1)
    elif taps <= DIRECT and k.dim() < 4:
        v = direct(x, k4, k4_rev)
    else:
        v = convolve(x, k4, k4_rev)
    if skip is not None:
        v = v + skip.to(wide).unsqueeze(-1) * x.unsqueeze(1)
    if bias is not None:
        v = v + bias.to(wide).unsqueeze(-1)
    y = activate(v, None if activation == "none" else activation)
    if k.dim() == 2:
        y = y.squeeze(1)
    if post_gate is not None:
        y = y * post_gate.to(wide)
    return y.to(u.dtype)


def _four(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).reshape((1,) * (4 - t.dim()) + t.shape)
