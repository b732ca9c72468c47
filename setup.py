"""Builds seqconv._C, or, where that is impossible, a pure Python package that does the same with torch.fft.

Everything else is declared in pyproject.toml. Only what is being built on counts: no GPU, torch or
CUDA is looked for. With SEQCONV_BUILD_CUBINS=1 (or a list, sm_90,sm_100) nvcc compiles the CUDA kernels
into the wheel, which then needs no NVRTC on those architectures.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.sysconfig import customize_compiler
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

WINDOWS = sys.platform == "win32"
if WINDOWS:  # the options of clang-cl
    COMPILE_ARGS, LINK_ARGS = ["/std:c++17", "/EHsc", "/clang:-O3"], []
else:
    COMPILE_ARGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    # Deallocation by size is not in the libstdc++ of manylinux_2_17.
    COMPILE_ARGS.append("-fno-sized-deallocation")
    LINK_ARGS = ["-pthread"]
# The C API of free-threaded builds has no stable subset.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

# In the code that g++ makes for Windows, AVX's vectors may lie on addresses at which they crash.
PROBE = """
#include <Python.h>
#if defined(_WIN32)
#if !defined(__clang__)
#error "on Windows the kernels need clang-cl"
#endif
#else
#include <pthread.h>
#endif
#include <memory>
typedef float Vector __attribute__((vector_size(32)));
extern "C" float probe(const float* x) { Vector v = {}; auto p = std::make_unique<int>(1); return (v
+ x[*p])[0]; }
#if defined(__x86_64__)
#include <immintrin.h>
extern "C" __attribute__((target("avx2,fma"))) void add(const float* x, float* y) {
  const __m256 v = _mm256_loadu_ps(x);
  if (__builtin_cpu_supports("avx2")) _mm256_storeu_ps(y, _mm256_fmadd_ps(v, v, v));
}
#endif
"""


def choose(compiler):
    """Of the compilers for Windows only clang-cl knows the vectors that the kernels are written in."""
    if WINDOWS and compiler.compiler_type == "msvc" and shutil.which("clang-cl"):
        compiler.initialize()
        compiler.cc = shutil.which("clang-cl")
    return compiler


def why_not_buildable() -> str | None:
    """Compiles and links a few lines with everything the extension needs from the machine."""
    command = build_ext(Distribution())
    command.finalize_options()
    compiler = new_compiler()
    customize_compiler(compiler)
    try:
        choose(compiler)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(PROBE)
            options = {"include_dirs": command.include_dirs, "extra_postargs": COMPILE_ARGS}
            objects = compiler.compile([str(source)], output_dir=folder, **options)
            compiler.link_shared_object(objects, str(Path(folder, "probe.so")), target_lang="c++")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def extensions() -> list[Extension]:
    reason = why_not_buildable()
    if reason is not None:
        print(
            "\nWARNING: seqconv is installed without its compiled CPU kernels: it works, but slower, on torch.fft.\n"
            "They need a C++17 compiler (g++ or clang; on Windows clang-cl) and the headers of this Python\n"
            "(Debian: g++ python3-dev).\n"
            f"What failed: {reason}\n",
            file=sys.stderr,
        )
        return []
    csrc = Path("csrc")
    headers = sorted(str(p) for p in csrc.rglob("*.h"))
    sources = sorted(str(p) for p in (*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")))
    return [
        Extension(
            "seqconv._C",
            sources=sources,
            depends=headers,
            language="c++",
            define_macros=[("Py_LIMITED_API", "0x030a0000")] if STABLE_ABI else [],
            py_limited_api=STABLE_ABI,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
            # Elsewhere no one has tried: a failure leaves the package on torch.fft, which warns.
            optional=not sys.platform.startswith("linux"),
        )
    ]


class BuildInParallel(build_ext):
    """Compiles several files at a time: some take a quarter of a minute."""

    def build_extensions(self):
        compile_in_turn = choose(self.compiler).compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_in_turn([source], **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_all
        super().build_extensions()


class BuildWithCubins(build_py):
    """Adds seqconv/cubins, where SEQCONV_BUILD_CUBINS asks for it."""

    def run(self):
        super().run()
        out = Path(self.build_lib, "seqconv", "cubins")
        shutil.rmtree(out, ignore_errors=True)  # of an earlier build
        asked = os.environ.get("SEQCONV_BUILD_CUBINS", "0")
        if asked == "0" or self.editable_mode:
            return
        archs = ["sm_80", "sm_90", "sm_100", "sm_120"] if asked == "1" else asked.split(",")
        path = Path("seqconv", "backends", "cuda", "kernels.py").resolve()
        spec = importlib.util.spec_from_file_location("kernels", path)
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        if shutil.which("nvcc") is None:
            raise SystemExit("seqconv: SEQCONV_BUILD_CUBINS needs nvcc, which is not on the PATH")
        out.mkdir(parents=True, exist_ok=True)
        only = os.environ.get("SEQCONV_BUILD_KERNELS")  # names, for a quick check
        for arch in archs:
            for name in only.split(",") if only else kernels.names(arch):
                with tempfile.TemporaryDirectory() as folder:
                    unit = Path(folder, f"{name}.cu")
                    unit.write_text(kernels.source(name))
                    cubin = str(out / kernels.cubin_name(name, arch))
                    command = ["nvcc", "-std=c++17", "-cubin", f"-arch={arch}", str(unit)]
                    subprocess.run([*command, "-o", cubin], check=True)


setup(
    cmdclass={"build_ext": BuildInParallel, "build_py": BuildWithCubins},
    ext_modules=extensions(),
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
