"""What the command for a machine with a GPU is made of: the machine, on a CUDA of our own; what it reads and writes."""

import contextlib
import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from emulated import Emulator

from bench.facts import commit
from bench.micro import contenders, timing
from bench.micro.contenders import Case
from bench.model import code as model_code
from bench.model import estimate as model_estimate
from bench.model import kernels as model_kernels
from bench.on_gpu import (
    benchmark,
    ceilings,
    compiled,
    facts,
    machine,
    profile,
    report,
    simulated,
    smoke,
    steps,
    targets,
)
from bench.on_gpu.log import Log
from bench.on_gpu.steps import ABSENT, RIGHT
from seqconv import fftconv, use_backend
from seqconv.backends.cuda import driver, kernels
from seqconv.backends.cuda.problem import H100

# ---- the few lines that only a GPU would run ----


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

    device = Device()
    monkeypatch.setattr(driver, "device", lambda index: device)
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
    launched = real.launched(lambda: [real.times_of_warps(k, 1, 128, 9) for k in ceilings.MMA])
    assert tuple(launched) == ceilings.MMA and "launch" not in vars(real.launcher)


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


# ---- what a GPU is asked, and what a dry run never meets ----


def test_what_a_gpu_is_asked():
    """The sizes of a GPU, which no dry run takes: first 768 channels of 4096 steps, and nothing that does not fit."""
    asked = [c for n in targets.LENGTHS for c, _ in benchmark.cases(n, dry=False)]
    asked += profile.COUNTED.values()
    for case in asked:
        assert case.batch == 64 and case.channels == (512 if case.length == 32768 else 768)
        found = targets.predicted(case, H100)
        assert 0 < found["predicted"] < 0.2 and found["moved"] > 0.5 * case.bytes()
    assert asked[5] == Case("causal", "bfloat16", batch=64, channels=768, length=4096)
    limit = [targets.limit_of(asdict(case)) for case in asked[5:10]]
    assert limit == [1.25, 1.4, None, 1.2, 1.6]
    smoked = list(smoke.cases(dry=False))
    kind, first, mode = smoked[0]
    assert (kind, first.length, first.dtype, mode) == ("causal", 4096, torch.bfloat16, "fast")
    assert len(smoked) == len(smoke.LENGTHS) * len(smoke.KINDS) * 5
    tried = {(k, c.length, c.dtype, m) for k, c, m in smoked}
    assert len(tried) == len(smoked) and max(c.length for _, c, _ in smoked) == 32768


def test_a_contender_that_fails_is_told_and_time_that_is_up_too(tmp_path, monkeypatch, capsys):
    def fails(*tensors):
        raise RuntimeError("CUDA out of memory")

    made = SimpleNamespace(dry=True, device="cpu", limits=H100, release=lambda: None)
    made.timer = lambda function, replay: machine.Timer("a clock", lambda: 1.0)
    made.launched = lambda function: ["spectrum", "a_forward"]
    known = {"a_forward": SIMULATED | {"rows": 4}}
    monkeypatch.setattr(simulated, "known", lambda: known)
    case = Case(dtype="bfloat16", batch=2, length=64)
    monkeypatch.setitem(contenders.CONTENDERS, "torch.fft", ("torch", lambda *_: fails))
    log = Log(tmp_path, "benchmark")
    todo = [(case, ["seqconv", "torch.fft", "nvsubquadratic"], True)] * 2
    assert benchmark.each(made, log, todo, 0.01, replay=False) == RIGHT
    text = capsys.readouterr().out
    assert "torch.fft: CUDA out of memory" in text and "1000.0000 ms" in text
    assert "simulated 0.1000, " in text  # of 2 rows, where 4 take 0.2 ms
    assert {r["contender"] for r in log.rows("time")} == {"seqconv"}
    late = Log(tmp_path, "benchmark", seconds=-1.0)
    assert benchmark.each(made, late, todo, 0.01, replay=False) == steps.PARTLY
    assert "not reached: B=2 H=1 L=64" in capsys.readouterr().out
    monkeypatch.setitem(contenders.CONTENDERS, "seqconv", ("seqconv", lambda *_: fails))
    with pytest.raises(RuntimeError, match="out of memory"):
        benchmark.each(made, log, todo, 0.01, replay=False)


# ---- what is read and written ----


def test_counters_are_read_as_ncu_prints_them():
    text = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","smsp__inst_executed.sum"
