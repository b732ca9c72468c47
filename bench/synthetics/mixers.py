"""A model of one layer again and again, with nothing between but norms and sums, as zoology compares layers.

    x <- x + layer(norm(x));  logits = norm(x) E^T for the embedding E (vocab, width)

Attention, which no layer of this package is, stands beside the layers: it solves what they do not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.language.model import LAYERS

ATTENTION = "attention"


class Attention(nn.Module):
    """Causal attention with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).unsqueeze(1).chunk(3, -1)
        return self.outer(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


class Mixers(nn.Module):
    """Tokens (batch, length) to the logits of those steps that are asked for."""

    def __init__(self, layer: str, width: int, depth: int, length: int, vocab: int):
        super().__init__()
        attends = layer == ATTENTION
        make = (lambda *_: Attention(width)) if attends else LAYERS[layer]
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(length, width) if attends else None
        depth = depth // 2 if attends else depth  # zoology's attention has half as many
        self.layers = nn.ModuleList(make(width, length) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth + 1))
        for module in (self.embedding, self.positions):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """asked (batch, length) -> (number of True in it, vocab)."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1]))
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + layer(norm(x))
        return F.linear(self.norms[-1](x[asked]), self.embedding.weight)
