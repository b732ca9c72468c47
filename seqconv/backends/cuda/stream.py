"""Steps of a stream on a device, and the spectra of its tiles (see seqconv.ops.stream), in float32.

The kernels are those of csrc/device/stream.cuh. A step allocates nothing, and packs only what differs from one step of
a stream to the next: its signals and the clock.
"""

import functools
from array import array

import torch
from torch import Tensor

from seqconv.backends.cuda.arguments import STREAM, address, arguments
from seqconv.backends.cuda.kernels import KERNELS, TILES
from seqconv.backends.cuda.lengths import radix_bytes
from seqconv.backends.cuda.problem import Limits
from seqconv.backends.cuda.tables import build
from seqconv.backends.pack import ACTIVATIONS, STEP, pack
from seqconv.backends.protocol import BLOCK
from seqconv.backends.tiles import GROUP, TOGETHER

STEP_THREADS, ROW_LANES = 128, 8  # of a block, and of a row
CLOCK_THREADS = 128
MOST_THREADS = 512  # of a block that transforms a piece of a tile
_NOW, _POINTS, _TABLES, _SIGNALS = (STREAM.places[n] for n in ("now", "points", "tables", "u"))
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def largest(limits: Limits, period: int) -> int:
    """The points of the largest piece of a tile: what one block transforms."""
    return max(n for n in TILES if n <= period and radix_bytes(n) <= limits.shared)


def table(most: int) -> Tensor:
    """The tables of transforms of BLOCK, 2 BLOCK, ..., `most` points; that of n points at 2 (n - BLOCK)."""
    found = torch.zeros(4 * most - 2 * BLOCK, dtype=torch.complex64)
    for n, radices in TILES.items():
        if n <= most:
            made = build(n, radices, len(radices) - 1, True)
            found[2 * (n - BLOCK) :][: len(made)] = made
    return found


