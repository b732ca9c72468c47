"""The training step of a language model, for bench.layers: three blocks of LongConv with their networks, and AdamW."""

import torch
from torch import Tensor, nn

from bench.language.model import Block

DEPTH = 3


class LanguageStep(nn.Module):
    """Blocks and norm of bench.language's model, (batch, length, width) -> the same. What lies before and behind them,
    the embedding and the logits of 256 bytes, is left out."""

    def __init__(self, width: int, length: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block("long_conv", width, length, 0.0) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(width)
        # At this rate the parameters stay as they are, and every step takes the time of any other.
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.0)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def update(self, grads: list[Tensor]) -> None:
        """A step of the optimiser, with a gradient for each parameter."""
        for p, grad in zip(self.parameters(), grads, strict=True):
            p.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad()
