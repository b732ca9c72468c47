"""The command for a machine with a GPU, run without one: every step in the emulator, and what goes wrong on purpose."""

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from emulated import Emulator, build

from bench import timing
from bench.contenders import Case
from bench.on_gpu import ceilings, constants, facts, limits, machine, profile, report, runner, steps
from bench.on_gpu.log import Log, rows_of
from bench.on_gpu.steps import RIGHT, WRONG, Step
from bench.records import ROOT
from seqconv import _ops, fftconv
from seqconv._cuda import driver, kernels
from seqconv._cuda.plan import H100

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
    assert again.returncode == 0 and again.stdout.count("skipped, it passed before") == 5

    readme = tmp_path / "README.md"
    readme.write_text("<!-- gpu bench -->\nnothing has run\n<!-- end of gpu bench -->\n")
    refused = on_gpu("report", out, "--readme", "--to", readme)
    assert refused.returncode == 1 and "DRY RUN" in refused.stdout
    assert "nothing has run" in readme.read_text()
    assert "a dry run's times are no GPU's" in refused.stdout


BROKEN = """
import torch
from emulated import Emulator, build
from seqconv._cuda.arguments import _PLACES

class Broken(Emulator):
    def launch(self, kernel, grid, threads, shared, arguments):
        {fault}
        super().launch(kernel, grid, threads, shared, arguments)

def device():
    return Broken(build())
"""
FAULTS = {  # what a device of BROKEN does -> a kind of call that is wrong then
    "drop the skip": "if kernel == 'spectrum': arguments[_PLACES['skip']] = 0",
    "write nothing": "if 'forward' in kernel: return",
}


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
    assert small_steps({"a": "exit(1)", "b": "pass"}) == (1, {"a": "wrong", "b": "passed"})
    assert small_steps({"a": "pass", "b": "exit(1)"}) == (0, {"a": "passed", "b": "passed"})
    assert small_steps({"a": "pass", "b": "exit(1)"}, only=["b"])[1]["b"] == "wrong"
    assert small_steps({"a": "exit(1)", "b": "pass"}, again=True)[0] == 1


def test_time_for_all_steps_is_kept(small_steps):
    code, status = small_steps({"slow": "import time; time.sleep(3)", "late": "pass"}, seconds=7.0)
    assert code == 1 and status == {"slow": "passed", "late": "not reached"}


def test_a_vital_step_that_fails_stops_the_rest(small_steps, monkeypatch):
    monkeypatch.setattr(
        runner, "chosen", lambda *_: [Step("v", 9, "", "", vital=True), Step("w", 9, "", "")]
    )
    code, status = small_steps({"v": "exit(1)", "w": "pass"})
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
    assert pack.pack("sm_90", tmp_path / "o") == 0
    assert asked == [["--arch", "sm_90", "--out", str(tmp_path / "o" / "cubins")]]
    monkeypatch.setenv("SEQCONV_CUBINS", str(tmp_path / "o" / "cubins"))
    assert all(driver.find_prebuilt(name, 9, 0) == code for name, code in made.items())
    assert (tmp_path / "o" / "packages" / "einops" / "__init__.py").is_file()
    text = capsys.readouterr().out
    assert "seqconv/_C.abi3.so" in text and "bench.on_gpu prove --out" in text
    monkeypatch.setattr(pack._cpu, "missing", "is not built")
    assert pack.pack("sm_90", tmp_path / "o") == 1


def test_every_telling_test_exists():
    text = (ROOT / "tests" / "gpu" / "test_gpu.py").read_text()
    from bench.on_gpu import suite

    assert all(f"def {name}(" in text for name in (*limits.TELLING, suite.LEFT_OUT))


# ---- the few lines that only a GPU would run, on a torch.cuda and a driver of our own ----


class Event:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self): ...

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Graph:
    """Records what is called while it captures; a replay takes 1 ms."""

    capturing, calls = False, 0

    def replay(self):
        Event.now += 1e-3
        Graph.calls += 1


