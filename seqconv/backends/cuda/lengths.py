"""The lengths that transforms can have, their radices, and the shared memory that a row takes."""

import functools

RADICES = (2, 3, 4, 5, 8, 16)  # the kernels have butterflies of these
LAST = 16  # the last radix of every transform
INNER = 256  # tensor cores keep so many points in registers
MAX_PASSES = 8  # the kernels take the radices as the bytes of one number


def radix_bytes(n: int) -> int:
    """The bytes of a row of complex float32 in shared memory, which is one element wider every 16."""
    return 8 * (n + n // 16 + 1)


def split(m: int) -> tuple[int, ...] | None:
    """m as a product of few radices, which ascend up to the 16s at the end. None if there is no such product."""
    odd = []
    for radix in (5, 3):
        while m % radix == 0:
            m, odd = m // radix, [radix, *odd]
    if m < 1 or m & (m - 1):
        return None
    twos = m.bit_length() - 1
    small = [2 ** (twos % 4)] if twos % 4 else []
    return (*sorted(small + odd), *[16] * (twos // 4))


@functools.lru_cache(4096)
def factor(n: int) -> tuple[int, ...] | None:
    """The radices of a transform of n points: at least two, and 16 is the last. None if there are none."""
    found = split(n // LAST) if n % LAST == 0 and n >= 2 * LAST else None
    return None if found is None else (*found, LAST)


@functools.lru_cache(64)
def sizes(limit: int) -> tuple[int, ...]:
    """All transform lengths up to limit, in ascending order."""
    powers = lambda base: [base**i for i in range(limit.bit_length()) if base**i <= limit]  # noqa: E731
    found = {LAST * a * b * c for a in powers(2) for b in powers(3) for c in powers(5)}
    return tuple(sorted(n for n in found if 2 * LAST <= n <= limit))


@functools.lru_cache(1024)
def outer_length(least: int) -> int:
    """The smallest outer length from `least` on that the radices give."""
    fits = lambda m: len(split(m) or range(99)) <= MAX_PASSES  # noqa: E731
    return next(m for m in range(max(least, 2), 2 * least + 3) if fits(m))
