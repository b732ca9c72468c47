"""Every header of the CPU kernels can be read by itself: it includes whatever it uses."""

import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

CPU = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
COMPILER = sysconfig.get_config_var("CXX") or "g++"
# What the translation unit of the widest instruction set defines before it includes the headers.
WIDEST = ["-DSEQCONV_ISA=avx512", "-DSEQCONV_VECTOR_BYTES=64", "-mavx2", "-mfma", "-mf16c"]
WIDEST += ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER.split()[0]) is None, reason="there is no C++ compiler"
)


def errors(text: str, flags: list[str]) -> str:
    """What the compiler says of a translation unit with this text, which includes from csrc/cpu."""
    command = [*COMPILER.split(), "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-psabi"]
    command += ["-Werror", "-Wno-unused-function", *flags, f"-I{CPU}", "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True).stderr


HEADERS = sorted(path.name for path in CPU.glob("*.h"))


@pytest.mark.parametrize("header", HEADERS)
def test_header_parses_alone(header):
    assert errors(f'#include "{header}"\n', []) == ""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other vectors")
@pytest.mark.parametrize("header", [h for h in HEADERS if "SEQCONV_ISA" in (CPU / h).read_text()])
def test_header_parses_alone_for_the_widest_vectors(header):
    assert errors(f'#include "{header}"\n', WIDEST) == ""


def test_an_include_that_is_missing_is_seen():
    text = (CPU / "dtypes.h").read_text().replace("#pragma once\n", "")
    assert errors(text, []) == ""
    assert "Dtype" in errors(text.replace('#include "tensor.h"\n', ""), [])
