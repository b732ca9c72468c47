"""Every example does what it says."""

import importlib

import pytest
import torch

from bench.examples.hugging_face import Mixer
from seqconv import S4D

pytestmark = pytest.mark.slow
EXAMPLES = {"transformer_encoder": 0.1, "checkpointing": 0.8, "bert": 0.75, "gpt2": 0.6}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, capsys):
    if name in ("bert", "gpt2"):
        pytest.importorskip("transformers")
    first, last, change = importlib.import_module(f"bench.examples.{name}").main()
    assert last < EXAMPLES[name] * first
    assert change < (1e-4 if name == "gpt2" else 1e-6)  # the future goes through a transform
    assert "loss" in capsys.readouterr().out


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
        block.attn = Mixer(S4D(32))
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
