"""bench.lra --packed: the samples, losses and gradients are those of padding, and runs resume as those do."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lra_run import TINY, checkpoint, finish, rows, start
from lra_tiny import VOCAB, Split

from bench.lra import options
from bench.lra.arguments import parse_fit, underscored
from bench.lra.batches import EvalBatches, TrainBatches, tensors
from bench.lra.model import SequenceClassifier, loss_of, pooled_rows
from bench.lra.schedule import compare_step

SOME = np.array([3, 1, 17, 8, 4])


def classifier(layer, kind, norm="layer", pool="mean", prenorm=False, dropout=0.2):
    torch.manual_seed(0)
    model = options.Model(2, 8, norm, prenorm, dropout, pool)
    inputs = {"channels": 1} if kind == "real" else {"vocab": VOCAB, "pair": kind == "pair"}
    sizes = {"classes": 3, "l_max": 40, **inputs}
    return SequenceClassifier(layer, model, options.KERNELS[layer](), **sizes).double()


def step(model, batch):
    """The loss and the gradients of a training step. Dropout draws the same numbers in each."""
    torch.manual_seed(1)
    model.zero_grad()
    x = batch.x.double() if batch.x.is_floating_point() else batch.x
    loss = loss_of(model(x, *batch.inputs[1:]), batch.labels)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_two_spellings_of_the_option(capsys):
    for given, wanted in (("--data.packed true", True), ("--data.packed=false", False)):
        config = parse_fit(underscored(["text", "--layer", "s4d", *given.split()]))
        assert config.run.packed is wanted
    with pytest.raises(SystemExit):
        underscored(["--data.packed", "perhaps"])
    assert "--data.packed must be true or false, got perhaps" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:LongConvKernel")
@pytest.mark.parametrize("kind", ["tokens", "pair", "real"])
@pytest.mark.parametrize("layer", ["s4d", "sgconv", "long_conv", "butterfly", "hyena"])
def test_a_step_is_that_of_padding(layer, kind):
    """Dropout included: a row of a pack has the mask that its sample has in a padded batch."""
    split = Split(kind, 20, 0)
    padded, packed = tensors(split, SOME), tensors(split, SOME, packed=True)
    assert packed.x.dim() == padded.x.dim() - 1 and packed.lengths is None
    assert torch.equal(packed.labels, padded.labels)
    for pool, prenorm in (("mean", False), ("last", True)):
        model = classifier(layer, kind, pool=pool, prenorm=prenorm)
        (loss, gradient), (wanted, exact) = step(model, packed), step(model, padded)
        assert abs(loss - wanted) < 1e-12 * wanted
        assert (gradient - exact).norm() < 1e-12 * exact.norm()
        if kind != "real":
            other = packed._replace(x=packed.x.flip(0))
            assert abs(step(model, other)[0] - wanted) > 1e-4 * wanted


def test_a_step_in_float32_is_that_of_padding():
    split, model = Split("tokens", 20, 0), classifier("s4d", "tokens").float()
    (loss, gradient), (wanted, exact) = (
        step(model, tensors(split, SOME, packed=packed)) for packed in (True, False)
    )
    assert abs(loss - wanted) < 1e-5 * wanted and (gradient - exact).norm() < 1e-5 * exact.norm()


def test_batch_norm_counts_real_steps_only():
    """The loss is that of a padded batch whose statistics leave out padding; in evaluation padding makes no
    difference anyway."""
    split = Split("tokens", 20, 0)
    padded, packed = tensors(split, SOME), tensors(split, SOME, packed=True)
    model = classifier("s4d", "tokens", norm="batch", dropout=0.0)
    found = step(model, packed)[0]
    running = model.norms[0].norm.running_mean.clone()
    assert abs(found - step(model, padded)[0]) > 1e-4
    real = torch.arange(padded.x.shape[1]) < padded.lengths.unsqueeze(1)
    for norm in model.norms:

        def masked(x, bn=norm.norm):
            mean, var = x[real].mean(0), x[real].var(0, unbiased=False)
            return (x - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias

        norm.forward = masked
    assert abs(found - step(model, padded)[0]) < 1e-12
    h = model.encoder(padded.x)
    first = (h + model.layers[0](h, lengths=padded.lengths))[real].mean(0)
    assert torch.allclose(running, 0.1 * first, rtol=1e-6)  # of one step
    for norm in model.norms:
        del norm.forward
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(*packed.inputs), model(*padded.inputs), rtol=1e-12)


def test_pooling_reads_rows():
    x = torch.arange(12.0).view(6, 2)
    offsets = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    nothing = torch.zeros(2)
    wanted = torch.stack([x[:2].mean(0), nothing, x[2:].mean(0)])
    assert torch.equal(pooled_rows(x, offsets, "mean"), wanted)
    assert torch.equal(pooled_rows(x, offsets, "last"), torch.stack([x[1], nothing, x[5]]))
    assert torch.equal(pooled_rows(x[:0], offsets[:1].repeat(3), "last"), torch.zeros(2, 2))
    half = pooled_rows(torch.full((3000, 1), 1.0).bfloat16(), torch.tensor([0, 3000]), "mean")
    assert half.dtype == torch.bfloat16 and half.item() == 1


def test_batches_are_those_of_padding():
    """The same samples in the same order, in training, evaluation and several processes; the rows are the samples."""
    split = Split("tokens", 23, 0)
    makers = [
        lambda packed: TrainBatches(split, batch=4, period=7, seed=1, accumulate=2, packed=packed),
        lambda packed: TrainBatches(
            split, batch=4, period=7, seed=1, rank=1, world=2, packed=packed
        ),
        lambda packed: EvalBatches(split, batch=4, packed=packed),
    ]
    for make in makers:
        pairs = list(zip(make(True), make(False), strict=True))
        assert len(pairs) >= 6
        for packed, padded in pairs:
            assert torch.equal(packed.labels, padded.labels)
            lengths = packed.cu_seqlens.diff()
            samples = packed.x.split(lengths.tolist())
            assert len(padded.x) == len(samples) and lengths.max() == padded.x.shape[1]
            for sample, row in zip(samples, padded.x, strict=True):
                assert torch.equal(sample, row[: len(sample)]) and not row[len(sample) :].any()


def test_offsets_stay_on_the_cpu():
    batch = tensors(Split("tokens", 20, 0), SOME, packed=True).to(torch.device("meta"))
    assert batch.x.is_meta and batch.labels.is_meta and batch.cu_seqlens.device.type == "cpu"


def test_what_packing_refuses_and_keeps(capsys, tmp_path):
    with pytest.raises(SystemExit):
        parse_fit(["text", "--packed", "--parallel.context", "2"])
    text = "--parallel.context must be 1 with --packed"
    assert text in capsys.readouterr().err
    config = parse_fit(["digits", "--packed"])  # samples of one length are packed, too
    assert config.run.packed and config.identity()["run.packed"]
    file = tmp_path / "config.yaml"
    file.write_text("task: digits\npacked: true\n")
    assert parse_fit(["--config", str(file)]).run.packed and not parse_fit(["digits"]).run.packed


def test_a_packed_step_is_timed_beside_torch_fft_on_padding():
    split, model = Split("tokens", 20, 0), classifier("s4d", "tokens", norm="batch").float()
    padded, packed = tensors(split, SOME), tensors(split, SOME, packed=True)
    found = compare_step(model, packed, 2, "32-true", padded)
    assert 0 < found["difference"] < 1e-3 and found["ratio"] > 0
    with pytest.raises(RuntimeError, match="gradients differ"):
        other = packed._replace(labels=packed.labels.roll(1))
        compare_step(model, other, 2, "32-true", padded)


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_a_packed_run_is_a_padded_one_and_resumes(tmp_path):
    """The losses of all steps and the accuracies, with dropout; and all bits after a resume, which needs no option."""
    options = (*TINY, "--model.norm", "layer", "--model.dropout", 0.2, "--optim.warmup", 0)
    options += ("--model.depth", 2, "--optim.lr", 0.01, "--optim.schedule_steps", 72)
    whole, parts, padded = (tmp_path / name for name in ("whole", "parts", "padded"))
    fit = ("fit", "text", *options, "--out")
    finish(start(*fit, padded))
    finish(start(*fit, whole, "--packed"))
    finish(start(*fit, parts, "--packed", "--stop_after", 31), 130)
    wrong = finish(start(*fit, padded, "--packed", "--resume"), 2)
    assert "packed was false, now true" in wrong
    finish(start("fit", "--out", parts, "--resume"))
    one, two, three = (checkpoint(folder) for folder in (whole, parts, padded))
    assert one["global_step"] == two["global_step"] == 72 and rows(whole) == rows(parts)
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
        error = F.mse_loss(tensor.double(), three["state_dict"][name].double()).sqrt()
        assert error < 1e-2 * tensor.double().square().mean().sqrt() + 1e-4, name
    losses = [[float(r["loss"]) for r in rows(folder)] for folder in (whole, padded)]
    assert np.abs(np.subtract(*losses)).max() < 1e-3
    results = [json.loads((f / "result.json").read_text()) for f in (whole, padded)]
    assert abs(results[0]["test_accuracy"] - results[1]["test_accuracy"]) < 0.02
    assert results[0]["test_accuracy"] > results[0]["majority"] + 0.2
    told = finish(start("eval", whole))
    assert f"{results[0]['test_accuracy']:.2%}" in told


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_older_checkpoints_are_padded_ones(tmp_path):
    """A run that began before there were packs goes on."""
    fit = ("fit", "text", *TINY, "--out", tmp_path)
    finish(start(*fit, "--stop_after", 10), 130)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["config"]["run"]["packed"], record["identity"]["run.packed"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    state = checkpoint(tmp_path)
    del state["identity"]["run.packed"]
    torch.save(state, tmp_path / "last.ckpt")
    finish(start(*fit, "--resume", "--stop_after", 15), 130)
    assert checkpoint(tmp_path)["global_step"] == 15
