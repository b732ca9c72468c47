"""The GPU's tests, each with a time limit. A test that hangs or spoils its process does not affect the others."""

import os
import subprocess
import sys
import time

from bench.facts import ROOT
from bench.on_gpu.limits import SPOILT, TELLING, TIME_IS_UP
from bench.on_gpu.steps import PARTLY, RIGHT, WRONG

LEFT_OUT = "test_compute_sanitizer"  # is a step of its own
# Seconds for a test. torch.compile, which only EACH_OF_ALL includes, takes longest.
EACH, EACH_OF_ALL = 20.0, 60.0
RESTARTS = 6
SPARE = 3.0  # seconds for the last lines


def files(dry: bool) -> tuple[list[str], str]:
    """Returns what pytest collects, and an expression for the most informative tests."""
    if dry:
        return ["tests/cpu/test_plan.py"], "test"
    return ["tests/cuda/gpu/test_gpu.py"], " or ".join(TELLING)


def run(machine, log, everything: bool) -> int:
    paths, telling = files(machine.dry)
    where = [] if everything else ["-k", telling]
    plugins = ["-p", "bench.on_gpu.limits", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-v", *plugins, "--no-header", "--tb=short"]
    command += [*where, *paths, "--deselect", f"{paths[0]}::{LEFT_OUT}"]
    environment = dict(os.environ, SEQCONV_TEST_STEP=log.step, SEQCONV_TEST_OUT=str(log.folder))
    environment["SEQCONV_TEST_SECONDS"] = str(EACH_OF_ALL if everything else EACH)
    begins, ends, outcomes = len(log.rows("test begins")), len(log.rows("test")), {}
    for _ in range(RESTARTS):
        before = time.perf_counter()
        environment["SEQCONV_TEST_LEFT"] = str(log.left() - SPARE)
        done = [word for name in outcomes for word in ("--deselect", name)]
        code = subprocess.run(command + done, cwd=ROOT, env=environment).returncode
        begun = [row["name"] for row in log.rows("test begins")[begins:]]
        ended = {row["name"]: row["outcome"] for row in log.rows("test")[ends:]}
        outcomes = {name: ended.get(name, "cut or crashed") for name in begun}
        log.say(f"pytest: exit status {code} after {time.perf_counter() - before:.1f} s")
        if code != SPOILT and (not begun or begun[-1] in ended):  # it came to its end
            break
        log.say(f"the tests after {begun[-1]} follow")
    red = {name: o for name, o in outcomes.items() if o not in ("passed", "skipped")}
    for name, outcome in red.items():
        log.say(f"{outcome}: {name}")
    log.say(f"{len(outcomes) - len(red)} of {len(outcomes)} tests right")
    if red or not outcomes:
        return WRONG
    return PARTLY if code == TIME_IS_UP else RIGHT


STEPS = {
    "tests": lambda machine, log: run(machine, log, False),
    "tests-all": lambda machine, log: run(machine, log, True),
}
