"""Packs divided among 2 and 3 processes against one process: values and every gradient, whatever row a cut divides."""

import pytest
from context_cases import ALL
from packed_parallel import rows, run_packed, run_packed_layers
from parallel_cases import zigzag
from processes import run

SIZES = {2: [[19, 18], [5, 26]], 3: [[13, 13, 11], [0, 20, 3]]}
STATES = ["s4d", "s4d, real", "s4d, two-sided", "s4d, shared sets", "s4d, dss"]
SOME = ["s4d, two-sided", "sgconv", "long_conv, short", "hyena, three kernels", "butterfly"]
OPTIONS = [
    {"taps": 40},
    {"taps": 0, "future": 3},
    {"taps": 1, "channels": 1},
    {"future": 50, "taps": 50, "layout": "blh", "activation": "gelu"},
    {"heads": 2, "future": 3, "layout": "blh", "gates": ("pre", "post"), "activation": "silu"},
    {"heads": 2, "per_row": True, "future": 2},
    {"gates": ("pre",), "channels": 4},
    {"gates": ("post",), "activation": "relu"},
]


@pytest.mark.parametrize("name", ALL)
def test_layers_equal_one_process(name):
    for world, (sizes, _) in SIZES.items():
        calls = [((name, sizes, lengths), {}) for lengths in rows(sizes).values()]
        assert max(run(world, run_packed_layers, calls)) < 1e-12


@pytest.mark.parametrize("method", ["a2a", "halo", "state"])
def test_methods(method):
    """Every layer with every pack, in one of the two divisions."""
    names = STATES if method == "state" else [name for name in SOME if name != "butterfly"]
    for world, sizes in SIZES.items():
        calls = [
            ((name, s, lengths), {"method": method})
            for i, name in enumerate(names)
            for j, s in enumerate(sizes)
            for k, lengths in enumerate(rows(s).values())
            if (i + j + k) % 2
        ]
        assert max(run(world, run_packed_layers, calls)) < 1e-12


@pytest.mark.parametrize("world", [2, 3])
def test_zigzag(world):
    sizes = zigzag(31, world)
    packs = rows(sizes, "zigzag").values()
    calls = [((n, sizes, lengths), {"order": "zigzag"}) for n in SOME for lengths in packs]
    assert max(run(world, run_packed_layers, calls)) < 1e-12
    states = {"order": "zigzag", "method": "state"}
    calls = [((n, sizes, lengths), states) for n in STATES for lengths in packs]
    assert max(run(world, run_packed_layers, calls)) < 1e-12


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_the_operator(world, order):
    divisions = SIZES[world] if order == "contiguous" else [zigzag(29, world)]
    calls = [
        ((sizes, lengths, method), options | {"order": order})
        for sizes in divisions
        for i, lengths in enumerate(rows(sizes, order).values())
        for method in ("a2a", "halo")
        for j, options in enumerate(OPTIONS)
        if (i + j) % 2
    ]
    assert max(run(world, run_packed, calls)) < 1e-12