def _any_threads(points: int) -> int:
    """Threads of a block whose transform has up to so many points, 16 to a thread."""
    return min(MOST_THREADS, max(32, points // 16))


def spectra(device, k: Tensor, period: int) -> Tensor:
    """Complex, of taps (heads, channels, count), contiguous: for every middle lag the points of a piece for each row.

    The middle lags are BLOCK, 2 BLOCK, ..., m for pieces of as many points, then 2 m, 3 m, ..., period for those of m,
    the most that a block transforms.
    """
    heads, channels, count = k.shape
    most = largest(device.limits, period)
    made = k.new_empty(heads * channels * (period + most - BLOCK), 2)
    if made.numel():
        fields = _sizes(1, heads, channels, period, most, "none")
        fields |= {"count": count, "k": k, "spectra": made, "tables": device.table(table, most)}
        lags = (most // BLOCK).bit_length() - 1 + period // most
        launch = (heads * channels * lags, _any_threads(most), radix_bytes(most))
        device.launch("stream_spectra", *launch, arguments("stream_spectra", **fields))
    return made


def _sizes(batch, heads, channels, period, most, activation: str) -> dict:
    sizes = {"batch": batch, "heads": heads, "channels": channels, "period": period}
    more = {"activation": ACTIVATIONS[activation], "largest": most, "now": 0, "points": 0}
    return sizes | more | {"count": 0}


@functools.lru_cache(1024)
def _kept(sizes: tuple, clock: int, inputs: int, sums: int, taps: int, spectra: int) -> array:
    """The arguments of a stream as far as they are the same at every step: sizes and addresses."""
    given = {"clock": clock, "inputs": inputs, "sums": sums, "taps": taps, "spectra": spectra}
    return arguments("stream_step", **_sizes(*sizes), **given)


def step(
    device, y, u, pre_gate, post_gate, rings, taps, spectra, activation: str, spread: bool
) -> None:
    """One step of all rows. Reads the clock on the host, or with `spread` on the device alone."""
    inputs, sums, clock = rings
    batch, heads, channels = y.shape
    period = inputs.shape[1] * BLOCK
    most = spectra.numel() // (2 * heads * channels) - period + BLOCK
    signals = u, pre_gate, post_gate, y
    _check(device, rings, signals, most, spread)
    memories = clock.data_ptr() if spread else 0, inputs.data_ptr(), sums.data_ptr()
    sizes = batch, heads, channels, period, most, activation
    told = _kept(sizes, *memories, taps.data_ptr(), spectra.data_ptr())[:]
    told[_SIGNALS:] = array("q", [word for t in signals for word in pack(t, STEP)])
    rows = -(-batch * channels // (STEP_THREADS // ROW_LANES))
    if spread:
        constants = device.table(table, most)  # kept until the launches
        told[_TABLES] = address(constants)
        due = -(-channels // (2 * GROUP)) * TOGETHER  # channels, at most
        blocks = batch * heads * (period // most) * due
        device.launch("stream_step", rows, STEP_THREADS, 0, told)
        device.launch("stream_tiles", blocks, _any_threads(most), radix_bytes(most), told)
        device.launch("stream_clocks", -(-batch // CLOCK_THREADS), CLOCK_THREADS, 0, told)
        return
    if device.table.capturing():
        raise RuntimeError(
            "stream: a CUDA graph would repeat the step that it has captured, at the same clock; use a spread state"
        )
    now, *others = sorted(set(clock.tolist()))
    if others:  # Rows of several states: each by itself.
        for b in range(batch):
            row = [None if t is None else t.narrow(0, b, 1) for t in (*signals, *rings)]
            y, *given = row[3], *row[:3], type(rings)(*row[4:])
            step(device, y, *given, taps, spectra, activation, False)
        return
    told[_NOW] = now
    device.launch("stream_step", rows, STEP_THREADS, 0, told)
    end = now + 1
    if end % BLOCK == 0:
        points = told[_POINTS] = end & -end
        constants = device.table(table, most)
        told[_TABLES] = address(constants)
        piece = min(points, most)
        launch = _tiles(piece, points // piece, batch * heads * channels, device.limits)
        device.launch(f"stream_tile_{piece}", *launch, told)
    clock.fill_(end % period)


@functools.lru_cache(1024)
def _tiles(piece: int, pieces: int, rows: int, limits: Limits) -> tuple[int, int, int]:
    """Grid, threads and shared memory. A block has one row whose tile has pieces, or else whole warps of rows: as few
    as give every multiprocessor its blocks."""
    kernel = KERNELS[f"stream_tile_{piece}"]
    team = min(MOST_THREADS, piece // 16)  # KnownTransform of csrc/device/transform.cuh says so
    slots = 1
    if pieces == 1:
        most = min(kernel.threads // team, limits.shared // radix_bytes(piece))
        few, warp = -(-rows // (kernel.blocks * limits.processors)), max(1, 32 // team)
        slots = min(most, -(-few // warp) * warp)
    return -(-rows * pieces // slots), slots * team, slots * radix_bytes(piece)


def _check(device, rings, signals, most: int, spread: bool) -> None:
    """The kernels trust what they are told."""
    inputs, sums, clock = rings
    for name, t in (("inputs", inputs), ("sums", sums)):
        if t.dtype != torch.float32 or not t.is_contiguous():
            found = f"{t.dtype} with strides {t.stride()}"
            raise ValueError(f"stream: {name} must be contiguous float32 on a GPU, got {found}")
    if any(t is not None and t.dtype not in _FLOATS for t in signals):
        found = [None if t is None else t.dtype for t in signals]
        raise TypeError(
            f"stream: u, pre_gate and post_gate of a float32 state must be float32 or 16 bits wide, got {found[:3]}"
        )
    if spread and clock.device != inputs.device:
        found = f"{clock.device} and {inputs.device}"
        raise ValueError(
            f"stream: a spread state's clock and inputs must be on one device, got {found}"
        )
    if most not in TILES or radix_bytes(most) > device.limits.shared:
        raise ValueError(
            f"stream: this device has no tiles of {most} points, as the kernel's spectra have; make them anew"
        )
