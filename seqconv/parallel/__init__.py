"""Layers and convolutions over several processes, on torch.distributed."""

from seqconv.parallel.fsdp import fully_shard

__all__ = ["fully_shard"]
