"""What kinds of instructions there are, which pipe each takes, and how many bytes it moves for a lane."""

from collections import Counter
from collections.abc import Iterable

from bench.model.code import Instruction

CLASSES = {
    "HMMA": ("HMMA", "IMMA", "DMMA"),
    "half2": ("HFMA2", "HMUL2", "HADD2", "HMNMX2", "HSET2", "HSETP2"),
    "float32": (
        *("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "FMNMX", "FSETP", "FSEL", "FSET"),
        *("FCHK", "MUFU", "FSWZADD"),
    ),
    "convert": ("F2F", "F2FP", "F2I", "F2IP", "I2F", "I2FP", "FRND", "HADD2_32"),
    "shared": ("LDS", "LDSM", "STS", "STSM", "ATOMS"),
    "global": ("LDG", "LD", "STG", "ST", "LDGSTS", "ATOMG", "ATOM", "RED", "UBLKCP", "UBLKPF"),
    "local": ("LDL", "STL"),
    "shuffle": ("SHFL", "REDUX", "CREDUX", "VOTE", "VOTEU", "MATCH"),
    "barrier": ("BAR", "DEPBAR", "LDGDEPBAR", "MEMBAR", "FENCE", "SYNCS", "WARPSYNC", "ERRBAR"),
    "branch": ("BRA", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "EXIT", "BRX", "JMP", "NOP", "YIELD"),
}  # fmt: skip
INTEGER = "integer"  # every other instruction: indices, moves, permutations, conditions, constants
ORDER = (*CLASSES, INTEGER)
_CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names}
# The pipes of a scheduler: T tensor cores, F float32 and half2, H integer products, M memory and special functions,
# A integers; N takes no pipe's time.
_PIPES = {
    "T": CLASSES["HMMA"],
    "F": ("HFMA2", "HMUL2", "HADD2", "HMNMX2", "FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"),
    "H": ("IMAD",),
    "M": (
        *CLASSES["shared"], *CLASSES["global"], *CLASSES["local"],
        *("SHFL", "REDUX", "CREDUX", "MUFU", "I2F", "F2I", "F2F", "S2R", "LDC", "BAR"),
    ),
    "N": (
        *CLASSES["branch"], "WARPSYNC", "ULDC", "UIADD3", "UMOV", "S2UR", "CS2R", "R2UR", "LDGDEPBAR", "DEPBAR",
    ),
}  # fmt: skip
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names}
_OCCUPIED = {"F": 1, "N": 0}  # cycles of a pipe; 2 for the others, which have 16 lanes


def kind_of(instruction: Instruction) -> str:
    return _CLASS_OF.get(instruction.name, INTEGER)


def count(instructions: Iterable[Instruction]) -> Counter:
    """Returns how many instructions of each class there are."""
    return Counter(map(kind_of, instructions))


def pipe_of(instruction: Instruction) -> tuple[str, int]:
    """Returns the pipe and for how many cycles it is taken. Those of T depend on the device."""
    pipe = _PIPE_OF.get(instruction.name, "A")
    return pipe, _OCCUPIED.get(pipe, 2)


def lane_bytes(instruction: Instruction) -> int:
    """Returns the bytes that an instruction on memory moves for each lane: 4 of a matrix of 8 x 8 halves."""
    suffixes = instruction.opcode.split(".")
    if instruction.name in ("LDSM", "STSM"):
        return 4 * (int(suffixes[-1]) if suffixes[-1] in ("2", "4") else 1)
    for suffix, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in suffixes:
            return size
    return 4
