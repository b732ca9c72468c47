"""The first step: what is installed, and whether the kernels run here at all."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import seqconv
from bench.facts import versions
from bench.on_gpu.steps import RIGHT, WRONG
from seqconv.backends import cpu
from seqconv.backends.cuda import kernels

ASKED = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
TOOLS = ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer", "g++")
PACKAGES = ("cuda-bindings", "cuda-core", "nvidia-cuda-nvrtc", "triton", "einops", "pytest")


def smi() -> dict[str, str]:
    """Returns what nvidia-smi says of the first GPU, by the names of its query."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return {}
    values = [value.strip() for value in (result.stdout.splitlines() or [""])[0].split(",")]
    names = ASKED.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def prebuilt(arch: str) -> str:
    """Returns how many of the kernels for this architecture have been carried here."""
    folder = os.environ.get("SEQCONV_CUBINS", "")
    names = kernels.names(arch)
    found = sum((Path(folder) / kernels.cubin_name(name, arch)).is_file() for name in names)
    return f"{found} of {len(names)} kernels for {arch} are prebuilt in {folder}"


def run(machine, log) -> int:
    facts, found = machine.facts(), versions(PACKAGES)
    log.say(f"{facts['name']}, {facts['processors']} multiprocessors, {facts['arch']}")
    log.say(
        f"torch {torch.__version__} for CUDA {facts['cuda']}, Python {platform.python_version()}"
    )
    log.say(", ".join(f"{name} {number}" for name, number in found.items()))
    log.say("; ".join(f"{name}: {shutil.which(name) or 'not there'}" for name in TOOLS))
    smi_says = smi()
    log.say(f"nvidia-smi: {smi_says or 'says nothing'}")
    log.say(f"seqconv {seqconv.__version__}: CPU kernels {cpu.missing or cpu.isa()}")
    log.say(prebuilt(facts["arch"]))
    reason = machine.reason()
    names = () if reason else ("clock", "bandwidth", "processors")
    limits = {name: getattr(machine.limits, name) for name in names} or None
    log.row("facts", **facts, versions=found, smi=smi_says, limits=limits, reason=reason)
    log.say("the kernels load" if reason is None else f"the kernels do not run here: {reason}")
    return RIGHT if reason is None else WRONG


STEPS = {"versions": run}
