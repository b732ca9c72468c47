"""A layer as attention of Hugging Face's models: their masks, made by hand and by their own code."""

import pytest
import torch
from torch import nn

from seqconv import S4D, LongConv
from seqconv.nn import AsHuggingFaceAttention

D, LENGTH = 8, 12
LEFT = torch.arange(LENGTH) < torch.tensor([[0], [5], [0]])  # (b l), True at padding
RIGHT = LEFT.flip(1)
NONE = torch.zeros_like(LEFT)


def additive(seen, dtype=torch.float32):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def full(padding, causal):
    """(b 1 q k), True where a key may be seen."""
    seen = ~padding[:, None, None].expand(-1, 1, LENGTH, -1)
    return seen & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if causal else seen


FORMS = {  # of what is not padding
    "bool": lambda padding, causal: ~padding,
    "int64": lambda padding, causal: (~padding).long(),
    "uint8": lambda padding, causal: (~padding).byte(),
    "float": lambda padding, causal: additive(~padding),
    "one query": lambda padding, causal: ~padding[:, None, None],
    "one query, -1e4": lambda padding, causal: -1e4 * padding[:, None, None].float(),
    "all queries": full,
    "all queries, float": lambda padding, causal: additive(full(padding, causal)),
    "all queries, float16": lambda padding, causal: additive(full(padding, causal), torch.float16),
}


@pytest.mark.parametrize("padding", [LEFT, RIGHT, NONE], ids=["left", "right", "none"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_masks(form, causal, padding):
    layer = S4D(D, bidirectional=not causal)
    x = torch.randn(*padding.shape, D)
    y, weights = AsHuggingFaceAttention(layer)(x, attention_mask=FORMS[form](padding, causal))
    assert weights is None and torch.equal(y, layer(x, padding))
    if padding.any():
        assert not torch.equal(y, layer(x))
    assert torch.equal(AsHuggingFaceAttention(layer)(x)[0], layer(x))


def test_a_causal_layer_may_see_less_than_its_mask():
    layer, x = S4D(D), torch.randn(*RIGHT.shape, D)
    y = AsHuggingFaceAttention(layer)(x, attention_mask=full(RIGHT, causal=False))[0]
    assert torch.equal(y, layer(x, RIGHT))


@pytest.mark.parametrize("padding", [LEFT, RIGHT, NONE], ids=["left", "right", "none"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", [f for f in FORMS if "float" not in f and "-1e4" not in f])
def test_inverted_masks_are_recognised(form, causal, padding):
    """As long as one sample has no padding, which then has nothing else."""
    attention = AsHuggingFaceAttention(S4D(D, bidirectional=not causal))
    mask = FORMS[form](padding, causal)
    inverted = ~mask if mask.dtype == torch.bool else 1 - mask
    with pytest.raises(ValueError, match=r"inverted|hide padding, or the future, and nothing else"):
        attention(torch.randn(*padding.shape, D), attention_mask=inverted)


def test_refusals():
    both, x = AsHuggingFaceAttention(S4D(D, bidirectional=True)), torch.randn(*LEFT.shape, D)
    causal = AsHuggingFaceAttention(S4D(D))

    def refuses(text, mask=None, attention=causal, error=ValueError, **others):
        with pytest.raises(error, match=f"AsHuggingFaceAttention: {text}"):
            attention(x, attention_mask=mask, **others)

    refuses("attention_mask must not hide the future", full(LEFT, True), both)
    refuses("attention_mask must not hide the future", additive(full(LEFT, True)), both)
    ahead = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    window = full(NONE, True) & (ahead > -4)
    packed = full(NONE, True) & (torch.arange(LENGTH) < 6).eq((torch.arange(LENGTH) < 6)[:, None])
    for mask in (window, packed, additive(window)):
        refuses("attention_mask must hide padding, or the future, and nothing else", mask)
    refuses("attention_mask must hide padding", full(NONE, False) & (ahead.abs() < 4), both)
    for wrong in ((~RIGHT).float(), torch.randn(3, 1, LENGTH, LENGTH), 2 * (~RIGHT).long()):
        refuses("attention_mask must be bool, integers 1 .* got other values", wrong)
    refuses(r"attention_mask must be \(batch=3, length=12\) or .* got \(3, 11\)", RIGHT[:, 1:])
    refuses("attention_mask must be .* got", full(LEFT, True).expand(-1, 2, -1, -1))
    refuses("attention_mask must be a tensor, got list", [1, 0], error=TypeError)
    refuses("attention_mask must be on hidden_states's device", RIGHT.to("meta"))
    for name in ("cache", "past_key_values"):
        refuses(f"{name} must be None .*use_cache must be False", **{name: object()})
    refuses("encoder_hidden_states must be None", encoder_hidden_states=x)
    refuses("output_attentions must be None", output_attentions=True)
    causal(x, cache=None, output_attentions=False, position_embeddings=x, use_cache=True)
    with pytest.raises(TypeError, match=r"layer must be a layer with d_model .* got Linear"):
        AsHuggingFaceAttention(nn.Linear(D, D))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    attention = AsHuggingFaceAttention(S4D(D, bidirectional=True)).eval()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    x, mask = torch.randn(*LEFT.shape, D), full(LEFT, causal=False)
    torch.testing.assert_close(compiled(x, attention_mask=mask)[0], attention.layer(x, LEFT))
    with pytest.raises(RuntimeError, match="attention_mask must let every sample see something"):
        compiled(x, attention_mask=~mask)


# ---- their models ----

SIZES = {"vocab_size": 10, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "max_position_embeddings": 40, "use_cache": False}


def bert(transformers, kind):
    model = transformers.BertModel(transformers.BertConfig(**SIZES, attn_implementation=kind))
    for block in model.encoder.layer:
        block.attention.self = AsHuggingFaceAttention(S4D(32, bidirectional=True))
    return model


def llama(transformers, kind):
    model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES, attn_implementation=kind))
    for block in model.layers:
        block.self_attn = AsHuggingFaceAttention(LongConv(32, l_max=LENGTH))
    return model


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [LEFT, RIGHT, NONE], ids=["left", "right", "none"])
def test_their_own_masks(make, kind, padding):
    """Every layer gets the padding that the model was given, and what stands there changes nothing."""
    transformers = pytest.importorskip("transformers")
    model = make(transformers, kind).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, AsHuggingFaceAttention):
            module.layer.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    ids, mask = torch.randint(1, 10, padding.shape), (~padding).long()
    one, two = (
        model(i, attention_mask=mask).last_hidden_state[~padding]
        for i in (ids, ids.where(~padding, 5))
    )
    assert len(seen) == 4 and all(torch.equal(NONE if p is None else p, padding) for p in seen)
    torch.testing.assert_close(one, two)


