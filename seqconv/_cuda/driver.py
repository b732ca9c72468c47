"""The kernels on a real device: found prebuilt or compiled by NVRTC, loaded and launched through the CUDA driver.

Needs the packages of the extra `cuda` (cuda-core, cuda-bindings, NVRTC), imported when the first CUDA tensor comes.
"""

import ctypes
import functools
import os
import threading
import weakref
from array import array
from pathlib import Path

import torch
from torch import Tensor

from seqconv._cuda import kernels
from seqconv._cuda.plan import Limits
from seqconv._cuda.tables import FIRST_CALL, CaptureError, Tables

# NVRTC 12 takes generic lambdas for host code otherwise.
OPTIONS = {"std": "c++17", "device_as_default_execution_space": True}
PACKAGED = Path(__file__).parent.parent / "cubins"


def cache_folder() -> Path:
    """Compiled kernels: SEQCONV_CACHE, or seqconv under the user's cache folder."""
    if os.environ.get("SEQCONV_CACHE"):
        return Path(os.environ["SEQCONV_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "seqconv"


@functools.cache
def _cache(folder: Path):
    from cuda.core.utils import FileStreamProgramCache

    return FileStreamProgramCache(folder, max_size_bytes=1 << 30)


def compile_kernel(kernel: str, arch: str, cached: bool = True, log=None) -> bytes:
    """Machine code for sm_XY by NVRTC; needs no GPU. cached: kept on disk, by source, options and NVRTC's version."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=arch, **OPTIONS, **({"ptxas_options": ["-v"]} if log else {}))
    program = Program(kernels.source(kernel), "c++", options)
    arguments = {"cache": _cache(cache_folder())} if cached else {}
    if log is not None:
        arguments["logs"] = log
    return bytes(program.compile("cubin", **arguments).code)


def find_prebuilt(kernel: str, major: int, minor: int) -> bytes | None:
    """Out of SEQCONV_CUBINS or the installation; code for an earlier minor version of the architecture runs as well."""
    folders = [Path(f) for f in (os.environ.get("SEQCONV_CUBINS"),) if f] + [PACKAGED]
    for lower in range(minor, -1, -1):
        for folder in folders:
            path = folder / kernels.cubin_name(kernel, f"sm_{major}{lower}")
            if path.is_file():
                return path.read_bytes()
    return None


def packages_reason() -> str | None:
    """What is missing on the Python side, or None."""
    if torch.version.hip:
        return "this torch is built for ROCm; the kernels are CUDA"
    try:
        import cuda.bindings.driver
        import cuda.core  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install 'seqconv[cuda]'"
    return None


def _check(result):
    """The values of a driver call, whose first is a status."""
    status, *values = result
    if status:
        raise RuntimeError(f"seqconv: CUDA driver: {status!r}")
    return values[0] if values else None


class Memory:
    """A copy of a tensor of the CPU in memory of its own, as an address; freed once all work on the device is done."""

    def __init__(self, driver, words: Tensor, stream: int):
        words, size = words.contiguous(), words.nbytes
        status, self.address = driver.cuMemAlloc(size)
        if status:  # torch keeps what it has freed
            torch.cuda.empty_cache()
            self.address = _check(driver.cuMemAlloc(size))

        def free(address=self.address):
            driver.cuCtxSynchronize(), driver.cuMemFree(address)

        weakref.finalize(self, free).atexit = False  # with the process everything goes
        _check(driver.cuMemcpyHtoDAsync(self.address, words.data_ptr(), size, stream))
        _check(driver.cuStreamSynchronize(stream))  # other streams will read it

    def __int__(self) -> int:
        return int(self.address)


class Device:
    """One GPU: `launch` and `table` are what seqconv._cuda.convolution needs. `driver` is cuda.bindings.driver."""

    def __init__(self, index: int, driver):
        self.index, self.driver = index, driver
        self.handle = _check(driver.cuDeviceGet(index))
        kind = driver.CUdevice_attribute

        def attribute(name: str) -> int:
            which = getattr(kind, f"CU_DEVICE_ATTRIBUTE_{name}")
            return _check(driver.cuDeviceGetAttribute(which, self.handle))

        self.major = attribute("COMPUTE_CAPABILITY_MAJOR")
        self.minor = attribute("COMPUTE_CAPABILITY_MINOR")
        width = attribute("GLOBAL_MEMORY_BUS_WIDTH")
        known = {  # 0 where a driver does not say
            "shared": attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            "shared_total": attribute("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
            "processors": attribute("MULTIPROCESSOR_COUNT"),
            "clock": 1e3 * attribute("CLOCK_RATE"),
            "bandwidth": 2e3 * attribute("MEMORY_CLOCK_RATE") * width / 8,
        }
        known = {name: value for name, value in known.items() if value}
        self.limits = Limits(**known, tensor_cores=self.major >= 8)
        self._kernels: dict = {}
        self._lock = threading.Lock()
        self._thread = threading.local()
        self.table = Tables(self._upload, self._capturing)

    @property
    def arch(self) -> str:
        return f"sm_{self.major}{self.minor}"

    def kernel(self, name: str):
        found = self._kernels.get(name)
        if found is None:
            with self._lock:
                found = self._kernels.get(name) or self._load(name)
                self._kernels[name] = found
        return found

    def _load(self, name: str):
        if self._capturing():
            raise CaptureError(FIRST_CALL)
        driver = self.driver
        code = find_prebuilt(name, self.major, self.minor) or compile_kernel(name, self.arch)
        library = _check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernel = _check(driver.cuLibraryGetKernel(library, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuKernelSetAttribute(limit, self.limits.shared, kernel, self.handle))
        return driver.CUfunction(int(kernel))  # a kernel handle launches in every context

    def _capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.index).cuda_stream

    def _bind_thread(self) -> None:
        """The driver knows no current device in a thread where nothing has called CUDA's runtime yet."""
        if getattr(self._thread, "bound", False):
            return
        if not int(_check(self.driver.cuCtxGetCurrent())):
            context = _check(self.driver.cuDevicePrimaryCtxRetain(self.handle))
            _check(self.driver.cuCtxSetCurrent(context))
        self._thread.bound = True

    def _upload(self, words: Tensor) -> Memory:
        self._bind_thread()
        return Memory(self.driver, words, self._stream())

    def launch(self, kernel: str, grid: int, threads: int, shared: int, arguments: array) -> None:
        """On torch's current stream of this device, which the caller has made current."""
        self._bind_thread()
        pointers = (ctypes.c_void_p * 1)(arguments.buffer_info()[0])
        result = self.driver.cuLaunchKernel(
            self.kernel(kernel), grid, 1, 1, threads, 1, 1, shared, self._stream(),
            ctypes.addressof(pointers), 0,
        )  # fmt: skip
        _check(result)


@functools.cache
def device(index: int) -> Device:
    """Raises where the kernels cannot run; see `reason`."""
    missing = packages_reason()
    if missing:
        raise RuntimeError(missing)
    from cuda.bindings import driver

    with torch.cuda.device(index):
        made = Device(index, driver)
        made.kernel("kernel_scales")  # the smallest: does anything compile, load and stay?
    return made


def _hint(error: Exception) -> str:
    """What would help."""
    try:
        from cuda.bindings import driver, nvrtc

        known, made = _check(driver.cuDriverGetVersion()), _check(nvrtc.nvrtcVersion()[:2])
    except Exception:  # one of the libraries is missing
        known = made = 0
    if made > known // 1000:
        older = " or pip install 'seqconv[cuda12]'" if known // 1000 == 12 else ""
        return f": NVRTC is of CUDA {made}, the driver of {known // 1000}: update the driver{older}"
    return ": pip install 'seqconv[cuda]'" if "nvrtc" in str(error).lower() else ""


_failures: dict[int, list[str]] = {}


def reason(index: int) -> str | None:
    """Why the kernels do not run on this GPU, or None. What fails three times is taken for final."""
    failed = _failures.setdefault(index, [])
    if len(failed) >= 3:
        return failed[-1]
    try:
        device(index)
    except CaptureError:
        raise
    except Exception as error:  # cuda-bindings raise what they like where a library is missing
        failed.append(" ".join(str(error).split()) + _hint(error))
        return failed[-1]
    return None
