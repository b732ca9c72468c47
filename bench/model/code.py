"""The machine code of a kernel as a list of instructions, each with what the compiler tells the scheduler about it.

NVRTC compiles the kernel and nvdisasm prints the instructions with their 128-bit encodings. Of these, bits 105 to 121
control the issue: how long the warp stalls, which of six scoreboards the instruction sets, and which it waits for.
"""

import importlib.metadata
import io
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from seqconv.backends.cuda import kernels
from seqconv.backends.cuda.compiler import compile_kernel

PACKAGE = "nvidia-cuda-nvdisasm"
NO_SCOREBOARD = 7
WORD = r"/\* (0x[0-9a-f]{16}) \*/"
LINE = re.compile(rf"\s*/\*([0-9a-f]{{4,}})\*/\s+(.+?)\s*;\s*{WORD}")
SECOND = re.compile(rf"\s*{WORD}\s*$")
LABEL = re.compile(r"\s*(\.L_\w+):")
PREDICATED = re.compile(r"@(!?U?P\w+)\s+(.+)")
TARGET = re.compile(r"`\((\.L_\w+)\)")


class NoDisassembler(RuntimeError):
    """nvdisasm is missing. The message says how to get it."""


class Instruction(NamedTuple):
    """One instruction. A scoreboard that it does not set is 7. waits has a bit for each one that it waits for."""

    opcode: str  # with its suffixes
    operands: str = ""
    predicate: str = ""
    target: int | None = None  # the index of the instruction to which it may jump
    stall: int = 1  # cycles until the warp may issue its next instruction
    written: int = NO_SCOREBOARD  # released when the result is there
    read: int = NO_SCOREBOARD  # released when the operands have been read
    waits: int = 0

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def may_fall_through(self) -> bool:
        if self.predicate:
            return True
        if self.name == "BRA":  # other kinds and other operands jump on a condition
            conditional = self.opcode.startswith(("BRA.DIV", "BRA.CONV"))
            return conditional or not self.operands.startswith("`")
        return self.name not in ("EXIT", "RET", "BRX", "JMP", "JMX")


class Code(NamedTuple):
    """A compiled kernel: its instructions, and what a thread and a block of it take."""

    instructions: list[Instruction]
    registers: int
    spills: int  # bytes that a thread stores or loads for want of registers, whichever is more
    shared: int  # bytes of a block's static shared memory


def disassembler() -> str:
    """The file of nvdisasm: the one that SEQCONV_NVDISASM names, or that of the installed package."""
    chosen = os.environ.get("SEQCONV_NVDISASM")
    if chosen:
        if not Path(chosen).is_file():
            raise NoDisassembler(f"SEQCONV_NVDISASM must name the file nvdisasm, got {chosen!r}")
        return chosen
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name in ("nvdisasm", "nvdisasm.exe") and file.locate().is_file():
            return str(file.locate())
    raise NoDisassembler(f"nvdisasm, which shows machine code, is missing: pip install {PACKAGE}")


def disassembler_reason() -> str | None:
    """Why nothing can be disassembled here, or None."""
    try:
        disassembler()
    except NoDisassembler as error:
        return str(error)
    return None


def disassemble(cubin: bytes, kernel: str) -> list[Instruction]:
    """Returns the instructions of a kernel in their order. ValueError if the cubin holds no such kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [disassembler(), "--print-code", "--print-instruction-encoding", str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"nvdisasm: {result.stderr.strip() or result.returncode}")
    return parse(result.stdout, kernel)


def parse(text: str, kernel: str) -> list[Instruction]:
    """Reads what nvdisasm prints. ValueError if there is no such kernel, or a line that is not understood."""
    found: list[tuple[str, str, int]] = []  # predicate, instruction, encoding
    labels: dict[str, int] = {}
    inside = False
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(".text."):
            inside = line == f".text.{kernel}:"
        if not inside:
            continue
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif first := LINE.match(line):
            second = SECOND.match(next(lines, ""))
            if not second:
                raise ValueError(f"nvdisasm: no second half of the encoding after {line!r}")
            predicated = PREDICATED.match(first[2])
            predicate, words = predicated.groups() if predicated else ("", first[2])
            found.append((predicate, words, int(second[1], 16) << 64 | int(first[3], 16)))
    if not found:
        raise ValueError(f"nvdisasm: there is no kernel {kernel!r} in the machine code")
    return [_instruction(*parts, labels) for parts in found]


def _instruction(predicate: str, words: str, encoding: int, labels: dict[str, int]) -> Instruction:
    opcode, _, operands = words.partition(" ")
    target = TARGET.search(operands)
    if target and target[1] not in labels:
        raise ValueError(f"nvdisasm: the label of {words!r} is not in the kernel")
    control = encoding >> 105
    return Instruction(
        opcode,
        operands.strip(),
        predicate,
        labels[target[1]] if target and opcode.startswith("BRA") else None,
        stall=control & 15,
        written=control >> 5 & 7,
        read=control >> 8 & 7,
        waits=control >> 11 & 63,
    )


def compiled(kernel: str, arch: str) -> Code:
    """Compiles a kernel of seqconv.backends.cuda.kernels for sm_XY. ValueError if there is no such kernel."""
    if kernel not in kernels.KERNELS and kernel not in kernels.GUESTS:
        raise ValueError(
            f"kernel: a name of seqconv.backends.cuda.kernels is wanted, got {kernel!r}"
        )
    log = io.StringIO()
    cubin = compile_kernel(kernel, arch, cached=False, log=log)
    said = log.getvalue()
    registers = re.search(r"Used (\d+) registers", said)
    if not registers:
        raise ValueError(f"NVRTC does not tell the registers of {kernel!r}: {said.strip()!r}")
    spills = re.findall(r"(\d+) bytes spill", said)  # stores and loads
    shared = re.search(r"(\d+) bytes smem", said)
    return Code(
        disassemble(cubin, kernel),
        int(registers[1]),
        max(map(int, spills), default=0),
        int(shared[1]) if shared else 0,
    )
