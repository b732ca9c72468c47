"""Modules that take the place of others: a layer as attention, of torch or of Hugging Face, and nn.Conv1d."""

import torch
from torch import Tensor, nn

from seqconv.layers.conv1d import Conv1d as Conv1d
from seqconv.ops.checks import FLOATS, check_flag, check_shape, check_tensor, require


class _Foreign:
    """An object in the place where torch's fused encoder kernels look for the weights of attention.

    An operand that defines __torch_function__ declines those kernels, in a stack as in a single layer. Every
    other way to decline them makes torch warn when a stack is built around the layer. And torch does not look
    at it again in a stack that was built before the layer was put in.
    """

    def __init__(self):
        self.weight = self.bias = self

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return NotImplemented


def _check_layer(function: str, layer: nn.Module) -> None:
    if not (hasattr(layer, "d_model") and hasattr(layer, "causal")):
        wanted = "a layer with d_model and causal"
        raise TypeError(f"{function}: layer must be {wanted}, got {type(layer).__name__}")


class AsAttention(nn.Module):
    """A layer that is called as nn.MultiheadAttention is, for the self_attn of nn.TransformerEncoderLayer.

    AsAttention(layer, batch_first=True)(x, x, x, key_padding_mask=mask) = (layer(x, mask), None): the layer mixes the
    sequence, and the encoder layer does the rest. It works in training, in evaluation, and in nn.TransformerEncoder
    and nn.TransformerDecoderLayer as well. It declines torch's fused inference kernels, which know attention
    only. All layers of an nn.TransformerEncoder are copies of one: give each its own weights.

    Args:
        layer: maps (batch, length, d_model) and a padding mask to the same shape. It has d_model, and causal,
            which is True if no output sees a later input, as every layer of seqconv has.
        batch_first: True for (batch, length, d_model), False for (length, batch, d_model). The encoder layer
            must have been built with the same value, and torch's default is False. With the other value
            the layer would mix the samples. There is no default here, because nothing could check it.

    There are no parameters besides the layer's.

    Source: torch.nn.MultiheadAttention's contract. Example:
        >>> from seqconv import S4D
        >>> block = nn.TransformerEncoderLayer(8, nhead=2, batch_first=True)
        >>> block.self_attn = AsAttention(S4D(8, bidirectional=True), batch_first=True)
        >>> block(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    # Torch's encoders read these attributes before they decide for or against their fused kernels.
    in_proj_weight = in_proj_bias = out_proj = _Foreign()
    _qkv_same_embed_dim = True
    num_heads = 2

    def __init__(self, layer: nn.Module, *, batch_first: bool):
        super().__init__()
        _check_layer("AsAttention", layer)
        check_flag("AsAttention", batch_first=batch_first)
        self.layer = layer
        self.embed_dim = layer.d_model
        self.batch_first = batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """query, key and value must be one tensor: (batch, length, d_model), or (length, batch, d_model)
        if not batch_first, or (length, d_model). key_padding_mask, (batch, length) or (length,), is the
        layer's mask. attn_mask and is_causal may only ask for what the layer does by itself: a causal layer takes
        the mask of nn.Transformer.generate_square_subsequent_mask, as floats or as bool, and
        is_causal=True, with or without that mask. Any other layer takes a mask that hides nothing. Everything else
        raises ValueError. The second result is None, because there are no weights of attention.
        """
        if not (query is key and key is value):
            raise ValueError(
                "AsAttention: query, key and value must be the same tensor (self-attention), got different ones"
            )
        check_tensor("AsAttention", "query", query)
        d = self.layer.d_model
        batched = (("batch", None), ("length", None), ("d_model", d))
        if not self.batch_first:
            batched = (batched[1], batched[0], batched[2])
        check_shape("AsAttention", "query", query, batched, (("length", None), ("d_model", d)))
        x = query
        if x.dim() == 2:
            x = x.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        self._check_attn_mask(attn_mask, is_causal, x.shape[1])
        y = self.layer(x, key_padding_mask)
        if query.dim() == 2:
            y = y.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, None

    def _check_attn_mask(self, attn_mask: Tensor | None, is_causal: bool, length: int) -> None:
        causal = self.layer.causal
        if is_causal and not causal:
            raise ValueError(
                "AsAttention: is_causal must be False for a layer that sees the future"
            )
        if attn_mask is None:
            return
        check_tensor("AsAttention", "attn_mask", attn_mask, dtypes=(torch.bool, *FLOATS))
        check_shape("AsAttention", "attn_mask", attn_mask, (("length", length),) * 2)
        hidden = torch.ones(length, length, dtype=torch.bool, device=attn_mask.device)
        hidden = hidden.triu(1 if causal else length)
        if attn_mask.dtype != torch.bool:
            hidden = torch.zeros_like(attn_mask).masked_fill(hidden, -torch.inf)
        layer, wanted = ("causal", "exactly the future") if causal else ("not causal", "nothing")
        text = f"AsAttention: attn_mask must hide {wanted} (the layer is {layer}), got another mask"
        require((attn_mask == hidden).all(), text)


_CACHE = "nothing is cached: use_cache must be False"
_NOT_THERE = {
    "cache": _CACHE,
    "past_key_values": _CACHE,
    "past_key_value": _CACHE,
    "layer_past": _CACHE,
    "encoder_hidden_states": "the layer is self-attention",
    "head_mask": "the layer has no heads of attention",
    "output_attentions": "the layer has no weights of attention",
    "cu_seq_lens_q": "packed sequences are not taken",
}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_VALUES = "be bool, integers 1 (seen) and 0 (padding), or floats 0 (seen) and at most -1e4 (padding), got other values"
_NOTHING = (
    "let every sample see something, got one that sees nothing: is the mask inverted? True is seen here, "
    "and padding in seqconv's own masks"
)
_MORE = "hide padding, or the future, and nothing else (no window, no packed sequences), got another mask"
_FUTURE = "not hide the future from a layer that is not causal, got a causal mask"


def _seen(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys a mask of Hugging Face's lets a query see, and which values are those of such a mask."""
    if mask.dtype == torch.bool:
        return mask, torch.ones_like(mask)
    if mask.is_floating_point():
        return mask == 0, (mask == 0) | (mask <= -1e4)
    return mask == 1, (mask == 0) | (mask == 1)


