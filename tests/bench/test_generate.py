"""The language model that generates step by step: its text is that of whole forward passes, alone and in a batch."""

import json
import math
import random

import pytest
import torch

from bench.language import command, corpus, serving, training
from bench.language.model import LAYERS, LanguageModel, as_text, as_tokens
from bench.language.serving import Request, alone, compare_greedy, serve, statistics
from bench.language.training import Training, bits_per_byte
from seqconv.streaming import State

pytestmark = pytest.mark.filterwarnings("ignore:.*is not seen")  # texts longer than the context
every_layer = pytest.mark.parametrize("layer", LAYERS)
SERVED = tuple(LAYERS)
PROMPT = b"The assert statement"
TINY = {"layer": "long_conv", "width": 8, "depth": 2, "context": 32, "batch": 2, "steps": 4}
TINY |= {"lr": 1e-2, "dropout": 0.1, "seed": 3}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are so small that more threads would only wait for each other."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def make(layer: str, depth: int = 2) -> LanguageModel:
    """In float64, with logits that depend on far inputs."""
    torch.manual_seed(0)
    model = LanguageModel(layer, 8, depth, 32).double().eval()
    with torch.no_grad():
        model.head.weight.mul_(10)
        model.embedding.weight.mul_(4)
        for name, parameter in model.named_parameters():
            if name.endswith(("linear.weight", "proj.weight")):
                parameter.mul_(4)
            if name.endswith("kernel.kernel"):  # of LongConv
                parameter.mul_(30)
    return model


# ---- the text ----


def test_the_text_is_new_at_its_end():
    whole = corpus.text()
    train, tail = corpus.split(whole)
    assert train + tail == whole == corpus.text() and len(whole) > 200_000
    assert len(tail) == pytest.approx(0.1 * len(whole), abs=1)
    assert b"assert" in train and whole.decode().isprintable() is False
    later = set(tail.split(b"\n\n")[1:-1])
    assert len(later) > 50 and not later & set(train.split(b"\n\n")[:-1])


def test_levels_are_bits_per_byte():
    draw = random.Random(0)
    noise = draw.randbytes(20_000)
    found = corpus.levels(noise, draw.randbytes(5_000))
    assert found["uniform"] == 8.0
    for name in ("unigram", "gzip", "xz"):
        assert 7.9 < found[name] < 8.5, name
    far = draw.randbytes(40_000)
    known = corpus.levels(noise + far, noise[:5_000])  # gzip does not remember so much, xz does
    assert known["xz"] < 2 and known["gzip"] > 7.9
    assert corpus.levels(noise, noise[-5_000:])["gzip"] < 0.3
    pair = corpus.levels(b"ab" * 50_000, b"a" * 100)["unigram"]
    assert pair == pytest.approx(1, abs=0.01)


# ---- generating ----


@every_layer
def test_greedy_text_is_that_of_whole_forward_passes(layer):
    found = compare_greedy(make(layer), PROMPT, 100)
    assert found["equal"] == found["count"] == 100 == len(found["tokens"])
    assert found["difference"] < 1e-11 < found["margin"]
    assert len(set(found["tokens"])) > 5, "a text that is no test"


@pytest.mark.parametrize("fault", ["zeros", "late", "forgets", "other row"])
def test_another_text_is_seen(monkeypatch, fault):
    right, before = LanguageModel.step, []

    def broken(self, tokens, state):
        if fault == "forgets" and len(before) == 40:
            state.reset([0])
        logits = right(self, tokens, state)
        before.append(logits)
        if fault == "zeros":
            return logits * 0
        return before[max(0, len(before) - 2)] if fault == "late" else logits

    monkeypatch.setattr(LanguageModel, "step", broken)
    if fault == "other row":
        right_prefill = LanguageModel.prefill
        other = lambda self, tokens, *rest: right_prefill(self, tokens.flip(1), *rest)  # noqa: E731
        monkeypatch.setattr(LanguageModel, "prefill", other)
    found = compare_greedy(make("long_conv"), PROMPT, 60)
    assert found["equal"] < 60 and found["difference"] > 1e-3


@every_layer
def test_a_state_of_the_model_is_a_state(layer):
    model = make(layer)
    tokens = as_tokens(PROMPT).view(2, 10)
    with torch.no_grad():
        wanted = model(tokens)
        logits, state = model.prefill(tokens[:, :4], model.init_state(2))
        assert isinstance(state, State) and state.batch == 2
        assert (logits - wanted[:, :4]).abs().max() < 1e-11
        swapped = state.select([1, 0])
        for t in range(4, 10):
            assert (model.step(tokens[:, t], state) - wanted[:, t]).abs().max() < 1e-11
            other = model.step(tokens[[1, 0], t], swapped)
            assert (other - wanted[[1, 0], t]).abs().max() < 1e-11


# ---- serving ----

REQUESTS = [
    Request(corpus.text()[start : start + size], count, seed)
    for seed, (start, size, count) in enumerate(
        [
            (0, 40, 30),
            (50, 3, 9),
            (99, 17, 1),
            (200, 8, 20),
            (300, 90, 12),
            (400, 1, 1),
            (500, 33, 25),
        ]
    )
]


@pytest.mark.parametrize("layer", SERVED)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_rows_of_a_batch_have_the_text_they_have_alone(layer, temperature, rows):
    model = make(layer)
    found = serve(model, REQUESTS, rows, temperature)
    for request, served in zip(REQUESTS, found, strict=True):
        assert served.request is request and len(served.tokens) == request.count
        assert served.tokens == alone(model, request, temperature)
        assert len(served.seconds) == request.count and min(served.seconds) > 0


