"""What the tests of the CUDA kernels share: fixtures for the emulator and a driver without a device."""

import pytest
from emulated import Emulator
from fake_driver import Device, Driver
from guarded import GuardedRecipe

from seqconv.backends.cuda import convolution, driver


@pytest.fixture(autouse=True)
def guarded_scratch(request, monkeypatch):
    """Scratch memory on the host is watched; a GPU's memory cannot be looked at from here."""
    if request.path.parent.name != "gpu":
        monkeypatch.setattr(convolution, "Recipe", GuardedRecipe)


@pytest.fixture(scope="session")
def library(emulator):
    return emulator.library


@pytest.fixture
def device(library, monkeypatch):
    """The package's own device on a driver that records."""
    fake = Driver(Emulator(library))
    # The code need not be right here, only its name inside: test_cuda_compile compiles all of it.
    monkeypatch.setattr(driver, "find_prebuilt", lambda name, *_: b"\x7fELF " + name.encode())
    return Device(0, fake)


@pytest.fixture
def fresh(monkeypatch):
    """What is known of devices is forgotten before the test and after it."""
    known = driver.device
    monkeypatch.setattr(driver, "_failures", {})
    known.cache_clear()
    yield
    known.cache_clear()
