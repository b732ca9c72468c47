"""The terms between operators and backends: what is asked for, who can do it, and how it is described."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

BLOCK = 32  # steps of a stream between its tiles, see seqconv.ops.stream


class Request(NamedTuple):
    """One call of an operator. Its first input says on which device it is made."""

    # "fftconv", "fftconv_packed", "ssm", "s4d_kernel", "ssm_step", "butterfly" or "stream"; a backend refuses others,
    # among them "glu" and "butterfly_product", for which only the CPU has kernels
    operator: str
    inputs: Any  # the operator's tensors by name
    options: tuple


@dataclass(frozen=True)
class Explanation:
    """How a call of fftconv or ssm_kernel is carried out; str() says it in a line or two."""

    backend: str  # "cpu", "cuda"; without kernels "reference"; of ssm_kernel "torch" or "keops"
    algorithm: str  # "direct sum", "right-angle fft", "torch.fft"; "matrix product", ...
    fft_size: int | None  # points of one transform; None where there is none
    blocks: int  # transforms per row: more than one where the kernel is much shorter than the row
    isa: str | None  # instruction set of the CPU kernel, or what a GPU kernel is compiled for
    threads: int  # of the CPU, or of one block of the GPU
    fallback: str | None  # why no fused kernel is used; None if one is
    plan: str | None = None  # on a GPU: how the rows are laid out, and the model's time

    def __str__(self) -> str:
        size = "" if self.fft_size is None else f" of {self.fft_size} points"
        if self.blocks > 1:
            size += f" in {self.blocks} blocks"
        where = self.backend
        if self.isa is not None:
            where += f" ({self.isa}, {self.threads} threads)"
        text = f"{where}: {self.algorithm}{size}"
        if self.plan is not None:
            text += f"\n{self.plan}"
        if self.fallback is not None:
            text += f"\nfallback, slower with the same answer: {self.fallback}"
        return text


class Backend(Protocol):
    """Computes the operators. Every function writes into outputs that it is given, and no output is empty.

    Inputs arrive validated, as the operators' files describe them (seqconv/ops), and with real memory:
    torch has resolved lazily negated and lazily zero tensors. Outputs may have any strides. A gradient
    that nobody wants is None. Gradients are computed by formula: torch records nothing inside an
    operator. The activation of fftconv is "none", "gelu", "silu" or "relu". A circular convolution
    arrives as a two-sided one, with taps in k and k_rev.
    """

    name: str
    always: frozenset[
        str
    ]  # operators that it carries out whatever the call, so that nobody need ask

    def why_not(self, request: Request) -> str | None:
        """Why this backend cannot carry out the call, or None if it can."""
        ...

    def explain(self, request: Request) -> Explanation:
        """How it carries out the call, which it can."""
        ...

    def fftconv(self, y: Tensor, inputs, activation: str) -> None: ...

    def fftconv_gradients(self, grads, dy: Tensor, inputs, activation: str) -> None: ...

    def fftconv_exact(self, y: Tensor, inputs, activation: str) -> None:
        """fftconv with exact_causal, without k_rev: no output has a trace of later inputs."""
        ...

    def fftconv_exact_gradients(self, grads, dy: Tensor, inputs, activation: str) -> None:
        """The gradient of u or a gate at a time has no trace of dy at earlier times, whose outputs do not see that
        input; and where an element of dy is 0, the value of its output does not matter."""
        ...

    def reads_offsets(self, offsets: Tensor) -> bool:
        """Whether packed rows may come with these offsets as they are, if the caller says how long a row is at most."""
        ...

    def fftconv_packed(self, y: Tensor, inputs, offsets: Tensor, activation: str) -> None:
        """fftconv of rows that lie one after another: row i at times [offsets[i], offsets[i + 1]) of signals without
        an axis of samples. The offsets are on the host in int64, checked; rows may be empty, and all may be.

        If reads_offsets says so, they may be where the signals are, in int32 or int64, unchecked. The steps of the
        longest row then come as one more argument, `longest`; and whatever the offsets are, no memory outside of the
        tensors may be touched."""
        ...

    def fftconv_packed_gradients(
        self, grads, dy: Tensor, inputs, offsets: Tensor, activation: str
    ) -> None: ...

    def ssm(self, k: Tensor, inputs) -> None: ...

    def ssm_gradients(self, grads, dk: Tensor, inputs) -> None: ...

    def s4d_modes(self, a: Tensor, w: Tensor, inputs, options) -> bool:
        """Writes the modes that the parameters of S4D make (seqconv/layers/s4d_kernel.py), or returns False, which
        leaves them and their gradients to torch."""
        ...

    def s4d_modes_gradients(self, grads, da: Tensor, dw: Tensor, inputs, options) -> None: ...

    def ssm_step(self, y: Tensor, inputs, activation: str) -> None:
        """Changes inputs.state in place. It is contiguous, as the tables and y are."""
        ...

    def butterfly(self, z: Tensor, inputs, radices: tuple[int, ...]) -> None: ...

    def butterfly_gradients(self, grads, dz: Tensor, inputs, radices: tuple[int, ...]) -> None: ...

    def stream_name(self) -> str:
        """Names how this backend lays spectra of tiles out, in this process."""
        ...

    def stream_spectra(self, k: Tensor, period: int) -> Tensor:
        """The spectra of tiles of BLOCK, 2 BLOCK, ..., period points, for taps (heads, channels, count)."""
        ...

    def stream_step(
        self, y: Tensor, u, pre_gate, post_gate, rings, taps, spectra, activation: str, spread: bool
    ) -> None: ...
