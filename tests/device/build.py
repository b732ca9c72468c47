"""Builds csrc/device for the host and runs its kernels in the emulator, behind the interface of a device."""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from seqconv._cuda import kernels
from seqconv._cuda.plan import H100, Limits

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
ENTRY = """
extern "C" const char* emulate_{name}(const void* arguments, unsigned grid, unsigned threads, size_t shared,
                                      unsigned order, const char* without) {{
  return guarded([&] {{
    const Args& a = *(const Args*)arguments;
    emulator::launch(grid, threads, {{order, shared, without}}, [&] {{ {body}(a, emulator::block().shared.data); }});
  }});
}}
"""
HOST = """
#include "emulator.h"
#include "tensor.cuh"
static std::string last;
template <class F> static const char* guarded(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    last = e.what();
    return last.c_str();
  }
}
extern "C" const char* emulator_visited() {
  last.clear();
  for (const std::string& site : emulator::visited) last += site + "\\n";
  return last.c_str();
}
extern "C" size_t arguments_size() { return sizeof(Args); }
"""


def build(extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The kernels as a shared library, built once for each state of the sources."""
    text = HOST + "".join(
        ENTRY.format(name=name, body=body) for name, (body, _, _) in kernels.KERNELS.items()
    )
    flags = [*FLAGS, *(["-mf16c"] if os.uname().machine == "x86_64" else []), *extra]
    compiler = os.environ.get("CXX", "g++")
    sources = [path.read_bytes() for path in (*sorted(kernels.folder().iterdir()), HERE / "emulator.h")]
    key = hashlib.sha256(repr((text, flags, compiler, sources)).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"seqconv-emulator-{os.getuid()}-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            unit = Path(folder) / "host.cpp"
            unit.write_text(text)
            made = Path(folder) / "host.so"
            includes = [f"-I{HERE}", f"-I{kernels.folder()}"]
            subprocess.run([compiler, *flags, *includes, str(unit), "-o", str(made)], check=True)
            os.replace(made, target)
    library = ctypes.CDLL(str(target))
    library.emulator_visited.restype = ctypes.c_char_p
    return library


@dataclass
class Emulator:
    """A device whose kernels run on the host; order and without as in emulator.h."""

    library: ctypes.CDLL
    limits: Limits = H100
    order: int = 0
    without: str = ""
    launches: tuple = ()

    def launch(self, kernel: str, grid: int, threads: int, shared: int, arguments) -> None:
        run = getattr(self.library, f"emulate_{kernel}")
        run.restype = ctypes.c_char_p
        self.launches += ((kernel, grid, threads, shared),)
        error = run(
            arguments, grid, threads, ctypes.c_size_t(shared), self.order, self.without.encode()
        )
        if error:
            raise RuntimeError(f"{kernel}: {error.decode()}")
