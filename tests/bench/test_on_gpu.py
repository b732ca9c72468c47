"""The command for a machine with a GPU, run without one: every step in the emulator, and what goes wrong on purpose."""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from emulated import build

from bench.facts import ROOT
from bench.on_gpu import (
    ceilings,
    limits,
    runner,
    steps,
)
from bench.on_gpu.log import Log, rows_of
from bench.on_gpu.steps import RIGHT, WRONG, Step
from seqconv.backends.cuda import driver

ABSENT = ("rich", "matplotlib", "scipy", "hypothesis", "lightning", "pykeops")  # on such a machine


@pytest.fixture(scope="session")
def emulator():
    """Built before any step looks at its limit."""
    build()


def on_gpu(*arguments, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.on_gpu", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 900, "cwd": ROOT}
    return subprocess.run(command, **options, env=os.environ | environment)


@pytest.fixture
def bare(tmp_path):
    """A PYTHONPATH on which every package is broken that such a machine may lack."""
    folder = tmp_path / "bare"
    for name in ABSENT:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise ImportError('{name} is not there')\n")
    return str(folder)


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_the_whole_of_it_runs_dry(emulator, bare, tmp_path):
    out = tmp_path / "out"
    for part, (wanted, _) in steps.PARTS.items():
        result = on_gpu(part, "--dry", "--all", "--out", out, PYTHONPATH=bare)
        assert result.returncode == 0, result.stdout + result.stderr
        status = {r["step"]: r["status"] for r in rows_of(out) if r["kind"] == "step"}
        assert {status[step.name] for step in wanted} == {"passed"}, status
        assert "all right" in result.stdout.splitlines()[-1]
        assert (out / "log.txt").read_text().endswith(result.stdout[-300:])
    rows = rows_of(out)
    timed = [r for r in rows if r["kind"] == "time"]
    assert all(r["gate"] and 0 < r["q1"] <= r["median"] <= r["q3"] for r in timed)
    assert {"torch.fft", "seqconv"} == {r["contender"] for r in timed}
    assert all(r["predicted"] > 0 and r["clock"] for r in timed if r["contender"] == "seqconv")
    assert {r["name"] for r in rows if r["kind"] == "ceiling"} >= {"copy", "launch", "clock"}
    again = on_gpu("prove", "--dry", "--out", out)
    assert again.returncode == 0 and again.stdout.count("skipped, it passed before") == 6

    readme = tmp_path / "README.md"
    readme.write_text("<!-- gpu bench -->\nnothing has run\n<!-- end of gpu bench -->\n")
    refused = on_gpu("report", out, "--readme", "--to", readme)
    assert refused.returncode == 1 and "DRY RUN" in refused.stdout
    assert "nothing has run" in readme.read_text()
    assert "a dry run's times are no GPU's" in refused.stdout


BROKEN = """
import torch
from emulated import Emulator, build
from seqconv.backends.cuda.arguments import CONVOLUTION

class Broken(Emulator):
    def launch(self, kernel, grid, threads, shared, arguments):
        {fault}
        super().launch(kernel, grid, threads, shared, arguments)

def device():
    return Broken(build())
"""
FAULTS = {  # what a device of BROKEN does -> a kind of call that is wrong then
    "drop the skip": "if kernel == 'spectrum': arguments[CONVOLUTION.places['skip']] = 0",
    "write nothing": "if 'forward' in kernel: return",
}


@pytest.mark.one_of(2)
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_result_is_red_and_gets_no_time(emulator, tmp_path, fault):
    (tmp_path / "broken.py").write_text(BROKEN.format(fault=FAULTS[fault]))
    out = tmp_path / "out"
    asked = ["prove", "--dry", "broken:device", "--only", "smoke", "times-4k", "--out", out]
    result = on_gpu(*asked, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "smoke wrong, times-4k wrong" in result.stdout.splitlines()[-1]
    rows = rows_of(out)
    smoke = {r["case"]: r["right"] for r in rows if r["kind"] == "smoke"}
    assert not any(right for case, right in smoke.items() if case.startswith("causal"))
    timed = [r for r in rows if r["kind"] == "time" and r["skip"]]
    assert timed and not any(r["gate"] or r["median"] for r in timed)
    assert "WRONG" in result.stdout


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_a_wrong_stream_is_red(emulator, tmp_path):
    fault = "if kernel.startswith('stream_tile'): return"
    (tmp_path / "broken.py").write_text(BROKEN.format(fault=fault))
    asked = ["prove", "--dry", "broken:device", "--only", "streams", "--out", tmp_path / "out"]
    result = on_gpu(*asked, PYTHONPATH=str(tmp_path))
    assert result.returncode == 1 and result.stdout.count("WRONG 3x2x37") == 2


@pytest.fixture
def small_steps(tmp_path, monkeypatch):
    """run(bodies) -> (exit status, status by step) of steps of our own, each a line of Python."""

    def run(bodies: dict[str, str], seconds: float = 60.0, **more):
        monkeypatch.setattr(runner, "SLACK", 1.0)
        made = tuple(Step(name, 6.0, "", "of a test") for name in bodies)
        monkeypatch.setitem(steps.PARTS, "prove", (made, seconds))
        usual = runner.follow

        def follow(command, limit, write, env):
            code = bodies[command[command.index("step") + 1]]
            return usual([sys.executable, "-c", code], limit, write, env)

        monkeypatch.setattr(runner, "follow", follow)
        options = {"only": [], "everything": False, "again": False, "dry": "x:y"} | more
        code = runner.run("prove", tmp_path, **options)
        monkeypatch.setattr(runner, "follow", usual)
        rows = [r for r in rows_of(tmp_path) if r["kind"] == "step"]
        return code, {r["step"]: r["status"] for r in rows}

    return run


HANG = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
CRASH = "import os; print('begun', flush=True); os.abort()"


def test_what_hangs_is_cut_and_what_crashes_is_told_and_the_next_runs(small_steps, tmp_path):
    start = time.monotonic()
    bodies = {"hangs": HANG, "crashes": CRASH, "lacks": "exit(4)", "partly": "exit(5)"}
    code, status = small_steps(bodies | {"right": "print('reached')"})
    assert time.monotonic() - start < 40
    wanted = {"hangs": "cut", "crashes": "crashed", "lacks": "absent", "partly": "partly"}
    assert code == 1 and status == wanted | {"right": "passed"}
    text = (tmp_path / "log.txt").read_text()
    assert text.count("begun") == 2 and "reached" in text and "cut at its limit" in text
    assert "exit status -6" in text


def test_what_passed_is_not_run_again_unless_asked_for(small_steps):
    assert small_steps({"a": "exit(3)", "b": "pass"}) == (1, {"a": "wrong", "b": "passed"})
    assert small_steps({"a": "pass", "b": "exit(3)"}) == (0, {"a": "passed", "b": "passed"})
    assert small_steps({"a": "pass", "b": "exit(3)"}, only=["b"])[1]["b"] == "wrong"
    assert small_steps({"a": "exit(3)", "b": "pass"}) == (0, {"a": "passed", "b": "passed"})
    again = small_steps({"a": "1 / 0", "b": "pass"}, again=True)
    assert again == (1, {"a": "crashed", "b": "passed"})


def test_time_for_all_steps_is_kept(small_steps):
    code, status = small_steps({"slow": "import time; time.sleep(3)", "late": "pass"}, seconds=7.0)
    assert code == 1 and status == {"slow": "passed", "late": "not reached"}


def test_a_vital_step_that_fails_stops_the_rest(small_steps, monkeypatch):
    monkeypatch.setattr(
        runner, "chosen", lambda *_: [Step("v", 9, "", "", vital=True), Step("w", 9, "", "")]
    )
    code, status = small_steps({"v": "exit(3)", "w": "pass"})
    assert code == 3 and status == {"v": "wrong"}


def test_a_dry_run_and_one_on_a_gpu_do_not_share_a_folder(small_steps):
    assert small_steps({"a": "pass"})[0] == 0
    assert small_steps({"a": "pass"}, dry=None)[0] == 2


def test_no_gpu_is_said_at_once(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = on_gpu("prove", "--out", tmp_path)
    assert result.returncode == 3 and "torch sees no CUDA device" in result.stdout
    assert "smoke" not in result.stdout.replace("bench", "")


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_in_the_middle_leaves_what_was_said(emulator, tmp_path, which):
    command = [sys.executable, "-m", "bench.on_gpu", "prove", "--dry", "--only", "smoke"]
    options = {"cwd": ROOT, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "--out", str(tmp_path)], **options)
    end = time.monotonic() + 120
    while not any(r["kind"] == "smoke" for r in rows_of(tmp_path)):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(which)
    process.wait(20)
    time.sleep(0.5)
    count = len(rows_of(tmp_path))
    assert "ok " in (tmp_path / "log.txt").read_text()
    time.sleep(1.0)
    assert len(rows_of(tmp_path)) == count  # the step has ended as well


HANGING = """
import ctypes, os
def test_one(): pass
def test_hangs(): ctypes.CDLL(None).sleep(60)
def test_fails(): assert False
def test_spoils(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_crashes(): os.abort()
def test_last(): pass
"""


def test_a_test_that_hangs_or_spoils_its_process_costs_itself_only(tmp_path, monkeypatch, capfd):
    from bench.on_gpu import suite

    (tmp_path / "test_of_gpu.py").write_text(HANGING)
    monkeypatch.setattr(suite, "EACH", 2.0)
    monkeypatch.setattr(suite, "files", lambda dry: ([str(tmp_path / "test_of_gpu.py")], "test"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    log = Log(tmp_path / "out", "tests")
    assert suite.run(SimpleNamespace(dry=False), log, False) == WRONG
    outcomes = {r["name"].split("::")[1]: r["outcome"] for r in log.rows("test")}
    assert outcomes == {
        "test_one": "passed",
        "test_fails": "failed",
        "test_spoils": "failed",
        "test_last": "passed",
    }
    text = capfd.readouterr().out
    assert re.search("cut or crashed: .*::test_hangs", text)
    assert re.search("cut or crashed: .*::test_crashes", text)
    assert "2 of 6 tests right" in text
    log = Log(tmp_path / "short", "tests", seconds=suite.SPARE - 1)
    assert suite.run(SimpleNamespace(dry=False), log, False) != RIGHT


def test_what_is_carried(tmp_path, monkeypatch, capsys):
    """But for the compiler, which test_cuda_compile tests."""
    from bench.on_gpu import pack

    asked = []
    made = {name: f"code of {name}".encode() for name in ceilings.MMA}
    monkeypatch.setattr(
        pack.prebuild,
        "main",
        lambda a: asked.append(a) or (tmp_path / "o/cubins").mkdir(parents=True),
    )
    monkeypatch.setattr(driver, "compile_kernel", lambda name, arch, cached: made[name])
    monkeypatch.setattr(pack.simulated, "make", lambda arch, path: f"{arch} {path.name}")
    assert pack.pack("sm_90", tmp_path / "o") == 0
    assert asked == [["--arch", "sm_90", "--out", str(tmp_path / "o" / "cubins")]]
    monkeypatch.setenv("SEQCONV_CUBINS", str(tmp_path / "o" / "cubins"))
    assert all(driver.find_prebuilt(name, 9, 0) == code for name, code in made.items())
    assert (tmp_path / "o" / "packages" / "einops" / "__init__.py").is_file()
    text = capsys.readouterr().out
    assert "sm_90 simulated.json" in text
    assert "seqconv/_C.abi3.so" in text and "bench.on_gpu prove --out" in text
    monkeypatch.setattr(pack.cpu, "missing", "is not built")
    assert pack.pack("sm_90", tmp_path / "o") == 1


def test_every_telling_test_exists():
    text = (ROOT / "tests" / "cuda" / "gpu" / "test_gpu.py").read_text()
    from bench.on_gpu import suite

    assert all(f"def {name}(" in text for name in (*limits.TELLING, suite.LEFT_OUT))
