"""The constants of a transform: the twist of its inputs and the twiddles of its passes.

They are computed in float64 and rounded once.
"""

import math
import threading
from collections import OrderedDict

import torch
from torch import Tensor

_FIRST = 16  # places for the factors of the first inputs

FIRST_CALL = (
    "fftconv: the first call of its kind must not be captured in a CUDA graph, because it compiles kernels "
    "and makes tables; run the same call once before the capture"
)


class CaptureError(RuntimeError):
    """Something that a capture cannot hold was still to be done."""


def _roots(numerator: Tensor, denominator: int) -> Tensor:
    """exp(-2 pi i numerator / denominator), where whole turns are dropped exactly."""
    turn = (numerator % denominator).to(torch.float64) * (-2 * math.pi / denominator)
    return torch.polar(torch.ones_like(turn), turn)


def build(n: int, radices: tuple[int, ...], passes: int, twist: bool) -> Tensor:
    """complex64: the factors of the first inputs, then the twiddles of each of the first `passes` passes.

    Twiddle p of column j lies at p * (block / radix) + j. It is exp(-2 pi i p j / block), in pass 0 times w^j
    with w = exp(i pi / 2n). Without the twist, as the inner transforms of long rows have it, w is 1.
    """
    first = torch.ones(_FIRST, dtype=torch.complex128)
    if twist:
        first[: radices[0]] = _roots(-torch.arange(radices[0]), 4 * radices[0])
    parts, block = [first], n
    for d in range(passes):
        columns = torch.arange(block // radices[d])
        table = _roots(torch.arange(radices[d])[:, None] * columns, block)
        if twist and d == 0:
            table = table * _roots(-columns, 4 * n)
        parts.append(table.flatten())
        block //= radices[d]
    return torch.cat(parts).to(torch.complex64)


def _operand(matrix: Tensor) -> Tensor:
    """A complex 16 x 16 matrix as the fp16 pairs of a left operand: 256 words, whose first half is the real parts.

    Lane (group g, thread t) holds rows g and g + 8 of columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 (PTX
    ISA, mma.m16n8k16). The words are in the order (lane, column half, row half).
    """
    planes = torch.stack([matrix.real, matrix.imag]).to(torch.float16)
    parts = planes.view(2, 2, 8, 2, 4, 2)  # plane, row half, group, column half, thread, pair
    return parts.permute(0, 2, 4, 3, 1, 5).contiguous().view(torch.int32).flatten()


def _words(table: Tensor, count: int | None = None) -> Tensor:
    """Complex numbers as float32 words, which zeros fill up to `count` words."""
    words = torch.view_as_real(table.to(torch.complex64)).contiguous().view(torch.int32).flatten()
    return words if count is None else torch.nn.functional.pad(words, (0, count - len(words)))


# A pass and its inverse are scaled by these powers of two, which are about 1 / sqrt(radix).
SCALES = {
    2: (0.5, 1.0),
    3: (0.5, 0.5),
    4: (0.5, 0.5),
    5: (0.5, 0.5),
    8: (0.5, 0.25),
    16: (0.25, 0.25),
}


def _dft(radix: int) -> Tensor:
    index = torch.arange(radix)
    return _roots(index[:, None] * index, radix)


def build_tensor(n: int, radices: tuple[int, ...]) -> Tensor:
    """int32 words for csrc/device/tensor.cuh, in the order of the offsets in half_plane.cuh.

    The two innermost radices are 16. Each pass before them has its matrix, scaled by SCALES and repeated as often
    as 16 rows hold it, then the inverse's matrix, then the twiddles of column c of group g as the product of one
    factor for c and one for g. The twist is part of the first pass as in `build`.
    """
    assert radices[-2:] == (16, 16), radices
    outer = radices[:-2]
    inner = _roots(torch.arange(16)[:, None] * torch.arange(16), 256)
    if not outer:  # the first of the two inner passes reads the row itself
        inner = inner * _roots(-torch.arange(16), 4 * n)
    matrix, back = _dft(16) * SCALES[16][0], _dft(16).conj() * SCALES[16][1]
    order = [4 * (i // 2 % 4) + 2 * (i // 8) + i % 2 for i in range(16)]  # half_plane.cuh's in_time
    words = [_operand(matrix), _operand(back[order]), _words(inner), _words(inner.T[order])]
    block = n
    for d, radix in enumerate(outer or (16,)):
        matrix = _dft(radix)
        if d == 0:  # w^(i n / radix) at input i
            matrix = matrix * _roots(-torch.arange(radix), 4 * radix)
        copies = torch.block_diag(*[matrix] * (16 // radix))
        room = torch.zeros(16, 16, dtype=torch.complex128)
        room[: len(copies), : len(copies)] = copies
        back = room.conj().T.resolve_conj()
        words += [_operand(room * SCALES[radix][0]), _operand(back * SCALES[radix][1])]
        if not outer:
            break
        p = torch.arange(radix)[:, None]
        columns, groups = torch.arange(16), 16 * torch.arange(block // radix // 16)
        column, group = _roots(p * columns, block), _roots(p * groups, block)
        if d == 0:
            column, group = column * _roots(-columns, 4 * n), group * _roots(-groups, 4 * n)
        words += [_words(column, 512), _words(group.T)]
        block //= radix
    return torch.cat(words)


class Tables:
    """The tables of a device that are kept for the next call: the 64 used last, and those that CUDA graphs use.

    upload(words) copies a tensor of the CPU to the device's memory, and what it returns keeps the copy there. The
    memory is not taken from torch's pools, because the first call may come while a pool serves a CUDA graph, and the
    graph must get back everything that was allocated for it.
    """

    def __init__(self, upload, capturing):
        self.upload, self.capturing = upload, capturing
        self.recent: OrderedDict[tuple, object] = OrderedDict()
        self.captured: dict[tuple, object] = {}  # a graph knows only their addresses
        self.lock = threading.Lock()

    def __call__(self, function, *arguments):
        key, capturing = (function, *arguments), self.capturing()
        with self.lock:
            found = self.captured.get(key, self.recent.get(key))
            if found is None:
                if capturing:
                    raise CaptureError(FIRST_CALL)
                with torch.device("cpu"):
                    words = function(*arguments)
                found = self.recent[key] = self.upload(words)
                while len(self.recent) > 64:
                    self.recent.popitem(last=False)
            elif capturing:
                self.captured[key] = found
            elif key in self.recent:
                self.recent.move_to_end(key)
        return found
