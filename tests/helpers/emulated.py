"""Builds csrc/device for the host, and runs its kernels in the emulator, which has the interface of a device."""

import ctypes
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from kept import kept

from seqconv.backends.cuda import Cuda, convolution, kernels
from seqconv.backends.cuda.problem import H100, Limits
from seqconv.backends.cuda.tables import Tables

HERE = Path(__file__).parent / "device"
FLAGS = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def build(*extra: str) -> ctypes.CDLL:
    """The kernels as a shared library, which is built once for each state of the sources."""
    text = (HERE / "host.cpp").read_text() + "".join(
        f"ENTRY({name}, {kernel.arguments}, {kernel.body})\n"
        for name, kernel in kernels.KERNELS.items()
    )
    asked = os.environ.get("SEQCONV_EMULATOR_FLAGS", "").split()  # sanitizers
    flags = [*FLAGS, *(["-mf16c"] if os.uname().machine == "x86_64" else []), *asked, *extra]
    compiler = os.environ.get("CXX", "g++")
    headers = [*sorted(kernels.folder().glob("*.cuh")), *sorted(HERE.glob("*.h"))]
    state = (text, flags, compiler, [path.read_bytes() for path in headers])

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            unit = Path(folder) / "host.cpp"
            unit.write_text(text)
            includes = [f"-I{HERE}", f"-I{kernels.folder()}", "-shared", "-fPIC"]
            subprocess.run([compiler, *flags, *includes, str(unit), "-o", str(path)], check=True)

    library = ctypes.CDLL(str(kept("emulator.so", state, make)))
    library.emulator_visited.restype = ctypes.c_char_p
    library.tensor_products.restype = ctypes.c_long
    return library


def arguments_size(library: ctypes.CDLL, kernel: str) -> int:
    """The bytes of the structure that the kernel takes."""
    size = getattr(library, f"arguments_of_{kernel}")
    size.restype = ctypes.c_size_t
    return size()


@dataclass
class Emulator:
    """A device whose kernels run on the host. order and without are those of Options in device/block.h."""

    library: ctypes.CDLL
    limits: Limits = H100
    order: int = 0
    without: str = ""
    arch: str = "sm_90"
    launches: list = field(default_factory=list)
    table = Tables(lambda words: words, lambda: False)

    def launch(self, kernel: str, grid: int, threads: int, shared: int, arguments) -> None:
        assert 0 < threads <= kernels.KERNELS[kernel].threads and 0 < grid < 1 << 31
        assert shared <= self.limits.shared
        self.launches.append((kernel, grid, threads, shared))
        run = getattr(self.library, f"emulate_{kernel}")
        run.restype = ctypes.c_char_p
        without = self.without.encode()
        address, count = arguments.buffer_info()
        assert count * arguments.itemsize == arguments_size(self.library, kernel)
        address = ctypes.c_void_p(address)
        error = run(address, grid, threads, ctypes.c_size_t(shared), self.order, without)
        if error:
            raise RuntimeError(f"{kernel}: {error.decode()}")


class EmulatorLibrary:
    """Makes devices that run the kernels' source, where tests ask for a machine."""

    name = "emulator"

    def __init__(self):
        self.library = build()

    def device(self, limits: Limits = H100, order: int = 0, without: str = "") -> Emulator:
        return Emulator(self.library, limits, order, without)


def forget_recipes() -> None:
    """Forgets all recipes, for tests that change what makes them, such as the planner or the list of kernels."""
    convolution._forward.cache_clear()
    convolution._backward.cache_clear()


def device() -> Emulator:
    """What stands for an H100 where `python -m bench.on_gpu --dry` runs."""
    return Emulator(build())


class OnDevice(Cuda):
    """The CUDA backend for CPU tensors: its own Python, and a device that runs its kernels on the host."""

    def __init__(self, device):
        self.emulated = device

    def device(self, place):
        return self.emulated

    def missing(self, place) -> None:
        return None

    def on(self, place, function, *arguments) -> None:
        function(self.emulated, *arguments)
