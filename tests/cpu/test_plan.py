"""How the CPU kernels cut a row: a pure function of its length and its kernel's."""

import random

import pytest

from seqconv.backends import cpu

SHORT = 32  # taps: up to here a direct sum


def smooth(n: int) -> bool:
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1


LENGTHS = [*range(1, 20_001), *(random.Random(0).randint(20_001, 1 << 22) for _ in range(2000))]


@pytest.mark.parametrize("double", [False, True])
def test_one_transform_covers_a_row_with_little_padding(isa, double):
    for length in LENGTHS:
        n, blocks = cpu.method(length, length, 0, double)
        if length <= SHORT:
            assert (n, blocks) == (0, 1)
            continue
        assert blocks == 1 and smooth(n)
        assert length <= n <= 1.25 * length, (length, n)


def test_short_kernels_take_blocks_that_cover_the_row_once(isa):
    draw = random.Random(1)
    cut = 0
    for length in LENGTHS[::7]:
        taps, taps_rev = draw.randint(0, length), draw.randint(0, length // 4)
        taps = min(taps, draw.choice([64, 256, 1000, length]))
        n, blocks = cpu.method(length, taps, min(taps_rev, length - 1), False)
        if n == 0:
            assert taps + taps_rev <= SHORT and blocks == 1
            continue
        assert smooth(n)
        # Every block is needed, and a transform is never longer than the row makes it.
        assert (blocks - 1) * n < length <= blocks * n
        if blocks > 1:
            cut += 1
            width = max(taps, 1) + taps_rev  # skip is part of tap 0
            assert width <= n <= 1.25 * max(length / 2, width, 256)
    assert cut > 100
