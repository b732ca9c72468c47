"""Calls from tensors down to the CUDA driver, where a recording driver runs each launch in the emulator."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from accuracy import rel_l2
from cases import Case, double
from emulated import HERE, Emulator, OnDevice
from fake_driver import Device, Driver

from seqconv import backends, fftconv, reference, use_backend
from seqconv.backends.cuda import compiler, convolution, driver, gpu, kernels
from seqconv.backends.inputs import Inputs
from seqconv.ops.fftconv import operator


@pytest.mark.parametrize(
    "case",
    [
        Case(
            2, 3, 500, 500, taps_rev=499, skip="h", pre_gate=True, post_gate=True, activation="gelu"
        ),
        Case(2, 3, 500, 500, heads=2, skip="ch", layout="blh"),
        Case(2, 3, 500, 500, heads=2, per_sample=True, dtype=torch.bfloat16),
        Case(2, 3, 501, 40, skip="h", dtype=torch.float16, mode="circular"),
    ],
    ids=str,
)
def test_results_through_the_driver(device, case):
    tensors = case.tensors()
    with use_backend(OnDevice(device)):
        y, grads, dy = case.with_gradients(fftconv, tensors)
    y64, grads64, _ = case.with_gradients(reference.fftconv_fft, double(tensors), dy.double())
    bound = 1e-6 if case.dtype == torch.float32 else 8e-3
    assert rel_l2(y, y64) < bound
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype and rel_l2(grad, grads64[name]) < bound
    assert {launch[4] for launch in device.driver.launches} == {77}


def test_any_strides(device):
    """Slices, transposes, expanded batches and negative views are read in place by their strides."""
    k = torch.randn(3, 2 * 200)[:, ::2]
    for u in (
        torch.randn(2, 3, 400)[..., ::2],
        torch.randn(200, 3, 2).permute(2, 1, 0),
        torch.randn(1, 3, 200).expand(2, 3, 200),
        torch.imag(torch.randn(2, 3, 200, dtype=torch.complex64).conj()),
        torch.randn(2, 3, 201)[..., 1:],
    ):
        for dtype in (torch.float32, torch.bfloat16):
            with use_backend(OnDevice(device)):
                y = fftconv(u.to(dtype) if dtype != u.dtype else u, k)
            y64 = reference.fftconv_fft(u.to(dtype).double(), k.double())
            assert rel_l2(y, y64) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_limits_come_from_the_device(device):
    limits = device.limits
    assert (limits.shared, limits.processors, limits.tensor_cores) == (232448, 132, True)
    assert limits.bandwidth == pytest.approx(3.35e12, rel=0.01) and device.arch == "sm_90"
    turing = Driver(device.driver.emulator)
    turing.attributes |= {"COMPUTE_CAPABILITY_MAJOR": 7, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 65536}
    turing.attributes |= {"COMPUTE_CAPABILITY_MINOR": 5, "CLOCK_RATE": 0}
    turing = Device(0, turing)
    assert (turing.arch, turing.limits.shared) == ("sm_75", 65536)
    assert not turing.limits.tensor_cores and turing.limits.clock > 1e9


def test_kernels_are_loaded_once_and_allowed_all_shared_memory(device):
    u, k = torch.randn(1, 2, 300), torch.randn(2, 300)
    with use_backend(OnDevice(device)):
        fftconv(u, k), fftconv(u, k)
    names = list(device.driver.names.values())
    assert sorted(names) == sorted(set(names)) == ["forward_f32", "spectrum"]
    assert set(device.driver.limits.values()) == {232448}
    assert len(device.driver.launches) == 4


def test_a_failing_launch_raises(device):
    device.driver.status = 700
    with use_backend(OnDevice(device)), pytest.raises(RuntimeError, match="CUDA driver: 700"):
        fftconv(torch.randn(1, 2, 300), torch.randn(2, 300))


def test_a_thread_that_has_not_used_the_device_yet(device):
    """The gradient is computed in a thread of its own, which has not used the driver before."""
    u, k = torch.randn(2, 2, 300, requires_grad=True), torch.randn(2, 300)
    with use_backend(OnDevice(device)):
        y = fftconv(u, k)
        found = []
        work = threading.Thread(target=lambda: found.extend(torch.autograd.grad(y.sum(), u)))
        work.start(), work.join()
    u64 = u.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.fftconv_fft(u64, k.double()).sum(), u64)
    assert rel_l2(found[0], expected) < 1e-6


def test_first_call_inside_a_graph_capture_says_so(device):
    device.capturing = True
    with (
        use_backend(OnDevice(device)),
        pytest.raises(RuntimeError, match="once before the capture"),
    ):
        fftconv(torch.randn(1, 2, 300), torch.randn(2, 300))


def test_scratch_of_long_rows_is_bounded(device, monkeypatch):
    """Channels are taken in turn where the passes between would need more than SCRATCH_BYTES."""
    monkeypatch.setattr(convolution, "SCRATCH_BYTES", 1 << 20)
    device.limits = device.limits.__class__(shared=20000, shared_total=20000, tensor_cores=False)
    case = Case(2, 5, 9000, 9000, heads=2, skip="ch", activation="silu", post_gate=True)
    tensors = case.tensors()
    with use_backend(OnDevice(device)):
        y, grads, dy = case.with_gradients(fftconv, tensors)
    y64, grads64, _ = case.with_gradients(reference.fftconv_fft, double(tensors), dy.double())
    assert rel_l2(y, y64) < 1e-6
    assert all(rel_l2(grad, grads64[name]) < 1e-6 for name, grad in grads.items())
    assert sum(name == "forward_c32" for name, *_ in device.driver.launches) > 2


def test_compile_and_functorch_take_the_same_kernels(device):
    """The operator is the same object on every device, so that what wraps it needs no CUDA code."""
    u, k = torch.randn(2, 3, 64), torch.randn(3, 64)
    with use_backend(OnDevice(device)):
        y = torch.compile(fftconv, backend="eager", fullgraph=True)(u, k)
        mapped = torch.vmap(fftconv, in_dims=(0, None))(u[:, None], k)[:, 0]
        torch.library.opcheck(
            operator.fwd, (*operator.flat(Inputs(u, k, None, None, None, None)), "none", False, False),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
    expected = reference.fftconv_fft(u, k)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-5)


def test_the_road_of_a_cuda_tensor(library, monkeypatch, fresh):
    """The package itself asks torch for the device and the stream, and whether it is capturing."""
    asked = []

    class Current:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            asked.append(self.index)

        def __exit__(self, *_):
            asked.append("left")

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    if torch.version.cuda:  # of torch's own functions, the one that its compiler asks as well
        assert callable(torch._C._cuda_getCurrentRawStream)
    monkeypatch.setattr(
        torch._C,
        "_cuda_getCurrentRawStream",
        lambda index: asked.append(index) or 77,
        raising=False,
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(driver, "find_prebuilt", lambda name, *_: b"\x7fELF " + name.encode())
    made = driver.Device(0, Driver(Emulator(library)))
    monkeypatch.setattr(driver, "device", lambda index: [made][index])
    u, k, y = torch.randn(2, 3, 300), torch.randn(3, 300), torch.empty(2, 3, 300)
    inputs = Inputs(u, k, *[None] * 4)
    gpu.fftconv(y, inputs, "none")
    assert rel_l2(y, reference.fftconv_fft(u.double(), k.double())) < 1e-6
    du = torch.empty_like(u)
    wanted = Inputs(du, *[None] * 5)
    gpu.fftconv_gradients(wanted, torch.ones_like(y), inputs, "none")
    leaf = u.double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.fftconv_fft(leaf, k.double()).sum(), leaf)
    assert rel_l2(du, expected) < 1e-6
    assert set(asked) == {0}  # streams: the device is the current one already
    asked.clear()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(backends.cuda, "_index", lambda device: 0)
    gpu.fftconv(y, inputs, "none")
    gpu.fftconv_gradients(wanted, torch.ones_like(y), inputs, "none")
    assert asked[0] == 0 and asked.count("left") == 2 and set(asked) == {0, "left"}
    assert {launch[4] for launch in made.driver.launches} == {77}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="once before the capture"):
        longer = Inputs(torch.randn(2, 3, 999), k, *[None] * 4)
        gpu.fftconv(torch.empty(2, 3, 999), longer, "none")


def test_devices_of_two_kinds(library, monkeypatch):
    """Each device asks for the machine code of its own architecture."""
    asked = []

    def found(name, major, minor):
        asked.append((major, minor))
        return b"\x7fELF " + name.encode()

    monkeypatch.setattr(driver, "find_prebuilt", found)
    for capability in ((9, 0), (8, 6)):
        fake = Driver(Emulator(library))
        fake.attributes |= dict(
            zip(("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR"), capability, strict=True)
        )
        with use_backend(OnDevice(Device(0, fake))):
            fftconv(torch.randn(1, 2, 300), torch.randn(2, 300))
    assert asked == [(9, 0)] * 2 + [(8, 6)] * 2


SCRIPT = """
import sys, torch
from cuda.bindings import driver as bindings
from emulated import OnDevice
from seqconv import fftconv, reference, use_backend
from seqconv.backends.cuda import driver

