"""The measuring instrument: it refuses wrong results, counts what it says it counts, and loses nothing."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import files
from bench.micro import contenders, measure, overhead, timing
from bench.micro.contenders import Case
from bench.micro.requirements import requirements
from bench.micro.worker import ALLOCATORS
from seqconv import backends

ROOT = Path(__file__).parents[2]
SMALL = ["--lengths", "256", "1000", "--elements", "16384", "--budget", "0.05"]
PAIR = ["--contenders", "seqconv", "torch.fft", "ducc0", "--allocators", "tuned", "default"]


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "bench.fftconv", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_a_run_measures_and_writes_what_it_shows(tmp_path):
    results, picture = tmp_path / "new" / "r.jsonl", tmp_path / "p.png"
    text = run(*SMALL, *PAIR, "--json", str(results), "--plot", str(picture))
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    timed = [r for r in rows if r["allocator"] != "returning"]
    assert {r["contender"] for r in timed} == {"seqconv", "torch.fft", "ducc0"}
    assert {r["op"] for r in timed} == {"forward", "forward+backward"}
    assert {r["allocator"] for r in rows} == {"tuned", "default", "returning"}
    for row in timed:
        assert row["gate"] and 0 < row["q1"] <= row["median"] <= row["q3"]
        assert row["rounds"] >= timing.MIN_ROUNDS and row["error_l2"] < 1e-5
        assert row["floor_copy"] > 0 and row["floor_flops"] > 0 and row["ratio"] > 0
        assert {"device", "isa", "versions", "commit", "threads", "when"} <= set(row)
    assert all(r["peak_bytes"] is not None for r in rows if r["allocator"] == "returning")
    assert picture.stat().st_size > 10_000
    assert "requirements" in text and "seqconv" in text


@pytest.mark.parametrize("fault", ["zeros", "shift", "skip", "future", "one element", "nan"])
def test_a_wrong_result_gets_no_time(monkeypatch, fault):
    def broken(case, device):
        def run(u, k, skip, *rest):
            right = contenders.fft(u, k, skip, *rest)
            if fault == "zeros":
                return right * 0
            if fault == "shift":
                return right.roll(1, -1)
            if fault == "skip":
                return right - skip[:, None] * u
            if fault == "future":
                return right + 1e-5 * u.roll(-1, -1)
            right = right.clone()
            right[0, 0, 0] += 1e-4 if fault == "one element" else float("nan")
            return right

        return run

    monkeypatch.setitem(contenders.CONTENDERS, "seqconv", ("seqconv", broken))
    case = Case(channels=2, length=500)
    rows = measure.measure(case, ["seqconv", "torch.fft"], 0.01, timing.Clock("cpu"), 1e9)
    rows = {row["contender"]: row for row in rows}
    assert not rows["seqconv"]["gate"] and rows["seqconv"]["median"] is None
    assert rows["torch.fft"]["gate"] and rows["torch.fft"]["median"] > 0


def test_who_cannot_compete_says_why(monkeypatch):
    def broken(case, device):
        raise ImportError("libfft.so.3 is missing")

    monkeypatch.setitem(contenders.CONTENDERS, "ducc0", ("ducc0", broken))
    asked = ["seqconv", "scipy.fft", "ducc0"]  # not pyfftw, which does not do it either
    case = Case("gated", channels=2, length=64)
    rows = measure.measure(case, asked, 0.01, timing.Clock("cpu"), 1e9)
    absent = {r["contender"]: r.get("absent") for r in rows}
    assert absent == {
        "seqconv": None,
        "scipy.fft": "does not do this case",
        "ducc0": "cannot be imported: libfft.so.3 is missing",
    }


def test_nvmath_tile_is_left_out_where_it_cannot_be():
    """Its kernel runs on a GPU, forward, on rows of a power of two; the package is a preview."""
    plain = Case(channels=2, length=64)
    assert "nvmath.tile" in contenders.ON_GPU
    assert contenders.make("nvmath.tile", plain, "cpu") is None
    for other in (
        Case(channels=2, length=100),
        Case(channels=2, length=64, taps=65),
        Case("gated", channels=2, length=64),
        Case(channels=2, length=64, op="forward+backward"),
    ):
        assert contenders.make("nvmath.tile", other, "cuda") is None
    if importlib.util.find_spec("nvmath") is None:
        assert "nvmath.tile" in contenders.missing()
        with pytest.raises(ImportError):
            contenders.make("nvmath.tile", plain, "cuda")


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # torch's own, where it imports its compiler
def test_the_complex_wrapper_competes_or_says_why_not():
    case = Case(channels=2, length=64)
    name = "torch.compile+complex"
    (row,) = measure.measure(case, [name], 0.01, timing.Clock("cpu"), 1e9)
    if "absent" in row:
        assert re.match(r"cannot be imported: torch [\w.+]+'s complex wrapper: \w+", row["absent"])
    else:
        assert row["gate"]
    assert contenders.make(name, Case("gated", channels=2, length=64), "cpu") is None


def test_the_complex_wrapper_is_on_whenever_torch_may_compile(monkeypatch):
    config = importlib.import_module("torch._functorch.config")
    if not hasattr(config, "enable_complex_wrapper"):
        pytest.skip("this torch has no complex wrapper")
    seen = []

    def compile(function, **options):
        def run(*tensors):
            seen.append(config.enable_complex_wrapper)
            return function(*tensors)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    case = Case(channels=2, length=64)
    tensors, _ = case.tensors("cpu")
    y = contenders.make("torch.compile+complex", case, "cpu")(tensors)
    assert seen == [True, True] and not config.enable_complex_wrapper  # on trial, and in earnest
    assert torch.equal(y, contenders.fft(*tensors))


def named(text: str) -> set[str]:
    return {
        name for name in contenders.CONTENDERS if re.search(rf"^{re.escape(name)}: ", text, re.M)
    }


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_who_was_asked_for_and_is_not_there_is_named_and_nobody_else():
    there = set(contenders.CONTENDERS) - set(contenders.missing())
    sample = [*SMALL, "--allocators", "tuned", "--ops", "forward"]
    text = run(*sample, "--contenders", "seqconv", "torch.fft")
    assert not named(text) and "installed" not in text
    text = run(*sample, "--modes", "gated", "--contenders", "seqconv", "scipy.fft", "flashfftconv")
    assert named(text) == {"scipy.fft", "flashfftconv"}
    assert "scipy.fft: does not do this case: B=8 H=8 L=256 gated forward and 1 other" in text
    if "flashfftconv" not in there:
        assert "flashfftconv: the package flashfftconv is not installed" in text
        command = [sys.executable, "-m", "bench.fftconv", *sample, "--contenders", "flashfftconv"]
        alone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert alone.returncode == 1 and "none of them is there" in alone.stderr


def test_cases_are_compared_per_element_and_with_their_own_threads(monkeypatch):
    case, longer = Case(channels=8, length=64), Case(channels=128, length=64)
    usual, threads = torch.get_num_threads(), {}

    def timed(functions, budget, clock, before):
        for name in functions:
            before[name]()
            threads[name] = torch.get_num_threads()
        elements = {"beside 0": longer.elements, "beside 1": case.elements}
        return {name: [1e-9 * elements.get(name, case.elements)] * 5 for name in functions}

    monkeypatch.setattr(measure, "interleaved", timed)
    beside = [(longer, usual + 1, 0.5), (case, usual + 2, 0.5)]
    (row,) = measure.measure(case, ["seqconv"], 0.2, timing.Clock("cpu"), 1e9, beside)
    assert row["beside"] == pytest.approx((1, 1, 1))  # a ratio of times per call would be 1/4
    own = {"beside 0": usual + 1, "beside 1": usual + 2}
    assert threads == {"torch.fft": usual, "seqconv": usual} | own
    assert torch.get_num_threads() == usual


@pytest.mark.parametrize("mode", ["causal", "two_sided", "gated", "heads"])
@pytest.mark.parametrize("layout", ["bhl", "blh"])
def test_every_contender_is_right_where_it_competes(mode, layout):
    if mode == "heads" and layout == "blh":
        pytest.skip("not measured")
    case = Case(mode, layout=layout, channels=3, length=200, op="forward+backward")
    forward = Case(mode, layout=layout, channels=3, length=200)
    for op in (case, forward):
        tensors, dy = op.tensors("cpu")
        exact = measure.oracle(op, tensors, dy)
        for name in (
            "seqconv",
            "torch.fft",
            "conv1d",
            "scipy.fft",
            "oaconvolve",
            "ducc0",
            "pyfftw",
        ):
            if name in contenders.missing():
                continue
            function = contenders.make(name, op, "cpu")
            if function is not None:
                results = measure.call(op, function, tensors, dy)
                assert measure.errors(op, results, exact)[0] < 1e-6, name


def test_every_case_is_compiled_anew(monkeypatch):
    """However many came before: else dynamo would run the plain function, under the compiled one's name."""
    modes = []

    def traced(*tensors):
        modes.append(torch.compiler.is_compiling())
        return fft(*tensors)

    fft = contenders.fft
    monkeypatch.setattr(contenders, "fft", traced)
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile(f, backend="eager", **options)
    )
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (16, 32, 48, 64):
            case = Case(length=length)
            contenders.make("torch.compile", case, "cpu")(case.tensors("cpu")[0])
    torch._dynamo.reset()
    assert modes == [True] * 4


