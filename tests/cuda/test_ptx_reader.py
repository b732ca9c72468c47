"""How the PTX machine reads a module: everything that stands there, and nothing else."""

import pytest
import torch
from ptx_text import HEAD, WORD, run

from seqconv.backends.cuda import kernels

ptx_device = pytest.importorskip("ptx_device")


def test_loads_into_wider_registers():
    """A signed number keeps its sign, and an unsigned one does not."""
    given = torch.full((32, 16), -5, dtype=WORD)
    for kind, high in (("s32", -1), ("u32", 0)):
        out = run(f"ld.global.{kind} %d4, [%d1]; st.global.u64 [%d2], %d4;", given)
        assert out[:, 0].tolist() == [-5] * 32 and out[:, 1].tolist() == [high] * 32


@pytest.mark.skipif(bool(ptx_device.compiler.compiler_reason()), reason="NVRTC is not installed")
def test_instructions_have_the_lines_of_the_text():
    """So that one can be looked up, and left out."""
    ptx = ptx_device.ptx_of(kernels.source("taps_divisors"), "sm_90")
    lines, counts = ptx.splitlines(), ptx_device.Program(ptx).counts()
    assert len(counts) > 100
    for *_, line, text in counts[:-1]:
        assert text.split()[0] in lines[line - 1], (line, text)


@pytest.mark.parametrize(
    "text",
    ["add.f128 %r1, %r1, %r1;", "ld.global.volatile.u32 %r5, [%d1];", "mov.u32 %r5, %laneid;", "mma.sync.x %r5;",
     "add.s32 %r5, %r6;", "mov.u32 %r5, %d1;", ".local .b8 x[4];", "ld.const.u32 %r5, [%d1];",
     "mov.f32 %f1, 0.5;", "L1: mov.u32 %r5, 0;\nL1: mov.u32 %r5, 1;", "ld.global.nc.u32 %r5, [%d1];"],
)  # fmt: skip
def test_what_is_unknown_is_refused(text):
    """The reader neither skips nor guesses anything."""
    with pytest.raises(RuntimeError, match=r"line \d+"):
        ptx_device.Program(HEAD + text + "\nret;\n}\n")
