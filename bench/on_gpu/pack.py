"""Gathers what travels to a machine with a GPU: kernels compiled ahead for its architecture, and what it may lack."""

import shutil
from pathlib import Path

import einops

from bench.facts import ROOT
from bench.on_gpu import simulated
from bench.on_gpu.ceilings import MMA
from seqconv import prebuild
from seqconv.backends import cpu
from seqconv.backends.cuda import driver, kernels


def pack(arch: str, out: Path) -> int:
    if cpu.missing:
        print(f"bench.on_gpu: seqconv/_C.abi3.so is wanted beside the package: {cpu.missing}")
        return 1
    shutil.rmtree(out, ignore_errors=True)
    cubins = out / "cubins"
    code = prebuild.main(["--arch", arch, "--out", str(cubins)])
    if code:
        return code
    for name in MMA:
        path = cubins / kernels.cubin_name(name, arch)
        path.write_bytes(driver.compile_kernel(name, arch, cached=False))
    print(simulated.make(arch, out / simulated.NAME))
    target = out / "packages" / "einops"
    shutil.copytree(
        Path(einops.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__")
    )
    (extension,) = (ROOT / "seqconv").glob("_C*.so")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    shown = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    print(f"""
Carry the tracked files, and these two, which git ignores, to the same places:
  {extension.relative_to(ROOT)}  ({extension.stat().st_size / 2**20:.1f} MiB)
  {shown}/  ({size / 2**20:.1f} MiB: kernels for {arch}, their simulated times, einops)
There, in the tree's root, with a Python that has torch, cuda-bindings and pytest:
  python3 -m bench.on_gpu prove --out FOLDER
  python3 -m bench.on_gpu measure --out FOLDER
Here, with that FOLDER:
  python -m bench.on_gpu report FOLDER --readme""")
    return 0
