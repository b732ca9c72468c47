"""A seqconv layer called as the attention of Hugging Face's BERT and GPT-2 (transformers 5)."""

from torch import nn


class Mixer(nn.Module):
    """attention_mask (batch, 1, queries, keys): True, or 0 if float, where a key may be seen, or None. What
    the last query may not see is padding; that a causal model's others see less is what the layer is.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, attention_mask=None, cache=None, **ignored):
        if cache is not None:
            raise ValueError(
                "Mixer: there are no keys and values to cache, use_cache must be False"
            )
        padding = None
        if attention_mask is not None:
            seen = attention_mask[:, 0, -1]
            padding = seen.logical_not() if not seen.is_floating_point() else seen < 0
        return self.layer(hidden_states, padding), None
