import contextlib
import fcntl
import os

import pytest
import torch
from emulated import forget_recipes

import seqconv
from seqconv import _cpu


def pytest_sessionstart(session):
    explanation = seqconv.explain(torch.zeros(1, 1, 64), torch.zeros(1, 64))
    if explanation.fallback and not os.environ.get("SEQCONV_ALLOW_FALLBACK"):
        pytest.exit(f"the tests would only test torch.fft: {explanation.fallback}", returncode=3)


@pytest.fixture(autouse=True)
def deterministic():
    """Every test starts from one seed, and torch fills uninitialised memory with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    forget_recipes()


@pytest.fixture(scope="session")
def in_turn(tmp_path_factory):
    """in_turn(name): a context for what two processes of a run must not do at a time."""

    @contextlib.contextmanager
    def lock(name: str):
        with open(tmp_path_factory.getbasetemp().parent / f"{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    return lock


@pytest.fixture
def keops(in_turn):
    """It compiles into a folder of the user's."""
    with in_turn("keops"):
        pytest.importorskip("pykeops", exc_type=ImportError)
        yield


@pytest.fixture(params=["fast", "accurate"])
def mode(request):
    """Whether the tensor cores' products may be summed in fp16, by torch's own switches."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    usual = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, request.param == "fast")
    yield request.param
    for name, value in zip(names, usual, strict=True):
        setattr(matmul, name, value)


@pytest.fixture(params=["portable", "neon", "avx2", "avx512"])
def isa(request):
    """Runs the test once with every instruction set that this processor has."""
    chosen = _cpu.isa()
    if not _cpu.set_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _cpu.set_isa(chosen)
