"""Builds csrc/device for the host, and runs its kernels in the emulator, which has the interface of a device."""

import ctypes
import functools
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from kept import kept

from seqconv.backends.cuda import Cuda, convolution, groups, kernels, packed
from seqconv.backends.cuda.problem import H100, Limits
from seqconv.backends.cuda.tables import Tables

HERE = Path(__file__).parent / "device"
# A kernel runs as fast with -O1 as with -O2, and is built in two thirds of the time.
FLAGS = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# Every library has its own blocks and counts, of which another one's loader must not make the same.
APART = ["-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]


class Library:
    """The kernels for the host: a shared library for each, which is built when it is first asked for."""

    def __init__(self, *extra: str):
        asked = os.environ.get("SEQCONV_EMULATOR_FLAGS", "").split()  # sanitizers
        half = ["-mf16c"] if os.uname().machine == "x86_64" else []
        self.flags = [*FLAGS, *APART, *half, *asked, *extra]
        self.compiler = os.environ.get("CXX", "g++")
        headers = [*sorted(kernels.folder().glob("*.cuh")), *sorted(HERE.glob("*.h"))]
        self.state = [path.read_bytes() for path in headers]
        self.loaded: dict[str, ctypes.CDLL] = {}

    def path(self, name: str, entry: str) -> Path:
        """The library of host.cpp with an entry, which is built once for each state of the sources."""
        text = (HERE / "host.cpp").read_text() + entry

        def make(path: Path) -> None:
            with tempfile.TemporaryDirectory() as folder:
                unit = Path(folder) / "host.cpp"
                unit.write_text(text)
                includes = [f"-I{HERE}", f"-I{kernels.folder()}"]
                command = [self.compiler, *self.flags, *includes, str(unit), "-o", str(path)]
                # The compiler needs no sanitizer, which the tests may run under, and is slow with one.
                environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
                subprocess.run(command, check=True, env=environment)

        return kept(f"{name}.so", (text, self.flags, self.compiler, self.state), make)

    def path_of(self, kernel: str) -> Path:
        known = kernels.KERNELS[kernel]
        return self.path(kernel, f"ENTRY({kernel}, {known.arguments}, {known.body})\n")

    def of(self, kernel: str) -> ctypes.CDLL:
        """The library of one kernel."""
        if kernel not in self.loaded:
            library = self.loaded[kernel] = ctypes.CDLL(str(self.path_of(kernel)))
            library.emulator_visited.restype = ctypes.c_char_p
            library.tensor_products.restype = ctypes.c_long
            getattr(library, f"emulate_{kernel}").restype = ctypes.c_char_p
            getattr(library, f"arguments_of_{kernel}").restype = ctypes.c_size_t
        return self.loaded[kernel]

    def emulator_visited(self) -> bytes:
        """The barriers and waits that kernels have come to so far, one a line."""
        sites = {site for one in self.loaded.values() for site in one.emulator_visited().split()}
        return b"\n".join(sorted(sites))

    def tensor_products(self) -> int:
        """The tensor core instructions that all warps have run so far."""
        return sum(one.tensor_products() for one in self.loaded.values())

    def emulate_fault(
        self, which: int, broken: bool, order: int = 0, copies: int = 0
    ) -> str | None:
        """What the emulator says of a program of device/faults.h."""
        faults = Library("-DSEQCONV_FAULTS").path("faults", "")
        run = ctypes.CDLL(str(faults)).emulate_fault
        run.restype, run.argtypes = (
            ctypes.c_char_p,
            [ctypes.c_int, ctypes.c_bool, *[ctypes.c_uint] * 2],
        )
        error = run(which, broken, order, copies)
        return error and error.decode()


@functools.cache
def build() -> Library:
    return Library()


def arguments_size(library: Library, kernel: str) -> int:
    """The bytes of the structure that the kernel takes."""
    return getattr(library.of(kernel), f"arguments_of_{kernel}")()


@dataclass
class Emulator:
    """A device whose kernels run on the host. order, without and copies are those of Options in device/block.h."""

    library: Library
    limits: Limits = H100
    order: int = 0
    without: str = ""
    copies: int = 0
    arch: str = "sm_90"
    launches: list = field(default_factory=list)
    table = Tables(lambda words: words, lambda: False)

    def launch(self, kernel: str, grid: int, threads: int, shared: int, arguments) -> None:
        assert 0 < threads <= kernels.KERNELS[kernel].threads and 0 < grid < 1 << 31
        assert shared <= self.limits.shared
        self.launches.append((kernel, grid, threads, shared))
        run = getattr(self.library.of(kernel), f"emulate_{kernel}")
        without = self.without.encode()
        address, count = arguments.buffer_info()
        assert count * arguments.itemsize == arguments_size(self.library, kernel)
        address = ctypes.c_void_p(address)
        options = (self.order, without, self.copies)
        error = run(address, grid, threads, ctypes.c_size_t(shared), *options)
        if error:
            raise RuntimeError(f"{kernel}: {error.decode()}")


class EmulatorLibrary:
    """Makes devices that run the kernels' source, where tests ask for a machine."""

    name = "emulator"

    def __init__(self):
        self.library = build()

    def device(
        self, limits: Limits = H100, order: int = 0, without: str = "", copies: int = 0
    ) -> Emulator:
        return Emulator(self.library, limits, order, without, copies)


def forget_recipes() -> None:
    """Forgets all recipes, for tests that change what makes them, such as the planner or the list of kernels."""
    for kind in (convolution, packed):
        kind._forward.cache_clear()
        kind._backward.cache_clear()
    groups.plan_of.cache_clear()


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
