"""Loads the kernels on a real device and launches them through the CUDA driver.

This needs cuda.bindings, which are imported when the first CUDA tensor comes.
"""

import ctypes
import functools
import threading
import weakref
from array import array

import torch
from torch import Tensor

from seqconv.backends.cuda.compiler import (
    OLDEST,
    NoCompiler,
    bindings_version,
    compile_kernel,
    find_prebuilt,
    nvrtc,
    prebuilt_folders,
    remedy,
)
from seqconv.backends.cuda.problem import Limits
from seqconv.backends.cuda.tables import FIRST_CALL, CaptureError, Tables


def packages_reason() -> str | None:
    """What Python lacks for launching kernels, or None."""
    if torch.version.hip:
        return "this torch is built for ROCm; the kernels are CUDA"
    try:
        import cuda.bindings.driver  # noqa: F401
    except ImportError as error:
        return f"{error}: {remedy()}"
    if not bindings_version():
        return f"the cuda.bindings here are older than {'.'.join(map(str, OLDEST))}: {remedy()}"
    return None


def _check(result):
    """What a driver's function returned behind its status. Raises RuntimeError where the status is an error."""
    status, *values = result
    if status:
        raise RuntimeError(f"seqconv: CUDA driver: {status!r}")
    return values[0] if values else None


class Memory:
    """A copy of a tensor of the CPU in memory of its own, as an address. It is freed when the device is at rest."""

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


class _Thread(threading.local):
    """What a thread keeps for its launches. The only parameter of each is a pointer to its arguments."""

    def __init__(self):
        self.bound, self.pointer = False, ctypes.c_void_p()
        self.parameters = ctypes.addressof(self.pointer)


class Device:
    """One GPU, which the convolution uses by `limits`, `launch` and `table`. `driver` is cuda.bindings.driver."""

    def __init__(self, index: int, driver):
        self.index, self.driver, self._launch = index, driver, driver.cuLaunchKernel
        self.handle = _check(driver.cuDeviceGet(index))
        kind = driver.CUdevice_attribute

        def attribute(name: str) -> int:
            which = getattr(kind, f"CU_DEVICE_ATTRIBUTE_{name}")
            return _check(driver.cuDeviceGetAttribute(which, self.handle))

        self.major = attribute("COMPUTE_CAPABILITY_MAJOR")
        self.minor = attribute("COMPUTE_CAPABILITY_MINOR")
        width = attribute("GLOBAL_MEMORY_BUS_WIDTH")
        known = {  # a driver that does not know a number says 0
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
        self._thread = _Thread()
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
        code = find_prebuilt(name, self.major, self.minor) or self._compile(name)
        library = _check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernel = _check(driver.cuLibraryGetKernel(library, name.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuKernelSetAttribute(limit, self.limits.shared, kernel, self.handle))
        return driver.CUfunction(int(kernel))  # the handle of a kernel launches in every context

    def _compile(self, name: str) -> bytes:
        try:
            return compile_kernel(name, self.arch)
        except NoCompiler as error:
            folders = " or ".join(str(folder) for folder in prebuilt_folders())
            raise NoCompiler(
                f"kernel {name} for {self.arch} is not in {folders}, and {error}; or compile it where NVRTC is, "
                f"with python -m seqconv.prebuild --arch {self.arch} --out FOLDER, and set SEQCONV_CUBINS to the folder"
            ) from None

    def _capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _stream(self) -> int:
        # torch.cuda.current_stream would make an object in every call.
        return torch._C._cuda_getCurrentRawStream(self.index)

    def _bind_thread(self) -> None:
        """Makes the device current in a thread where nothing has called CUDA's runtime yet."""
        if self._thread.bound:
            return
        if not int(_check(self.driver.cuCtxGetCurrent())):
            context = _check(self.driver.cuDevicePrimaryCtxRetain(self.handle))
            _check(self.driver.cuCtxSetCurrent(context))
        self._thread.bound = True

    def _upload(self, words: Tensor) -> Memory:
        self._bind_thread()
        return Memory(self.driver, words, self._stream())

    def launch(self, kernel: str, grid: int, threads: int, shared: int, arguments: array) -> None:
        """Launches on torch's current stream of this device, which the caller has made current."""
        thread = self._thread
        if not thread.bound:
            self._bind_thread()
        function = self._kernels.get(kernel) or self.kernel(kernel)
        thread.pointer.value = arguments.buffer_info()[0]
        result = self._launch(
            function, grid, 1, 1, threads, 1, 1, shared, self._stream(), thread.parameters, 0
        )
        if result[0]:
            _check(result)


@functools.cache
def device(index: int) -> Device:
    """The device of this index. Raises where the kernels cannot run; see `reason`."""
    missing = packages_reason()
    if missing:
        raise RuntimeError(missing)
    from cuda.bindings import driver

    with torch.cuda.device(index):
        made = Device(index, driver)
        made.kernel("taps_divisors")  # the smallest one shows whether kernels compile and load
    return made


def _hint(error: Exception) -> str:
    """What the user can do about the error, as the end of its message."""
    if isinstance(error, NoCompiler):
        return ""  # the message itself says what to do
    try:
        from cuda.bindings import driver

        known = _check(driver.cuDriverGetVersion()) // 1000
        made = _check(nvrtc().nvrtcVersion()[:2])
    except Exception:  # one of the libraries is missing
        return ""
    if made <= known:
        return ""
    # Where both releases of NVRTC are installed, the bindings take the newer one.
    older = (
        "pip uninstall nvidia-cuda-nvrtc, then pip install 'cuda-python<13' nvidia-cuda-nvrtc-cu12"
    )
    way = f"update the driver{f', or {older}' if known == 12 else ''}"
    return f": NVRTC is of CUDA {made}, the driver of {known}: {way}"


_failures: dict[int, list[str]] = {}


def reason(index: int) -> str | None:
    """Why the kernels do not run on this GPU, or None. A device that has failed three times is not tried again."""
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
