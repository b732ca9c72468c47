"""The machine code of the kernels, which is found prebuilt, was kept by an earlier call, or is compiled by NVRTC.

NVRTC needs no GPU. It is called through cuda.bindings, which are imported when the first kernel has to be compiled.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import uuid
import warnings
from pathlib import Path

import torch

from seqconv.backends.cuda import kernels

# Without -default-device NVRTC 12 takes generic lambdas for host code.
OPTIONS = ("-std=c++17", "-default-device")
OLDEST = (12, 8)  # release of cuda.bindings that will do
PACKAGED = Path(__file__).parents[2] / "cubins"
CACHE_BYTES = 256 << 20  # this holds some fifty states of all kernels of one architecture


class NoCompiler(RuntimeError):
    """NVRTC or its bindings are missing. The message says how to get them."""


def bindings_version() -> str:
    """The version of cuda.bindings, or "" where there are none that find NVRTC as a package and launch its kernels."""
    try:
        from cuda.bindings import __version__ as found
    except ImportError:
        return ""
    return found if tuple(map(int, found.split(".")[:2])) >= OLDEST else ""


def remedy() -> str:
    """The command that installs what is missing, however seqconv itself was installed."""
    found = bindings_version()
    cuda12 = (found or torch.version.cuda or "").startswith("12.")
    packages = ["nvidia-cuda-nvrtc-cu12" if cuda12 else "nvidia-cuda-nvrtc"]
    if not found:
        packages = ["--upgrade", "'cuda-python<13'" if cuda12 else "cuda-python", *packages]
    return f"pip install {' '.join(packages)}"


def _load(chosen: str) -> list[int]:
    """Loads an NVRTC by its file, since the bindings take what is loaded already. Returns its version, two numbers."""
    for path in sorted(Path(chosen).parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(path))  # some releases do not look for this file beside themselves
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(chosen).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return [major.value, minor.value]


@functools.cache
def nvrtc():
    """cuda.bindings.nvrtc with its library, which is the file that SEQCONV_NVRTC names or what the bindings find."""
    chosen = os.environ.get("SEQCONV_NVRTC")
    try:
        wanted = _load(chosen) if chosen else None
        from cuda.bindings import nvrtc as bindings

        _, *found = bindings.nvrtcVersion()
    except Exception as error:  # every release of the bindings raises something else
        text = (str(error) or repr(error)).splitlines()[0]
        named = chosen and not isinstance(error, ImportError)
        way = "SEQCONV_NVRTC must name the file libnvrtc.so.*" if named else remedy()
        raise NoCompiler(f"NVRTC, which compiles the kernels, is missing ({text}): {way}") from None
    if chosen and found != wanted:
        known, other = (".".join(map(str, pair)) for pair in (wanted, found))
        raise NoCompiler(
            f"SEQCONV_NVRTC={chosen} is NVRTC {known}, but cuda.bindings loaded {other}"
        )
    return bindings


@functools.cache
def version() -> str:
    """NVRTC's release to the last digit, such as 13.0.88, which only its output tells."""
    text = compile_source("", "sm_90", "ptx")
    found = re.search(r"release \S+ V(\S+)", text)
    return found[1] if found else text


def compiler_reason() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        version()
    except RuntimeError as error:
        return str(error)
    return None


