"""The steps of every sequence divided among processes: --parallel.context."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqconv import parallel
from seqconv.parallel.shards import chunk_sizes


class Context:
    """This process among the `size` that have the same samples and divide the steps of each of them.

    Neighbouring processes belong together. Each has the part that torch.chunk would give it. `length` is the number
    of steps of the batch at hand, `start` the place of this process's first one.
    """

    def __init__(self, size: int):
        self.size = size
        self.group, _ = dist.new_subgroups(size)
        self.rank = dist.get_rank(self.group)
        self.start = self.length = 0

    def divide(self, model: nn.Module) -> None:
        """Makes a model take whole rows and compute with this process's steps of them. The gradients of all
        parameters are those of the sum of the processes' losses."""
        for module in model.modules():
            if hasattr(module, "context"):
                module.context = self
        parallel.context_parallel(model, self.group)

    def own(self, x: Tensor) -> Tensor:
        """This process's steps of a batch (batch, length, ...)."""
        sizes = chunk_sizes(x.shape[1], self.size)
        self.start, self.length = sum(sizes[: self.rank]), x.shape[1]
        return x.narrow(1, self.start, sizes[self.rank])

    def sum(self, t: Tensor) -> Tensor:
        return parallel.sum_over_ranks(t, self.group)

    def batch_norm(self, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
        """norm in training, by the statistics of whole rows; x is (batch, steps, channels)."""
        count = x.shape[0] * self.length
        if count < 2:
            raise ValueError(f"BatchNorm wants more than one step in training, got {count}")
        rows = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = self.sum(rows.sum((0, 1))) / count
        rows = rows - mean
        var = self.sum(rows.square().sum((0, 1))) / count
        with torch.no_grad():
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
        return (rows * ((var + norm.eps).rsqrt() * norm.weight) + norm.bias).to(x.dtype)
