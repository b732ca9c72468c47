"""Who may import whom, and what importing the package costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYER = {"_check", "_layer", "_module"}
ALLOWED = {  # module of seqconv -> modules of seqconv it may import
    "_version": set(),
    "_check": set(),
    "_module": set(),
    "_explanation": set(),
    "reference": set(),
    "_pack": set(),
    "_cpu": {"_C", "_pack"},
    "_cuda.plan": {"_cuda.kernels"},
    "_cuda.kernels": set(),
    "_cuda.tables": set(),
    "_cuda.arguments": {"_pack"},
    "_cuda.recipe": {"_cuda.arguments"},
    "_cuda.layout": {"_pack", "_cuda.arguments", "_cuda.plan", "_cuda.tables"},
    "_cuda.convolution": {
        "_pack",
        "_cuda.kernels",
        "_cuda.layout",
        "_cuda.plan",
        "_cuda.recipe",
    },
    "_cuda.butterfly": {"_cuda.arguments", "_cuda.plan", "_cuda.tables", "_pack"},
    "_cuda.ssm": {"_cuda.arguments", "_pack"},
    "_cuda.compiler": {"_cuda.kernels"},
    "_cuda.driver": {"_cuda.compiler", "_cuda.plan", "_cuda.tables"},
    "_cuda": {"_cuda.butterfly", "_cuda.convolution", "_cuda.driver", "_cuda.plan", "_cuda.ssm"},
    "_ops": {"_cpu", "_cuda", "reference"},
    "_butterfly": {"_autograd", "_cpu", "_cuda", "_ops", "_pack", "reference"},
    "_autograd": {"_ops", "reference"},
    "functional": {"_autograd", "_check", "_cpu", "_cuda", "_explanation", "_ops", "reference"},
    "_hints": set(),
    "_opaque": {"_autograd", "_ops"},
    "_layer": {"_autograd", "_check", "_hints", "_module", "functional"},
    "_ssm": {"_autograd", "_cpu", "_cuda", "_explanation", "_ops"},
    "ssm": {"_check", "_explanation", "_ssm"},
    "s4d_init": {"_check"},
    "_recurrence": LAYER | {"_ssm", "functional", "reference", "ssm"},
    "s4d": LAYER | {"_opaque", "_recurrence", "_ssm", "s4d_init", "ssm"},
    "long_conv": LAYER,
    "sgconv": LAYER | {"_opaque"},
    "hyena": LAYER | {"_opaque", "functional"},
    # Not another layer but its kernel generator: the taps are LongConv's, only the transforms differ.
    "butterfly_conv": LAYER | {"_butterfly", "_opaque", "functional", "long_conv", "reference"},
    "optim": {"_layer"},
    "parallel": {"_module"},  # which imports torch.distributed: not part of `import seqconv`
    "_conv1d": {"_check", "functional"},
    "nn": LAYER | {"_conv1d"},
    "convert": {*LAYER, "_conv1d", "long_conv", "s4d", "sgconv"},
    "__init__": {"_version", "_explanation", "convert", "functional", "nn", "optim", "s4d", "ssm"}
    | {"butterfly_conv", "hyena", "long_conv", "sgconv"},
    "__main__": {"_cpu", "_cuda", "_ops", "reference"},
    "prebuild": {"_cuda.compiler", "_cuda.kernels"},
}
OUTSIDE = {"torch", "einops"}
LAZY = {
    "_cuda.compiler": {"cuda"},
    "_cuda.driver": {"cuda"},
    "_ssm": {"pykeops"},
}  # inside functions only


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module in ("seqconv", "seqconv._cuda"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def test_imports_point_downward():
    package = ROOT / "seqconv"
    paths = {
        ".".join(p.relative_to(package).with_suffix("").parts): p for p in package.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): imports(path) for name, path in paths.items()}
    assert set(modules) == set(ALLOWED)
    for module, found in modules.items():
        inside = {name.removeprefix("seqconv.") for name in found if name.startswith("seqconv.")}
        assert inside <= ALLOWED[module], f"{module} imports {inside - ALLOWED[module]}"
        outside = (
            {name.split(".")[0] for name in found} - {"seqconv"} - set(sys.stdlib_module_names)
        )
        assert outside <= OUTSIDE | LAZY.get(module, set()), f"{module} imports {outside - OUTSIDE}"


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