def _require_all(conditions: dict[str, Tensor]) -> None:
    """Raises ValueError with the first text whose condition does not hold. All conditions are transferred from the
    device together."""
    if torch.compiler.is_compiling():
        for text, condition in conditions.items():
            require(condition.all(), text)
        return
    valid = torch.stack([condition.all() for condition in conditions.values()]).tolist()
    if not all(valid):
        raise ValueError(next(t for t, v in zip(conditions, valid, strict=True) if not v))


class AsHuggingFaceAttention(nn.Module):
    """A layer that is called as Hugging Face's models (transformers 5) call their self-attention.

    AsHuggingFaceAttention(layer)(hidden_states, attention_mask=mask) = (layer(hidden_states, padding), None).
    The two conventions are opposites:

        attention_mask, Hugging Face's   True, 1 or 0.0 is a key that may be seen;
                                         False, 0 or at most -1e4 is not: padding
        mask, of seqconv's layers        True or -inf is padding; False or 0.0 is not

    Hence `layer(x, mask=attention_mask == 0)` is right for a tokenizer's integers. Bool masks of the two conventions
    differ in the sense of True only. Always give the model the attention_mask of its own convention. An inverted
    mask is recognised here if it leaves nothing to see in a sample, as it does in every sample without padding.

    Args:
        layer: maps (batch, length, d_model) and a padding mask to the same shape. It has d_model and causal,
            as every layer of seqconv has.

    There are no parameters besides the layer's, and nothing is cached: use_cache must be False, and generation
    passes the whole sequence at every step.

    Source: the attention modules of transformers.models. Example:
        >>> from seqconv import S4D
        >>> attention = AsHuggingFaceAttention(S4D(8, bidirectional=True))
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        >>> attention(torch.randn(2, 4, 8), attention_mask=mask)[0].shape
        torch.Size([2, 4, 8])
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        _check_layer("AsHuggingFaceAttention", layer)
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others
    ) -> tuple[Tensor, None]:
        """hidden_states is (batch, length, d_model). attention_mask is (batch, length), or (batch, 1, queries,
        keys) with 1 or length queries, and holds bools, integers 0 and 1, or floats. It may hide padding, and the
        future from a causal layer, which hides the future itself. Masks that hide more (a sliding window, or
        other samples packed into the row) raise ValueError, and so do caches, encoder_hidden_states, head_mask,
        and a request for weights of attention. The rest of `others` is ignored, positions for example.
        """
        for name, value in others.items():
            if name in _NOT_THERE and value is not None and value is not False:
                wanted, got = f"None ({_NOT_THERE[name]})", type(value).__name__
                raise ValueError(f"AsHuggingFaceAttention: {name} must be {wanted}, got {got}")
        padding = None
        if attention_mask is not None:
            check_tensor("AsHuggingFaceAttention", "hidden_states", hidden_states)
            padding = self._padding(attention_mask, hidden_states)
        return self.layer(hidden_states, padding), None

    def _padding(self, mask: Tensor, x: Tensor) -> Tensor:
        """Whether a step is padding, (batch, length): the last query may not see it. Of the other queries only so
        much is read as tells padding from masks that a layer cannot follow, in time that grows with the length."""
        name = "AsHuggingFaceAttention"
        kinds = (torch.bool, *_INTEGERS, *FLOATS)
        check_tensor(
            name, "attention_mask", mask, dtypes=kinds, device=x.device, owner="hidden_states"
        )
        batch, length = ("batch", x.shape[0]), ("length", x.shape[1])
        all_queries = (batch, ("one", 1), length, length)
        one_query = (*all_queries[:2], ("one", 1), length)
        check_shape(name, "attention_mask", mask, (batch, length), one_query, all_queries)
        if mask.dim() == 2:
            mask = mask[:, None, None]
        mask, last = mask[:, 0], mask[:, 0, -1]
        seen, valid = _seen(last)
        conditions = {_VALUES: valid, _NOTHING: seen.any(1)}
        if mask.shape[1] > 1:
            itself, valid = _seen(mask.diagonal(dim1=1, dim2=2))
            conditions |= {_VALUES: valid & conditions[_VALUES], _MORE: itself == seen}
            if not self.layer.causal:
                first = seen.int().argmax(1)[:, None, None].expand(-1, 1, mask.shape[2])
                conditions[_FUTURE] = _seen(mask.gather(1, first).squeeze(1))[0] == seen
        if x.numel():
            _require_all({f"{name}: attention_mask must {t}": c for t, c in conditions.items()})
        return ~seen
