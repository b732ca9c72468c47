"""Modules for the place of others: a layer as attention, of torch or of Hugging Face; a depthwise nn.Conv1d."""

import torch
from torch import Tensor, nn

from seqconv._check import FLOATS, check_flag, check_shape, check_tensor
from seqconv._conv1d import Conv1d as Conv1d
from seqconv._layer import _require


class _Foreign:
    """Stands where torch's fused encoder kernels look for the weights of attention.

    An operand that defines __torch_function__ declines them, in a stack as in a single layer. Any
    other way to decline makes torch warn when a stack is built around the layer, and is not looked
    at again in a stack that was built before the layer was put in.
    """

    def __init__(self):
        self.weight = self.bias = self

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return NotImplemented


class AsAttention(nn.Module):
    """Calls a layer as nn.MultiheadAttention is called: the self_attn of nn.TransformerEncoderLayer.

    AsAttention(layer, batch_first=True)(x, x, x, key_padding_mask=mask) = (layer(x, mask), None): the layer mixes the
    sequence, the encoder layer does the rest. In training, in evaluation, and in nn.TransformerEncoder
    and nn.TransformerDecoderLayer as well; torch's fused inference kernels, which know attention
    only, are declined. All layers of an nn.TransformerEncoder are copies: give each its own weights.

    Args:
        layer: maps (batch, length, d_model) and a padding mask to the same shape; has d_model, and causal,
            True if no output sees a later input, as every layer of seqconv.
        batch_first: (batch, length, d_model), or (length, batch, d_model) if False. The encoder layer
            must have been built with the same value, of which torch's default is False; with another
            the layer would mix the samples. There is no default: nothing could check it.

    There are no parameters but the layer's.

    Source: torch.nn.MultiheadAttention's contract. Example:
        >>> from seqconv import S4D
        >>> block = nn.TransformerEncoderLayer(8, nhead=2, batch_first=True)
        >>> block.self_attn = AsAttention(S4D(8, bidirectional=True), batch_first=True)
        >>> block(torch.randn(2, 100, 8)).shape
        torch.Size([2, 100, 8])
    """

    # What torch's encoders read before they decide for or against their fused kernels.
    in_proj_weight = in_proj_bias = out_proj = _Foreign()
    _qkv_same_embed_dim = True
    num_heads = 2

    def __init__(self, layer: nn.Module, *, batch_first: bool):
        super().__init__()
        if not (hasattr(layer, "d_model") and hasattr(layer, "causal")):
            wanted = "a layer with d_model and causal"
            raise TypeError(f"AsAttention: layer must be {wanted}, got {type(layer).__name__}")
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
        """query, key and value must be one tensor, (batch, length, d_model), (length, batch, d_model)
        if not batch_first, or (length, d_model). key_padding_mask (batch, length), or (length,), as
        the layer's mask. attn_mask and is_causal may ask for what the layer does: a causal layer takes
        the mask of nn.Transformer.generate_square_subsequent_mask, as floats or as bool, and
        is_causal=True, with or without it; any other a mask that hides nothing. Anything else
        is a ValueError. There are no weights to return: None stands for them.
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
        _require((attn_mask == hidden).all(), text)
