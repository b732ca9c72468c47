"""A language model of tokens, bytes for one: an embedding, blocks of one of the layers and a network, and logits.

    block: x <- x + layer(norm(x)); x <- x + network(norm(x))

It runs over whole sequences, and step by step with a state, as its layers do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqconv
from seqconv.streaming import State, States

LAYERS = {  # name -> the layer for a width and a context
    "long_conv": lambda width, context: seqconv.LongConv(width, l_max=context),
    "s4d": lambda width, context: seqconv.S4D(width),
    "sgconv": lambda width, context: seqconv.SGConv(width, l_max=context),
    "hyena": lambda width, context: seqconv.Hyena(width, l_max=context),
}
BYTES = 256


class Block(nn.Module):
    def __init__(self, layer: str, width: int, context: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.layer = LAYERS[layer](width, context)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def _with(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        return x + self.dropout(self.network(self.norms[1](x)))

    def forward(self, x: Tensor) -> Tensor:
        return self._with(x, self.layer(self.norms[0](x)))

    def step(self, x: Tensor, state) -> tuple[Tensor, State]:
        mixed, state = self.layer.step(self.norms[0](x), state)
        return self._with(x, mixed), state

    def prefill(self, x: Tensor, state, **padding) -> tuple[Tensor, State]:
        mixed, state = self.layer.prefill(self.norms[0](x), state, **padding)
        return self._with(x, mixed), state


class LanguageModel(nn.Module):
    """Tokens, integers below `vocab`, to logits of the next one. LongConv, SGConv and Hyena see the last `context`
    tokens in each block."""

    def __init__(
        self,
        layer: str,
        width: int,
        depth: int,
        context: int,
        dropout: float = 0.0,
        vocab: int = BYTES,
    ):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(layer, width, context, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> (batch, length, vocab)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        """The mean cross-entropy of tokens (batch, length + 1) after the first, in nats."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    # ---- step by step ----

    def init_state(self, batch: int) -> States:
        return States(block.layer.init_state(batch) for block in self.blocks)

    def step(self, tokens: Tensor, state: States) -> Tensor:
        """(batch,) -> (batch, 256). Changes the state."""
        x = self.embedding(tokens)
        for block, part in zip(self.blocks, state, strict=True):
            x, _ = block.step(x, part)
        return self.head(self.norm(x))

    def prefill(
        self, tokens: Tensor, state: States, lengths: Tensor | None = None
    ) -> tuple[Tensor, States]:
        """(batch, length) -> (batch, length, 256), and the state after them. Row i has lengths[i] tokens, followed by
        padding."""
        padding = {} if lengths is None else {"lengths": lengths}
        x, states = self.embedding(tokens), []
        for block, part in zip(self.blocks, state, strict=True):
            x, part = block.prefill(x, part, **padding)
            states.append(part)
        return self.head(self.norm(x)), States(states)


def as_tokens(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def as_text(tokens) -> str:
    return bytes(tokens).decode(errors="replace")
