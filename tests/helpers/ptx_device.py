"""A device whose kernels are NVRTC's PTX, which the machine in tests/helpers/ptx runs on the host.

The emulator (emulated.py) runs the source of the kernels. This runs what the compiler made of it, with the inline
assembly. The two share no code.
"""

import ctypes
import functools
import gc
import os
import subprocess
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from kept import kept
from torch._subclasses.fake_tensor import FakeTensor

from seqconv.backends.cuda import compiler, kernels
from seqconv.backends.cuda.problem import H100, Limits
from seqconv.backends.cuda.tables import Tables

HERE = Path(__file__).parent / "ptx"
FLAGS = [
    *("-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-ftree-loop-vectorize", "-fvect-cost-model=unlimited", "-Wall", "-Wextra"),
]
RACES = {"shared": 1, "global": 2, "both": 3, "none": 0, "banks": 4}
ROUNDINGS = {"exact": 0, "in order": 1, "pessimistic": 2}


def ptx_of(source: str, arch: str, options: tuple[str, ...] = ()) -> str:
    """What NVRTC makes of a source, with the options of every kernel."""
    state = (source, arch, options, compiler.OPTIONS, compiler.version())

    def make(path: Path) -> None:
        path.write_text(compiler.compile_source(source, arch, "ptx", options=options))

    return kept(f"{arch}.ptx", state, make).read_text()


class Launch(ctypes.Structure):
    """Launch of tests/helpers/ptx/state.h."""

    _fields_ = [
        (name, ctypes.c_uint) for name in "grid threads shared order races mma copies".split()
    ]