def test_rounds_are_interleaved():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = timing.interleaved(functions, 0.0, timing.Clock("cpu"))
    rounds = timing.WARM_UP + timing.MIN_ROUNDS
    assert calls == ["a", "b"] * rounds
    assert all(len(s) == timing.MIN_ROUNDS for s in seconds.values())
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0]) == (1.5, 2.5, 3.5)
    assert timing.ratios([2.0, 4.0, 9.0], [1.0, 1.0, 3.0])[1] == 3.0


def test_peak_memory_counts_temporaries():
    size = 64 << 20
    code = (
        "import torch; from bench.micro.timing import peak_bytes\n"
        f"print(peak_bytes(lambda: torch.ones({size}, dtype=torch.uint8), 'cpu'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", **ALLOCATORS["returning"]},
        check=True,
    )
    if result.stdout.strip() != "None":
        assert 0.95 * size < int(result.stdout) < 1.2 * size


def test_bytes_and_flops():
    case = Case(batch=8, channels=2, length=1024)
    assert case.bytes() == 4 * (2 * 8 * 2 * 1024 + 2 * 1024)
    assert case.flops() == 16 * (2 * 5 * 1024 * 10 + 8 * 1024) + 2 * 5 * 1024 * 10


def test_results_survive_a_torn_line(tmp_path):
    path = tmp_path / "r.jsonl"
    files.append(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2, "b"')
    assert files.read([path]) == [{"a": 1}]
    files.append(path, {"a": 3})
    assert files.read([path]) == [{"a": 1}, {"a": 3}]


def test_readme_section_is_replaced_whole(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- bench -->\nold\n<!-- end of bench -->\nafter\n")
    files.replace_between(path, "bench", "new")
    assert path.read_text() == "before\n<!-- bench -->\nnew\n<!-- end of bench -->\nafter\n"
    with pytest.raises(ValueError, match="must hold one"):
        files.replace_between(path, "other", "new")


def test_a_missed_requirement_says_what_the_floors_allow():
    base = {
        "tag": "speed",
        "allocator": "tuned",
        "threads": 1,
        "gate": True,
        "peak_bytes": None,
    } | asdict(Case())
    base |= {"batch": 8, "channels": 128, "length": 4096, "floor_copy": 1.0, "floor_flops": 3.0}
    rows = [base | {"contender": "torch.fft", "median": 24.0, "ratio": 1.0}]
    for ratio, measured, met in ((4.0, "4x, floors 6x", False), (5.5, "5.5x", True)):
        lines = requirements(
            [*rows, base | {"contender": "seqconv", "median": 24 / ratio, "ratio": ratio}]
        )
        assert ("tuned, forward, B=8, L=4K, 1 thread", ">= 5x", measured, met) in lines


def test_what_python_takes_is_measured_by_parts(monkeypatch, capsys):
    """On the road of a GPU's tensors, whose launches do nothing; the CPU's kernels are back afterwards."""
    monkeypatch.setattr(sys, "argv", ["overhead", "--budget", "0", "--dtype", "bfloat16"])
    usual, threads = backends._asked, torch.get_num_threads()
    try:
        overhead.main()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()[2:]
    cells = {line.split(" | ")[0].strip("| "): line.strip("|").split(" | ")[1:] for line in lines}
    assert all(0 < float(least) <= float(middle) for middle, least in cells.values())
    assert float(cells["of it: backend"][1]) < float(cells["forward"][1])
    assert backends._asked is usual

    monkeypatch.setattr(overhead.Bare, "fftconv", lambda *_: None)
    monkeypatch.setattr(overhead.Bare, "fftconv_gradients", lambda *_: None)
    with pytest.raises(AssertionError, match="another road"):
        overhead.measure(torch.float32, 0)
