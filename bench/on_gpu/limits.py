"""A pytest plugin: a row for every test as it begins and ends, a limit for each, and an end where the process is
spoilt by a fault."""

import faulthandler
import os
from pathlib import Path

import pytest

from bench.on_gpu.log import Log

SECONDS = "SEQCONV_TEST_SECONDS"
FATAL = ("CUDA error", "CUDA driver", "CUDA_ERROR", "illegal memory access", "unspecified launch")
SPOILT = 7  # exit status


def _log() -> Log:
    return Log(Path(os.environ["SEQCONV_TEST_OUT"]), os.environ["SEQCONV_TEST_STEP"])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    _log().row("test begins", name=item.nodeid)
    # In a thread of its own: a call that waits for a GPU in vain never comes back to Python.
    faulthandler.dump_traceback_later(float(os.environ[SECONDS]), exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        text = "" if report.outcome == "passed" else str(report.longrepr)[-1500:]
        _log().row(
            "test", name=report.nodeid, outcome=report.outcome, seconds=report.duration, text=text
        )
        if report.outcome == "failed" and any(word in text for word in FATAL):
            pytest.exit(f"the process is spoilt by {report.nodeid}", returncode=SPOILT)