@functools.cache
def library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "g++")
    sources = [path.read_bytes() for path in sorted(HERE.glob("*.[hc]*"))]

    def make(path: Path) -> None:
        command = [compiler, *FLAGS, "-shared", "-fPIC", str(HERE / "machine.cpp"), "-o", str(path)]
        subprocess.run(command, check=True)

    loaded = ctypes.CDLL(str(kept("machine.so", (compiler, FLAGS, sources), make)))
    loaded.ptx_load.restype = ctypes.c_void_p
    for name in ("ptx_error", "ptx_launch", "ptx_counts"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


class Program:
    """The PTX of one kernel. `launch` raises RuntimeError with kernel, block, thread, line of the PTX and the fault."""

    def __init__(self, ptx: str):
        self.handle = ctypes.c_void_p(library().ptx_load(ptx.encode()))
        self._check(library().ptx_error(self.handle))
        self.parameters_size = library().ptx_parameters_size(self.handle)

    @staticmethod
    def _check(error: bytes | None) -> None:
        if error:
            raise RuntimeError(error.decode())

    def launch(self, options: Launch, address: int, ranges: list[tuple[int, int]] = ()) -> None:
        """ranges are addresses and sizes of the global memory that may be touched. Without any, all memory may be."""
        flat = (ctypes.c_uint64 * (2 * len(ranges)))(*[x for pair in ranges for x in pair])
        given = (ctypes.byref(options), ctypes.c_void_p(address), flat, len(ranges))
        self._check(library().ptx_launch(self.handle, *given))

    def counts(self) -> list[tuple[int, int, int, str]]:
        """For every instruction, how many warps and lanes ran it, its line and its text."""
        return [(*numbers, text) for *numbers, _, text in self._counted()]

    def bank_conflicts(self) -> list[tuple[int, int, str]]:
        """Turns of shared memory that conflicts cost, with races="banks", line and text of those instructions."""
        return [(turns, line, text) for _, _, line, turns, text in self._counted() if turns]

    def _counted(self) -> list[tuple]:
        rows = library().ptx_counts(self.handle, 0).decode().splitlines()
        split = [row.split(" ", 4) for row in rows]
        return [(*map(int, numbers), text) for *numbers, text in split]


# The objects that live by now are looked through once. The collector leaves them alone from here on.
_EARLY = [weakref.ref(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
gc.freeze()


def living_memory() -> list[tuple[int, int]]:
    """The address and size of the memory of every living tensor of the CPU, in order and without overlaps."""
    found: dict[int, int] = {}
    for x in [*gc.get_objects(), *(reference() for reference in _EARLY)]:
        kind = type(x)
        if not issubclass(kind, torch.Tensor) or kind is FakeTensor:
            continue
        try:
            if x.device.type != "cpu":
                continue
            storage = x.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
        except RuntimeError:
            # A tensor of a compiler or a transform has no memory, and one that the collector took apart has no device.
            continue
        if size:
            found[address] = max(size, found.get(address, 0))
    apart: list[tuple[int, int]] = []
    for begin, size in sorted(found.items()):
        if apart and begin < sum(apart[-1]):
            apart[-1] = (apart[-1][0], max(sum(apart[-1]), begin + size) - apart[-1][0])
        else:
            apart.append((begin, size))
    return apart


def without(ranges: list[tuple[int, int]], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What the holes leave of the ranges. Both are addresses and sizes, in order and without overlaps."""
    left = []
    for begin, size in ranges:
        end = begin + size
        for hole, hole_size in holes:
            if begin < hole + hole_size and hole < end:
                left.append((begin, hole - begin))
                begin = hole + hole_size
        left.append((begin, end - begin))
    return [(begin, size) for begin, size in left if size > 0]


_PROGRAMS: dict[str, Program] = {}


def program_of(ptx: str) -> Program:
    found = _PROGRAMS.get(ptx)
    if found is None:
        found = _PROGRAMS[ptx] = Program(ptx)
    return found


def arch_of(limits: Limits) -> str:
    """The architecture of the smallest compute capability that has such limits."""
    if not limits.tensor_cores:
        return "sm_75"
    return {101376: "sm_86", 166912: "sm_80"}.get(limits.shared, "sm_90")


@dataclass
class PtxDevice:
    """A device for the CUDA backend.

    order says which lanes and warps go first, and copies when asynchronous copies happen, as for the emulator. races
    and rounding, that of matrix products, are keys of RACES and ROUNDINGS. change makes another source of a kernel's,
    and alter other PTX.
    """

    limits: Limits = H100
    order: int = 0
    races: str = "both"
    rounding: str = "exact"
    arch: str | None = None
    options: tuple[str, ...] = ()
    change: Callable[[str, str], str] | None = None
    alter: Callable[[str, str], str] | None = None
    copies: int = 0
    launches: list = field(default_factory=list)
    forbidden: list[tuple[int, int]] = ()  # address and size of memory that no launch may touch
    table = Tables(lambda words: words, lambda: False)

    def program(self, kernel: str) -> Program:
        source = kernels.source(kernel)
        source = self.change(kernel, source) if self.change else source
        ptx = ptx_of(source, self.arch or arch_of(self.limits), self.options)
        return program_of(self.alter(kernel, ptx) if self.alter else ptx)

    def launch(self, kernel: str, grid: int, threads: int, shared: int, arguments) -> None:
        assert 0 < threads <= kernels.KERNELS[kernel].threads and 0 < grid < 1 << 31
        assert shared <= self.limits.shared
        self.launches.append((kernel, grid, threads, shared))
        program = self.program(kernel)
        address, count = arguments.buffer_info()
        assert program.parameters_size == count * arguments.itemsize
        flags = (RACES[self.races], ROUNDINGS[self.rounding], self.copies)
        options = Launch(grid, threads, shared, min(self.order, 2), *flags)
        program.launch(options, address, without(living_memory(), self.forbidden))


class PtxLibrary:
    """Makes devices that run the compiled kernels, where tests ask for a machine."""

    name = "ptx"

    def device(self, limits: Limits = H100, order: int = 0, copies: int = 0) -> PtxDevice:
        return PtxDevice(limits, order, copies=copies)
