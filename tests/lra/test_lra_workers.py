"""Processes that make data: their results in order, their errors, and that none is left behind."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.lra import data
from bench.lra.data import DataError
from bench.lra.data.workers import in_order

ROOT = Path(__file__).parents[2]


def late(i: int) -> int:
    """The first tasks take longest, so that the answers come in another order."""
    time.sleep(0.05 * (4 - i % 4))
    return i


def fails(i: int) -> bytes:
    if i == 3:
        raise ZeroDivisionError("three")
    if i == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes(1 << 20)  # more than a pipe holds


def test_results_come_in_order_and_errors_come_through():
    before = set(multiprocessing.active_children())  # of other tests
    assert list(in_order(late, [(i,) for i in range(11)], 3)) == list(range(11))
    assert list(in_order(late, [], 2)) == []
    endless = in_order(late, ((i,) for i in itertools.count()), 2)
    assert list(itertools.islice(endless, 5)) == list(range(5))
    endless.close()
    with pytest.raises(ZeroDivisionError, match="three"):
        list(in_order(fails, [(i,) for i in range(5)], 2))
    with pytest.raises(DataError, match="a process that makes data was ended"):
        list(in_order(fails, [(i,) for i in range(4, 9)], 2))
    assert set(multiprocessing.active_children()) <= before


def heeds() -> None:
    """Makes a new process heed Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def of_session(session: int) -> list[int]:
    """Processes of a session that are not zombies."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if path.name.isdigit() and int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.name))
    return found


@pytest.mark.one_of(2)
@pytest.mark.slow
@pytest.mark.parametrize("task", ["pathfinder32-easy", "listops-gen"])
@pytest.mark.parametrize("way", ["Ctrl-C", "Ctrl-C twice", "alone", "SIGTERM", "SIGKILL", "early"])
def test_no_process_is_left_however_making_ends(tmp_path, task, way):
    command = [sys.executable, "-m", "bench.lra", "data", "make", task, "--root", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pipes |= {"start_new_session": True, "preexec_fn": heeds}
    process = subprocess.Popen([*command, "--workers", "3"], cwd=ROOT, **pipes)
    deadline = time.monotonic() + 60
    while (
        len(of_session(process.pid)) < 5 and time.monotonic() < deadline
    ):  # and the resource tracker
        time.sleep(0.01)
    if way != "early":  # while they still import, or at work
        time.sleep(3)
    if way.startswith("Ctrl-C") or way == "early":
        os.killpg(process.pid, signal.SIGINT)
        if way == "Ctrl-C twice":
            time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
    else:
        names = {"alone": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}
        process.send_signal(names[way])
    output = process.communicate(timeout=30)[0].decode()  # the workers hold the pipe, too
    if way in ("Ctrl-C", "alone", "early"):
        assert process.returncode == 130 and "Traceback" not in output, output
        assert "python -m bench.lra data: stopped" in output
    deadline = time.monotonic() + 10
    while of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not of_session(process.pid)


IN_A_FRESH_PROCESS = """
import os, signal, threading, time
from bench.lra.data import workers

def blocked(i):
    time.sleep(0.2)  # so that every worker has some of the tasks
    return os.getpid(), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

def stubborn(i):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600 * i)
    return os.getpid()
"""


def in_a_fresh_process(code: str, tmp_path) -> str:
    """What a script prints whose functions its workers can import."""
    path = tmp_path / "script.py"
    body = "".join(f"    {line}\n" for line in code.splitlines())
    path.write_text(f"{IN_A_FRESH_PROCESS}\nif __name__ == '__main__':\n{body}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=heeds,  # A shell's background jobs ignore SIGINT, and so would their children.
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ctrl_c_is_held_back_while_workers_start(tmp_path):
    """Else it may come between a worker's start and the note of it. The workers inherit what holds it back."""
    code = "found = dict(workers.in_order(blocked, [(i,) for i in range(6)], 3))\n"
    code += "print(len(found), all(found.values()), signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    assert in_a_fresh_process(code, tmp_path) == "3 True set()\n"


def test_ctrl_c_while_workers_are_ended_leaves_none(tmp_path):
    code = """
workers.PATIENCE = 1.0
results = workers.in_order(stubborn, [(i,) for i in range(2)], 1)
number = next(results)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    results.close()
    print("Ctrl-C came too late")
except KeyboardInterrupt:
    print(os.path.exists(f"/proc/{number}"))
"""
    assert in_a_fresh_process(code, tmp_path) == "False\n"


def test_what_cannot_be_made_is_named(tmp_path):
    (tmp_path / "generated").write_text("no folder")
    with pytest.raises(DataError, match=r"listops-short cannot be written: .*the same command"):
        data.make("listops-short", tmp_path, n=60, workers=1, progress=False)
    with pytest.raises(DataError, match="workers must be at least 1, got 0"):
        data.make("listops-short", tmp_path, n=60, workers=0)
    with pytest.raises(DataError, match="seed must be >= 0, got -1"):
        data.make("pathfinder32-easy", tmp_path, n=60, seed=-1)


@pytest.mark.slow
def test_a_killed_parent_takes_its_workers_along_in_the_midst_of_a_task():
    code = "import time; from bench.lra.data.workers import in_order\n"
    code += "for _ in in_order(time.sleep, [(0,), (600,), (600,)], 2): print(flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    assert len(of_session(process.pid)) >= 3
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not of_session(process.pid)