class Device(driver.Device):
    def _stream(self): return 0
    def _capturing(self): return False

device = Device(0, bindings)
assert device.arch == "sm_90" and device.limits.shared == 232448 and device.limits.processors == 132
for dtype, n in ((torch.float32, 300), (torch.bfloat16, 1024)):
    u, k = torch.randn(3, 2, n, dtype=dtype, requires_grad=True), torch.randn(2, n, requires_grad=True)
    skip = torch.randn(2, requires_grad=True)
    with use_backend(OnDevice(device)):
        y = fftconv(u, k, skip)
        grads = torch.autograd.grad(y.float().square().sum(), (u, k, skip))
    y64 = reference.fftconv_fft(u.double(), k.double(), skip.double())
    grads64 = torch.autograd.grad(y64.square().sum(), (u, k, skip))
    for a, b in zip((y, *grads), (y64, *grads64)):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error < (1e-6 if dtype == torch.float32 else 6e-3), error
print("launched", len(device._kernels), "kernels")
"""


@pytest.mark.slow
def test_real_bindings_and_machine_code(library, tmp_path):
    """The real cuda.bindings load NVRTC's code into the tests' driver library, which launches it in the emulator."""
    if compiler.compiler_reason():
        pytest.skip(compiler.compiler_reason())
    source = HERE / "libcuda.cpp"
    stub = str(tmp_path / "libcuda.so.1")
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-ldl", "-o", stub]
    subprocess.run(command, check=True)
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    # NVRTC itself looks for a driver and would take this one: compiled without it, found as prebuilt.
    needed = "^(spectrum|(taps|skip)_gradient|(for|back)ward_f32|half_(for|back)ward_bf16_1024)$"
    folder = tmp_path / "cubins"
    asked = ["--arch", "sm_90", "--out", str(folder), "--kernels", needed]
    subprocess.run(
        [sys.executable, "-m", "seqconv.prebuild", *asked], check=True, stdout=subprocess.DEVNULL
    )
    assert len(list(folder.iterdir())) == 7
    for name in filter(re.compile(needed).search, kernels.KERNELS):
        (tmp_path / f"{name}.so").symlink_to(library.path_of(name))
    environment = {
        "SEQCONV_CUBINS": str(folder),
        "LD_LIBRARY_PATH": str(tmp_path),
        "SEQCONV_EMULATOR": str(tmp_path),
        "PYTHONPATH": path,
    }
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("launched")
