"""bench.lra: recipes, command line, model, order of samples, exact resume, report."""

import csv
import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import seqconv
from bench.lra import data, options, plan
from bench.lra.__main__ import parse_fit
from bench.lra.batches import EvalBatches, TrainBatches, same
from bench.lra.model import SequenceClassifier, pooled
from bench.lra.recipes import RECIPES, SAMPLES, recipe, whole
from bench.lra.report import keep, load, report

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LAYERS = ("s4d", "sgconv", "long_conv", "butterfly", "hyena")


def start(*arguments, before=(), delay=0.0, backend="", train=120) -> subprocess.Popen:
    """delay: seconds that reading a batch takes. backend: SEQCONV_BACKEND. train: training samples."""
    command = [*(before or [sys.executable]), "-m", "tests.lra_tiny", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = ENVIRONMENT | {"LRA_TINY_DELAY": str(delay), "SEQCONV_BACKEND": backend}
    environment["LRA_TINY_TRAIN"] = str(train)
    # A group of its own, to be interrupted as from a terminal.
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


# ---- recipes: numbers typed again from the papers' and their configurations' tables ----

PUBLISHED = {  # layers, d_model, norm, prenorm, dropout, lr, batch, epochs, decay, cosine, warm-up, pool
    "s4d": {
        "listops": (8, 128, "batch", False, 0, 1e-2, 50, 40, 5e-2, 80e3, 1e3, "mean"),
        "text": (6, 256, "batch", True, 0, 1e-2, 16, 32, 5e-2, 50e3, 1e3, "mean"),
        "retrieval": (6, 256, "batch", True, 0, 1e-2, 64, 20, 5e-2, 50e3, 2.5e3, "mean"),
        "image": (6, 512, "layer", False, 0.1, 1e-2, 50, 200, 5e-2, 180e3, 900, "mean"),
        "pathfinder": (6, 256, "batch", True, 0, 4e-3, 64, 200, 3e-2, 500e3, 2.5e3, "last"),
        "pathx": (6, 256, "batch", True, 0, 5e-4, 32, 50, 5e-2, 500e3, 10e3, "mean"),
        "scifar": (6, 512, "layer", False, 0.1, 1e-2, 50, 200, 5e-2, 180e3, 900, "mean"),
        "speech": (6, 128, "batch", True, 0, 1e-2, 16, 40, 5e-2, 200e3, 1e3, "mean"),
    },
    "sgconv": {
        "listops": (8, 128, "batch", False, 0, 1e-2, 50, 40, 5e-2, 80e3, 1e3, "mean"),
        "text": (6, 256, "batch", True, 0, 1e-2, 16, 32, 5e-2, 50e3, 1e3, "mean"),
        "retrieval": (6, 256, "batch", True, 0, 1e-2, 64, 20, 5e-2, 50e3, 2.5e3, "mean"),
        "image": (6, 512, "layer", False, 0.2, 1e-2, 50, 200, 5e-2, 200e3, 1e3, "mean"),
        "pathfinder": (6, 256, "batch", True, 0.2, 4e-3, 64, 200, 3e-2, 500e3, 2.5e3, "last"),
        "pathx": (6, 256, "batch", True, 0, 4e-3, 64, 50, 3e-2, 125e3, 10e3, "mean"),
    },
    "long_conv": {
        "listops": (8, 128, "batch", False, 0, 1e-2, 50, 40, 5e-2, 80e3, 10e3, "mean"),
        "text": (6, 256, "batch", True, 0, 1e-2, 16, 32, 5e-2, 50e3, 5e3, "mean"),
        "retrieval": (6, 256, "batch", True, 0, 1e-2, 64, 20, 5e-2, 50e3, 2.5e3, "mean"),
        "image": (6, 512, "layer", False, 0.1, 1e-2, 50, 200, 5e-2, 200e3, 1e3, "mean"),
        "pathfinder": (6, 256, "batch", True, 0, 4e-3, 64, 200, 3e-2, 500e3, 2.5e3, "last"),
        "pathx": (6, 256, "batch", True, 0, 5e-4, 16, 50, 5e-2, 500e3, 10e3, "mean"),
        "scifar": (6, 512, "layer", False, 0.1, 1e-2, 50, 300, 5e-2, 300e3, 1e3, "mean"),
    },
}
SIX = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
ACCURACY = {
    "s4d": dict(zip(SIX, (60.52, 86.97, 90.96, 87.93, 93.96, 96.02), strict=True))
    | {"scifar": 90.42, "speech": 96.25},
    "sgconv": dict(zip(SIX, (61.45, 89.20, 91.11, 87.97, 95.46, 97.83), strict=True)),
    "long_conv": dict(zip(SIX, (60.3, 87.1, 90.0, 88.3, 94.0, 96.9), strict=True))
    | {"scifar": 91.0},
}
KERNELS = {
    # lam, kernel dropout, kernel lr, two-sided
    ("long_conv", ("lam", "kernel_dropout", "kernel_lr", "bidirectional")): {
        "listops": (0.002, 0.2, 5e-4, False),
        "text": (0.003, 0.2, 1e-3, False),
        "retrieval": (0.004, 0.1, 1e-4, False),
        "image": (0.003, 0.2, 1e-3, False),
        "pathfinder": (0.001, 0.3, 1e-3, True),
        "pathx": (0.001, 0.3, 5e-4, True),
        "scifar": (0.001, 0.2, 1e-3, False),
    },
    ("sgconv", ("kernel_dim", "init_scale", "init", "decay", "decay_min", "decay_max")): {
        "listops": (1, 0, "randn", "geometric", 2, 2),
        "text": (2, 0, "randn", "geometric", 2, 2),
        "retrieval": (1, 0, "randn", "geometric", 2, 2),
        "image": (32, 0, "randn", "power_fixed", 1, 1),
        "pathfinder": (32, 0, "randn", "geometric", 2, 2),
        "pathx": (64, 1, "cos", "geometric", 1, 3),
    },
    ("s4d", ("n_ssm", "dt_min", "dt_max", "kernel_lr", "dt_lr")): {
        "listops": (None, 1e-3, 0.1, 1e-3, 1e-2),
        "text": (None, 1e-3, 0.1, 1e-3, 1e-2),
        "retrieval": (256, 1e-3, 0.1, 1e-3, 1e-2),
        "image": (2, 1e-3, 0.1, 1e-3, 1e-2),
        "pathfinder": (256, 1e-3, 0.1, 1e-3, None),
        "pathx": (None, 1e-4, 0.1, 5e-4, None),
        "scifar": (2, 1e-3, 0.1, 1e-3, None),
        "speech": (2, 1e-3, 0.1, 1e-3, None),
    },
}


def test_recipes_are_the_published_ones():
    for layer, tasks in PUBLISHED.items():
        for task, line in tasks.items():
            r = RECIPES[task, layer]
            m, o = r.model, r.optim
            found = (m.depth, m.d_model, m.norm, m.prenorm, m.dropout, o.lr, o.batch, o.epochs)
            found += (o.weight_decay, o.schedule_steps, o.warmup, m.pool)
            assert found == line, (task, layer)
            assert m.tie_dropout and not r.ours and r.source
            assert r.published == ACCURACY[layer][task]
    for (layer, names), tasks in KERNELS.items():
        for task, values in tasks.items():
            kernel = RECIPES[task, layer].kernel
            assert tuple(getattr(kernel, n) for n in names) == values, (task, layer)
    for task in PUBLISHED["long_conv"]:
        kernel = RECIPES[task, "long_conv"].kernel
        assert (kernel.heads, kernel.init, kernel.smooth) == (2, "random", None)
        accumulate = RECIPES[task, "long_conv"].optim.accumulate
        assert accumulate == (2 if task == "retrieval" else 1)
    for layer in ("s4d", "sgconv"):
        for task in PUBLISHED[layer]:
            assert RECIPES[task, layer].kernel.bidirectional
    for task in PUBLISHED["s4d"]:
        kernel = RECIPES[task, "s4d"].kernel
        assert (kernel.d_state, kernel.init, kernel.heads) == (64, "lin", 1)


def test_every_task_has_every_layer_and_ours_are_marked():
    published = {(t, layer) for layer, tasks in PUBLISHED.items() for t in tasks}
    for task in (
        *SIX,
        "scifar",
        "speech",
        "path256",
        "pathfinder64",
        "mnist5k",
        "digits",
        "r8",
        "ucr",
    ):
        for layer in LAYERS:
            assert RECIPES[task, layer].ours == ((task, layer) not in published)
    # Reported without settings.
    assert RECIPES["path256", "long_conv"].published == 92.2
    assert RECIPES["scifar", "butterfly"].published == 92.5
    assert recipe("ucr:GunPoint", "s4d") is RECIPES["ucr", "s4d"]
    assert recipe("listops-gen", "sgconv") is RECIPES["listops", "sgconv"]
    with pytest.raises(ValueError, match="did you mean listops"):
        recipe("listop", "s4d")
    with pytest.raises(ValueError, match="did you mean s4d"):
        recipe("listops", "s4")
    with pytest.raises(TypeError):
        RECIPES["listops", "s4d"] = None


@pytest.mark.filterwarnings("ignore:LongConvKernel")
def test_parameters_of_published_models():
    """LongConv's taps as the paper counts them, and the scales that SGConv's kernels get."""
    for task, l_max, count in (("listops", 2048, 0.52e6), ("pathfinder", 1024, 1.05e6)):
        r = RECIPES[task, "long_conv"]
        model = dataclasses.replace(r.model, depth=1)
        made = SequenceClassifier("long_conv", model, r.kernel, classes=2, l_max=l_max, channels=1)
        assert made.layers[0].kernel.kernel.numel() == pytest.approx(count, rel=0.01)
    for task, l_max, scales in (("listops", 2048, 12), ("pathx", 16384, 8), ("image", 1024, 6)):
        r = RECIPES[task, "sgconv"]
        model = dataclasses.replace(r.model, depth=1)
        made = SequenceClassifier("sgconv", model, r.kernel, classes=2, l_max=l_max, channels=1)
        assert len(made.layers[0].kernel.pieces) == scales


# ---- command line ----


def test_help_is_fast_and_needs_no_torch():
    blocked = "import sys; sys.modules['torch'] = None; from bench.lra.__main__ import main; main()"
    seconds = []
    for arguments in (["--help"], ["fit", "text", "--layer", "sgconv", "--help"], ["sweep", "-h"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", blocked, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Of processor time, which a busy machine does not stretch as it does the clock's.
    assert max(seconds) < 1, seconds


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        parse_fit(list(arguments))
    assert error.value.code == 2
    return capsys.readouterr().err


def test_refusals_name_what_was_meant(capsys, tmp_path):
    assert "did you mean optim.lr" in refusal(capsys, "text", "--optim.lrr", "1")
    assert "did you mean max_minutes" in refusal(capsys, "text", "--max-minute=3")
    assert "did you mean kernel.lam" in refusal(
        capsys, "text", "--layer=long_conv", "--kernel.lamb", "1"
    )
    # An option of another layer.
    assert "unknown option --kernel.lam" in refusal(capsys, "text", "--layer=s4d", "--kernel.lam=1")
    assert "did you mean sgconv" in refusal(capsys, "text", "--layer", "sgcon")
    assert "did you mean pathfinder" in refusal(capsys, "pathfindr")
    assert "model.norm" in refusal(capsys, "text", "--model.norm", "instance")
    assert "model.depth" in refusal(capsys, "text", "--model.depth", "two")
    assert "--optim.accumulate must divide" in refusal(capsys, "text", "--optim.accumulate=3")
    assert "--optim.lr must be positive" in refusal(capsys, "text", "--optim.lr=0")
    assert "which task" in refusal(capsys, "--layer", "s4d")
    file = tmp_path / "c.yaml"
    file.write_text("task: text\noptim: {lrr: 1}\n")
    assert "did you mean optim.lr" in refusal(capsys, "--config", str(file))


def test_options_override_the_recipe_and_come_back_from_a_file(capsys, tmp_path):
    config = parse_fit(["listops", "--layer", "sgconv", "--optim.lr=0.5", "--max-minutes", "2"])
    expected = RECIPES["listops", "sgconv"]
    assert config.model == expected.model and config.kernel == expected.kernel
    assert config.optim == dataclasses.replace(expected.optim, lr=0.5)
    assert config.run == options.Run(max_minutes=2.0)
    with pytest.raises(SystemExit):
        parse_fit(
            ["listops", "--layer=sgconv", "--optim.lr=0.5", "--max-minutes=2", "--print-config"]
        )
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse_fit(["--config", str(tmp_path / "c.yaml")]) == config
    # A cosine given in steps follows the epochs, unless it is given itself.
    config = parse_fit(["listops", "--optim.epochs", "4"])
    assert config.optim.schedule_steps == 8000
    config = parse_fit(["listops", "--optim.epochs", "4", "--optim.schedule_steps", "7"])
    assert config.optim.schedule_steps == 7
    assert options.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_plan():
    config = parse_fit(["listops"])  # 40 epochs of 96,000 / 50 steps
    p = plan.make(config, 96_000, 40 * 96_000)
    assert (p.steps, p.period, p.warmup, p.cosine, p.share) == (76_800, 1920, 1000, 80_000, 1.0)
    assert p.factor(0) == 1 / 1000 and p.factor(999) == 1 == p.factor(1000)
    assert p.factor(40_500) == pytest.approx(0.5) and p.factor(80_000) == 0
    assert 0 < p.factor(76_799) < 0.01
    config = parse_fit(["listops", "--max_minutes", "10"])
    timing = plan.Timing(step=0.1, validation=10.0, test=20.0)
    p = plan.make(config, 96_000, 40 * 96_000, timing)
    # 600 s - 20 s for the test, three evaluations for three times 1,850 steps.
    assert p.steps % p.period == 0
    assert 560 < 0.1 * p.steps + 10 * (p.steps // p.period) + 20 <= 600
    assert p.cosine == round(80_000 * p.steps / 76_800) and p.warmup == p.steps // 10
    assert p.share == pytest.approx(p.steps / 76_800)
    enough = plan.Timing(step=1e-4, validation=0.1, test=0.1)
    assert plan.make(config, 96_000, 40 * 96_000, enough) == plan.make(config, 96_000, 40 * 96_000)
    short = plan.make(config, 96_000, 40 * 96_000, plan.Timing(1.0, 300.0, 300.0))
    assert short.steps >= 1 and short.period == short.steps


def test_the_schedule_keeps_its_length_whatever_the_evaluations():
    for steps, every in ((199, 2), (48, 7), (76_800, 1000), (10, 30)):
        epochs = ("--optim.epochs", "1", "--optim.batch", "10", "--eval_steps", str(every))
        p = plan.make(parse_fit(["digits", *epochs]), 10 * steps, 10 * steps)
        assert steps <= p.steps < 1.03 * steps + 1 and p.steps % p.period == 0
        assert p.period <= every and p.cosine == p.steps
    timing = plan.Timing(step=0.1, validation=0.001, test=0.1)
    config = parse_fit(["digits", "--max_minutes", "0.334", "--eval_steps", "2"])
    p = plan.make(config, 100_000, 1)
    assert plan.make(config, 100_000, 1, timing).steps >= 0.9 * 199 and p.steps > 10_000


def test_the_share_is_of_the_published_samples():
    for task, (n, *_) in {name: files.sizes for name, files in data.OFFICIAL.items()}.items():
        assert SAMPLES[task] == n
    assert whole("pathx-gen", "s4d", 16_000) == 50 * 160_000
    assert whole("digits", "s4d", 1258) == 40 * 1258


def test_the_cosine_is_scaled_once(tmp_path):
    def steps(*options):
        return parse_fit(["listops", *options]).optim.schedule_steps

    assert (steps(), steps("--optim.epochs", "4")) == (80_000, 8000)
    assert steps("--optim.epochs", "80", "--optim.schedule_steps", "80000") == 80_000
    file = tmp_path / "c.yaml"
    file.write_text("optim: {epochs: 4, schedule_steps: 8000}\n")
    assert steps("--config", str(file)) == 8000
    assert steps("--config", str(file), "--optim.epochs", "40") == 80_000
    file.write_text("optim: {epochs: 4}\n")
    assert steps("--config", str(file)) == 8000


@pytest.mark.parametrize(
    "options, message",
    [
        (("--seed", "-1"), "--seed must be >= 0, got -1"),
        (("--compare", "-1"), "--compare must be >= 0"),
        (("--kernel.kernel_lr", "-1"), "--kernel.kernel_lr must be >= 0, got -1.0"),
        (("--layer", "butterfly", "--compare", "3"), "--compare must be 0 for butterfly"),
    ],
)
def test_numbers_that_no_run_can_have(options, message, capsys):
    with pytest.raises(SystemExit):
        parse_fit(["digits", *options])
    assert message in capsys.readouterr().err


# ---- the model ----

SMALL = options.Model(2, 8, "layer", False, 0.0, "mean")


def small(layer="s4d", model=SMALL, **kind):
    kernel = options.KERNELS[layer]()
    kind = kind or {"channels": 1}
    return SequenceClassifier(layer, model, kernel, classes=3, l_max=32, **kind)


@pytest.mark.filterwarnings("ignore:LongConvKernel")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_changes_nothing(layer, prenorm, pool):
    """A sample's answer is the same alone and padded in a batch, for every layer and pooling."""
    model = dataclasses.replace(SMALL, prenorm=prenorm, pool=pool)
    made = small(layer, model, vocab=7).double().eval()
    x = torch.randint(1, 7, (2, 20))
    lengths = torch.tensor([13, 20])
    together = made(x, lengths)
    alone = made(x[:1, :13])
    # Kernels are computed in float32.
    assert (together[0] - alone[0]).norm() < 1e-5 * alone.norm()
    changed = x.clone()
    changed[0, 13:] = 0
    assert torch.allclose(made(changed, lengths), together, rtol=1e-12)
    changed[0, 12] = x[0, 12] % 6 + 1
    assert not torch.allclose(made(changed, lengths)[0], together[0], rtol=1e-4)


def test_backbone_is_the_papers():
    """Against the equations, with the layers and norms taken from the model."""
    x = torch.randn(4, 16, 1)
    for prenorm in (True, False):
        made = small(model=dataclasses.replace(SMALL, norm="batch", prenorm=prenorm)).train()
        h = made.encoder(x)

        def norm(z, i, made=made):
            mean, var = z.mean((0, 1)), z.var((0, 1), unbiased=False)
            bn = made.norms[i].norm
            return (z - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias

        for i, layer in enumerate(made.layers):
            h = h + layer(norm(h, i)) if prenorm else norm(h + layer(h), i)
        assert len(made.norms) == 2 + prenorm
        h = norm(h, 2) if prenorm else h
        wanted = made.decoder(h.mean(1))
        assert torch.allclose(made(x), wanted, atol=1e-5)


def test_pairs_and_pooling():
    made = small(vocab=7, pair=True).eval()
    a, b = torch.randint(1, 7, (2, 3, 20))
    features = []
    made.decoder.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    logits = made(torch.cat([a, b]))
    assert logits.shape == (3, 3)
    first, second, difference, product = features[0].chunk(4, dim=1)
    assert torch.equal(difference, first - second) and torch.equal(product, first * second)
    made(torch.cat([b, a]))
    assert torch.allclose(features[1].chunk(4, dim=1)[0], second, atol=1e-6)
    x = torch.arange(12.0).view(1, 6, 2)
    assert torch.equal(pooled(x, torch.tensor([3]), "mean"), x[:, :3].mean(1))
    assert torch.equal(pooled(x, torch.tensor([3]), "last"), x[:, 2])
    assert torch.equal(pooled(x, None, "last"), x[:, 5])
    with pytest.raises(ValueError, match="one of channels and vocab"):
        small(channels=1, vocab=2)


def test_dropout_is_tied_and_dt_has_its_rate():
    made = small(model=dataclasses.replace(SMALL, dropout=0.5)).train()
    dropped = made.dropout(torch.ones(4, 10, 8))
    assert (dropped == dropped[:, :1]).all() and 0 < (dropped == 0).float().mean() < 1
    kernel = options.S4D(kernel_lr=1e-3, dt_lr=5e-3)
    made = SequenceClassifier("s4d", SMALL, kernel, classes=2, l_max=9, channels=1)
    groups = seqconv.param_groups(made, lr=1e-2, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    k = made.layers[0].kernel
    assert found[id(k.inv_dt)] == (5e-3, 0) and found[id(k.inv_A_real)] == (1e-3, 0)
    assert found[id(k.C)] == found[id(made.decoder.weight)] == (1e-2, 0.1)


# ---- the order of samples ----


class Numbers:
    """Sample i is the number i."""

    def __init__(self, count, lengths=None):
        self.labels = np.arange(count)
        self.lengths = np.ones(count, int) if lengths is None else lengths

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        return self.labels[indices, None, None].astype("f4"), self.lengths[indices], indices


def passes(batches, count) -> list[list[int]]:
    return [part[2].tolist() for _ in range(count) for part in batches]


def test_order_is_a_permutation_that_any_position_resumes():
    def make(**options):
        return TrainBatches(Numbers(23), batch=4, period=3, seed=1, **options)

    whole = passes(make(), 6)  # 18 batches of 5 per epoch
    assert len(make()) == 3 and len(whole) == 18
    for epoch in range(3):
        seen = [i for part in whole[5 * epoch : 5 * epoch + 5] for i in part]
        assert len(seen) == len(set(seen)) == 20
    assert whole[:5] != whole[5:10]
    assert passes(make(), 1) == whole[:3]
    assert passes(TrainBatches(Numbers(23), batch=4, period=3, seed=2), 1) != whole[:3]
    for stop in range(1, 17):
        first = make()
        got = []
        while len(got) < stop:
            for part in first:
                got.append(part[2].tolist())
                if len(got) == stop:
                    break
        state = first.state_dict()
        assert state == {"seed": 1, "epoch": stop // 5, "position": stop % 5}
        second = make()
        second.load_state_dict(state)
        while len(got) < 18:
            got += passes(second, 1)
        assert got == whole
    parts = [passes(make(rank=rank, world=2), 6) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(w) for w in whole]
    halves = passes(make(accumulate=2), 6)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole
    with pytest.raises(ValueError, match="at most 23"):
        TrainBatches(Numbers(23), batch=24, period=1, seed=0)
    with pytest.raises(ValueError, match="multiple of"):
        make(world=3)
    with pytest.raises(ValueError, match="seed was 5"):
        make().load_state_dict({"seed": 5, "epoch": 0, "position": 0})


def test_evaluation_sees_every_sample_once():
    lengths = np.array([5, 1, 4, 2, 3, 9, 8])
    for world in (1, 2):
        shares = [
            EvalBatches(Numbers(7, lengths), batch=2, rank=r, world=world) for r in range(world)
        ]
        seen = [i for share in shares for part in share for i in part[2].tolist()]
        assert sorted(seen) == list(range(7))
    order = [i for part in EvalBatches(Numbers(7, lengths), batch=2) for i in part[2].tolist()]
    assert lengths[order].tolist() == sorted(lengths)


def test_splits_that_are_the_same_are_noticed():
    one = Numbers(9)
    assert same(one, Numbers(9)) and not same(one, Numbers(8))
    assert not same(one, Numbers(9, 1 + np.arange(9) % 2))
    other = Numbers(9)
    other.batch = lambda indices: (indices[:, None, None] + 1, None, None)
    assert not same(one, other)


def test_an_error_in_reading_is_not_lost():
    class Broken(Numbers):
        def batch(self, indices):
            raise OSError("sample 3 cannot be read")

    with pytest.raises(OSError, match="sample 3"):
        next(iter(TrainBatches(Broken(9), batch=3, period=3, seed=0)))


# ---- runs ----

TINY = ("--model.d_model", 16, "--optim.batch", 10, "--optim.epochs", 6, "--checkpoint_steps", 5)
TINY += ("--log_steps", 5)
TIMES = ("seconds", "sequences_per_second", "waiting", "peak_mib")


def checkpoint(folder: Path, name: str = "last.ckpt") -> dict:
    return torch.load(folder / name, weights_only=True)


def rows(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]


def assert_same(one: Path, two: Path) -> None:
    a, b = checkpoint(one), checkpoint(two)
    assert a["global_step"] == b["global_step"] == 72
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    for p, q in zip(*(c["optimizer_states"][0]["state"].values() for c in (a, b)), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)
    assert rows(one) == rows(two)
    best, again = (checkpoint(folder, "best.ckpt") for folder in (one, two))
    assert all(torch.equal(t, again["model"][name]) for name, t in best["model"].items())
    first, second = (json.loads((f / "result.json").read_text()) for f in (one, two))
    assert first["test_accuracy"] == second["test_accuracy"]


def test_a_run_learns_and_its_folder_holds_everything(tmp_path):
    out = tmp_path / "run"
    text = finish(start("fit", "digits", "--out", out, *TINY, "--compare", 2))
    assert "chance 33.3%, majority" in text and "sequences/s" in text and "torch.fft" in text
    assert not re.search("(?i)tip:|litlogger|warning|GPU available|weights_only", text), text
    assert {p.name for p in out.iterdir()} == {
        *("best.ckpt", "last.ckpt", "config.yaml", "run.json", "result.json", "metrics.csv"),
        *("curves.png", "kernels.png", "tensorboard"),
    }
    assert any("tfevents" in p.name for p in (out / "tensorboard").iterdir())
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "done" and result["test_accuracy"] > 0.9 and result["ours"]
    assert result["steps"] == 72 == result["plan"]["steps"] and result["sequences_per_second"] > 0
    assert result["operator"].startswith("cpu (") and result["torch"] == torch.__version__
    assert result["peak_mib"] > 50 and result["compared"]["difference"] < 1e-3
    table = rows(out)
    assert [int(r["step"]) for r in table][:4] == [5, 10, 12, 15] and table[2]["val_accuracy"]
    assert float(table[-1]["loss"]) < 0.7 * float(table[0]["loss"])
    assert f"{result['test_accuracy']:.2%}" in finish(start("eval", out))
    config = parse_fit(["--config", str(out / "config.yaml")])
    assert config.model.d_model == 16 and config.optim.epochs == 6


@pytest.mark.slow
def test_what_a_run_folder_refuses(tmp_path):
    out = tmp_path / "run"
    finish(start("fit", "digits", "--out", out, *TINY, "--stop_after", 3), 130)
    assert "holds a run" in finish(start("fit", "digits", "--out", out, *TINY), 1)
    wrong = finish(start("fit", "digits", "--out", out, *TINY, "--resume", "--optim.lr", 0.5), 1)
    assert "optim.lr was 0.01, now 0.5" in wrong
    (out / "last.ckpt").write_bytes((out / "last.ckpt").read_bytes()[:1000])
    assert "cannot be read" in finish(start("fit", "digits", "--out", out, *TINY, "--resume"), 1)
    missing = start("fit", "digits", "--out", tmp_path / "no", "--resume")
    assert "there is no" in finish(missing, 1)
    assert "data_batch_1 is missing" in finish(start("fit", "image", "--out", tmp_path / "im"), 1)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["s4d", "long_conv"])
def test_a_killed_run_resumes_to_the_same_weights(layer, tmp_path):
    """Killed between checkpoints, within an epoch; stopped by Ctrl-C; and stopped exactly at an
    epoch's end. Dropout draws random numbers all the time."""
    options = (*TINY, "--layer", layer, "--model.dropout", 0.2, "--optim.accumulate", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start("fit", "digits", "--out", whole, *options))
    command = ("fit", "digits", "--out", parts, *options)
    killed = start(*command, "--stop_after", 70, delay=0.03)
    while not (parts / "last.ckpt").exists():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    reached = checkpoint(parts)["global_step"]
    assert 0 < reached < 40 and not (parts / "result.json").exists()
    interrupted = start(*command, "--resume", delay=0.03)
    while checkpoint(parts)["global_step"] == reached:
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGINT)
    assert "Continue with the same command and --resume" in finish(interrupted, 130)
    assert reached < checkpoint(parts)["global_step"] < 60
    finish(start(*command, "--resume", "--stop_after", 60), 130)
    assert checkpoint(parts)["global_step"] == 60  # five times twelve: an epoch's end
    finish(start(*command, "--resume"))
    assert_same(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["s4d", "sgconv", "long_conv"])
def test_losses_are_those_of_the_reference(layer, tmp_path):
    """The first hundred with the compiled kernels and with torch's formulas, from the same seed."""
    options = ("--layer", layer, *TINY, "--optim.epochs", 9, "--log_steps", 1)
    folders = [tmp_path / (backend or "fused") for backend in ("", "reference")]
    for out, backend in zip(folders, ("", "reference"), strict=True):
        finish(start("fit", "digits", "--out", out, *options, backend=backend))
    operators = [json.loads((out / "run.json").read_text())["operator"] for out in folders]
    assert "fallback" not in operators[0] and "fallback" in operators[1]
    fused, plain = (np.array([float(r["loss"]) for r in rows(out)[:100]]) for out in folders)
    assert len(fused) == 100 and fused[-1] < 0.7 * fused[0]
    assert 0 < np.abs(fused - plain).max() < 1e-4


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Under torchrun both processes take half of every batch: the losses are those of one process up
    to round-off, until a resume too."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    # BatchNorm and SGConv would see their own half only, or draw random numbers.
    options = (*TINY, "--model.norm", "layer")
    finish(start("fit", "digits", "--out", one, *options))
    finish(start("fit", "digits", "--out", two, *options, before=torchrun))
    a, b = (np.array([float(r["loss"]) for r in rows(f)]) for f in (one, two))
    assert len(a) == len(b) and np.abs(a[:6] - b[:6]).max() < 1e-4
    stopped = start("fit", "digits", "--out", parts, *options, "--stop_after", 17, before=torchrun)
    assert "--resume" in stopped.communicate()[0] and checkpoint(parts)["global_step"] == 17
    finish(start("fit", "digits", "--out", parts, *options, "--resume", before=torchrun))
    assert_same(two, parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, layer", [("retrieval", "sgconv"), ("text", "hyena"), ("digits", "butterfly")]
)
def test_other_tasks_and_layers_train(task, layer, tmp_path):
    small = ("--model.d_model", 16, "--model.depth", 2, "--optim.batch", 10, "--optim.warmup", 0)
    small += ("--optim.epochs", 12, "--optim.lr", 0.01, "--optim.schedule_steps", 144)
    small += ("--model.prenorm", "true", "--optim.accumulate", 1)
    out = tmp_path / "run"
    finish(start("fit", task, "--layer", layer, "--out", out, *small))
    result = json.loads((out / "result.json").read_text())
    assert result["test_accuracy"] > result["majority"] + 0.2


@pytest.mark.slow
def test_the_budget_is_kept_and_divergence_is_a_failure(tmp_path):
    out = tmp_path / "run"
    options = ("--model.d_model", 16, "--optim.batch", 10, "--optim.epochs", 100_000)
    finish(start("fit", "digits", "--out", out, *options, "--max_minutes", 0.1))
    result = json.loads((out / "result.json").read_text())
    assert 1 < result["seconds"] < 15 and result["plan"]["share"] < 100
    assert result["steps"] == result["plan"]["steps"] == result["plan"]["cosine"]
    out = tmp_path / "diverged"
    text = finish(start("fit", "digits", "--out", out, *TINY, "--optim.lr", 1e30), 1)
    assert "failed" in text
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "diverged" and "-* (1 of 1 failed)" in report(load([out]))


@pytest.mark.slow
def test_sweep_goes_on_where_it_was(tmp_path):
    command = ("sweep", "digits", "listops-gen", "--layers", "s4d,sgconv", "--seeds", "0,1")
    command += ("--out", tmp_path, *TINY, "--model.depth", 1)
    finish(start(*command))
    first = (tmp_path / "digits-s4d-0" / "result.json").stat().st_mtime_ns
    (tmp_path / "digits-sgconv-1" / "result.json").unlink()
    text = finish(start(*command))
    assert text.count("already there") == 7 and text.count("resumed") == 1
    assert (tmp_path / "digits-s4d-0" / "result.json").stat().st_mtime_ns == first
    text = finish(start("report", tmp_path))
    assert "listops-gen (generated data)" in text and "±" in text and "[61.45]" in text
    assert "no such folder" in finish(start("report", tmp_path / "nothing"), 1)
    kept = tmp_path / "kept.jsonl"
    finish(start("report", tmp_path, "--json", kept, "--out", tmp_path / "table.md"))
    assert finish(start("report", kept)) == text == (tmp_path / "table.md").read_text()
    assert "did you mean" in finish(start(*command, "--optim.lrr", 1), 2)
    assert "none of a sweep's options: --layers" in finish(start(*command, "--layer", "s4d"), 2)
    assert "none of a sweep's options: --seeds" in finish(start(*command, "--seed=1"), 2)


@pytest.mark.slow
def test_what_cannot_be_is_refused_before_anything_is_lost(tmp_path):
    out = tmp_path / "run"
    fit = ("fit", "digits", "--out", out, *TINY)
    finish(start(*fit, "--stop_after", 30), 130)
    refusals = {
        ("--kernel.d_state", 3): "d_state must be even",
        ("--optim.batch", 200): "--optim.batch must be at most 120",
        ("--precision", "16-mixed"): "16-mixed needs a GPU",
    }
    for wrong, message in refusals.items():
        text = finish(start(*fit, "--overwrite", *wrong), 1)
        assert message in text and "Traceback" not in text and len(text) < 400, text
    assert "now" in finish(start(*fit, "--resume", train=80), 1)
    best = (out / "best.ckpt").read_bytes()
    (out / "best.ckpt").unlink()
    assert "needs the best weights so far" in finish(start(*fit, "--resume"), 1)
    (out / "best.next.ckpt").write_bytes(
        best
    )  # ended after last.ckpt was written, before the renaming
    finish(start(*fit, "--resume", "--precision", "32-true", "--compare", 2))
    result = json.loads((out / "result.json").read_text())
    assert len(result["sessions"]) == 2 and result["compared"]["ratio"] > 0
    assert not (out / "best.next.ckpt").exists()
    assert "cannot" not in finish(start("eval", out, "--device", "cpu", "--split", "val"))
    assert "is no checkpoint" in finish(start("eval", out, "--checkpoint", "run.json"), 1)
    assert "holds no run" in finish(start("eval", tmp_path), 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_run_with_its_checkpoint(tmp_path, workers, number):
    """Ctrl-C reaches all processes at once, a scheduler's SIGTERM the first."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={workers}"]
    before = torchrun if workers > 1 else ()
    command = ("fit", "digits", "--out", tmp_path, *TINY, "--model.norm", "layer")
    process = start(*command, "--checkpoint_steps", 10, before=before, delay=0.05)
    while not (tmp_path / "last.ckpt").exists():
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    text = process.communicate(timeout=120)[0]
    assert "Stopped at step" in text and process.returncode != 0, text
    reached = checkpoint(tmp_path)["global_step"]
    assert f"Stopped at step {reached}" in text and 10 <= reached < 72
    assert workers > 1 or process.returncode == 130


@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_with_a_checkpoint(tmp_path):
    process = start("sweep", "digits", "--layers", "s4d", "--out", tmp_path, *TINY, delay=0.05)
    folder = tmp_path / "digits-s4d-0"
    while not (folder / "last.ckpt").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    text = finish(process, 130)
    assert "Traceback" not in text and "stopped; the same command goes on" in text
    assert f"Stopped at step {checkpoint(folder)['global_step']}" in text


@pytest.mark.slow
def test_gpu_runs_in_sessions(tmp_path):
    """On the processor, of a small set: both precisions, a session that is over, and one that goes on."""
    made = tmp_path / "data/generated/pathx-gen/generated.json"
    made.parent.mkdir(parents=True)
    made.write_text('{"whole": true}')
    command = (
        "gpu",
        "pathx-gen",
        "--device",
        "cpu",
        "--out",
        tmp_path,
        "--data",
        tmp_path / "data",
    )
    text = finish(start(*command, "--minutes", 0.15, delay=0.05), 130)
    assert "[1/2] pathx-gen-s4d-0-bf16-mixed: stopped; the same command goes on" in text
    folder = tmp_path / "pathx-gen-s4d-0-bf16-mixed"
    config = json.loads((folder / "run.json").read_text())["config"]["run"]
    assert config["max_minutes"] == 10 and config["precision"] == "bf16-mixed"
    assert "did you mean" not in finish(start("gpu", "pathy"), 2)
    reached = checkpoint(folder)["global_step"]
    text = finish(start(*command, "--minutes", 0.2, delay=0.05), 130)
    assert "resumed" in text and checkpoint(folder)["global_step"] > reached


# ---- report ----


def write_run(
    folder: Path, task: str, layer: str, seed: int, accuracy: float | None, **facts
) -> None:
    config = parse_fit([task, "--layer", layer, "--seed", str(seed)])
    r = recipe(task, layer)
    values = {
        "task": task,
        "layer": layer,
        "seed": seed,
        "config": dataclasses.asdict(config),
        "plan": {"share": 0.25},
        "chance": 0.1,
        "majority": 0.17,
        "generated": "gen" in task,
        "published": r.published,
        "source": r.source,
        "ours": r.ours,
        "parameters": 1000,
        "device": "a processor",
    }
    folder = folder / f"{task}-{layer}-{seed}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(values))
    if accuracy is not None:
        done = {"status": "done", "test_accuracy": accuracy, "seconds": 60.0} | facts
        done |= {"sequences_per_second": 100.0, "peak_mib": 200.0}
        (folder / "result.json").write_text(json.dumps(values | done))


def test_report(tmp_path):
    for seed, accuracy in enumerate((0.58, 0.60, 0.18)):
        write_run(tmp_path, "listops-gen", "s4d", seed, accuracy)
    write_run(tmp_path, "listops-gen", "sgconv", 0, None)
    write_run(tmp_path, "image", "long_conv", 0, 0.881)
    text = report(load([tmp_path]))
    kept = tmp_path / "kept.jsonl"
    keep(load([tmp_path]), kept)
    assert report(load([kept])) == text and len(load([kept, tmp_path])) == 10
    mean, spread = np.mean([58, 60, 18]), np.std([58, 60, 18], ddof=1)
    summary, details = (part.splitlines() for part in text.split("\n\n")[1:3])
    assert summary[0] == "| task | chance | majority | long_conv | s4d | sgconv |"
    assert summary[2] == "| image | 10.0 | 17.0 | 88.10 [88.3] | - | - |"
    cell = f"{mean:.2f} ± {spread:.2f} (1 of 3 failed) [60.52]"
    assert (
        summary[3]
        == f"| listops-gen (generated data) | 10.0 | 17.0 | - | {cell} | - (1 unfinished) [61.45] |"
    )
    line = next(x for x in details if "s4d" in x)
    assert "| 0, 1, 2 |" in line and "| 18.00 |" in line and "25% of the published" in line
    assert "- (1 unfinished)" in next(x for x in details if "sgconv" in x)
    assert "not the published files" in text
    assert not load([tmp_path / "nothing"])


def test_report_does_not_mix_unlike_runs(tmp_path):
    write_run(tmp_path / "a", "digits", "s4d", 0, 0.9, device="a GPU", plan={"share": 0.019})
    write_run(tmp_path / "a", "digits", "s4d", 1, 0.8, device="a GPU", plan={"share": 0.5})
    write_run(tmp_path / "b", "digits", "s4d", 0, 0.7)
    write_run(tmp_path / "c", "digits", "s4d", 0, 0.1)  # another run of the same seed
    write_run(tmp_path / "d", "digits", "s4d", 0, 0.6, changed={"model.d_model": 16})
    runs = load([tmp_path / name for name in "abc"])
    assert "| 85.00 ± 7.07; 70.00 |" in report(runs) and "| 1.9 to 50% of ours |" in report(runs)
    text = report(load([tmp_path / "d"]))
    assert "| 60.00* |" in text and "25% of ours, with model.d_model 16" in text
