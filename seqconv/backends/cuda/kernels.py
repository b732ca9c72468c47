"""The kernels' source, which is one string for any compiler, and every instantiation that a plan can ask for.

This file imports nothing but the standard library, since setup.py loads it alone.
"""

import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

_HERE = Path(__file__).parent
_IO = {"f32": "float", "bf16": "bf16", "f16": "fp16"}
# Kernels that compute in float32 know these lengths, and take half the instructions: those powers of two of which one
# pass holds a row. The radices are those of lengths.factor.
KNOWN = {
    256: (16, 16),
    512: (2, 16, 16),
    1024: (4, 16, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
    8192: (2, 16, 16, 16),
    16384: (4, 16, 16, 16),
}
TILES = {
    32: (2, 16),
    64: (4, 16),
    128: (8, 16),
    **KNOWN,
}  # points of a stream's tiles, or of their pieces
_ROWS = 512  # threads of the largest block, as seqconv.backends.cuda.plan.MAX_THREADS says


class Kernel(NamedTuple):
    """A CUDA function: what its body calls, the structure of csrc/device that holds its arguments, the threads of its
    largest block, and how many blocks a multiprocessor should hold at least."""

    body: str
    arguments: str
    threads: int
    blocks: int = 1


_CONVOLUTION, _BUTTERFLY, _SSM = "ConvolutionArgs", "ButterflyArgs", "SsmArgs"
_PACKED, _STREAM = "PackedArgs", "StreamArgs"
KERNELS: dict[str, Kernel] = {
    "spectrum": Kernel("spectrum", _CONVOLUTION, _ROWS),
    "taps_divisors": Kernel("taps_divisors", _CONVOLUTION, _ROWS),
    "taps_gradient": Kernel("taps_gradients", _CONVOLUTION, _ROWS),
    "long_taps": Kernel("long_taps", _CONVOLUTION, _ROWS),
    "long_taps_gradient": Kernel("long_taps_gradient", _CONVOLUTION, _ROWS),
    "skip_gradient": Kernel("skip_gradient", "SkipArgs", 256, 4),
    "butterfly": Kernel("butterfly", _BUTTERFLY, 256),
    "butterfly_backward": Kernel("butterfly_backward", _BUTTERFLY, 256),
    "ssm_powers": Kernel("ssm_powers", _SSM, 128, 4),
    "ssm_forward": Kernel("ssm_forward", _SSM, 128, 5),
    "ssm_backward": Kernel("ssm_backward", _SSM, 128, 4),
    "ssm_gradients": Kernel("ssm_gradients", _SSM, 128, 4),
    "ssm_step": Kernel("ssm_step", "SsmStepArgs", 128, 8),
    "stream_step": Kernel("stream_step", _STREAM, 128, 8),
    "stream_clocks": Kernel("stream_clocks", _STREAM, 128),
    "stream_tiles": Kernel("stream_tiles", _STREAM, _ROWS),
    "stream_spectra": Kernel("stream_spectra", _STREAM, _ROWS),
}
for _suffix, _type in (*_IO.items(), ("c32", "c32")):
    for _name in ("forward", "backward"):
        KERNELS[f"{_name}_{_suffix}"] = Kernel(f"{_name}<{_type}>", _CONVOLUTION, _ROWS)
for _suffix, _type in _IO.items():
    KERNELS[f"bias_sums_{_suffix}"] = Kernel(f"bias_sums<{_type}>", _CONVOLUTION, 256, 4)
    for _name in ("long_input", "long_gradient", "long_output", "long_input_gradient"):
        KERNELS[f"{_name}_{_suffix}"] = Kernel(f"{_name}<{_type}>", _CONVOLUTION, _ROWS)
for _n, _radices in TILES.items():
    _packed = sum(r << (8 * i) for i, r in enumerate(_radices))
    _shape = f"KnownTransform<{_n}, {len(_radices)}, {_packed}>"
    _threads = 256 if _n <= 4096 else _ROWS
    _blocks = 3 if _radices[0] == 16 else 512 // _threads
    _tile = f"stream_tile<{_shape}>"
    KERNELS[f"stream_tile_{_n}"] = Kernel(_tile, _STREAM, _threads, 512 // _threads)
    if _n not in KNOWN:
        continue
    for _suffix, _type in _IO.items():
        KERNELS[f"forward_{_suffix}_{_n}"] = Kernel(
            f"forward<{_type}, {_shape}>", _CONVOLUTION, _threads, _blocks
        )
        if _n < 16384:  # backward takes two rows in shared memory
            KERNELS[f"backward_{_suffix}_{_n}"] = Kernel(
                f"backward<{_type}, {_shape}>", _CONVOLUTION, _threads
            )

# Those that read or write rows, or taps of a row's own, also find rows in packs.
_OF_ROWS = ("spectrum", "taps_gradient", "bias_sums", "long_", "forward_", "backward_")
for _name, _kernel in list(KERNELS.items()):
    if _name.startswith(_OF_ROWS) and not _name.endswith("_c32"):
        KERNELS[f"packed_{_name}"] = _kernel._replace(arguments=_PACKED)


class HalfShape(NamedTuple):
    """A kernel for 16-bit rows on tensor cores: Shape of csrc/device/half_shape.cuh. Its block has `slots` teams of
    `warps` warps, each of which works on `pair` rows together."""

    points: int
    warps: int
    slots: int
    pair: int
    blocks: int  # of a multiprocessor, which its registers suffice for
    flags: int

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.slots

    @property
    def whole_twiddles(self) -> bool:
        """Whether twiddles lie whole in shared memory, and the taps' spectrum beside them."""
        return self.points <= 4096 or bool(self.points == 8192 and self.flags & PIECES)

    @property
    def shared(self) -> int:
        """The bytes of shared memory of a block."""
        n, rows = self.points, self.points // 256
        split = max(1, rows // 16)
        planes = (3 if self.flags & PIECES else 2) + (self.flags & GATED).bit_count()
        pads = (
            self.slots * self.pair * planes * rows // 32
        )  # matrices for which the rows' ends have room
        absorbs = split == 2 or (split == 4 and pads >= 12)
        tables = 8 * n if self.whole_twiddles else 4 * 4096 + (split - 1) * 1024
        tables += {2: 16, 8: 11}.get(split, 12) * 512 + (0 if absorbs else (split - 1) * 64)
        plane = rows * 16 * (34 if rows <= 4 else 33)
        return tables + self.slots * self.pair * (planes * plane + 64)


PIECES, WHOLE, PRE_GATE, POST_GATE, GELU, SLOPE = (1 << i for i in range(6))  # enum Flags
GATED = PRE_GATE | POST_GATE
# The forms of a kernel: what its rows are like and what it does beside the convolution.
_BESIDE = {"": 0, "_gelu": GELU, "_slope": GELU | SLOPE | POST_GATE, "_gated": GATED}
FORMS = {
    **{name: PIECES | WHOLE | flags for name, flags in _BESIDE.items()},
    **{f"_ragged{name}": PIECES | flags for name, flags in _BESIDE.items()},
    "_any": 0,
}
# Warps, slots, pair and blocks for each number of points, of rows in pieces, those with gates, and any rows.
_FORWARD = {
    256: ((1, 8, 1, 2), (1, 8, 1, 2), (1, 8, 1, 2)),
    512: ((1, 8, 1, 2), (1, 8, 1, 2), (1, 8, 1, 2)),
    1024: ((1, 8, 1, 2), (1, 7, 1, 2), (1, 8, 1, 2)),
    2048: ((2, 4, 1, 2), (2, 3, 1, 2), (2, 4, 1, 2)),
    4096: ((4, 2, 1, 2), (4, 2, 2, 1), (4, 2, 1, 2)),
    8192: ((4, 3, 1, 1), (8, 1, 1, 1), (8, 2, 1, 1)),
    16384: ((8, 2, 1, 1), (16, 1, 1, 1), (8, 1, 1, 2)),
    32768: ((16, 1, 1, 1), None, (16, 1, 1, 1)),
}
_BACKWARD = {
    256: ((1, 6, 2, 2), (1, 6, 2, 2), (1, 6, 2, 2)),
    512: ((1, 6, 2, 2), (1, 6, 2, 2), (1, 6, 2, 2)),
    1024: ((1, 6, 2, 2), (1, 4, 2, 2), (1, 6, 2, 2)),
    2048: ((2, 3, 2, 2), (2, 2, 2, 2), (2, 3, 2, 2)),
    4096: ((4, 3, 2, 1), (4, 2, 2, 1), (4, 1, 2, 2)),
    8192: ((8, 1, 2, 1), (8, 1, 2, 1), (8, 1, 2, 1)),
    16384: ((16, 1, 2, 1), None, (8, 1, 1, 2)),
    32768: ((16, 1, 1, 1), None, (16, 1, 1, 1)),
}
HALF_POINTS = tuple(_FORWARD)


def half_shape(backward: bool, n: int, form: str) -> HalfShape | None:
    """The shape of the kernel of this form for n points, or None where any rows' kernel serves instead."""
    flags, rows = FORMS[form], (_BACKWARD if backward else _FORWARD)[n]
    # For the longest rows registers do not suffice for gelu. Gradients have it behind them.
    if flags & GELU and (backward or n == 32768):
        return None
    if backward:
        flags &= ~POST_GATE  # the kernel has post_gate beside dy, as it has pre_gate beside u
    few = flags & GATED or (flags & GELU and n == 16384)  # rows that take more memory or registers
    chosen = rows[2 if not flags & PIECES else 1 if few else 0]
    return chosen and HalfShape(n, *chosen, flags)


def suffixes(form: str) -> tuple[str, ...]:
    """The types of a form's rows. fp16 has not the range for a gradient that is rounded on its way."""
    return ("bf16",) if FORMS[form] & SLOPE else ("bf16", "f16")


HALF_SHAPES: dict[str, HalfShape] = {}  # by the names of kernels
for _back, _name in enumerate(("forward", "backward")):
    for _n in HALF_POINTS:
        for _form in FORMS:
            _shape = half_shape(bool(_back), _n, _form)
            for _suffix in suffixes(_form) if _shape else ():
                _numbers = ", ".join(map(str, (*_shape[:4], _shape.flags)))
                HALF_SHAPES[f"half_{_name}_{_suffix}_{_n}{_form}"] = _shape
                KERNELS[f"half_{_name}_{_suffix}_{_n}{_form}"] = Kernel(
                    f"half_{_name}<{_IO[_suffix]}, Shape<{_numbers}>>",
                    _CONVOLUTION,
                    _shape.threads,
                    _shape.blocks,
                )

# Whole sources, by name, of kernels that are no part of the package: bench/on_gpu measures a device with them.
GUESTS: dict[str, str] = {}


def folder() -> Path:
    """csrc/device, which lies beside the package in a checkout and inside it in an installation."""
    package = _HERE.parents[1]
    for candidate in (package / "csrc" / "device", package.parent / "csrc" / "device"):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"seqconv: no csrc/device beside {package}: reinstall seqconv")


@functools.cache
def headers() -> str:
    """The headers as one text, in the order of their includes. So compilers need no include paths."""
    seen: list[str] = []

    def read(name: str) -> str:
        if name in seen:
            return ""
        seen.append(name)
        text = (folder() / name).read_text().replace("#pragma once\n", "")
        return re.sub(r'#include "(\S+)"\n', lambda match: read(match[1]), text)

    names = ("half_gradients", "long_rows", "butterfly", "ssm", "ssm_step", "stream")
    return "".join(read(f"{name}.cuh") for name in names)


def source(name: str) -> str:
    """The translation unit of one kernel, named `name` in the object code."""
    if name in GUESTS:
        return GUESTS[name]
    kernel = KERNELS[name]
    return (
        f"{headers()}\nSEQCONV_KERNEL({kernel.threads}, {kernel.blocks}) {name}(const {kernel.arguments} a) {{\n"
        f"  SEQCONV_SHARED(shared);\n  {kernel.body}(a, shared);\n}}\n"
    )


def names(arch: str) -> list[str]:
    """The names of the kernels that run on sm_XY. The tensor cores' instructions came with 8.0."""
    older = int(arch.removeprefix("sm_")) < 80
    return [name for name in KERNELS if not (older and name.startswith("half"))]


def cubin_name(name: str, arch: str) -> str:
    """The name of a prebuilt kernel's file, which fits one state of the source only."""
    digest = hashlib.sha256(source(name).encode()).hexdigest()[:16]
    return f"{name}-{arch}-{digest}.cubin"
