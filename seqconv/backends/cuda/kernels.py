"""The kernels' source: one string for any compiler, and every instantiation that a plan can ask for.

Imports nothing but the standard library: setup.py loads this file alone.
"""

import functools
import hashlib
import re
from pathlib import Path

_HERE = Path(__file__).parent
_IO = {"f32": "float", "bf16": "bf16", "f16": "fp16"}
# Lengths whose transforms on tensor cores have kernels of their own, with sums in fp16 (convolution.py): known
# when they are compiled, a sixth to a quarter fewer instructions. The radices are seqconv.backends.cuda.plan.factor's.
FIXED = {
    1024: (4, 16, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
    8192: (2, 16, 16, 16),
    16384: (4, 16, 16, 16),
    32768: (8, 16, 16, 16),
}
_ROWS = 512  # threads of the largest block: seqconv.backends.cuda.plan.MAX_THREADS

# name -> (what its body calls, threads at most, blocks at least that a multiprocessor should hold)
KERNELS: dict[str, tuple[str, int, int]] = {
    "spectrum": ("spectrum", _ROWS, 1),
    "kernel_scales": ("kernel_scales", _ROWS, 1),
    "taps_gradient": ("taps_gradient_kernel", _ROWS, 1),
    "skip_gradient": ("skip_gradient", 256, 4),
    "long_taps": ("long_taps", _ROWS, 1),
    "butterfly": ("butterfly", 256, 1),
    "butterfly_backward": ("butterfly_backward", 256, 1),
    "long_taps_gradient": ("long_taps_gradient", _ROWS, 1),
    "ssm_powers": ("ssm_powers", 128, 4),
    "ssm_forward": ("ssm_forward", 128, 5),
    "ssm_backward": ("ssm_backward", 128, 4),
    "ssm_gradients": ("ssm_gradients", 128, 4),
}
for _suffix, _type in (*_IO.items(), ("c32", "c32")):
    for _name in ("forward", "backward"):
        KERNELS[f"{_name}_{_suffix}"] = (f"{_name}<{_type}>", _ROWS, 1)
for _suffix, _type in _IO.items():
    for _name in ("long_input", "long_gradient", "long_output", "long_input_gradient"):
        KERNELS[f"{_name}_{_suffix}"] = (f"{_name}<{_type}>", _ROWS, 1)
for _suffix in ("bf16", "f16"):
    for _mode, _number in (("fast", "u32"), ("accurate", "Pair")):
        for _name in ("forward", "backward"):
            _body = f"tensor_{_name}<{_IO[_suffix]}, {_number}>"
            KERNELS[f"tensor_{_name}_{_suffix}_{_mode}"] = (_body, _ROWS, 1)
for _n, _radices in FIXED.items():
    _packed = sum(r << (8 * i) for i, r in enumerate(_radices))
    _fixed = f"FixedTransform<{_n}, {len(_radices)}, {_packed}>"
    for _suffix in ("bf16", "f16"):
        for _name in ("forward", "backward"):
            _body = f"tensor_{_name}<{_IO[_suffix]}, u32, {_fixed}>"
            KERNELS[f"tensor_{_name}_{_suffix}_fast_{_n}"] = (_body, _ROWS, 1)

# Whole sources of kernels that are no part of the package, by name: what bench/on_gpu measures a device with.
GUESTS: dict[str, str] = {}


def folder() -> Path:
    """csrc/device: beside the package in a checkout, inside it in an installation."""
    package = _HERE.parents[1]
    for candidate in (package / "csrc" / "device", package.parent / "csrc" / "device"):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"seqconv: no csrc/device beside {package}: reinstall seqconv")


@functools.cache
def headers() -> str:
    """The headers in the order of their includes, as one text: NVRTC's cache knows no include paths."""
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
    body, threads, blocks = KERNELS[name]
    return (
        f"{headers()}\nSEQCONV_KERNEL({threads}, {blocks}) {name}(const Args a) {{\n"
        f"  SEQCONV_SHARED(shared);\n  {body}(a, shared);\n}}\n"
    )


def names(arch: str) -> list[str]:
    """What runs on sm_XY: the tensor cores' instructions came with 8.0."""
    older = int(arch.removeprefix("sm_")) < 80
    return [name for name in KERNELS if not (older and name.startswith("tensor"))]


def cubin_name(name: str, arch: str) -> str:
    """A prebuilt kernel's file: it fits one state of the source only."""
    digest = hashlib.sha256(source(name).encode()).hexdigest()[:16]
    return f"{name}-{arch}-{digest}.cubin"
