"""parallel.fftconv on 1 to 4 processes against fftconv in one: values and every gradient."""

import pytest
from parallel_cases import run_cases, zigzag
from processes import run

SIZES = {
    1: [[13]],
    2: [[7, 6], [13, 0], [0, 13], [1, 30]],
    3: [[5, 4, 4], [3, 0, 8], [17, 1, 1]],
    4: [[8, 8, 8, 7], [2, 2, 2, 1], [0, 0, 0, 5], [1, 1, 29, 0]],
}
OPTIONS = [
    {},
    {"taps": 40, "skip": False},
    {"taps": 0},
    {"taps": 1, "channels": 1},
    {"future": 4, "activation": "gelu"},
    {"future": 50, "taps": 50, "layout": "blh"},
    {"mode": "circular", "taps": 5},
    {"heads": 3, "taps": 9, "bias": True, "activation": "silu"},
    {"heads": 2, "future": 3, "layout": "blh", "gates": ("pre", "post"), "activation": "gelu"},
    {"heads": 2, "per_sample": True, "future": 2},
    {"gates": ("pre", "post"), "channels": 3},
    {"gates": ("post",), "bias": True, "activation": "relu", "layout": "blh"},
    {"batch": 1, "channels": 11, "taps": 3, "layout": "blh"},
]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equal_to_one_process(world):
    cases = [(sizes, options) for sizes in SIZES[world] for options in OPTIONS]
    assert max(run(world, run_cases, cases, ["a2a", "halo", "auto"])) < 1e-12


@pytest.mark.parametrize("world", [2, 3, 4])
def test_zigzag(world):
    cases = [(zigzag(n, world), {"order": "zigzag"} | o) for n in (31, 40, 5) for o in OPTIONS]
    assert max(run(world, run_cases, cases, ["a2a", "halo"])) < 1e-12
