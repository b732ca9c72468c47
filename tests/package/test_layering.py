"""Who may import whom, and what importing the package costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = ("reference", "backends", "ops", "layers")  # each may import those before it; the rest any
OUTSIDE = {"torch", "einops"}
# Optional, inside functions only, and where.
LAZY = {"cuda": ("backends", "ops"), "pykeops": ("backends", "ops"), "safetensors": ("convert",)}
LAZY |= {"onnxscript": ("onnx",), "onnx_ir": ("onnx",)}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_downward():
    package = ROOT / "seqconv"
    height = {name: i for i, name in enumerate(FLOORS)}
    for path in package.rglob("*.py"):
        floor = path.relative_to(package).with_suffix("").parts[0]
        for name in imports(path):
            top, inner = (*name.split("."), "")[:2]
            if top == "seqconv":
                low = height.get(floor, len(FLOORS)) >= height.get(inner, 0)
                above = inner not in height and inner != "_C" and floor in height
                assert low and not above and floor != "reference", f"{path} imports {name}"
            elif top not in sys.stdlib_module_names:
                assert top in OUTSIDE or floor in LAZY.get(top, ()), (path, name)


def test_includes():
    """csrc knows no torch, no CUDA; the kernels know no Python; device code includes device code only."""
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix not in (".h", ".cpp", ".cuh"):
            continue
        found = re.findall(r'#include [<"](.+)[>"]', path.read_text())
        if path.parent.name == "device":
            assert all(
                (path.parent / name).is_file() and name.endswith(".cuh") for name in found
            ), path
        assert not any(re.search("torch|ATen|c10|cuda", name) for name in found), path
        if path.parent.name == "cpu":
            own = [name for name in found if name != "sys/mman.h"]  # the system's, for large pages
            assert not any("Python" in name or "/" in name for name in own), path


def test_import_needs_torch_and_einops_only():
    code = """
import sys, torch, einops
before = set(sys.modules)
import seqconv
assert "seqconv.parallel" not in sys.modules
print(*{m.split(".")[0] for m in set(sys.modules) - before})
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert set(result.stdout.split()) - set(sys.stdlib_module_names) == {"seqconv"}


def test_every_exported_name_is_documented():
    import seqconv

    for name in seqconv.__all__:
        assert name.startswith("__") or len(getattr(seqconv, name).__doc__) > 60, name


def test_earlier_module_paths_still_import():
    """Programs and pickled models name these."""
    import importlib

    import seqconv

    for path, name in {
        "functional": "fftconv",
        "ssm": "ssm_kernel",
        "s4d": "S4D",
        "s4d_init": "POSITIVE",
        "sgconv": "SGConvKernel",
        "long_conv": "LongConv",
        "hyena": "HyenaFilter",
        "butterfly_conv": "ButterflyConv",
        "_conv1d": "Conv1d",
        "_explanation": "Explanation",
        "_layer": "TiedDropout",
    }.items():
        found = getattr(importlib.import_module(f"seqconv.{path}"), name)
        assert found is getattr(seqconv, name, found)
        assert getattr(seqconv, path) is sys.modules[f"seqconv.{path}"]
