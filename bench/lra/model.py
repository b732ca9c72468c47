"""The sequence classifier of the Long Range Arena around any of the package's layers."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqconv
from bench.lra import options
from seqconv.layers.base import TiedDropout

LAYERS = {
    "s4d": seqconv.S4D,
    "sgconv": seqconv.SGConv,
    "long_conv": seqconv.LongConv,
    "butterfly": seqconv.ButterflyConv,
    "hyena": seqconv.Hyena,
}


def make_layer(layer: str, model: options.Model, kernel, l_max: int) -> nn.Module:
    arguments = dataclasses.asdict(kernel)
    dt_lr = arguments.pop("dt_lr", None)
    kernel_lr = arguments["kernel_lr"]
    if dt_lr is not None:
        arguments["kernel_lr"] = max(
            dt_lr, kernel_lr
        )  # with 0 the parameter would become a buffer for good
    if layer != "s4d":
        arguments["l_max"] = l_max
    if layer != "hyena":
        arguments |= {"dropout": model.dropout, "tie_dropout": model.tie_dropout}
    made = LAYERS[layer](model.d_model, **arguments)
    if dt_lr is not None:
        made.kernel.override("inv_dt", lr=dt_lr)
        made.kernel.override("inv_A_real", "inv_A_imag", "B", lr=kernel_lr)
    return made


class Norm(nn.Module):
    """LayerNorm over channels, or BatchNorm over (batch, length), padding included as in the papers."""

    def __init__(self, kind: str, d_model: int):
        super().__init__()
        self.batch = kind == "batch"
        self.norm = nn.BatchNorm1d(d_model) if self.batch else nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x) if self.batch else self.norm(x)


class SequenceClassifier(nn.Module):
    """Encoder, `depth` residual blocks of one layer and norm, pooling, decoder; no positions.

        block: z = layer(norm(x) if prenorm else x, lengths); x <- x + dropout(z); x <- norm(x) unless prenorm

    x (batch, length, channels) float or (batch, length) tokens, lengths (batch,) or None for full
    length -> logits (batch, classes). prenorm adds a norm at the end. Pooling reads only valid
    steps. pair: x holds the first documents and, behind them, the second ones. The decoder is then a
    network with a GELU that sees (a, b, a - b, a b) of both.

    channels: continuous input has a linear encoder. vocab: tokens have an embedding, initially torch's N(0, 1).
    """

    def __init__(
        self,
        layer: str,
        model: options.Model,
        kernel,
        *,
        classes: int,
        l_max: int,
        channels: int | None = None,
        vocab: int | None = None,
        pair: bool = False,
    ):
        super().__init__()
        width = model.d_model
        if (channels is None) == (vocab is None):
            raise ValueError(f"one of channels and vocab wanted, got {channels} and {vocab}")
        self.encoder = nn.Embedding(vocab, width) if vocab else nn.Linear(channels, width)
        self.layers = nn.ModuleList(
            make_layer(layer, model, kernel, l_max) for _ in range(model.depth)
        )
        norms = model.depth + model.prenorm
        self.norms = nn.ModuleList(Norm(model.norm, width) for _ in range(norms))
        self.dropout = (TiedDropout if model.tie_dropout else nn.Dropout)(model.dropout)
        self.prenorm, self.pool, self.pair = model.prenorm, model.pool, pair
        if pair:
            hidden = nn.Linear(4 * width, width)
            self.decoder = nn.Sequential(hidden, nn.GELU(), nn.Linear(width, classes))
        else:
            self.decoder = nn.Linear(width, classes)

    def features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Returns what is pooled: (batch, length, d_model)."""
        x = self.encoder(x)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            z = layer(norm(x) if self.prenorm else x, lengths=lengths)
            x = x + self.dropout(z)
            x = x if self.prenorm else norm(x)
        return self.norms[-1](x) if self.prenorm else x

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = pooled(self.features(x, lengths), lengths, self.pool)
        if self.pair:
            a, b = x.chunk(2)
            x = torch.cat([a, b, a - b, a * b], dim=-1)
        return self.decoder(x)

    def kernels(self, length: int) -> list[Tensor]:
        """Returns the first kernel of every layer, (channels, taps), without dropout."""
        training = self.training
        self.eval()
        with torch.no_grad():
            made = [getattr(x, "kernel", None) or x.filter for x in self.layers]
            found = [kernel(length)[0].float().cpu() for kernel in made]
        self.train(training)
        return found


def pooled(x: Tensor, lengths: Tensor | None, pool: str) -> Tensor:
    """(batch, length, d_model) -> (batch, d_model): the mean of the valid steps, or the last of them."""
    if lengths is None:
        return x.mean(1) if pool == "mean" else x[:, -1]
    if pool == "last":
        return x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0)]
    valid = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
    total = x.masked_fill(~valid.unsqueeze(-1), 0.0).sum(1)
    return total / lengths.clamp(min=1).unsqueeze(1).to(x.dtype)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)
