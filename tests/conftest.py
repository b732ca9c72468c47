"""What all tests share: the seed, the instruction sets, and the two machines that run CUDA kernels on a CPU."""

import contextlib
import fcntl
import importlib
import os
import zlib
from collections import defaultdict

import pytest
import torch
from emulated import EmulatorLibrary, forget_recipes
from judge import sums

import seqconv
from seqconv.backends import cpu

# Helpers that assert explain a failure as tests do: they are rewritten when a test imports them.
pytest.register_assert_rewrite(
    "butterfly_cases", "device_cases", "operator_cases", "packed_cases", "ssm_cases", "step_cases"
)


def pytest_addoption(parser):
    parser.addoption("--backend", help="MODULE:NAME of the backend that all operators shall use")


def pytest_configure(config):
    if config.getoption("--backend"):
        module, name = config.getoption("--backend").split(":")
        seqconv.use_backend(getattr(importlib.import_module(module), name))


def pytest_sessionstart(session):
    explanation = seqconv.explain(torch.zeros(1, 1, 64), torch.zeros(1, 64))
    if explanation.fallback and not os.environ.get("SEQCONV_ALLOW_FALLBACK"):
        pytest.exit(f"the tests would only test torch.fft: {explanation.fallback}", returncode=3)


def _draw(config, items):
    """Leaves one in n of the tests that are marked so, by name and by the number of commits in SEQCONV_COMPILE."""
    number = os.environ.get("SEQCONV_COMPILE", "all")
    if not number.isdigit():
        return
    spared = set()
    for item in items:
        share = item.get_closest_marker("one_of")
        if share and (zlib.crc32(item.name.encode()) + int(number)) % share.args[0]:
            spared.add(item)
    if spared:
        config.hook.pytest_deselected(items=list(spared))
        items[:] = [item for item in items if item not in spared]


# Of the tests that run on any machine, the share that also runs the compiled PTX. SEQCONV_PTX=all asks for every one.
PTX_SHARE = 8


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the markers
def pytest_collection_modifyitems(config, items):
    """Chooses which tests run on the PTX machine: a share, by name, so that a test is in every run or in none.

    Of every test function one problem is quick, the rest of the share is marked slow.
    """
    _draw(config, items)
    if os.environ.get("SEQCONV_PTX") == "all":
        return
    problems = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("machine") == "ptx":
            drawn = zlib.crc32(item.name.encode())
            problems[item.nodeid.split("[")[0]].append((drawn % PTX_SHARE, drawn, item))
    spared = set()
    for drawn in problems.values():
        for rest, _, item in sorted(drawn, key=lambda draw: draw[:2])[1:]:
            if rest:
                spared.add(item)
            else:
                item.add_marker(pytest.mark.slow)
    if spared:
        config.hook.pytest_deselected(items=list(spared))
        items[:] = [item for item in items if item not in spared]


@pytest.fixture(scope="session")
def emulator():
    return EmulatorLibrary()


@pytest.fixture(scope="session", params=["emulator", "ptx"])
def machine(request, emulator):
    """What runs the CUDA kernels on the host: `device(limits, order)` makes a device for seqconv.backends.cuda."""
    if request.param == "emulator":
        return emulator
    ptx_device = pytest.importorskip("ptx_device")
    if ptx_device.compiler.compiler_reason():
        pytest.skip(ptx_device.compiler.compiler_reason())
    return ptx_device.PtxLibrary()


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
    with sums(request.param) as chosen:
        yield chosen


@pytest.fixture(params=["portable", "neon", "avx2", "avx512"])
def isa(request):
    """Runs the test once with every instruction set that this processor has."""
    chosen = cpu.isa()
    if not cpu.set_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    cpu.set_isa(chosen)
