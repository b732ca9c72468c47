"""DistributedDataParallel over gloo: python two_processes.py RANK FOLDER, in two processes at once.

Every layer takes a step on its half of a batch; the gradients must be those of the whole batch in one process.
"""

import sys

import torch
import torch.distributed as dist
from layer_table import LAYERS, D
from torch.nn.parallel import DistributedDataParallel

from seqconv import ButterflyConv, Hyena


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    x = torch.randn(4, 50, D, generator=torch.Generator().manual_seed(1))
    more = {
        "hyena": lambda: Hyena(D, l_max=80),
        "butterfly_conv": lambda: ButterflyConv(D, l_max=80, kernel_dropout=0.0),
    }
    for name, make in (LAYERS | more).items():
        torch.manual_seed(rank)  # rank 0's parameters are broadcast
        layer = DistributedDataParallel(make())
        layer(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        found = [p.grad.clone() for p in layer.module.parameters()]
        layer.module.zero_grad()
        layer.module(x).square().mean().backward()
        for (path, p), grad in zip(layer.module.named_parameters(), found, strict=True):
            error = (grad - p.grad).norm() / p.grad.norm()
            assert error < 1e-4, f"{name}: {path} differs by {error:.1e}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
