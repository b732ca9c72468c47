"""The commands that measure and draw layers: they refuse wrong results and write what they show."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import seqconv
from bench.gallery import __main__ as gallery
from bench.gallery import initial
from bench.lra import options
from bench.lra.model import SequenceClassifier
from bench.micro import layers, parts, ssm_kernel, timing
from bench.micro.worker import Worker
from seqconv.backends import cpu

ROOT = Path(__file__).parents[2]
SMALL_SSM = {"channels": 6, "modes": 4, "length": 300, "budget": 0.01}
SMALL_LAYER = {"length": 150, "batch": 2, "d_model": 4, "budget": 0.01}


def run(module: str, *arguments, cwd=ROOT) -> str:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- S4D's kernel ----


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_ssm_kernel_measures_and_writes_what_it_shows(tmp_path):
    results, picture = tmp_path / "new" / "r.jsonl", tmp_path / "p.png"
    names = [n for n in ssm_kernel.CONTENDERS if n != ssm_kernel.KEOPS]
    options = ["--lengths", 256, 1000, "--channels", 20, "--d-state", 8, "--budget", 0.02]
    options += ["--contenders", *names, "--json", results, "--plot", picture]
    text = run("bench.ssm_kernel", *options)
    rows = lines(results)
    assert {r["contender"] for r in rows if r["op"] == "forward"} == set(names)
    backward = {r["contender"] for r in rows if r["op"] != "forward"}
    assert backward == set(ssm_kernel.TRAINED)
    for row in rows:
        assert row["gate"] and 0 < row["q1"] <= row["median"] <= row["q3"]
        assert row["rounds"] >= timing.MIN_ROUNDS and 0 < row["of_peak"] < 1 and row["ratio"] > 0
        assert {"device", "isa", "versions", "commit", "threads", "when"} <= set(row)
        few = row["contender"] == ssm_kernel.EINSUM
        assert row["timed_channels"] == (16 if few else 20)
        assert row["error_l2"] < (1e-4 if few else 5e-7)
    assert "16 channels, scaled" in text and "requirements" in text
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("op", ["forward", "forward+backward"])
@pytest.mark.parametrize("fault", ["zeros", "shift", "phase", "one element"])
def test_a_wrong_kernel_gets_no_time(monkeypatch, op, fault):
    def broken(a, w, length):
        right = ssm_kernel.definition(a, w, length)
        if fault == "shift":
            return right.roll(1, -1)
        if fault == "phase":
            return ssm_kernel.definition(a * (1 + 1e-5), w, length)
        spoilt = torch.zeros_like(right)
        if fault == "one element":
            spoilt[0, 0, 0] = 1e-2
            return right + spoilt
        return right * spoilt

    made = ssm_kernel.functions
    monkeypatch.setattr(ssm_kernel, "functions", lambda *x: made(*x) | {ssm_kernel.FUSED: broken})
    job = SMALL_SSM | {"op": op, "contenders": [ssm_kernel.FUSED, ssm_kernel.BMM]}
    wrong, right = ssm_kernel.measure(job, timing.Clock("cpu"))
    assert not wrong["gate"] and wrong["median"] is None and "ratio" not in wrong
    assert right["gate"] and right["median"] > 0
    common = {"op": op, "length": 300, "channels": 6}
    first, *_ = ssm_kernel.requirements([common | wrong, common | right])
    assert first[2:] == ("1 red", False)


def test_ssm_requirements_are_decided_by_the_rows():
    row = {"gate": True, "op": "forward", "length": 16384, "median": 2.2, "of_peak": 0.6}
    found = ssm_kernel.requirements(
        [
            row | {"contender": ssm_kernel.INTO, "ratio": 6.0},
            row | {"contender": ssm_kernel.FUSED, "ratio": 4.0},
            row | {"contender": ssm_kernel.EINSUM, "ratio": 0.02},
            row | {"contender": ssm_kernel.FUSED, "ratio": 4.0, "op": "forward+backward"},
        ]
    )
    assert {what.removesuffix(", L=16K"): met for what, _, _, met in found} == {
        "every result is right": True,
        "share of peak, preallocated, forward": True,
        "time, preallocated, forward": True,
        "goal: time, preallocated, forward": False,
        "seqconv, preallocated over torch.bmm, forward": True,
        "seqconv over torch.bmm, forward+backward": False,
        "torch.bmm over the einsum, forward": True,
    }


# ---- layers ----


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_layers_are_measured_and_tabled(tmp_path):
    results = tmp_path / "r.jsonl"
    options = ["--lengths", 100, 256, "--batch", 2, "--d-model", 4, "--budget", 0.02]
    text = run("bench.layers", *options, "--json", results)
    rows = lines(results)
    measured = {(r["layer"], r["length"], r["contender"]) for r in rows}
    ways = ("seqconv", "torch.fft")
    assert measured == {(n, m, way) for n in layers.LAYERS for m in (100, 256) for way in ways}
    for row in rows:
        assert row["gate"] and 0 < row["q1"] <= row["median"] <= row["q3"]
        assert row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"] and row["peak_bytes"] is not None
        assert {"device", "isa", "versions", "commit", "threads", "when"} <= set(row)
    assert "LongConv, two-sided" in text
    table = layers.readme_table(rows)
    for name in layers.LAYERS:
        assert re.search(rf"^\| {name} \| [\d.]+x, [\d.]+ ms \| [\d.]+x", table, re.M), name
    assert "MiB at 256" in table and "2 samples, d_model 4, 1 thread" in table


@pytest.mark.parametrize("layer", parts.LAYERS)
def test_the_parts_of_a_step_are_measured_and_tabled(layer):
    job = SMALL_LAYER | {"layer": layer}
    step = partial(layers.step, "seqconv")
    rows = list(parts.measure(job, layers.problem, step, timing.Clock("cpu")))
    assert [row["part"] for row in rows] == [*parts.PARTS, parts.WHOLE]
    assert all(row["median"] > 0 for row in rows)
    header, (line,) = parts.readme_table([job | row for row in rows], str)
    assert line[:2] == [layer, str(job["length"])] and len(line) == len(header)
    other = [job | row | {"threads": 2, "batch": 3} for row in rows]
    rows = [job | row | {"threads": 1} for row in rows]
    assert layers.parts_table([*other, *rows]) == layers.parts_table(rows)
    shares = [int(re.search(r"\((-?\d+)%\)", cell)[1]) for cell in line[3:]]
    assert abs(sum(shares) - 100) <= 2


def test_the_parts_are_the_layers():
    """What is timed has the values of the whole, and changes with what it is made of."""
    layer, x, dy = layers.problem(SMALL_LAYER | {"layer": "S4D"})
    found = parts.functions(layer, x, dy, partial(layers.step, "seqconv", layer, x, dy))
    _, dx, *grads = found[parts.WHOLE]()
    names = [name for name, _ in layer.named_parameters()]
    dv, dweight, dbias = found["linear map and GLU"]()
    whole = dict(zip(names, grads, strict=True))
    torch.testing.assert_close(dweight, whole["linear.weight"])
    torch.testing.assert_close(dbias, whole["linear.bias"])
    assert dv.shape == dx.shape and len(found["kernel"]()) == len(list(layer.kernel.parameters()))
    assert next(t.shape for t in found["convolution"]()) == dx.shape


@pytest.mark.parametrize("layer", [*layers.LAYERS, *layers.MODELS])
def test_both_ways_compute_the_layer(layer):
    rows = list(layers.measure(SMALL_LAYER | {"layer": layer}, timing.Clock("cpu")))
    assert [row["contender"] for row in rows] == ["seqconv", "torch.fft"]
    assert all(row["gate"] and row["median"] > 0 for row in rows)


def test_torch_fft_runs_no_kernel_of_ours(monkeypatch):
    def refuse(*_):
        raise RuntimeError("a kernel ran")

    for name in ("fftconv", "fftconv_gradients", "butterfly", "butterfly_gradients"):
        monkeypatch.setattr(cpu, name, refuse)
    for name in ("S4D", "Hyena", "SGConv, two-sided", "ButterflyConv"):
        problem = layers.problem(SMALL_LAYER | {"layer": name})
        for way in layers.ways_of(problem[0]):
            if way != "seqconv":
                assert len(layers.step(way, *problem)) > 3
        with pytest.raises(RuntimeError, match="a kernel ran"):
            layers.step("seqconv", *problem)
    assert seqconv.explain(torch.zeros(1, 1, 64), torch.zeros(1, 64)).fallback is None


@pytest.mark.parametrize("fault", ["zeros", "one element", "gradient"])
def test_a_wrong_layer_gets_no_time(monkeypatch, fault):
    right = layers.step

    def broken(way, *problem):
        found = right(way, *problem)
        if way == "seqconv" and fault == "zeros":
            found[0] = found[0] * 0
        if way == "seqconv" and fault == "one element":
            found[0][0, 0, 0] += 1e-3
        if way == "seqconv" and fault == "gradient":
            found[-1] = found[-1] * (1 + 1e-4)
        return found

    monkeypatch.setattr(layers, "step", broken)
    ours, theirs = layers.measure(SMALL_LAYER | {"layer": "LongConv"}, timing.Clock("cpu"))
    assert not ours["gate"] and ours["median"] is None and "ratio" not in theirs
    assert theirs["gate"] and theirs["median"] > 0


def test_what_a_library_prints_does_not_spoil_the_rows(tmp_path, monkeypatch):
    (tmp_path / "noisy.py").write_text(
        "import os\nfrom bench.micro.worker import serve\n"
        "def answer(job):\n    print('noise')\n    os.system('echo noise')\n    yield job\n"
        "serve(lambda settings: answer)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    worker = Worker("noisy", "default", 1)
    assert worker({"a": 1}) == [{"a": 1}] and worker({"b": 2}) == [{"b": 2}]
    worker.close()


# ---- pictures ----


@pytest.mark.slow
@pytest.mark.one_of(2)
def test_gallery_draws_from_a_checkpoint_what_it_trained(tmp_path):
    out, runs = tmp_path / "out", tmp_path / "runs"
    arguments = ["--families", "long_conv", "--epochs", 1, "--digits", 20, "--states", 4]
    assert "epoch 1.0" in run("bench.gallery", *arguments, "--out", out, "--runs", runs)
    text = run("bench.gallery", *arguments, "--out", out, "--runs", runs)
    assert "Written" in text and "epoch 1.0" not in text  # the second time nothing is trained
    assert {p.name for p in out.iterdir()} == {"initial.png", "long_conv.png", "s4d_limit.png"}
    assert all(10_000 < p.stat().st_size < 150_000 for p in out.iterdir())


@pytest.mark.filterwarnings("ignore:.*steps or more away")
def test_sensitivity_is_by_lag():
    """Two layers of five taps see eight pixels back and no further."""
    torch.manual_seed(0)
    settings = options.Model(
        depth=2, d_model=32, norm="layer", prenorm=False, dropout=0.0, pool="mean"
    )
    kernel = options.LongConv(lam=0.0)
    model = SequenceClassifier("long_conv", settings, kernel, classes=10, l_max=5, channels=1)
    seen = gallery.sensitivity(model, torch.randn(3, 40, 1), torch.tensor([1, 2, 3]))
    assert seen.shape == (40,) and (seen[:9] > 0).all()
    assert seen[9:].max() < 1e-3 * seen[8]


class Noise:
    """A split of nine samples."""

    def __len__(self):
        return 9

    def batch(self, picked):
        x = np.random.default_rng(0).normal(size=(len(picked), 64, 1))
        return x.astype(np.float32), np.full(len(picked), 64), picked


@pytest.mark.parametrize("family", options.KERNELS)
def test_every_layer_has_its_picture(family, tmp_path, monkeypatch):
    """Of two untrained models; above, one family is trained for it."""
    settings = options.Model(
        depth=1, d_model=16, norm="layer", prenorm=False, dropout=0.0, pool="mean"
    )
    sizes = {"classes": 10, "l_max": 64, "channels": 1}
    kernel = options.KERNELS[family]()
    models = [SequenceClassifier(family, settings, kernel, **sizes) for _ in range(2)]
    opened = (None, SimpleNamespace(l_max=64), {"test": Noise()}, *models)
    (tmp_path / "result.json").write_text('{"test_accuracy": 0.5}')
    monkeypatch.setattr(gallery, "trained", lambda *_: tmp_path)
    monkeypatch.setattr(gallery, "reopen", lambda _: opened)
    picture = gallery.draw_family(
        family, SimpleNamespace(digits=3, epochs=1, runs=None, out=tmp_path)
    )
    assert picture.name == f"{family}.png" and 10_000 < picture.stat().st_size < 300_000


def test_gallery_has_every_layer():
    assert set(gallery.TITLES) == set(options.KERNELS) == set(initial.LAYERS)


@pytest.mark.parametrize("family", initial.LAYERS)
def test_a_new_layer_sees_the_past_only_unless_it_is_two_sided(family):
    made = initial.layer(family)
    assert initial.kernel(made).shape == (initial.CHANNELS, initial.LENGTH)
    lags, size = initial.field(made)
    assert lags[0] == initial.LENGTH // 2 and size[lags == 0] == 1
    assert size[lags < 0].max() < 1e-5 and size[lags > 0].min() > 1e-4
    if family in initial.TWO_SIDED:
        lags, size = initial.field(initial.layer(family, bidirectional=True))
        assert size.min() > 1e-4


def test_the_picture_of_new_layers(tmp_path):
    initial.draw_initial(["s4d", "hyena"], gallery.TITLES, tmp_path / "initial.png")
    assert 10_000 < (tmp_path / "initial.png").stat().st_size < 100_000


def test_the_readme_has_the_table_and_shows_pictures_that_exist():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- layers bench -->") == text.count("<!-- end of layers bench -->") == 1
    for page in (ROOT / "README.md", ROOT / "docs/benchmarks.md"):
        shown = re.findall(r"!\[.+?\]\((.+?)\)", page.read_text())
        assert shown
        for path in shown:
            assert 10_000 < (page.parent / path).stat().st_size < 150_000, path
