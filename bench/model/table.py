"""Prints a table of the CUDA kernels: what their machine code takes, and simulated times beside the memory's floor.

python -m bench.device_model                     every kernel for sm_90
python -m bench.device_model --kernel half_      those whose names contain this

No GPU is used. Instructions are counted in the machine code, for one row and all its warps. Times are simulated for
64 samples and 768 channels on an H100, with copies at 3.0 TB/s, and may be wrong by a fifth either way. A kernel whose
loops depend on its arguments has registers and spills only.
"""

import argparse
import re
from pathlib import Path

from bench.files import write_json
from bench.model import kernels
from bench.model.classes import ORDER
from bench.model.code import compiled, disassembler_reason
from bench.model.estimate import INTERVALS, count, estimate
from bench.model.simulator import Device
from bench.terminal import console, table
from seqconv.backends.cuda.compiler import compiler_reason
from seqconv.backends.cuda.kernels import names


def row_of(kernel: str, arch: str, intervals) -> dict:
    """Returns what is known of a kernel."""
    if kernels.describe(kernel) is not None:
        return estimate(count(kernel, arch), intervals)
    code = compiled(kernel, arch)
    return {"kernel": kernel, "arch": arch, "registers": code.registers, "spills": code.spills}


PLANNERS = Path(__file__).parents[2] / "seqconv" / "backends" / "cuda" / "simulated.py"
HEAD = '''"""What a row takes on tensor cores: cycles of a multiprocessor, simulated for an H100, and warp instructions.

Written by `python -m bench.device_model --planner` from the kernels of whole bfloat16 rows. No GPU has measured them.
"""

ROWS = {
'''


def row_of_planner(kernel: str) -> tuple[int, int]:
    """The simulated cycles of a row, at the longer interval of tensor core instructions, and its instructions."""
    device, counted = Device(hmma=max(INTERVALS)), count(kernel)
    rows = device.processors * 1000
    return round(counted.simulated(rows, device) * device.clock / 1000), round(counted.instructions)


def planners_table() -> str:
    """The source of the planner's table."""
    described = [n for n in names("sm_90") if "_bf16_" in n and kernels.describe(n)]
    lines = [f'    "{n.replace("_bf16", "")}": {row_of_planner(n)},\n' for n in described]
    return HEAD + "".join(lines) + "}\n"


def show(rows: list[dict], arch: str, intervals) -> None:
    times = [f"simulated ms, HMMA every {h}" for h in intervals]
    kinds = [k for k in ORDER if any(k in row.get("by_class", ()) for row in rows)]
    numbers = ("instructions a row", "registers", "spills, B", "shared, KB", "floor, ms", *times)
    shown = table(f"{arch}, B=64 H=768, no GPU: times are simulated", ("kernel",), numbers)
    parts = table("warp instructions a row by class", ("kernel",), tuple(kinds))
    for row in rows:
        cells = [row["kernel"], "", str(row["registers"]), str(row["spills"])]
        if "instructions" in row:
            cells[1] = f"{row['instructions']:,.0f}"
            milliseconds = [row["floor"], *row["simulated"].values()]
            cells += [f"{row['shared'] / 1024:.1f}", *(f"{t * 1e3:.3f}" for t in milliseconds)]
            of_kinds = (row["by_class"].get(k, 0) for k in kinds)
            parts.add_row(row["kernel"], *(f"{x:,.0f}" for x in of_kinds))
        shown.add_row(*cells)
    console.print(shown)
    if kinds:
        console.print(parts)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.device_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", default="", help="only kernels whose names contain this")
    parser.add_argument("--arch", default="sm_90", help="architecture of the machine code")
    parser.add_argument(
        "--hmma", type=int, nargs="+", default=list(INTERVALS),
        help="cycles between two tensor core instructions of a scheduler",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--planner", action="store_true", help="only write the table that the planner reads"
    )
    return parser.parse_args(argv)


def main(argv=None) -> int:
    options = parse(argv)
    if not re.fullmatch(r"sm_\d{2,3}", options.arch):
        raise SystemExit(f"--arch: sm_90 or a like name is wanted, got {options.arch!r}")
    if min(options.hmma) < 1:
        raise SystemExit(f"--hmma: positive numbers of cycles are wanted, got {options.hmma}")
    for reason in (compiler_reason(), disassembler_reason()):
        if reason:
            raise SystemExit(f"bench.device_model: {reason}")
    if options.planner:
        PLANNERS.write_text(planners_table())
        return 0
    chosen = [name for name in names(options.arch) if options.kernel in name]
    if not chosen:
        raise SystemExit(f"--kernel: no kernel's name contains {options.kernel!r}")
    rows, failed = [], []
    for name in chosen:
        try:
            rows.append(row_of(name, options.arch, options.hmma))
        except (RuntimeError, ValueError) as error:
            failed.append(f"{name}: {error}")
    if rows:
        show(rows, options.arch, options.hmma)
    for line in failed:
        console.print(line)
    if options.json:
        write_json(options.json, rows)
    return 1 if failed else 0