def test_their_other_masks_are_refused():
    """A sliding window, and several samples packed into a row by their positions."""
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(1, 10, (1, LENGTH))
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    mistral = transformers.MistralModel(config)
    packed = llama(transformers, "sdpa")
    for block in mistral.layers:
        block.self_attn = AsHuggingFaceAttention(S4D(32))
    with pytest.raises(ValueError, match="no window, no packed sequences"):
        mistral(ids)
    with pytest.raises(ValueError, match="no window, no packed sequences"):
        packed(ids, position_ids=torch.arange(LENGTH).remainder(7)[None])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gpt2_with_padding_and_its_own_checkpointing():
    """On the left, as for generation: what stands in the padding changes nothing, nor does recomputing."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 10, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 20}
    none = {"use_cache": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **none, bos_token_id=0, eos_token_id=0)
    )
    for block in model.transformer.h:
        block.attn = AsHuggingFaceAttention(S4D(32))
    mask = (torch.arange(20) >= torch.tensor([[0], [7]])).long()
    ids = torch.randint(10, mask.shape)
    results, calls = [], []
    model.transformer.h[0].attn.layer.register_forward_hook(lambda *_: calls.append(1))
    for checkpointed, tokens in ((False, ids), (False, ids.where(mask == 1, 5)), (True, ids)):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        logits = model(tokens, attention_mask=mask).logits[mask == 1]
        logits.square().sum().backward()
        kernels = [p.grad for name, p in model.named_parameters() if ".attn." in name]
        results.append([logits, *kernels])
    assert len(calls) == 4 and len(results[0]) == 17  # checkpointed: twice
    for others in results[1:]:
        for ours, theirs in zip(others, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
