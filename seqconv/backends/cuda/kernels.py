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
# For these lengths the transform on tensor cores with sums in fp16 has kernels of its own. They know their length when
# they are compiled, and take a sixth to a quarter fewer instructions. The radices are those of lengths.factor.
FIXED = {
    1024: (4, 16, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
    8192: (2, 16, 16, 16),
    16384: (4, 16, 16, 16),
    32768: (8, 16, 16, 16),
}
_ROWS = 512  # threads of the largest block, as seqconv.backends.cuda.plan.MAX_THREADS says


class Kernel(NamedTuple):
    """A CUDA function: what its body calls, the structure of csrc/device that holds its arguments, the threads of its
    largest block, and how many blocks a multiprocessor should hold at least."""

    body: str
    arguments: str
    threads: int
    blocks: int = 1


_CONVOLUTION, _BUTTERFLY, _SSM = "ConvolutionArgs", "ButterflyArgs", "SsmArgs"
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
}
for _suffix, _type in (*_IO.items(), ("c32", "c32")):
    for _name in ("forward", "backward"):
        KERNELS[f"{_name}_{_suffix}"] = Kernel(f"{_name}<{_type}>", _CONVOLUTION, _ROWS)
for _suffix, _type in _IO.items():
    for _name in ("long_input", "long_gradient", "long_output", "long_input_gradient"):
        KERNELS[f"{_name}_{_suffix}"] = Kernel(f"{_name}<{_type}>", _CONVOLUTION, _ROWS)
for _suffix in ("bf16", "f16"):
    for _mode, _number in (("fast", "u32"), ("accurate", "Pair")):
        for _name in ("forward", "backward"):
            _body = f"tensor_{_name}<{_IO[_suffix]}, {_number}>"
            KERNELS[f"tensor_{_name}_{_suffix}_{_mode}"] = Kernel(_body, _CONVOLUTION, _ROWS)
for _n, _radices in FIXED.items():
    _packed = sum(r << (8 * i) for i, r in enumerate(_radices))
    _fixed = f"FixedTransform<{_n}, {len(_radices)}, {_packed}>"
    for _suffix in ("bf16", "f16"):
        for _name in ("forward", "backward"):
            _body = f"tensor_{_name}<{_IO[_suffix]}, u32, {_fixed}>"
            KERNELS[f"tensor_{_name}_{_suffix}_fast_{_n}"] = Kernel(_body, _CONVOLUTION, _ROWS)

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

    return read("tensor_fftconv.cuh") + read("butterfly.cuh") + read("ssm.cuh")


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
    return [name for name in KERNELS if not (older and name.startswith("tensor"))]


def cubin_name(name: str, arch: str) -> str:
    """The name of a prebuilt kernel's file, which fits one state of the source only."""
    digest = hashlib.sha256(source(name).encode()).hexdigest()[:16]
    return f"{name}-{arch}-{digest}.cubin"
