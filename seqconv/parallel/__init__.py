"""Layers and convolutions over several processes, on torch.distributed."""

from seqconv.parallel.context import ContextParallel, context_parallel
from seqconv.parallel.fftconv import explain, fftconv
from seqconv.parallel.fsdp import fully_shard
from seqconv.parallel.plan import Explanation
from seqconv.parallel.tensor import plan

__all__ = [
    "ContextParallel",
    "Explanation",
    "context_parallel",
    "explain",
    "fftconv",
    "fully_shard",
    "plan",
]
