"""Why a call takes the kernels or does not, on a recording driver."""

import pytest
import torch
from emulated import OnDevice
from torch._subclasses.fake_tensor import FakeTensorMode

import seqconv
from seqconv import use_backend
from seqconv.backends.cuda import driver, gpu, tables
from seqconv.backends.cuda.plan import longest
from seqconv.backends.inputs import Inputs
from seqconv.backends.protocol import Request


class Row:
    """A tensor as far as the choice of a backend asks it."""

    is_cpu, is_cuda = False, True
    device = torch.device("cuda", 0)

    def __init__(self, length: int, dtype=torch.float32):
        self.shape, self.dtype = (1, 1, length), dtype


def why_not(row: Row) -> str | None:
    return gpu.why_not(Request("fftconv", Inputs(row, *[None] * 5), ("none", False)))


def test_why_there_is_no_kernel(monkeypatch, fresh):
    assert "float64" in why_not(Row(5, torch.float64))
    monkeypatch.setattr(driver, "packages_reason", lambda: "No module: pip install cuda-python")
    assert "pip install cuda-python" in why_not(Row(5))


def test_rows_without_a_plan_take_the_fallback(device, monkeypatch, fresh):
    monkeypatch.setattr(driver, "device", lambda index: device)
    most = longest(device.limits)
    assert most > 1 << 26 and why_not(Row(most)) is None
    assert str(most) in why_not(Row(most + 1))


def test_failures_are_tried_again_but_not_for_ever(device, monkeypatch, fresh):
    """A device that failed once, perhaps for lack of memory, is tried again. A capture is an error and no fallback."""
    calls = []

    def failing(index):
        calls.append(index)
        raise RuntimeError("no memory")

    monkeypatch.setattr(driver, "device", failing)
    assert [driver.reason(0) for _ in range(5)] == ["no memory"] * 5 and len(calls) == 3

    def captured(index):
        raise tables.CaptureError(tables.FIRST_CALL)

    monkeypatch.setattr(driver, "device", captured)
    with pytest.raises(RuntimeError, match="once before the capture"):
        driver.reason(1)
    monkeypatch.setattr(driver, "device", lambda index: device)
    assert driver.reason(1) is None


@pytest.mark.parametrize(
    "version, wanted", [(13000, ""), (12040, "cuda-python<13"), (11080, "update")]
)
def test_a_driver_older_than_the_compiler(monkeypatch, fresh, version, wanted):
    """Machine code of a later CUDA does not load. The reason says what to do."""
    bindings = pytest.importorskip("cuda.bindings.driver")
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(bindings, "cuDriverGetVersion", lambda: (0, version))
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, 13, 5))

    def failing(index):
        raise RuntimeError("seqconv: CUDA driver: 218")

    monkeypatch.setattr(driver, "device", failing)
    reason = driver.reason(0)
    assert reason.startswith("seqconv: CUDA driver: 218") and wanted in reason
    assert ("nvrtc-cu12" in reason) == (version == 12040)
    assert ("update" in reason) == (version < 13000)


def test_explain_shows_the_plan(device):
    with use_backend(OnDevice(device)):
        u, k = torch.zeros(1, 1, 1000).bfloat16().expand(64, 768, -1), torch.zeros(768, 1000)
        half = str(seqconv.explain(u, k))
        floats = str(seqconv.explain(torch.randn(8, 4, 5000), torch.randn(4, 5000)))
    assert "tensor cores, 1024 points" in half and "sm_90" in half and "simulated: " in half
    assert "float32, 5120 points" in floats and "lower bound: " in floats


def test_explain_tells_a_cuda_tensor_what_it_takes(device, monkeypatch):
    with FakeTensorMode():  # a CUDA tensor without a device
        u, k = torch.empty(2, 3, 500, device="cuda:0"), torch.empty(3, 500, device="cuda:0")
        monkeypatch.setattr(driver, "reason", lambda index: "pip install cuda-python")
        found = seqconv.explain(u, k)
        assert found.backend == "reference" and "cuda-python" in found.fallback
        monkeypatch.setattr(driver, "reason", lambda index: None)
        monkeypatch.setattr(driver, "device", lambda index: device)
        assert "float64" in seqconv.explain(u.double(), k.double()).fallback
        found = seqconv.explain(u, k)
        assert (found.backend, found.fallback) == ("cuda", None) and "512 points" in found.plan
