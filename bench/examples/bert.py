"""Hugging Face's BERT with a two-sided S4D instead of self-attention learns which of two tokens is more frequent."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from bench.examples import train
from seqconv import S4D
from seqconv.nn import AsHuggingFaceAttention

WIDTH, LENGTH = 32, 40


def main() -> tuple[float, float, float]:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=8, intermediate_size=64, **sizes))
    for block in model.bert.encoder.layer:
        block.attention.self = AsHuggingFaceAttention(S4D(WIDTH, bidirectional=True))
    lengths = torch.tensor([[40], [25], [30], [35]]).repeat(8, 1)
    mask = (torch.arange(LENGTH) < lengths).long()  # (b l)

    def loss_of():
        ids = torch.randint(1, 8, mask.shape)
        more = (((ids == 2).long() - (ids == 3).long()) * mask).sum(1) > 0
        return model(ids, attention_mask=mask, labels=more.long()).loss

    first, last = train(model, loss_of, steps=100, lr=5e-3)
    ids = torch.randint(1, 8, mask.shape)
    model.eval()
    with torch.no_grad():
        one, two = (model(i, attention_mask=mask).logits for i in (ids, ids.where(mask == 1, 5)))
    change = (one - two).abs().max().item()
    print(
        f"loss {first:.3f} -> {last:.3f}; other tokens in the padding change logits by {change:.1e}"
    )
    return first, last, change


if __name__ == "__main__":
    main()
