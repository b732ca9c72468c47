"""A CUDA driver without a GPU: it records what the package asks of it, and runs each launch in the emulator."""

import ctypes
import threading
from array import array
from types import SimpleNamespace

from emulated import Emulator, arguments_size

from seqconv.backends.cuda import driver

ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 232448,
    "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 233472,
    "MULTIPROCESSOR_COUNT": 132,
    "CLOCK_RATE": 1755000,
    "MEMORY_CLOCK_RATE": 2619000,
    "GLOBAL_MEMORY_BUS_WIDTH": 5120,
}


class Driver:
    """The functions of cuda.bindings.driver that the package calls, with their signatures and statuses."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    CUdevice_attribute = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{n}": n for n in ATTRIBUTES})

    def __init__(self, emulator: Emulator):
        self.emulator, self.names, self.launches, self.limits, self.status = emulator, {}, [], {}, 0
        self.attributes, self.thread = dict(ATTRIBUTES), threading.local()
        self.memory, self.tried, self.full = {}, 0, 0
        self.copying = self.running = False

    def cuLibraryLoadData(self, code, *options):
        assert code[:4] == b"\x7fELF" and options == ([], [], 0, [], [], 0)
        return 0, code

    def cuLibraryGetKernel(self, library, name):
        assert name in library
        handle = len(self.names) + 1000
        self.names[handle] = name.decode()
        return 0, handle

    def cuDeviceGet(self, index):
        return 0, f"device {index}"

    def cuDeviceGetAttribute(self, attribute, device):
        return 0, self.attributes[attribute]

    def cuCtxGetCurrent(self):
        return 0, getattr(self.thread, "context", 0)

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, 5

    def cuCtxSetCurrent(self, context):
        self.thread.context = context
        return (0,)

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        assert (attribute, device) == ("shared", "device 0")
        self.limits[self.names[kernel]] = value
        return (0,)

    def CUfunction(self, handle):
        return handle

    def cuMemAlloc(self, size):
        assert self.thread.context == 5 and size
        self.tried += 1
        if self.tried <= self.full:
            return 2, None
        buffer = (ctypes.c_char * size)()
        self.memory[ctypes.addressof(buffer)] = buffer
        return 0, ctypes.addressof(buffer)

    def cuMemcpyHtoDAsync(self, to, address, size, stream):
        assert len(self.memory[to]) == size and stream == 77
        ctypes.memmove(to, address, size)
        self.copying = True
        return (0,)

    def cuStreamSynchronize(self, stream):
        assert stream == 77
        self.copying = False
        return (0,)

    def cuCtxSynchronize(self):
        self.running = False
        return (0,)

    def cuMemFree(self, address):
        assert not self.running
        self.memory.pop(address)
        return (0,)

    def cuLaunchKernel(self, f, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        name = self.names[f]
        assert self.thread.context == 5  # a thread without one would get 201, invalid context
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0) and shared <= self.limits[name]
        assert not self.copying  # other streams read a table too, so that its copy must have ended
        self.launches.append((name, gx, bx, shared, stream))
        self.running = True
        if self.status:
            return (self.status,)
        size = arguments_size(self.emulator.library, name)
        address = ctypes.c_void_p.from_address(parameters).value
        copied = array("q", ctypes.string_at(address, size))
        self.emulator.launch(name, gx, bx, shared, copied)
        return (0,)


class Device(driver.Device):
    """The package's device for tensors of the CPU. It is told what torch would say of a CUDA stream."""

    stream, capturing = 77, False

    def _stream(self):
        return self.stream

    def _capturing(self):
        return self.capturing
