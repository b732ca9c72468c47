"""The offsets of packed rows, read on the host."""

import torch
from torch import Tensor


def on_one(cu_seqlens) -> Tensor:
    """As a plain tensor: of a DTensor every process has all."""
    return cu_seqlens.to_local() if hasattr(cu_seqlens, "to_local") else cu_seqlens


def readable(cu_seqlens: Tensor) -> bool:
    """Whether their values are known, without waiting for a GPU."""
    known = not torch.compiler.is_compiling() and not hasattr(cu_seqlens, "fake_mode")
    return known and on_one(cu_seqlens).is_cpu


def offsets_of(
    cu_seqlens: Tensor,
    total: int | None,
    max_seqlen: int | None = None,
    *,
    function: str = "fftconv",
    name: str = "max_seqlen",
) -> Tensor:
    """The offsets in int64 on the host, checked, but for their end if total is None. Waits for a GPU that has them.
    `name` is the argument that the caller has for max_seqlen."""
    offsets = on_one(cu_seqlens).to("cpu", torch.int64).contiguous()
    steps = offsets.diff()
    first, last = offsets[0].item(), offsets[-1].item()
    if first != 0:
        raise ValueError(f"{function}: cu_seqlens[0] must be 0, got {first}")
    if len(steps) and steps.min() < 0:
        i = 1 + int((steps < 0).nonzero()[0])
        before, after = offsets[i - 1].item(), offsets[i].item()
        raise ValueError(
            f"{function}: cu_seqlens[{i}] must be >= cu_seqlens[{i - 1}]={before}, got {after}"
        )
    if total is not None and last != total:
        text = f"must be the number of steps, {total}, got {last}"
        raise ValueError(f"{function}: cu_seqlens[{len(offsets) - 1}] {text}")
    if max_seqlen is not None and len(steps) and steps.max() > max_seqlen:
        i = int((steps > max_seqlen).nonzero()[0])
        text = f"must be at least the length of every row, got {max_seqlen} and {steps[i]} steps in row {i}"
        raise ValueError(f"{function}: {name} {text}")
    return offsets
