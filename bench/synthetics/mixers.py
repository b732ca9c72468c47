"""A model of one layer again and again, without networks between, as zoology compares layers (arXiv 2312.04927).

    x <- x + layer(norm(x));  x <- x + norm(x);  logits = norm(x) E^T for the embedding E (vocab, width)

Attention, which no layer of this package is, stands beside the layers: it solves what they do not. Apart from the
embeddings, initial weights are those of torch and of the layers, and not zoology's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT = 0.1  # of embeddings, and of attention's weights


class Attention(nn.Module):
    """Causal attention with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).unsqueeze(1).chunk(3, -1)
        dropout = DROPOUT if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.outer(y.squeeze(1))


class Mixers(nn.Module):
    """Tokens (batch, length) to the logits of those steps that are asked for.

    make: the layer of a width and a length. positions: steps have an embedding, too.
    """

    def __init__(
        self,
        make: Callable[[int, int], nn.Module],
        width: int,
        depth: int,
        length: int,
        vocab: int,
        positions: bool = False,
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(length, width) if positions else None
        self.layers = nn.ModuleList(make(width, length) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.dropout = nn.Dropout(DROPOUT)
        for module in (self.embedding, self.positions):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """asked (batch, length) -> (number of True in it, vocab)."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1]))
        x = self.dropout(x)
        for i, layer in enumerate(self.layers):
            x = x + layer(self.norms[2 * i](x))
            x = x + self.norms[2 * i + 1](x)
        return F.linear(self.norms[-1](x[asked]), self.embedding.weight)
