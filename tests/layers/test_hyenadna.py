"""HyenaDNA from state_dicts and folders in its two layouts, against its formulas; generation; the tokenizer."""

import copy
import json
import math

import pytest
import torch
from hyena_cases import D, L, checkpoint, operator, rand

from seqconv import Hyena
from seqconv.convert import load_hyenadna
from seqconv.models import CharacterTokenizer, HyenaDNA

VOCAB, INNER, DEPTH = 16, 10, 2
LAYER = {"_name_": "hyena", "emb_dim": 5, "filter_order": 5, "local_order": 3, "l_max": L}
LAYER |= {"modulate": True, "w": 10, "lr": "6e-4", "wd": 0.0, "lr_pos_emb": 0.0}
CONFIG = {"d_model": D, "n_layer": DEPTH, "d_inner": INNER, "vocab_size": 12, "layer": LAYER}
CONFIG |= {"pad_vocab_size_multiple": 8, "residual_in_fp32": True, "embed_dropout": 0.1}
PORTED = {"d_model": D, "n_layer": DEPTH, "d_inner": INNER, "vocab_size": 12, "hyena_order": 2}
PORTED |= {"pad_vocab_size_multiple": 8, "max_seq_len": L, "filter_order": 5, "emb_dim": 5}
PORTED |= {"num_inner_mlps": 2, "short_filter_order": 3, "activation_freq": 10}
PORTED |= {"tie_word_embeddings": False, "layer_norm_epsilon": 0.01, "hyena_dropout": 0.0}


def norm(name):
    return {f"{name}.weight": rand(D) + 1, f"{name}.bias": rand(D)}


def state(prefix="", depth=DEPTH):
    found = {"embeddings.word_embeddings.weight": rand(VOCAB, D), **norm("ln_f")}
    for i in range(depth):
        found |= checkpoint(prefix=f"layers.{i}.mixer.")
        found |= norm(f"layers.{i}.norm1") | norm(f"layers.{i}.norm2")
        for name, rows, columns in (("fc1", INNER, D), ("fc2", D, INNER)):
            found[f"layers.{i}.mlp.{name}.weight"] = rand(rows, columns) / columns**0.5
            found[f"layers.{i}.mlp.{name}.bias"] = rand(rows)
    return {f"{prefix}backbone.{name}": t for name, t in found.items()}


def normed(x, weight, bias, epsilon):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias


def logits(found, prefix, tokens, *, shift=0.05, head=None, last=1e-5):
    """The formulas: x <- x + hyena(norm(x)), x <- x + mlp(norm(x)), then the last norm and the head."""
    own = {k.removeprefix(prefix + "backbone."): t for k, t in found.items()}
    words = own["embeddings.word_embeddings.weight"]
    x = words[tokens]
    for i in range(DEPTH):
        part = {
            k.removeprefix(f"layers.{i}."): t
            for k, t in own.items()
            if k.startswith(f"layers.{i}.")
        }
        mixer = {k.removeprefix("mixer."): t for k, t in part.items() if k.startswith("mixer.")}
        h = normed(x, part["norm1.weight"], part["norm1.bias"], 1e-5)
        x = x + operator(mixer, h, shift)
        h = normed(x, part["norm2.weight"], part["norm2.bias"], 1e-5)
        h = h @ part["mlp.fc1.weight"].T + part["mlp.fc1.bias"]
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + h @ part["mlp.fc2.weight"].T + part["mlp.fc2.bias"]
    x = normed(x, own["ln_f.weight"], own["ln_f.bias"], last)
    return x @ (words if head is None else head).T


def check(model, wanted, tokens):
    with torch.no_grad():
        y = model(tokens)
    assert isinstance(model, HyenaDNA) and not model.training and wanted.std() > 0.1
    torch.testing.assert_close(y, wanted, rtol=1e-8, atol=1e-8)


