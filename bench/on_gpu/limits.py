"""A pytest plugin. It writes a row when a test begins and ends, limits the time of each test, and ends a process that a
fault has spoilt."""

import faulthandler
import os
import time
from pathlib import Path

import pytest

from bench.on_gpu.log import Log

SECONDS = "SEQCONV_TEST_SECONDS"
FATAL = ("CUDA error", "CUDA driver", "CUDA_ERROR", "illegal memory access", "unspecified launch")
SPOILT, TIME_IS_UP = 7, 8  # exit status
# Each is a part of a test's name. The most informative tests come first.
TELLING = (
    "test_graph_capture_and_replay",
    "test_repeatable",
    "test_two_streams",
    "test_explain_names_the_backend",
    "test_lengths",
    "test_windows",
    "test_packed_rows",
    "test_strides_beyond_32_bits",
    "test_layers",
    "test_learned_butterfly",
    "test_sums_of_exponentials",
    "test_streams",
    "test_cases_of_the_long_kernels",
)
END = time.monotonic() + float(os.environ.get("SEQCONV_TEST_LEFT", "inf"))


def _log() -> Log:
    return Log(Path(os.environ["SEQCONV_TEST_OUT"]), os.environ["SEQCONV_TEST_STEP"])


def pytest_collection_modifyitems(items):
    def rank(item) -> int:
        return next((i for i, name in enumerate(TELLING) if name in item.name), len(TELLING))

    items.sort(key=rank)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    if time.monotonic() > END:
        pytest.exit("time is up", returncode=TIME_IS_UP)
    _log().row("test begins", name=item.nodeid)
    # faulthandler has a thread of its own. A call that waits for a GPU in vain never returns to Python.
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
