"""Layers and convolutions over several processes, on torch.distributed."""

from seqconv.parallel.fftconv import explain, fftconv
from seqconv.parallel.fsdp import fully_shard
from seqconv.parallel.plan import Explanation
from seqconv.parallel.tensor import plan

__all__ = ["Explanation", "explain", "fftconv", "fully_shard", "plan"]
