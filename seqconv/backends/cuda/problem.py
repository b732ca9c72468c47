"""What a plan is made from: the sizes of a call of the convolution, and the limits of a device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a plan has to know of a device."""

    shared: int = 232448  # bytes that one block may ask for
    shared_total: int = 233472  # bytes of one multiprocessor
    processors: int = 132
    clock: float = 1.755e9  # Hz
    bandwidth: float = 3.35e12  # bytes per second
    tensor_cores: bool = True  # for fp16 with m16n8k16: compute capability 8.0 and later

    @property
    def issue(self) -> float:
        """Warp instructions per second, of all multiprocessors."""
        return self.processors * 4 * self.clock


H100 = Limits()


@dataclass(frozen=True)
class Problem:
    """One call: rows are (batch, channels); element is u's size in bytes."""

    batch: int
    heads: int
    channels: int
    length: int
    taps: int
    taps_rev: int
    per_sample: bool
    element: int
    fast: bool = True  # 16-bit tensors: products may be summed in fp16

    @property
    def sets(self) -> int:
        return self.batch if self.per_sample else 1

    @property
    def taps_rows(self) -> int:
        return self.sets * self.heads * self.channels