TOKENS = torch.randint(12, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("inside", ["", ".layer"])
def test_keys_of_the_repository(prefix, inside):
    found = state(prefix)
    wanted = logits(found, prefix, TOKENS)
    words = found[prefix + "backbone.embeddings.word_embeddings.weight"]
    given = {
        k.replace(".mixer.", f".mixer{inside}.").replace(".mlp.", f".mlp{inside}."): t
        for k, t in found.items()
    }
    for more in ({}, {prefix + "lm_head.weight": words}):
        model = load_hyenadna(given | more, CONFIG)
        assert model.head.weight is model.embedding.weight
        assert model.blocks[0].dropouts[0].p == 0.1 and model.blocks[1].dropouts[0].p == 0
        check(model, wanted, TOKENS)
    other = logits(found, prefix, TOKENS, shift=0.2)
    check(load_hyenadna(given, CONFIG | {"layer": LAYER | {"shift": 0.2}}), other, TOKENS)
    check(load_hyenadna(given, shift=0.2), other, TOKENS)


def test_keys_of_the_port():
    found, head = state("hyena."), rand(VOCAB, D)
    wanted = logits(found, "hyena.", TOKENS, head=head, last=0.01)
    # Shared tensors are stored once.
    once = {k: t for k, t in found.items() if not k.endswith(("3.freq", "5.freq"))}
    model = load_hyenadna(once | {"lm_head.weight": head}, PORTED)
    check(model, wanted, TOKENS)
    assert model.head.weight is not model.embedding.weight


def test_folders(tmp_path):
    found = state("model.")
    wanted = logits(found, "model.", TOKENS)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match=r"must hold one of model.safetensors, weights"):
        load_hyenadna(tmp_path)
    torch.save({"state_dict": found, "epoch": 3}, tmp_path / "weights.ckpt")
    check(load_hyenadna(tmp_path), wanted, TOKENS)
    (tmp_path / "weights.ckpt").unlink()
    torch.save(found, tmp_path / "pytorch_model.bin")
    check(load_hyenadna(str(tmp_path)), wanted, TOKENS)


def test_folder_of_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    found, head = state("hyena."), rand(VOCAB, D)
    wanted = logits(found, "hyena.", TOKENS, head=head, last=0.01)
    once = {k: t for k, t in found.items() if not k.endswith(("3.freq", "5.freq"))}
    (tmp_path / "config.json").write_text(json.dumps(PORTED))
    once = {k: t.contiguous() for k, t in once.items()} | {"lm_head.weight": head}
    safetensors.save_file(once, tmp_path / "model.safetensors")
    check(load_hyenadna(tmp_path), wanted, TOKENS)


@pytest.mark.parametrize("chunk", [1, 7])
def test_generation_is_greedy_decoding_of_whole_forwards(chunk):
    found = state()
    model = load_hyenadna(found)
    tokens = TOKENS[:, :9]
    got = model.generate(tokens, 11)
    whole = tokens
    with torch.no_grad():
        for _ in range(11):
            whole = torch.cat([whole, model(whole)[:, -1:].argmax(-1)], 1)
        assert torch.equal(got, whole[:, 9:]) and len(got.unique()) > 1
        # Logits of prefill in parts and of steps are those of the formulas.
        wanted, found_logits = logits(found, "", whole), []
        states = model.init_state(2)
        for part in whole[:, :14].split(chunk, 1):
            y, states = model.prefill(part, states)
            found_logits.append(y)
        for t in range(14, 20):
            y, states = model.step(whole[:, t], states)
            found_logits.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(found_logits, 1), wanted, rtol=1e-7, atol=1e-7)


def test_generation_draws():
    model = load_hyenadna(state())

    def draw(seed, **options):
        options["generator"] = torch.Generator().manual_seed(seed)
        return model.generate(TOKENS[:, :5], 40, temperature=1.0, **options)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    among = draw(0, among=range(7, 11))
    assert among.shape == (2, 40) and set(among.unique().tolist()) <= {7, 8, 9, 10}
    assert model.generate(TOKENS[:, :5], 0).shape == (2, 0)
    cold = model.generate(TOKENS[:, :5], 5, temperature=1e-9)
    assert torch.equal(cold, model.generate(TOKENS[:, :5], 5))
    with pytest.raises(ValueError, match=r"steps must be an integer >= 0, .* got -1"):
        model.generate(TOKENS, -1)
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        model.generate(TOKENS, 1, temperature=-1.0)
    for wrong in (TOKENS - TOKENS.max() - 1, TOKENS + model.vocab):
        with pytest.raises(
            ValueError, match=f"tokens must be >= 0 and below {model.vocab}, got from"
        ):
            model.generate(wrong, 1)
    with pytest.raises(ValueError, match=f"among must be >= 0 and below {model.vocab}"):
        model.generate(TOKENS, 1, among=[model.vocab])


def test_half_precision_keeps_a_wide_sum():
    found = {name: t.float() for name, t in state().items()}
    wide = load_hyenadna(found, CONFIG)
    wanted = wide(TOKENS)
    half = load_hyenadna({name: t.bfloat16() for name, t in found.items()}, CONFIG)
    y = half(TOKENS)
    assert (
        y.dtype == torch.bfloat16 and half.blocks[0].mixer.filter.frequency.dtype == torch.float32
    )
    assert (y.float() - wanted).norm() < 0.1 * wanted.norm()
    narrow = load_hyenadna(
        {name: t.bfloat16() for name, t in found.items()}, CONFIG | {"residual_in_fp32": False}
    )
    assert half.blocks[0].wide_sum and not narrow.blocks[0].wide_sum
    assert not torch.equal(narrow(TOKENS), y)


