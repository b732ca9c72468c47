"""The tests test: each deliberate bug must make the operator's suite fail, and none must make it pass."""

import os
import subprocess
import sys
from pathlib import Path

import mutations
import pytest

HERE = Path(__file__).parent
HELPERS = HERE.parent / "helpers"


def run_suite(mutation: str) -> subprocess.CompletedProcess:
    options = ["-x", "-q", "-p", "mutations", "-p", "no:cacheprovider", "--no-header"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_fftconv.py", "-k", "test_accuracy"],
        cwd=HERE,
        env=os.environ | {"SEQCONV_MUTATION": mutation, "PYTHONPATH": str(HELPERS)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_suite_passes_without_a_mutation():
    result = run_suite("")
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("mutation", [*mutations.FORWARD, *mutations.BACKWARD])
def test_mutation_is_caught(mutation):
    result = run_suite(mutation)
    assert result.returncode == 1 and "AssertionError" in result.stdout, (
        result.stdout[-3000:] + result.stderr[-2000:]
    )