def compile_source(source: str, arch: str, kind: str = "cubin", log=None, options: tuple = ()):
    """Compiles CUDA C++ for sm_XY: to a "cubin", machine code as bytes, or to "ptx", the text that it is made from.

    log is a file for what the compiler says. options are NVRTC's, and follow OPTIONS.
    """
    if kind not in ("cubin", "ptx"):
        raise ValueError(f"compile_source: kind must be 'cubin' or 'ptx', got {kind!r}")
    bindings = nvrtc()

    def call(function: str, *arguments):
        status, *values = getattr(bindings, function)(*arguments)
        if status:
            raise RuntimeError(f"seqconv: NVRTC: {function}: {status.name}")
        return values[0] if values else None

    def text(of: str) -> bytes:
        room = bytearray(call(f"nvrtcGet{of}Size", program))
        call(f"nvrtcGet{of}", program, room)
        return bytes(room)

    flags = [flag.encode() for flag in (f"-arch={arch}", *OPTIONS, *options)]
    program = call("nvrtcCreateProgram", source.encode(), b"seqconv.cu", 0, [], [])
    try:
        (status,) = bindings.nvrtcCompileProgram(program, len(flags), flags)
        said = text("ProgramLog").rstrip(b"\0").decode(errors="replace")
        if log is not None:
            log.write(said)
        if status:
            raise RuntimeError(f"seqconv: NVRTC for {arch}: {status.name}: {said.strip()}")
        return text("CUBIN") if kind == "cubin" else text("PTX").rstrip(b"\0").decode()
    finally:
        bindings.nvrtcDestroyProgram(program)


def compile_kernel(kernel: str, arch: str, cached: bool = True, log=None) -> bytes:
    """The kernel's machine code for sm_XY. Where cached, it is kept on disk by source, options and NVRTC's release."""
    source = kernels.source(kernel)
    if not cached:
        options = () if log is None else ("--ptxas-options=-v",)
        return compile_source(source, arch, log=log, options=options)
    state = hashlib.sha256(repr((source, arch, OPTIONS, version())).encode()).hexdigest()
    name = f"{kernel}-{arch}-{state[:32]}.seqconv"
    code = _kept(name)
    if code is None:
        code = compile_source(source, arch)
        try:
            _keep(name, code)
        except OSError as error:
            way = "every process compiles them anew; SEQCONV_CACHE names another folder"
            warnings.warn(f"seqconv: compiled kernels cannot be kept: {error}: {way}", stacklevel=2)
    return code


def cache_folder() -> Path:
    """Where compiled kernels are kept: SEQCONV_CACHE, or seqconv in the user's cache folder."""
    if os.environ.get("SEQCONV_CACHE"):
        return Path(os.environ["SEQCONV_CACHE"])
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None
    return Path(base) / "seqconv"


def _kept(name: str) -> bytes | None:
    """The code in a file of the cache, which ends with its SHA-256. A file that does not fit counts as missing."""
    with contextlib.suppress(OSError):
        path = cache_folder() / name
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() == data[-32:]:
            with contextlib.suppress(OSError):  # the folder may be for reading only
                os.utime(path)  # the files that were used last stay
            return data[:-32]
    return None


def _keep(name: str, code: bytes) -> None:
    """Writes a file as a whole, whoever else reads or writes. Then deletes the oldest files beyond CACHE_BYTES."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}{uuid.uuid4().hex}"  # a file of tempfile would be for this user only
    try:
        with open(part, "xb") as file:
            file.write(code + hashlib.sha256(code).digest())
        os.replace(part, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    found = []
    for path in folder.glob("*-sm_*.seqconv*"):
        with contextlib.suppress(FileNotFoundError):  # another process may delete files as well
            state = path.stat()
            found.append((state.st_mtime_ns, state.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= CACHE_BYTES:
            break
        with contextlib.suppress(PermissionError):  # it may be another user's in a shared folder
            path.unlink(missing_ok=True)
            total -= size


def prebuilt_folders() -> list[Path]:
    """The folders of prebuilt kernels in the order of the search: SEQCONV_CUBINS, then the installation's."""
    return [Path(f) for f in (os.environ.get("SEQCONV_CUBINS"),) if f] + [PACKAGED]


def find_prebuilt(kernel: str, major: int, minor: int) -> bytes | None:
    """The prebuilt code of a kernel, or None. Code for an earlier minor version of the architecture runs as well."""
    for lower in range(minor, -1, -1):
        for folder in prebuilt_folders():
            path = folder / kernels.cubin_name(kernel, f"sm_{major}{lower}")
            if path.is_file():
                return path.read_bytes()
    return None
