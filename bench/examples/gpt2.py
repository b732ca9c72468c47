"""Hugging Face's GPT-2 with a causal LongConv in place of attention. It learns to continue periodic sequences."""

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from bench.examples import train
from seqconv import LongConv
from seqconv.nn import AsHuggingFaceAttention

WIDTH, LENGTH, PERIOD, TOKENS = 32, 40, 6, 10


def main() -> tuple[float, float, float]:
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": LENGTH}
    rest = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False, "resid_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, **sizes, **rest))
    for block in model.transformer.h:
        block.attn = AsHuggingFaceAttention(LongConv(WIDTH, l_max=LENGTH))

    def sequences():
        return torch.randint(TOKENS, (16, PERIOD)).repeat(1, LENGTH // PERIOD + 1)[:, :LENGTH]

    def loss_of():
        ids = sequences()
        return F.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:])

    first, last = train(model, loss_of, steps=150, lr=1e-2)
    ids = sequences()
    later = torch.cat([ids[:, :20], (ids[:, 20:] + 1) % TOKENS], 1)
    model.eval()
    with torch.no_grad():
        change = (model(ids).logits - model(later).logits)[:, :20].abs().max().item()
    print(f"loss {first:.3f} -> {last:.3f}; later tokens change earlier logits by {change:.1e}")
    return first, last, change


if __name__ == "__main__":
    main()
