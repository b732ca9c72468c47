"""Layers under context parallelism on 1 to 4 processes against one process: values and every gradient."""

import pytest
from context_cases import ALL, run_layers
from processes import run

SIZES = {
    1: [[37]],
    2: [[19, 18], [5, 32], [0, 23]],
    3: [[13, 13, 11]],
    4: [[10, 10, 10, 7], [0, 20, 3, 0]],
}


@pytest.mark.parametrize("name", ALL)
def test_equal_to_one_process(name):
    for world, sizes in SIZES.items():
        calls = [((name, s), {}) for s in sizes]
        assert max(run(world, run_layers, calls)) < 1e-12