@pytest.mark.parametrize("fault", ["reset", "insert"])
def test_rows_that_keep_their_past_are_seen(monkeypatch, fault):
    monkeypatch.setattr(State, fault, lambda *_: None)
    model = make("long_conv")
    found = serve(model, REQUESTS, 3, 0.0)
    texts = [alone(model, request, 0.0) for request in REQUESTS]
    assert [s.tokens for s in found] != texts


def test_statistics_count_bytes_and_latencies():
    served = serving.Served(Request(b"a", 3), 0.0, None)  # pyright: ignore
    served.tokens, served.seconds = [1, 2, 3], [0.5, 0.001, 0.003]
    found = statistics([served, served], 2.0)
    assert found["bytes"] == 6 and found["bytes_per_second"] == 3
    assert found["p50_ms"] == pytest.approx(2) and found["p99_ms"] == pytest.approx(3)
    assert found["first_p50_ms"] == found["first_p99_ms"] == 500


def test_requests_that_cannot_be_served():
    for arguments in ((b"", 3), (b"a", 0)):
        with pytest.raises(ValueError, match="at least one byte"):
            Request(*arguments)


def test_a_text_is_drawn_by_its_seed():
    logits = torch.tensor([0.0, math.log(3), -math.inf]).double()
    generator = torch.Generator().manual_seed(0)
    drawn = [serving.choose(logits, 1.0, generator) for _ in range(2000)]
    assert 2 not in drawn and drawn.count(1) == pytest.approx(1500, abs=80)
    assert serving.choose(logits, 0.0) == 1
    assert as_text([72, 105, 255]) == "Hi\ufffd"


# ---- training ----


def parts(run: Training) -> list[torch.Tensor]:
    moments = [t for s in run.optimizer.state.values() for t in s.values()]
    return [*run.model.state_dict().values(), *moments, torch.tensor(run.losses)]


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    whole = Training(TINY, tmp_path / "whole")
    assert whole.run(60, 50) and whole.step == 4 and len(whole.losses) == 4
    first = Training(TINY, tmp_path / "parts")
    first.run(0, 50)
    assert first.step == 0
    first = Training(TINY, tmp_path / "parts")
    save, saved = Training.save, []

    def stop(run):
        save(run)
        saved.append(run.step)
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        first.run(60, 2)
    monkeypatch.undo()
    assert saved == [2]
    second = Training(TINY, tmp_path / "parts")
    assert second.step == 2 and second.run(60, 50)
    for a, b in zip(parts(whole), parts(second), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.rglob("*.tmp"))
    for other in ({"seed": 4}, {"context": 16}):
        with pytest.raises(SystemExit, match="another run"):
            Training(TINY | other, tmp_path / "parts")
    monkeypatch.setattr(training, "text", lambda: b"abc" * 100)
    with pytest.raises(SystemExit, match="another text"):
        Training(TINY, tmp_path / "parts")


@every_layer
def test_training_lowers_the_loss(layer, tmp_path):
    options = TINY | {"layer": layer, "steps": 30, "batch": 8, "width": 16, "depth": 1, "lr": 2e-2}
    run = Training(options, tmp_path)
    run.run(60, 50)
    start, end = sum(run.losses[:3]) / 3, sum(run.losses[-5:]) / 5
    assert start > 6 and end < start - 1.5
    bits = bits_per_byte(run.model, run.train_text[-100:], run.tail[:3000])
    assert bits < start - 1


def test_bits_of_the_held_out_text_are_those_of_one_pass(monkeypatch):
    model, before, tail = make("long_conv"), corpus.text()[:100], corpus.text()[100:400]
    monkeypatch.setattr(training, "CHUNK", 37)
    found = bits_per_byte(model, before, tail)
    tokens = as_tokens(before[-32:] + tail)
    with torch.no_grad():
        logits = model(tokens.unsqueeze(0))[0, 31:-1]
    wanted = torch.nn.functional.cross_entropy(logits, tokens[32:]).item() / math.log(2)
    assert found == pytest.approx(wanted, rel=1e-12)


# ---- the command ----


@every_layer
def test_the_command_trains_serves_and_checks(layer, tmp_path, capsys, monkeypatch):
    options = (
        "--width 8 --depth 1 --context 16 --batch 2 --steps 2 --sample 5 --requests 4 --rows 2"
    )
    argv = [*options.split(), "--layer", layer, "--out", str(tmp_path), "--check", "10"]
    monkeypatch.setattr(command, "levels", lambda train, tail: {"gzip": 2.0})
    command.main([*argv, "--minutes", "0"])
    assert "Stopped at step 0 of 2" in capsys.readouterr().out
    command.main(argv)
    text = capsys.readouterr().out
    for part in (
        "bits per byte. Others: gzip 2.000",
        "4 requests in 2 rows",
        "percentiles",
        "10 of 10",
    ):
        assert part in text
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["check"]["equal"] == 10 and result["step"] == 2 and result["layer"] == layer
    assert 6 < result["bits_per_byte"] < 12 and result["serving"]["same_as_alone"] == 2
    assert {"device", "isa", "versions", "commit", "threads", "when"} <= set(result)
    assert 0 < result["serving"]["p50_ms"] <= result["serving"]["p99_ms"]

    monkeypatch.setattr(
        command, "compare_greedy", lambda *_: result["check"] | {"equal": 9, "tokens": []}
    )
    with pytest.raises(SystemExit, match="is not that of"):
        command.main(argv)
    with pytest.raises(SystemExit):
        command.main([*argv, "--rows", "0"])
