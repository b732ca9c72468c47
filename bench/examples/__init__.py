"""Small models of other libraries with a seqconv layer. python -m bench.examples.NAME takes seconds on a CPU."""

import torch
from torch import nn

from seqconv import param_groups


def train(model: nn.Module, loss_of, steps: int, lr: float) -> tuple[float, float]:
    """Minimises loss_of() by AdamW. Returns the first and the last loss."""
    optimizer = torch.optim.AdamW(param_groups(model, lr=lr))
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]