@pytest.fixture
def fake(monkeypatch):
    @contextlib.contextmanager
    def capture(graph):
        Graph.capturing = True
        yield
        Graph.capturing = False

    stream = SimpleNamespace(wait_stream=lambda other: None)
    known = {
        "name": "Fake",
        "major": 9,
        "minor": 0,
        "total_memory": 1,
        "multi_processor_count": 132,
    }
    cuda = SimpleNamespace(
        current_device=lambda: 0,
        get_device_properties=lambda index: SimpleNamespace(**known),
        synchronize=lambda: None,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda stream: contextlib.nullcontext(),
        CUDAGraph=Graph,
        graph=capture,
        Event=Event,
        _sleep=lambda cycles: None,
        empty_cache=lambda: None,
        is_available=lambda: True,
        profiler=SimpleNamespace(profile=contextlib.nullcontext),
    )
    on_cpu = {name: getattr(torch, name) for name in ("empty", "zeros")}
    for name, function in on_cpu.items():
        monkeypatch.setattr(torch, name, lambda *a, f=function, device=None, **k: f(*a, **k))
    monkeypatch.setattr(timing, "FLUSH_BYTES", 16)
    monkeypatch.setattr(torch, "cuda", cuda)
    Event.now = 0.0

    class Device:
        limits = H100

        def launch(self, kernel, grid, threads, shared, arguments):
            assert kernel in kernels.GUESTS and shared == 0
            import ctypes

            times = (ctypes.c_longlong * (4 * grid * threads // 32)).from_address(arguments[0])
            for i in range(0, len(times), 4):
                cycles = arguments[1] * 8 * threads // 128 * 2  # one every two cycles, at 2 GHz
                times[i : i + 4] = [100, 100 + cycles, 50, 50 + cycles // 2]

    monkeypatch.setattr(driver, "device", lambda index: Device())
    monkeypatch.setattr(driver, "reason", lambda index: None)
    return cuda


def test_the_real_machine(fake):
    real = machine.connect(None)
    assert not real.dry and real.reason() is None and real.limits is H100
    assert real.facts()["arch"] == "sm_90" and real.facts()["processors"] == 132
    called = []

    def call():
        called.append(Graph.capturing)
        Event.now += 2e-3

    timer = real.timer(call, replay=True)
    assert called == [False, False, True] and timer.clock == real.replayed
    assert timer() == pytest.approx(1e-3)
    # A call of 1 ms is timed by events, though graphs could: they see the 2 ms that this one takes.
    timer = real.timer(call)
    assert timer.clock == real.between_events and timer() == pytest.approx(2e-3)
    real.synchronize(), real.release()
    with real.profiled():
        pass
    cycles, hertz = ceilings.interval(real, "mma_f16", 4)
    assert cycles == pytest.approx(2.0) and hertz == pytest.approx(2e9)


def test_what_no_graph_can_hold_is_timed_by_events(fake, monkeypatch):
    def fails(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    fake.graph = fails
    real = machine.Cuda()
    timer = real.timer(lambda: setattr(Event, "now", Event.now + 1e-3))
    assert "no graph: operation not permitted" in timer.clock and timer() == pytest.approx(1e-3)
    with pytest.raises(RuntimeError, match="capturing"):
        real.timer(lambda: None, replay=True)


def test_short_calls_are_timed_by_replays(fake, monkeypatch):
    monkeypatch.setattr(machine, "SHORT", 2e-3)
    assert machine.Cuda().timer(lambda: None).clock == machine.Cuda.replayed


# ---- what is read and written ----


def test_counters_are_read_as_ncu_prints_them():
    text = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","smsp__inst_executed.sum"
"","","ns","inst"
"0","spectrum","9,120","12,345,678"
"1","tensor_forward_bf16_fast_4096","760000.5","452788224"
==PROF== Disconnected"""
    spectrum, forward = profile.parse_counters(text)
    assert spectrum["smsp__inst_executed.sum"] == 12345678
    assert forward["Kernel Name"] == "tensor_forward_bf16_fast_4096"
    assert forward["gpu__time_duration.sum"] == 760000.5
    assert profile.parse_counters("==ERROR== no permission") == []


def test_summaries_of_the_sanitizer():
    assert profile.parse_check("========= ERROR SUMMARY: 0 errors\n") == 0
    assert profile.parse_check("========= ERROR SUMMARY: 12 errors\n") == 12
    hazard = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"
    assert profile.parse_check(hazard) == 3
    assert profile.parse_check("========= Error: Device not supported") is None


def test_tools_that_are_not_there_are_said_to_be_absent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    log = Log(tmp_path, "x")
    assert profile.counters(None, log) == profile.sanitizer(None, log) == steps.ABSENT
    assert facts.smi() == {} and "not on the PATH" in capsys.readouterr().out


def times(length: int, milliseconds: float, **more) -> dict:
    case = Case(dtype="bfloat16", batch=64, channels=768, length=length)
    row = {"kind": "time", "step": "times-4k", "contender": "seqconv", "skip": True, "gate": True}
    row |= asdict(case) | {"median": milliseconds / 1e3, "floor_copy": 0.25e-3, "target": 1.25}
    row |= {
        "predicted": 0.5e-3,
        "moved": 0.8e9,
        "work": 450e6,
        "clock": "graph replays",
        "ratio": 9.0,
    }
    return row | {"error_l2": 1e-3} | more


def folder_of_a_run(path, *rows):
    run = {
        "kind": "run",
        "step": "run",
        "dry": False,
        "when": "now",
        "commit": "abc",
        "part": "prove",
    }
    limits = {"bandwidth": 3.35e12, "clock": 1.755e9, "processors": 132}
    facts = {"kind": "facts", "step": "versions", "name": "Test GPU", "versions": {"torch": "2.11"}}
    seen = [("copy", 3.0e12), ("clock", 1.755e9), ("launch", 6e-6), ("mma_f16, 4 warps", 4.1)]
    ceilings = [{"kind": "ceiling", "step": "ceilings", "name": n, "value": v} for n, v in seen]
    path.mkdir(exist_ok=True)
    rows = [run, facts | {"limits": limits}, *ceilings, *rows]
    (path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_report_compares_measured_predicted_and_wanted(tmp_path, capsys):
    counters = {"smsp__inst_executed.sum": 9e8, "gpu__time_duration.sum": 7e5}
    counted = [
        {"kind": "counters", "step": "counters", "case": "4K-forward"}
        | {"launched": [{"kernel": "a", "values": counters}]},
        {"kind": "model", "step": "counters", "case": "4K-forward", "work": 4.5e8, "moved": 8e8},
    ]
    folder = folder_of_a_run(tmp_path / "run", times(4096, 0.3), times(4096, 0.75), *counted)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- gpu bench -->\nold\n<!-- end of gpu bench -->\nafter\n")
    assert report.report(folder, readme) == 0
    text = capsys.readouterr().out
    assert "| 0.75 | 0.25 | 3.00 | 1.25 | 0.5 | 9.00 |" in text  # the newer row alone
    assert "0.3 |" not in text
    assert "| bandwidth | 3.35 TB/s | 3 TB/s | 0.90 |" in text
    assert "| LAUNCH | 3 us | 6 us | 2.00 |" in text
    assert "| warp instructions, 4K-forward | 450 M | 900 M | 2.00 |" in text
    assert "share of issue slots used, causal, forward, L=4096 | 1.00 | 0.65 | 1.54 |" in text
    assert "<= 1.25x | 3x | not met" in text
    written = readme.read_text()
    assert written.startswith("before\n<!-- gpu bench -->\n| bfloat16, 64 samples | 1K | 4K |")
    assert "| forward, ms | - | 0.75 |" in written and "Test GPU, torch 2.11, commit abc" in written
    assert written.endswith("<!-- end of gpu bench -->\nafter\n") and "old" not in written


@pytest.mark.parametrize("wrong", [{"gate": False, "median": None}, None])
def test_wrong_or_no_results_leave_the_readme_alone(tmp_path, wrong, capsys):
    folder = folder_of_a_run(tmp_path / "run", *([times(4096, 1.0, **wrong)] if wrong else []))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- gpu bench -->\nold\n<!-- end of gpu bench -->\n")
    assert report.report(folder, readme) == 1 and "old" in readme.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="no row of kind 'run'"):
        report.report(tmp_path, None)


def test_nothing_is_compared_that_was_not_measured():
    assert constants.table([], []) == []
    assert constants.of_call([{}]) == {}


def test_the_kernels_of_the_ceilings_compile_and_are_found_prebuilt(tmp_path, monkeypatch):
    if driver.packages_reason():
        pytest.skip(driver.packages_reason())
    monkeypatch.setenv("SEQCONV_CUBINS", str(tmp_path))
    for name in ceilings.MMA:
        assert driver.find_prebuilt(name, 9, 0) is None
        code = driver.compile_kernel(name, "sm_90", cached=False)
        assert code[:4] == b"\x7fELF" and name.encode() in code
        (tmp_path / kernels.cubin_name(name, "sm_90")).write_bytes(code)
        assert driver.find_prebuilt(name, 9, 0) == code


def test_the_emulator_stands_in(emulator, monkeypatch):
    monkeypatch.setattr(_ops, "_cpu", _ops._cpu)  # given back afterwards
    made = machine.connect("emulated:device")
    assert made.dry and isinstance(made.emulator, Emulator) and made.timer(lambda: None)() >= 0
    gc.collect()
    fftconv(torch.zeros(1, 1, 64), torch.zeros(1, 64))
    assert made.emulator.launches