def test_trains():
    model = HyenaDNA([Hyena(8, l_max=20) for _ in range(2)], vocab=12)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tokens = torch.tensor([[7, 8, 9, 10] * 5])
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    assert model.eval().generate(tokens[:, :8], 6).tolist() == [[7, 8, 9, 10, 7, 8]]


def test_contract():
    found = state()
    for more, message in (
        ({"backbone.layers.0.mixer.Wqkv.weight": rand(2)}, "unknown keys .*Wqkv"),
        ({"backbone.embeddings.position_embeddings.weight": rand(2)}, "unknown keys .*position"),
        ({"head.output_transform.weight": rand(2)}, "unknown keys .*output_transform"),
        ({"backbone.layers.1.mlp.fc3.weight": rand(2)}, "unknown keys .*layers.1.mlp.fc3"),
        ({"lm_head.weight": rand(VOCAB, D)}, "must be the embedding's, because they are tied"),
        ({"lm_head.weight": rand(VOCAB, 3)}, "lm_head.weight must be .vocab_size=16, d_model=4."),
    ):
        with pytest.raises(ValueError, match=message):
            load_hyenadna(found | more)
    for name in ("backbone.ln_f.bias", "backbone.layers.1.norm2.weight"):
        with pytest.raises(ValueError, match=f"load_hyenadna: state_dict must have '{name}'"):
            load_hyenadna({k: t for k, t in found.items() if k != name})
    with pytest.raises(ValueError, match="must have a key that ends in"):
        load_hyenadna({"a": rand(2)})
    for options, message in (
        ({"d_model": 5}, "config's d_model must be 4, got 5"),
        ({"n_layer": 3}, "config's n_layer must be 2, got 3"),
        ({"d_inner": 11}, "config's d_inner must be 10, got 11"),
        ({"pad_vocab_size_multiple": 1}, "must have 12 rows"),
        ({"layer": LAYER | {"l_max": 31}}, "l_max must be 30"),
        ({"layer": LAYER | {"num_heads": 2}}, "num_heads must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            load_hyenadna(found, CONFIG | options)
    model = load_hyenadna(found)
    with pytest.raises(ValueError, match=r"HyenaDNA: tokens must be \(batch, length\), got"):
        model(TOKENS[0])
    with pytest.raises(TypeError, match="tokens must be one of int64, int32"):
        model(TOKENS.float())
    with pytest.raises(ValueError, match="mixers must have one d_model, got"):
        HyenaDNA([Hyena(4, l_max=9), Hyena(5, l_max=9)])


def test_tokenizer():
    tokenizer = CharacterTokenizer()
    assert tokenizer.tokens == (
        *("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"),
        *"ACGTN",
    )
    assert tokenizer.encode("ACGTNa-") == [7, 8, 9, 10, 11, 6, 6]
    assert tokenizer.encode("AC", special=True) == [0, 7, 8, 1]
    assert tokenizer.decode(torch.tensor([0, 7, 8, 11, 1])) == "[CLS]ACN[SEP]"
    with pytest.raises(ValueError, match=r"numbers must be 0 ... 11, got 12"):
        tokenizer.decode([12])
    with pytest.raises(ValueError, match="characters must be different"):
        CharacterTokenizer("AA")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter
def test_an_exported_step_returns_its_states():
    class Step(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens, state):
            return self.model.step(tokens, state)

    model = HyenaDNA([Hyena(D, l_max=L) for _ in range(2)]).eval()
    tokens = torch.randint(7, 12, (2, 9))
    with torch.no_grad():
        wanted, state = model(tokens), model.init_state(2)
        given = copy.deepcopy(state)
        step = torch.export.export(Step(model), (tokens[:, 0], given), strict=False).module()
        for t in range(9):
            y, state = step(tokens[:, t], state)
            torch.testing.assert_close(y, wanted[:, t], rtol=1e-4, atol=1e-5)


def test_sources_of_wrong_kinds_are_refused():
    for wrong in (None, 3, [1]):
        with pytest.raises(TypeError, match="source must be a state_dict or the path of a folder"):
            load_hyenadna(wrong)
    with pytest.raises(TypeError, match=r"config must be the dictionary of .*, got str"):
        load_hyenadna(state(), "config.json")
    with pytest.raises(TypeError, match=r"state_dict\['model'\] must be a tensor, got dict"):
        load_hyenadna({"model": state()})
