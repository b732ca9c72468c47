"""Packed rows whose steps are divided among processes: the whole pack is one sequence, and is cut wherever it falls."""

import hashlib
from array import array
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from seqconv.layers.packing import Pack, pack_of
from seqconv.ops.packed import offsets_of
from seqconv.parallel.meeting import shape_of
from seqconv.parallel.shards import Shards

_DIGEST = "cu_seqlens, which are those of the whole pack (a digest of them)"


@dataclass(frozen=True, eq=False)
class DividedPack:
    """The rows of a pack, of which this rank has some steps.

    offsets (rows + 1,) are those of the whole pack, in int64 on the host; longest is the number of steps that the
    kernel is made for, as in Pack.
    """

    offsets: Tensor
    longest: int
    shards: Shards
    rank: int

    @cached_property
    def longest_row(self) -> int:
        return int(self.offsets.diff().max()) if len(self.offsets) > 1 else 0

    def within(self, first: int, size: int) -> Tensor:
        """The offsets of the rows in a run of steps of the pack. Those outside of it are empty there."""
        return self.offsets.clamp(first, first + size) - first

    def lengths(self, device: torch.device) -> Tensor:
        """The steps of every row on this rank, (runs of neighbouring steps, rows)."""
        runs = self.shards.segments(self.rank)
        return torch.stack([self.within(*run).diff() for run in runs]).to(device)

    def across(self, cut: int) -> tuple[int, int]:
        """The first step and the end of the row to which the steps before and after a cut belong; the cut itself,
        twice, where none does."""
        i = int(torch.searchsorted(self.offsets, cut, right=True)) - 1
        if self.offsets[i] == cut:
            return cut, cut
        return int(self.offsets[i]), int(self.offsets[i + 1])


def offered(function: str, x: Tensor, rows, mask=None, lengths=None) -> Pack:
    """What a rank says of the pack by rows = (cu_seqlens, max_seqlen), with the offsets on the host, checked but for
    the number of steps of all ranks."""
    cu_seqlens, max_seqlen = rows
    pack = pack_of(function, x, cu_seqlens, max_seqlen, mask, lengths, part=True)
    offsets = offsets_of(pack.cu_seqlens, None, max_seqlen, function=function)
    return pack._replace(cu_seqlens=offsets)


def facts_of(rows, pack: Pack | None) -> dict:
    """What the ranks must agree about, whether they have packed rows or not."""
    cu_seqlens, max_seqlen = rows
    digest = None
    if pack is not None:
        # A weighted sum, which tells masks apart, is the same for many offsets: [0, 3, 5, 10] and [0, 0, 7, 10].
        values = array("q", pack.cu_seqlens.tolist()).tobytes()
        digest = int.from_bytes(hashlib.blake2b(values, digest_size=7).digest(), "little")
    return shape_of("cu_seqlens", cu_seqlens, 1) | {"max_seqlen": max_seqlen, _DIGEST: digest}


def divided(function: str, pack: Pack, shards: Shards, rank: int) -> DividedPack:
    """The pack, once the ranks know one another's sizes. All of them raise the same error."""
    offsets = pack.cu_seqlens
    if offsets[-1] != shards.length:
        text = f"must be the number of steps of all ranks, {shards.length}, got {int(offsets[-1])}"
        raise ValueError(f"{function}: cu_seqlens[{len(offsets) - 1}] {text}")
    return DividedPack(offsets, pack.longest, shards, rank)
