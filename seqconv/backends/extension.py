"""The compiled extension seqconv._C: whether it is there, torch's threads that it is lent, and its instruction set."""

import ctypes
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

try:
    from seqconv import _C
except ImportError as error:
    _C = None
    _folder = Path(__file__).resolve().parents[2]
    _why = f"does not load ({error})" if find_spec("seqconv._C") else "is not installed"
    missing = f"the compiled extension seqconv._C {_why}"
    if (_folder / "setup.py").exists():
        missing = (
            f"the compiled extension seqconv._C {_why} in the source folder {_folder}, which Python took for the "
            f"package: pip install --editable '{_folder}' builds it there; or start Python in another folder"
        )
    text = f"seqconv: {missing}; fftconv takes torch.fft, slower: see python -m seqconv"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
else:
    missing = ""


def _lend_threads() -> bool:
    """Hands torch's stable C function torch_parallel_for to the extension; without it, it runs serially."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        function = ctypes.cast(library.torch_parallel_for, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return False
    _C.set_parallel_for(function)
    return True


threaded = _C is not None and _lend_threads()
if (
    _C is not None
    and os.environ.get("SEQCONV_CPU_ISA")
    and not _C.set_isa(os.environ["SEQCONV_CPU_ISA"])
):
    raise ValueError(
        f"SEQCONV_CPU_ISA={os.environ['SEQCONV_CPU_ISA']} does not run on this processor or is unknown"
    )


def compiler() -> str:
    return _C.compiler()


def set_isa(name: str) -> bool:
    """False if the processor cannot run it."""
    return _C.set_isa(name)


def isa() -> str:
    return _C.isa()


def threads() -> int:
    return torch.get_num_threads() if threaded and not _C.forked() else 1


# ---- comparison: of memory by same_bytes(address, address, bytes, ...), and of dictionaries, pair by pair, by
# same_items(dict, dict, ...): whether they hold the same objects under the same names in the same order ----

same_bytes: Any = getattr(_C, "same_bytes", None)
same_items: Any = getattr(_C, "same_items", None)
