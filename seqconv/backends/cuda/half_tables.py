"""The constants of a transform of 16-bit rows on tensor cores: matrices and twiddles as fp16 numbers.

csrc/device/half_shape.cuh says how a transform of 256 * radix * split points is made. The constants are computed in
float64 and rounded once.
"""

import math

import torch
from torch import Tensor

# A product of so many points and its inverse are scaled by these powers of two, which are about 1 / sqrt(radix).
SCALES = {1: (1.0, 1.0), 2: (0.5, 1.0), 4: (0.5, 0.5), 8: (0.5, 0.25), 16: (0.25, 0.25)}
# The butterflies between products are scaled by these, in both directions, as a part of the twiddles.
SPLIT_SCALES = {1: 1.0, 2: 0.5, 4: 0.5, 8: 0.25}
INNER_SCALE = 1 / 4  # of each of the two products of the inner 256 points


def roots(numerator, denominator: int) -> Tensor:
    """exp(-2 pi i numerator / denominator), where whole turns are dropped exactly."""
    turn = (torch.as_tensor(numerator) % denominator).to(torch.float64) * (
        -2 * math.pi / denominator
    )
    return torch.polar(torch.ones_like(turn), turn)


def split_of(n: int) -> tuple[int, int]:
    """The points of a product, and the number of products for a column of n / 256 points."""
    rows = n // 256
    radix = min(rows, 16)
    return radix, rows // radix


def scales(n: int) -> tuple[float, float]:
    """By what the whole transform of n points and its inverse are scaled."""
    radix, split = split_of(n)
    rest = SPLIT_SCALES[split] * INNER_SCALE**2
    return SCALES[radix][0] * rest, SCALES[radix][1] * rest


def _words(numbers: Tensor) -> Tensor:
    """Real numbers (..., 2) as words of two fp16 numbers."""
    return numbers.to(torch.float16).contiguous().view(torch.int32).flatten()


def _fragment(matrix: Tensor) -> Tensor:
    """A 16 x 16 matrix as a left operand (lane, register, pair): register 2 j + h of a lane holds row group + 8 h and
    columns 2 thread + 8 j and the next one (PTX ISA, mma.m16n8k16, with the middle registers the other way round)."""
    parts = matrix.view(2, 8, 2, 4, 2)  # row half, group, column half, thread, pair
    return parts.permute(1, 3, 2, 0, 4).reshape(32, 4, 2)


def _left(matrix: Tensor) -> Tensor:
    return _words(_fragment(matrix))


def _right(matrix: Tensor) -> Tensor:
    """As the right operand of the transpose, whose two registers for 8 columns are neighbours."""
    return _words(_fragment(matrix)[:, [0, 2, 1, 3]])


def _both(make, matrix: Tensor) -> list[Tensor]:
    return [make(matrix.real), make(matrix.imag)]


def _twiddles(n: int) -> list[Tensor]:
    """Whole: for every 16 columns of each group and every product. The twist w^j, w = exp(i pi / 2n), is among them."""
    radix, split = split_of(n)
    point, columns = torch.arange(16), torch.arange(16)
    found = []
    for tile in range(radix):
        at = (
            16 * (tile + radix * (point // radix)) + columns[:, None]
        )  # columns of a tile by its points
        for s in range(split):
            factor = roots((point % radix + 16 * s) * at, n) * roots(-at, 4 * n)
            found += _both(_left, factor * SPLIT_SCALES[split])
    return found


def _factored_twiddles(n: int) -> list[Tensor]:
    """A factor for each of 16 results of any product, and one for each product but the first."""
    _, split = split_of(n)
    found = []
    for tile in range(16):
        at = 16 * tile + torch.arange(16)
        factor = roots(at[:, None] * torch.arange(16), n) * roots(-at, 4 * n)[:, None]
        found += _both(_left, factor * SPLIT_SCALES[split])
    group = torch.arange(8)[:, None] + torch.tensor([0, 8])
    for s in range(1, split):
        found += [
            _words(torch.view_as_real(roots(16 * s * (16 * tile + group), n))) for tile in range(16)
        ]
    return found


def build(n: int, whole: bool) -> Tensor:
    """int32 words: twiddles, whole or factored, and matrices in the order of Constants in half_products.cuh."""
    radix, split = split_of(n)
    index, sixteen = torch.arange(radix), torch.arange(16)
    there = roots(index[:, None] * index, radix) * roots(
        -index, 4 * radix
    )  # w^(i n / radix) at input i
    there = torch.block_diag(*[there] * (16 // radix))
    back = there.conj().T.resolve_conj() * SCALES[radix][1]
    there = there * SCALES[radix][0]
    inner = roots(sixteen[:, None] * sixteen, 16) * INNER_SCALE
    words = _twiddles(n) if whole else _factored_twiddles(n)
    words += _both(_right, there)
    for make in (_left, _right):
        words += [make(inner.real), make(inner.imag)]
        if make is _left or split < 8:  # with 8 products there is no room for the other one
            words.append(make(-inner.imag))
    words += _both(_left, roots(sixteen[:, None] * sixteen, 256))
    words += _both(_right, back.conj())
    turned = []  # the matrices of the other products, with the factors before or behind the butterflies in them
    factors = []  # or those factors alone
    for s in range(1, split):
        turn = roots(s * sixteen, 16 * split) * roots(-s, 64 * split)
        turned += _both(_right, turn[:, None] * there)
        turned += _both(_right, (turn.conj() * back).conj())
        of_thread = turn.view(2, 4, 2).transpose(0, 1)  # thread, column half, pair
        factors.append(_words(torch.cat([of_thread.real, of_thread.imag], 1)))
    words += turned if split == 2 else factors + (turned if split == 4 else [])
    return torch.cat(words)
