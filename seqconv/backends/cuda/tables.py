"""The constants of a transform: the twist of its inputs and the twiddles of its passes.

They are computed in float64 and rounded once.
"""

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from seqconv.backends.cuda.half_tables import roots

_FIRST = 16  # places for the factors of the first inputs

FIRST_CALL = (
    "fftconv: the first call of its kind must not be captured in a CUDA graph, because it compiles kernels "
    "and makes tables; run the same call once before the capture"
)


class CaptureError(RuntimeError):
    """Something that a capture cannot hold was still to be done."""


def build(n: int, radices: tuple[int, ...], passes: int, twist: bool) -> Tensor:
    """complex64: the factors of the first inputs, then the twiddles of each of the first `passes` passes.

    Twiddle p of column j lies at p * (block / radix) + j. It is exp(-2 pi i p j / block), in pass 0 times w^j
    with w = exp(i pi / 2n). Without the twist, as the inner transforms of long rows have it, w is 1.
    """
    first = torch.ones(_FIRST, dtype=torch.complex128)
    if twist:
        first[: radices[0]] = roots(-torch.arange(radices[0]), 4 * radices[0])
    parts, block = [first], n
    for d in range(passes):
        columns = torch.arange(block // radices[d])
        table = roots(torch.arange(radices[d])[:, None] * columns, block)
        if twist and d == 0:
            table = table * roots(-columns, 4 * n)
        parts.append(table.flatten())
        block //= radices[d]
    return torch.cat(parts).to(torch.complex64)


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
