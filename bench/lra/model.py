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
    """LayerNorm over channels, or BatchNorm over (batch, length), padding included as in the papers.

    Of a pack (total, channels) the statistics of BatchNorm are those of the real steps, since there are no others.
    """

    def __init__(self, kind: str, d_model: int):
        super().__init__()
        self.batch = kind == "batch"
        self.norm = nn.BatchNorm1d(d_model) if self.batch else nn.LayerNorm(d_model)
        self.context = None  # bench.lra.context.Context, where processes divide the steps

    def forward(self, x: Tensor) -> Tensor:
        if self.batch and self.training and self.context is not None:
            return self.context.batch_norm(self.norm, x)
        if self.batch and x.dim() == 3:
            return self.norm(x.flatten(0, 1)).view_as(x)
        return self.norm(x)


class SequenceClassifier(nn.Module):
    """Encoder, `depth` residual blocks of one layer and norm, pooling, decoder; no positions.

        block: z = layer(norm(x) if prenorm else x, lengths); x <- x + dropout(z); x <- norm(x) unless prenorm

    x (batch, length, channels) float or (batch, length) tokens, lengths (batch,) or None for full
    length -> logits (batch, classes). prenorm adds a norm at the end. Pooling reads only valid
    steps. pair: x holds the first documents and, behind them, the second ones. The decoder is then a
    network with a GELU that sees (a, b, a - b, a b) of both.

    With cu_seqlens (rows + 1,) the samples are packed: x is (total, channels) or (total,), and row i has the steps
    [cu_seqlens[i], cu_seqlens[i + 1]). The logits are those of the padded batch, but for what BatchNorm in training
    counts.

    channels: continuous input has a linear encoder. vocab: tokens have an embedding, initially torch's N(0, 1).

    `rate` is that of the layers: samples that were taken 1 / rate times as often as those of training.

    Where `context` is set, several processes have the same x, and each computes with its own steps of it. The
    logits are those of whole rows, on every process the same.
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
        self.context = None
        self.rate = 1.0  # steps of training in one step of x
        if pair:
            hidden = nn.Linear(4 * width, width)
            self.decoder = nn.Sequential(hidden, nn.GELU(), nn.Linear(width, classes))
        else:
            self.decoder = nn.Linear(width, classes)

    def features(
        self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Returns what is pooled: (batch, length, d_model), this process's steps of it, or (total, d_model)."""
        x = self.encoder(x if self.context is None else self.context.own(x))
        rows = {"lengths": lengths} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        rows |= {"rate": self.rate} if self.rate != 1 else {}
        steps = ()
        if cu_seqlens is not None and isinstance(self.dropout, TiedDropout):
            steps = (cu_seqlens.to(x.device).diff(),)  # a mask for each row
        for layer, norm in zip(self.layers, self.norms, strict=False):
            z = layer(norm(x) if self.prenorm else x, **rows)
            x = x + self.dropout(z, *steps)
            x = x if self.prenorm else norm(x)
        return self.norms[-1](x) if self.prenorm else x

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        x = self.features(x, lengths, cu_seqlens)
        if cu_seqlens is None:
            x = pooled(x, lengths, self.pool, self.context)
        else:
            x = pooled_rows(x, cu_seqlens, self.pool)
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


def pooled(x: Tensor, lengths: Tensor | None, pool: str, context=None) -> Tensor:
    """(batch, length, d_model) -> (batch, d_model): the mean of the valid steps, or the last of them.

    context: x holds this process's steps only, and lengths are those of whole rows.
    """
    if lengths is None and context is None:
        return x.mean(1) if pool == "mean" else x[:, -1]
    steps = torch.arange(x.shape[1], device=x.device)
    if context is not None:
        steps = steps + context.start
    if lengths is None:
        lengths = steps.new_full((len(x),), context.length)
    count = lengths.clamp(min=1).unsqueeze(1)
    read = steps < lengths.unsqueeze(1) if pool == "mean" else steps == count - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.masked_fill(~read.unsqueeze(-1), 0.0).sum(1, dtype=wide)
    total = total if context is None else context.sum(total)
    return (total / count if pool == "mean" else total).to(x.dtype)


def pooled_rows(x: Tensor, cu_seqlens: Tensor, pool: str) -> Tensor:
    """The same of packed rows: (total, d_model) -> (rows, d_model). A row without steps has zeros."""
    offsets = cu_seqlens.to(x.device, torch.int64)
    count = offsets.diff().unsqueeze(1)
    if pool == "last":
        # The step before an empty row is another row's.
        last = x[(offsets[1:] - 1).clamp(min=0)] if len(x) else x.new_zeros(len(count), x.shape[1])
        return last.masked_fill(count == 0, 0.0)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = torch.segment_reduce(wide, "sum", offsets=offsets, unsafe=True)
    return (total / count.clamp(min=1)).to(x.dtype)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)
