"""nn.TransformerEncoder with S4D in place of attention. It learns to copy its input five steps late, past padding."""

import torch
from torch import nn

from bench.examples import train
from seqconv import S4D
from seqconv.nn import AsAttention

WIDTH, LENGTH, DELAY = 32, 60, 5


def main() -> tuple[float, float, float]:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(WIDTH, 2, 64, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(block, num_layers=2)
    for block in encoder.layers:
        block.self_attn = AsAttention(S4D(WIDTH), batch_first=True)
    model = nn.ModuleList([nn.Linear(1, WIDTH), encoder, nn.Linear(WIDTH, 1)])
    padding = torch.arange(LENGTH) >= torch.tensor([[60], [40], [50], [45]]).repeat(4, 1)  # (b l)

    def predict(x):
        return model[2](encoder(model[0](x), src_key_padding_mask=padding))

    def loss_of():
        x = torch.randn(16, LENGTH, 1)
        return (predict(x)[:, DELAY:] - x[:, :-DELAY])[~padding[:, DELAY:]].square().mean()

    first, last = train(model, loss_of, steps=60, lr=5e-3)
    x = torch.randn(16, LENGTH, 1)
    other, wanted = x.masked_fill(padding.unsqueeze(-1), 100.0), predict(x)[~padding]
    model.eval()
    with torch.no_grad():
        change = (predict(other)[~padding] - wanted).abs().max().item()
    print(f"loss {first:.3f} -> {last:.3f}; eval and other padding change results by {change:.1e}")
    return first, last, change


if __name__ == "__main__":
    main()
