"""Gradient checkpointing of a stack of layers under bfloat16 autocast. It leaves the gradients as they are, even with
dropout."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.examples import train
from seqconv import LongConv

WIDTH, LENGTH = 32, 256


def main() -> tuple[float, float, float]:
    torch.manual_seed(0)
    layers = nn.ModuleList(LongConv(WIDTH, l_max=LENGTH, dropout=0.1) for _ in range(4))
    model = nn.ModuleList([nn.Linear(1, WIDTH), layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)])

    def loss_of(x=None, saving=True):
        x = torch.randn(4, LENGTH, 1) if x is None else x
        with torch.autocast("cpu", torch.bfloat16):
            h = model[0](x)
            for layer in layers:
                h = h + (checkpoint(layer, h, use_reentrant=False) if saving else layer(h))
            return F.mse_loss(model[3](model[2](h)).float(), x.cumsum(1) / 8)

    def gradients(x, saving):
        torch.manual_seed(1)
        return torch.autograd.grad(loss_of(x, saving), list(model.parameters()))

    x = torch.randn(4, LENGTH, 1)
    pairs = zip(gradients(x, True), gradients(x, False), strict=True)
    change = max((a - b).abs().max().item() for a, b in pairs)
    first, last = train(model, loss_of, steps=40, lr=5e-3)
    print(f"loss {first:.3f} -> {last:.3f}; checkpointing changes gradients by {change:.1e}")
    return first, last, change


if __name__ == "__main__":
    main()
