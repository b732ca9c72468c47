"""What the emulator of tests/helpers/device must notice, and what it counts."""

import ctypes
import math

import pytest
import torch
from cases import Case
from device_cases import FEW, ORDERS, results
from emulated import Emulator, OnDevice
from guarded import BAND, Overrun

from seqconv import fftconv, use_backend
from seqconv.backends.cuda.arguments import CONVOLUTION


def test_every_barrier_is_needed(emulator):
    """Each barrier is left out in turn. Then a race is found, or the result is another one."""
    right = [results(emulator, case, limits, 0) for case, limits in ORDERS]
    visited = emulator.library.emulator_visited().decode().split()
    others = ("butterfly", "ssm")  # test_cuda_butterfly's and test_cuda_ssm's
    sites = [site for site in visited if not site.startswith(others)]
    assert len(sites) > 20

    def noticed(site: str) -> bool:
        for (case, limits), expected in zip(ORDERS, right, strict=True):
            for order in (0, 1):
                try:
                    found = results(emulator, case, limits, order, without=site)
                except RuntimeError as error:
                    assert "race" in str(error), f"{site}: {error}"
                    return True
                if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                    return True
        return False

    assert [site for site in sites if not noticed(site)] == []


FAULTS = [
    "write after write",
    "read after write",
    "write after read",
    "outside of shared memory",
    "barrier",
    "different collectives",
]


@pytest.mark.parametrize("which", range(len(FAULTS)), ids=FAULTS)
def test_the_emulator_notices(emulator, which):
    emulator.library.emulate_fault.restype = ctypes.c_char_p
    error = emulator.library.emulate_fault(which)
    assert error is not None and FAULTS[which] in error.decode()


def test_tensor_core_instructions_match_the_formula(emulator, mode):
    """Each radix has a pass there and one back. A complex product takes 8 instructions, or 4 where one side is real."""
    for length, outer in ((256, 0), (4096, 1), (8192, 2)):
        case = Case(1, 1, length, length, dtype=torch.float16)
        before = emulator.library.tensor_products()
        with use_backend(OnDevice(emulator.device(FEW))):
            fftconv(*[case.tensors()[n] for n in ("u", "k")])
        tiles, passes = length // 256, 2 + outer
        expected = tiles * (2 * 4 + (2 * passes - 2) * 8)
        assert emulator.library.tensor_products() - before == expected


@pytest.mark.parametrize("step", [-BAND // 4, -1, 2, 1 + BAND // 4], ids=str)
def test_a_step_beside_a_piece_of_scratch_memory(emulator, step):
    """Something is written a few elements before or behind the two divisors of two rows of taps."""
    seen = []

    class Beside(Emulator):
        def launch(self, kernel, grid, threads, shared, arguments):
            super().launch(kernel, grid, threads, shared, arguments)
            if kernel == "spectrum":
                divisors = arguments[CONVOLUTION.places["divisors"]]
                at = ctypes.c_float.from_address(divisors + 4 * step)
                seen.append(at.value)
                at.value = 1.0

    case = Case(2, 2, 1024, 1024, dtype=torch.bfloat16)
    with (
        use_backend(OnDevice(Beside(emulator.library))),
        pytest.raises(Overrun, match="spectrum wrote"),
    ):
        case.run(fftconv, case.tensors())
    assert len(seen) == 1 and math.isnan(seen[0])
