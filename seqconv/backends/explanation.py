"""How an operator carries out a call."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """How a call of fftconv or ssm_kernel is carried out; str() says it in a line or two."""

    backend: str  # "cpu", "cuda"; without kernels "reference"; of ssm_kernel "torch" or "keops"
    algorithm: (
        str  # "direct sum", "right-angle fft", "torch.fft"; "matrix product", "every exponential"
    )
    fft_size: int | None  # points of one transform; None where there is none
    blocks: int  # transforms per row: more than one where the kernel is much shorter than the row
    isa: str | None  # instruction set of the CPU kernel, or what a GPU kernel is compiled for
    threads: int  # of the CPU, or of one block of the GPU
    fallback: str | None  # why no fused kernel is used; None if one is
    plan: str | None = (
        None  # on a GPU: how the rows are laid out, and a lower bound of the time, predicted
    )

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