"","","ns","inst"
"0","spectrum","9,120","12,345,678"
"1","half_forward_bf16_4096","760000.5","452788224"
==PROF== Disconnected"""
    spectrum, forward = profile.parse_counters(text)
    assert spectrum["smsp__inst_executed.sum"] == 12345678
    assert forward["Kernel Name"] == "half_forward_bf16_4096"
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
    assert "| 0.75 | 0.25 | 3.00 | 1.25 | 0.5 |  | 9.00 |" in text  # the newer row alone
    assert "The simulation is wrong" not in text
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


# ---- simulated times ----

SIMULATED = {
    "points": 4096,
    "rows": 49152,
    "floor": 0.1e-3,
    "simulated": {"4": 0.2e-3, "6": 0.3e-3},
}


def test_simulated_times_are_those_of_the_kernels_for_rows(tmp_path):
    path = tmp_path / "simulated.json"
    assert simulated.known(path) == {}
    path.write_text(
        json.dumps([SIMULATED | {"kernel": name} for name in ("a_forward", "a_backward")])
    )
    of = simulated.known(path)
    launched = ["spectrum", "a_forward"]
    assert simulated.seconds(launched, 49152, None, of) == pytest.approx(0.2e-3)
    assert simulated.seconds(launched, 49152, 5.5, of) == pytest.approx(0.3e-3)
    assert simulated.seconds(launched, 49152 // 2, 4.9, of) == pytest.approx(0.1e-3)
    assert simulated.seconds([*launched, "a_backward"], 49152, 4.0, of) == pytest.approx(0.4e-3)
    assert simulated.seconds([*launched, "b_backward"], 49152, 4.0, of) is None
    assert simulated.seconds(["spectrum"], 49152, 4.0, of) is None


def test_the_report_names_what_the_simulation_gets_wrong(tmp_path, capsys):
    near, far = times(4096, 0.5, simulated=0.45e-3), times(8192, 0.9, simulated=0.6e-3)
    fast = times(1024, 0.1, simulated=0.125e-3)
    assert simulated.wrong([near, far, fast, times(2048, 1.0)]) == [far, fast]
    assert report.report(folder_of_a_run(tmp_path / "run", near, far, fast), None) == 0
    text = capsys.readouterr().out
    assert "| 0.5 | 0.45 | 9.00 |" in text and "| 0.5 | 0.6 | 9.00 |" in text
    assert text.count("The simulation is wrong by more than 15 %") == 2
    assert re.search("wrong by more than 15 %: .*8192.*: 1.50 times as long", text)


def test_simulated_times_are_made_where_they_can_be(tmp_path, monkeypatch):
    path = tmp_path / "simulated.json"
    assert "the model knows sm_90 only" in simulated.make("sm_80", path)
    monkeypatch.setattr(model_code, "disassembler_reason", lambda: "pip install it")
    assert "pip install it" in simulated.make("sm_90", path) and not path.exists()
    monkeypatch.setattr(model_code, "disassembler_reason", lambda: None)
    monkeypatch.setattr(model_kernels, "describe", lambda name: name == "taps_divisors")
    monkeypatch.setattr(model_estimate, "count", lambda name, arch: name)
    monkeypatch.setattr(model_estimate, "estimate", lambda name: SIMULATED | {"kernel": name})
    assert "simulated for 1 kernels" in simulated.make("sm_90", path)
    assert simulated.known(path) == {"taps_divisors": SIMULATED | {"kernel": "taps_divisors"}}


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
    assert report.constants([], []) == []
    assert report.of_call([{}]) == {}


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


def test_the_emulator_stands_in():
    with use_backend("auto"):  # what it was before comes back afterwards
        made = machine.connect("emulated:device")
        fftconv(torch.zeros(1, 1, 64), torch.zeros(1, 64))
    assert made.dry and isinstance(made.emulator, Emulator) and made.timer(lambda: None)() >= 0
    assert made.emulator.launches


def test_a_machine_without_git(monkeypatch, tmp_path):
    """A bare machine has none, and the tree that was carried there no history."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"


def test_torch_compile_without_a_c_compiler(monkeypatch, tmp_path):
    """Triton cannot start a kernel there: the step says so, and is no crash."""
    log, said = Log(tmp_path, "compile"), []
    monkeypatch.setattr(log, "say", said.append)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert compiled.run(SimpleNamespace(dry=False), log) == ABSENT
    assert "no C compiler" in said[0]


def test_a_timed_call_waits_for_no_backward(monkeypatch):
    """Each has a mark of its own: torch replays no graph while a backward may still come."""
    marks = []
    mark = lambda: marks.append(len(marks))  # noqa: E731
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", mark)
    for _ in range(3):
        compiled.timed(lambda u, k: u * k, torch.ones(2), torch.ones(2))
    assert marks == [0, 1, 2]


def test_a_replay_must_give_what_the_call_gave():
    """Also where it writes nothing, or only a part."""
    called, recorded = [torch.randn(4, 5), None], [torch.empty(4, 5), None]
    machine.check_replay(lambda: recorded[0].copy_(called[0]), recorded, called)
    for wrong in (lambda: None, lambda: recorded[0][:2].copy_(called[0][:2])):
        with pytest.raises(machine.WrongReplay, match="result 0"):
            machine.check_replay(wrong, recorded, called)
