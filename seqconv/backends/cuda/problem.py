"""What a plan is made from: the sizes of a call of the convolution, and the limits of a device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a plan has to know of a device."""

    shared: int = 232448  # bytes that one block may ask for
    shared_total: int = 233472  # bytes that one multiprocessor has
    processors: int = 132
    clock: float = 1.755e9  # Hz
    bandwidth: float = 3.35e12  # bytes per second
    tensor_cores: bool = True  # they take fp16 with m16n8k16 since compute capability 8.0

    @property
    def issue(self) -> float:
        """The warp instructions per second of all multiprocessors."""
        return self.processors * 4 * self.clock


H100 = Limits()


@dataclass(frozen=True)
class Problem:
    """The sizes of one call, whose rows are (batch, channels). element is the bytes of one of u's numbers."""

    batch: int
    heads: int
    channels: int
    length: int
    taps: int
    taps_rev: int
    per_sample: bool
    element: int
    fast: bool = True  # 16-bit tensors may be computed with fp16 operands and sums
    pieces: bool = True  # all rows can be read and written 16 bytes at a time
    beside: str | None = (
        ""  # what is done beside the convolution: "", "gelu", "gated", or None for anything else
    )

    @property
    def sets(self) -> int:
        return self.batch if self.per_sample else 1

    @property
    def taps_rows(self) -> int:
        return self.sets * self.heads * self.channels
