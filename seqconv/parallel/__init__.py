"""Layers and convolutions over several processes, on torch.distributed."""

from seqconv.parallel.context import ContextParallel, context_parallel
from seqconv.parallel.exchange import sum_over_ranks
from seqconv.parallel.fftconv import explain, fftconv
from seqconv.parallel.fsdp import fully_shard
from seqconv.parallel.plan import Explanation

__all__ = [
    "ContextParallel",
    "Explanation",
    "context_parallel",
    "explain",
    "fftconv",
    "fully_shard",
    "sum_over_ranks",
]
