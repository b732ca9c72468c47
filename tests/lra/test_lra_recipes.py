"""bench.lra before anything is trained: recipes, the command line, the schedule."""

import dataclasses
import json
import resource
import subprocess
import sys

import pytest
from lra_run import ENVIRONMENT, ROOT

from bench.lra import data, options, schedule
from bench.lra.__main__ import main
from bench.lra.arguments import parse_fit
from bench.lra.model import SequenceClassifier
from bench.lra.recipes import RECIPES, SAMPLES, recipe, whole

LAYERS = ("s4d", "sgconv", "long_conv", "butterfly", "hyena")

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


PAPER = {"s4d": "2206.11893", "sgconv": "2210.09298", "long_conv": "2302.06646"}
SAME = {  # of a layer's kernels in all published rows
    "s4d": {"d_state": 64, "init": "lin", "heads": 1, "discretization": "zoh"}
    | {"bidirectional": True},
    "sgconv": {"kernel_lr": 1e-3, "combine": "cat", "upsample": "linear", "heads": 1}
    | {"bidirectional": True},
    "long_conv": {"heads": 2, "init": "random", "smooth": None},
}


def test_recipes_are_the_published_ones():
    for layer, tasks in PUBLISHED.items():
        for task, line in tasks.items():
            r = RECIPES[task, layer]
            m, o = r.model, r.optim
            found = (m.depth, m.d_model, m.norm, m.prenorm, m.dropout, o.lr, o.batch, o.epochs)
            found += (o.weight_decay, o.schedule_steps, o.warmup, m.pool)
            assert found == line, (task, layer)
            assert m.tie_dropout and not r.ours
            assert r.published == ACCURACY[layer][task]
            # The authors' own Path-X run of S4D-Lin fails; a later paper's does not.
            paper = "2508.20441" if (task, layer) == ("pathx", "s4d") else PAPER[layer]
            assert r.source.endswith(f"arXiv {paper}"), (task, layer)
            assert {name: getattr(r.kernel, name) for name in SAME[layer]} == SAME[layer]
            assert o.accumulate == (2 if (task, layer) == ("retrieval", "long_conv") else 1)
    for (layer, names), tasks in KERNELS.items():
        for task, values in tasks.items():
            kernel = RECIPES[task, layer].kernel
            assert tuple(getattr(kernel, n) for n in names) == values, (task, layer)
    # 6 x 256, N 128, lr 1e-4, batch 16, 20 epochs, decay .05: S4D-DFouT's; warm-up, cosine and steps are ours.
    r = RECIPES["path256", "s4d"]
    assert r.model == options.Model(6, 256, "batch", True, 0.0, "mean")
    assert r.optim == options.Optim(1e-4, 0.05, 16, 20, 10_000, None)
    assert r.kernel == options.S4D(d_state=128, dt_min=1e-4, kernel_lr=1e-4)


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
    for key, published in ((("path256", "long_conv"), 92.2), (("scifar", "butterfly"), 92.5)):
        assert RECIPES[key].published == published and "2302.06646" in RECIPES[key].source
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
    for arguments in (
        ["--help"],
        ["fit", "text", "--layer", "sgconv", "--help"],
        ["sweep", "-h"],
        ["data", "make", "-h"],
    ):
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
    assert "did you mean --optim.lr" in refusal(capsys, "text", "--optim.lrr", "1")
    assert "did you mean --max_minutes" in refusal(capsys, "text", "--max-minute=3")
    assert "did you mean --kernel.lam" in refusal(
        capsys, "text", "--layer=long_conv", "--kernel.lamb", "1"
    )
    for word, meant in (
        ("lr", "optim.lr"),
        ("learning-rate", "optim.lr"),
        ("model.lr", "optim.lr"),
        ("epoch", "optim.epochs"),
        ("batch_size", "optim.batch"),
        ("dropout", "model.dropout"),
        ("d-model", "model.d_model"),
        ("kernel.lr", "optim.lr"),
        ("eval_step", "eval_steps"),
    ):
        assert f"did you mean --{meant}" in refusal(capsys, "text", f"--{word}", "1"), word
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
    for content, message in (
        ("task: text\noptim: {lrr: 1}\n", "did you mean --optim.lr"),
        ("task: text\noptim: 3\n", "optim must be a mapping, got 3"),
        ("task: [text]\n", "task must be a word"),
        ("- text\n", "must be a YAML mapping"),
        ("\x00", "cannot be read"),
    ):
        file.write_text(content)
        assert message in refusal(capsys, "--config", str(file)), content


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("data chek listops", "data: unknown command 'chek'; did you mean check?"),
        ("data check listop", "data check: unknown task 'listop'; did you mean listops"),
        ("data check listops --second 3", "unknown option --second; did you mean --seconds"),
        ("data make listops-gen --see 3", "unknown option --see; did you mean --seed"),
        ("data make listops-gen --n many", "data make:"),
        ("data make", "task"),
        ("sweep digits --layers s4d,sgcon", "sweep: unknown layer 'sgcon'; did you mean sgconv"),
        ("sweep digit", "sweep: unknown task 'digit'; did you mean digits"),
        ("sweep digits --seeds=", "sweep: --seeds names none"),
        ("sweep digits --seeds 1,x", "sweep:"),
        ("sweep digits --lr 1", "sweep: unknown option --lr; did you mean --optim.lr?"),
        ("eval runs --device gpu", "device"),
        ("gpu pathy", "gpu: unknown task 'pathy'; did you mean pathx-gen"),
    ],
)
def test_other_commands_refuse_too(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


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
    p = schedule.make(config, 96_000, 40 * 96_000)
    assert (p.steps, p.period, p.warmup, p.cosine, p.share) == (76_800, 1920, 1000, 80_000, 1.0)
    assert p.factor(0) == 1 / 1000 and p.factor(999) == 1 == p.factor(1000)
    assert p.factor(40_500) == pytest.approx(0.5) and p.factor(80_000) == 0
    assert 0 < p.factor(76_799) < 0.01
    config = parse_fit(["listops", "--max_minutes", "10"])
    timing = schedule.Timing(step=0.1, validation=10.0, test=20.0)
    p = schedule.make(config, 96_000, 40 * 96_000, timing)
    # 600 s - 20 s for the test, three evaluations for three times 1,850 steps.
    assert p.steps % p.period == 0
    assert 560 < 0.1 * p.steps + 10 * (p.steps // p.period) + 20 <= 600
    assert p.cosine == round(80_000 * p.steps / 76_800) and p.warmup == p.steps // 10
    assert p.share == pytest.approx(p.steps / 76_800)
    enough = schedule.Timing(step=1e-4, validation=0.1, test=0.1)
    assert schedule.make(config, 96_000, 40 * 96_000, enough) == schedule.make(
        config, 96_000, 40 * 96_000
    )
    short = schedule.make(config, 96_000, 40 * 96_000, schedule.Timing(1.0, 300.0, 300.0))
    assert short.steps >= 1 and short.period == short.steps


def test_the_schedule_keeps_its_length_whatever_the_evaluations():
    for steps, every in ((199, 2), (48, 7), (76_800, 1000), (10, 30)):
        epochs = ("--optim.epochs", "1", "--optim.batch", "10", "--eval_steps", str(every))
        p = schedule.make(parse_fit(["digits", *epochs]), 10 * steps, 10 * steps)
        assert steps <= p.steps < 1.03 * steps + 1 and p.steps % p.period == 0
        assert p.period <= every and p.cosine == p.steps
    timing = schedule.Timing(step=0.1, validation=0.001, test=0.1)
    config = parse_fit(["digits", "--max_minutes", "0.334", "--eval_steps", "2"])
    p = schedule.make(config, 100_000, 1)
    assert schedule.make(config, 100_000, 1, timing).steps >= 0.9 * 199 and p.steps > 10_000


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
        (("--seed", "2147483648"), "--seed must be below 2^31"),
        (("--compare", "-1"), "--compare must be >= 0"),
        (("--kernel.kernel_lr", "-1"), "--kernel.kernel_lr must be >= 0, got -1.0"),
        (("--layer", "butterfly", "--compare", "3"), "--compare must be 0 for butterfly"),
    ],
)
def test_numbers_that_no_run_can_have(options, message, capsys):
    with pytest.raises(SystemExit):
        parse_fit(["digits", *options])
    assert message in capsys.readouterr().err
