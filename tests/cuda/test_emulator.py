"""What the emulator of tests/helpers/device must notice, and what it counts."""

import ctypes
import math
import re

import pytest
import torch
from cases import Case
from device_cases import FEW, ORDERS, results
from emulated import Emulator, OnDevice
from guarded import BAND, Overrun

from seqconv import fftconv, use_backend
from seqconv.backends.cuda.arguments import CONVOLUTION


def test_every_barrier_is_needed(emulator):
    """Each barrier and each wait is left out in turn. Then a race or a copy that nobody waited for is found, or the
    result is another one. test_half_mutations.py does so with every place of the machine code."""
    right = [results(emulator, case, limits, 0) for case, limits in ORDERS]
    visited = emulator.library.emulator_visited().decode().split()
    others = ("butterfly", "ssm", "stream")  # of tests of their own
    sites = [site for site in visited if not site.startswith(others)]
    assert len(sites) > 20

    def noticed(site: str) -> bool:
        for (case, limits), expected in zip(ORDERS, right, strict=True):
            for order, copies in ((0, 1), (1, 0)):
                try:
                    found = results(emulator, case, limits, order, without=site, copies=copies)
                except RuntimeError as error:
                    assert "race" in str(error) or "waited" in str(error), f"{site}: {error}"
                    return True
                if not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
                    return True
        return False

    assert [site for site in sites if not noticed(site)] == []


RACE = "race in shared memory"
UNAWAITED = "of what an asynchronous copy writes, which nobody waited for"
FAULTS = {  # the programs of device/faults.h
    "write after write": f"{RACE}: write after write",
    "no barrier before a read": RACE,
    "no barrier before a write": RACE,
    "outside": "outside of shared memory",
    "a barrier that some never reach": "waits at a barrier|wait at barriers",
    "different collectives": "different collectives",
    "a warp's lanes without a barrier": RACE,
    "barriers of two halves of the block": RACE,
    "a chain of named barriers": RACE,
    "lanes at different barriers": "at different barriers",
    "a barrier with two counts": "two counts|nobody can complete",
    "a barrier with no such number": "no such barrier: 0",
    "a barrier with too few": "nobody can complete|more threads at a barrier",
    "two threads in two bytes": f"{RACE}: write after write",
    "a copy read early": f"read {UNAWAITED}",
    "a wait for all but the last group": f"read {UNAWAITED}",
    "a copy in no group": f"read {UNAWAITED}",
    "no barrier after a wait": f"{RACE}|{UNAWAITED}",
    "a copy written over": f"write {UNAWAITED}",
    "a copy over what others read": f"{RACE}|{UNAWAITED}",
    "no wait": "the block ends while nobody has waited",
    "a short copy": "another value",
    "a misaligned copy": "multiples of 16",
    "a misaligned load": "misaligned",
    "transposed tiles stored and loaded": "another value",
    "tiles in the order of rows": "another value",
    "tiles stored where they were loaded": RACE,
    "products of another type": "another value",
    "functions of pairs": "another value",
}


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("name", FAULTS)
def test_the_emulator_notices(emulator, name, order):
    """Without its fault a program is right. Both hold whenever asynchronous copies happen."""
    which = list(FAULTS).index(name)
    for copies in (0, 1, 2):
        assert emulator.library.emulate_fault(which, False, order, copies) is None
        error = emulator.library.emulate_fault(which, True, order, copies)
        assert error and re.search(FAULTS[name], error), error


def test_every_program_has_a_name(emulator):
    assert emulator.library.emulate_fault(len(FAULTS), False).startswith("no such program")


def test_tensor_core_instructions_match_the_formula(emulator):
    """A complex product of 16 x 16 numbers takes 8 instructions, and 4 where one side is real: 40 for 256 points there
    and back. What a row brings beside itself costs nothing."""
    for length, options in (
        (256, {}),
        (4096, {}),
        (4000, {}),
        (4096, {"pre_gate": True, "post_gate": True}),
    ):
        case = Case(2, 1, length, length, dtype=torch.float16, **options)
        before = emulator.library.tensor_products()
        with use_backend(OnDevice(emulator.device(FEW))):
            case.run(fftconv, case.tensors())
        tiles = 2 * max(256, 1 << (length - 1).bit_length()) // 256
        assert emulator.library.tensor_products() - before == 40 * tiles


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
