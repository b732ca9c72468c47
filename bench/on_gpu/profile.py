"""NVIDIA's own tools on a few calls: the profiler's counters and compute-sanitizer's checks. The step says so
where a tool is missing."""

import csv
import os
import re
import shutil
import subprocess
import sys

import torch

from bench.facts import ROOT
from bench.micro.contenders import Case, make
from bench.micro.measure import call
from bench.on_gpu.steps import ABSENT, RIGHT, WRONG
from bench.on_gpu.targets import BATCH, CHANNELS, predicted
from seqconv import fftconv

BF16 = {"dtype": "bfloat16", "batch": BATCH, "channels": CHANNELS}
COUNTED = {
    "4K-forward": Case(length=4096, **BF16),
    "16K-forward": Case(length=16384, **BF16),
    "4K-forward+backward": Case(length=4096, op="forward+backward", **BF16),
    "4K-gated": Case(length=4096, mode="gated", **BF16),
}
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "InstructionStats", "LaunchStats")
SECTIONS += ("MemoryWorkloadAnalysis", "Occupancy", "SchedulerStats", "WarpStateStats")
# What the report needs, by the profiler's names, and what a line says of it. Other counters are kept as well.
TELLING = {
    "gpu__time_duration.sum": "ns",
    "smsp__inst_executed.sum": "instructions",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "% of issue slots",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps",
    "dram__bytes_read.sum": "bytes read",
    "dram__bytes_write.sum": "bytes written",
    "launch__registers_per_thread": "registers",
}
ASKED = [name for name in TELLING if name.endswith(".sum")]  # the sections do not hold these
SANITIZED = "sanitized"
CHECKS = {  # tool -> options of its own; torch and the bindings probe for functions, which is not an error
    "racecheck": [],
    "memcheck": ["--report-api-errors", "no"],
}


def small(case: Case) -> Case:
    return Case(case.mode, case.dtype, case.layout, 2, 1, case.length // 16, op=case.op)


def work(machine, name: str) -> None:
    """Makes the calls that a tool examines: one of COUNTED after a first one, or small ones of every kind."""
    if name == SANITIZED:
        for dtype in (torch.float32, torch.bfloat16):
            for length in (100, 300) if machine.dry else (100, 1000, 4096, 5000):
                u = torch.randn(3, 2, length, dtype=dtype).to(machine.device).requires_grad_()
                k = torch.randn(2, length).to(machine.device).requires_grad_()
                fftconv(u, k, activation="gelu").float().sum().backward()
        return machine.synchronize()
    case = small(COUNTED[name]) if machine.dry else COUNTED[name]
    tensors, dy = case.tensors(machine.device)
    function = make("seqconv", case, machine.device)
    call(case, function, tensors, dy)
    machine.synchronize()
    with machine.profiled():
        call(case, function, tensors, dy)
        machine.synchronize()


def run_tool(machine, command: list[str], name: str, **environment: str) -> str:
    """Returns what the tool and the workload print."""
    ours = [sys.executable, "-m", "bench.on_gpu", "workload", name]
    ours += ["--dry", machine.made] if machine.dry else []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run(command + ours, cwd=ROOT, env=os.environ | environment, **pipes)
    if result.returncode:
        return f"{result.stdout}\nexit status {result.returncode}"
    return result.stdout


def number(text: str):
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def parse_counters(text: str) -> list[dict]:
    """Reads `ncu --csv --page raw`: a header, a line of units, and a line for every kernel that was launched."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    header, *rows = list(csv.reader(lines)) or [[]]
    if "Kernel Name" not in header:
        return []
    found = [
        dict(zip(header, map(number, row), strict=True)) for row in rows if len(row) == len(header)
    ]
    return [row for row in found if row["Kernel Name"]]  # not the units


def counters(machine, log) -> int:
    if shutil.which("ncu") is None:
        log.say("ncu is not on the PATH: no counters")
        return ABSENT
    command = "ncu --clock-control none --profile-from-start off --csv --page raw --print-units base".split()
    command += ["--metrics", ",".join(ASKED)]
    command += [word for section in SECTIONS for word in ("--section", section)]
    right = True
    for name, case in COUNTED.items():
        text = run_tool(machine, command, name)
        found = parse_counters(text)
        launched = []
        for row in found:
            values = {k: v for k, v in row.items() if isinstance(v, float)}
            launched.append({"kernel": row["Kernel Name"], "values": values})
            said = [f"{values[m]:,.6g} {unit}" for m, unit in TELLING.items() if m in values]
            log.say(f"{name}, {row['Kernel Name']}: {', '.join(said)}")
            for reason, value in stalls(values):
                log.say(f"  waits for {reason}: {value:.2f} warps at an issue")
        log.row("counters", case=name, launched=launched)
        if not found:
            right = False
            log.say(f"{name}: ncu gave no counters\n{text[-1500:]}")
        log.row("model", case=name, **predicted(case, machine.limits))
    return RIGHT if right else WRONG


def stalls(values: dict) -> list[tuple[str, float]]:
    """Returns the three most frequent reasons for which warps waited."""
    pattern = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active")
    found = {m[1]: v for name, v in values.items() if (m := pattern.match(name))}
    return sorted(found.items(), key=lambda item: -item[1])[:3]


def parse_check(text: str) -> int | None:
    """Returns how many errors and hazards the sanitizer's summaries count; None if there is no summary."""
    pattern = r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)"
    found = [int(count) for count in re.findall(pattern, text)]
    return sum(found) if found else None


def sanitizer(machine, log) -> int:
    if shutil.which("compute-sanitizer") is None:
        log.say("compute-sanitizer is not on the PATH: nothing is checked")
        return ABSENT
    right = True
    for tool, options in CHECKS.items():
        command = ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "9"]
        text = run_tool(machine, command, SANITIZED, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        count = parse_check(text)
        right &= count == 0
        log.row("sanitizer", tool=tool, errors=count)
        log.say(f"{tool}: {'no summary' if count is None else f'{count} errors'}")
        if count != 0:
            log.say(text[-3000:])
    return RIGHT if right else WRONG


STEPS = {"counters": counters, "sanitizer": sanitizer}
