"""Packed rows from and to the other forms of a batch of sequences of different lengths.

A pack has all steps of all rows one after another, (total, ...), and cu_seqlens (rows + 1,): row i has the steps
[cu_seqlens[i], cu_seqlens[i + 1]). The values() and offsets() of a jagged tensor of torch.nested are a pack already.
"""

import torch
from torch import Tensor

from seqconv.backends.offsets import offsets_of
from seqconv.layers.packing import NUMBERS, pad
from seqconv.layers.padding import padding_of
from seqconv.ops.checks import OFFSETS, check_offsets, check_shape, check_tensor, require

__all__ = ["pack", "pad", "position_ids", "rows_from_position_ids", "rows_from_seq_idx", "seq_idx"]


def pack(
    x: Tensor, lengths: Tensor | None = None, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The steps of x (batch, length, ...) that are no padding, (total, ...), and cu_seqlens.

    lengths (batch,) keeps the first lengths[i] steps of row i; mask (batch, length) keeps those where it is False (or
    0, if it has -inf elsewhere). One of them must be given.

    Example:
        >>> pack(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([2, 1]))
        (tensor([1., 2., 3.]), tensor([0, 2, 3]))
    """
    check_tensor("pack", "x", x, dtypes=NUMBERS)
    if x.dim() < 2:
        raise ValueError(f"pack: x must be (batch, length, ...), got {tuple(x.shape)}")
    if lengths is None and mask is None:
        raise ValueError("pack: lengths or mask must be given, got neither")
    kept = ~padding_of("pack", x.flatten(2) if x.dim() > 2 else x.unsqueeze(2), mask, lengths)
    steps = kept.sum(1)
    return x[kept], torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def position_ids(cu_seqlens: Tensor) -> Tensor:
    """The number of each step in its row, (total,), from 0 on in int64, as flash-attention's users have them.

    Example:
        >>> position_ids(torch.tensor([0, 2, 3]))
        tensor([0, 1, 0])
    """
    rows = _row_of_step("position_ids", cu_seqlens)
    place = torch.arange(len(rows), device=rows.device)
    return place - cu_seqlens.to(torch.int64)[rows]


def rows_from_position_ids(position_ids: Tensor) -> Tensor:
    """cu_seqlens in int64 of a pack whose steps have these numbers in their rows, (1, total) or (total,): a row begins
    at every 0. Rows without steps leave no trace.

    Example:
        >>> rows_from_position_ids(torch.tensor([0, 1, 0]))
        tensor([0, 2, 3])
    """
    name = "rows_from_position_ids"
    check_tensor(name, "position_ids", position_ids, dtypes=OFFSETS)
    total = ("total", None)
    check_shape(name, "position_ids", position_ids, (total,), (("batch", 1), total))
    position_ids = position_ids.flatten()
    total, first = len(position_ids), position_ids == 0
    follows = (position_ids[1:] == position_ids[:-1] + 1) | first[1:]
    if total:
        require(
            first[0] & follows.all(),
            f"{name}: position_ids must begin with 0 and count up from every 0",
        )
    starts = first.nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([total])])


def seq_idx(cu_seqlens: Tensor) -> Tensor:
    """The number of the row of each step, (1, total) in int32, as mamba's kernels take it.

    Example:
        >>> seq_idx(torch.tensor([0, 2, 3]))
        tensor([[0, 0, 1]], dtype=torch.int32)
    """
    return _row_of_step("seq_idx", cu_seqlens).to(torch.int32).unsqueeze(0)


def rows_from_seq_idx(seq_idx: Tensor) -> Tensor:
    """cu_seqlens in int64 of a pack whose steps are of these rows, (1, total) or (total,): a row ends where the number
    changes. Rows without steps leave no trace.

    Example:
        >>> rows_from_seq_idx(torch.tensor([[0, 0, 1]], dtype=torch.int32))
        tensor([0, 2, 3])
    """
    name = "rows_from_seq_idx"
    check_tensor(name, "seq_idx", seq_idx, dtypes=OFFSETS)
    check_shape(name, "seq_idx", seq_idx, (("total", None),), (("batch", 1), ("total", None)))
    rows = seq_idx.flatten()
    total = rows.new_tensor([len(rows)], dtype=torch.int64)
    if not len(rows):
        return total
    changes = 1 + rows.diff().nonzero().flatten()
    return torch.cat([torch.zeros_like(total), changes, total])


def _row_of_step(name: str, cu_seqlens: Tensor) -> Tensor:
    check_offsets(name, cu_seqlens, None)
    offsets = cu_seqlens.to(torch.int64)
    lengths = offsets.diff()
    if torch.compiler.is_compiling():
        fits = (offsets[0] == 0) & (lengths >= 0).all()
        require(fits, f"{name}: cu_seqlens must be 0 first and not decrease")
    else:
        offsets_of(cu_seqlens, None, function=name)
    return torch.arange(lengths.shape[0], device=offsets.device).repeat_interleave(lengths)
