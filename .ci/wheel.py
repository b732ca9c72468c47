"""Builds this platform's wheel and tries it. `make wheel` runs it.

The wheel is built from the source distribution, repaired by auditwheel, checked by abi3audit, and tried by
smoke.py in an empty environment of every CPython found here, with every release of torch in TORCH. Of torch
only builds for the CPU are asked for, which call themselves VERSION+cpu. Where there is none for a Python,
the compiled module is tried alone, and the summary says so. TORCH="VERSION+any" takes the package index's build as
well, which for Linux has CUDA and 3 GB.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "wheel"
MOST_BYTES = 15_000_000
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t")
TORCH = os.environ.get("TORCH", "2.10.0 2.13.0 2.15.0").split()


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], check=True, **options)


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def build() -> Path:
    """The repaired wheel, in build/wheel."""
    shutil.rmtree(OUT, ignore_errors=True)
    with tempfile.TemporaryDirectory() as raw:
        run(sys.executable, "-m", "build", "--outdir", raw, ROOT, stdout=subprocess.DEVNULL)
        (wheel,) = Path(raw).glob("*.whl")
        if "-abi3-" not in wheel.name:
            raise SystemExit(f"{wheel.name} has no compiled kernels: see the warning above")
        # auto: the oldest policy that the symbols allow
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        repair = ("repair", "--strip", "--plat", "auto", "--wheel-dir", OUT, wheel)
        run(tool("auditwheel"), *repair, env=os.environ | {"PATH": path})
    (wheel,) = OUT.glob("*.whl")
    run(tool("auditwheel"), "show", wheel)
    run(tool("abi3audit"), "--strict", "--report", wheel, stdout=subprocess.DEVNULL)
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.2f} MB; abi3audit finds nothing", flush=True)
    if size > MOST_BYTES:
        raise SystemExit(f"{size} bytes are more than {MOST_BYTES}")
    return wheel


def find(version: str) -> str | None:
    """An interpreter that says that it is this version, on the PATH or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    installed = sorted(pyenv.glob(f"{version.rstrip('t')}.*/bin/python{version}"), reverse=True)
    code = (
        "import sys, sysconfig; free = sysconfig.get_config_var('Py_GIL_DISABLED');"
        "print('%d.%d' % sys.version_info[:2] + 't' * bool(free), sys.implementation.name)"
    )
    for path in (shutil.which(f"python{version}"), *map(str, installed)):
        if path is None:
            continue
        told = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if told.returncode == 0 and told.stdout.split() == [version, "cpython"]:
            return path
    return None


def attempt(interpreter: str, wheel: Path, torch: str | None) -> str | None:
    """Tries the wheel in a new environment, without torch if None; None if there is no such torch for it."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "env", "bin", "python")
        run(interpreter, "-m", "venv", python.parents[1])
        pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
        if torch is not None:
            release = torch.removesuffix("+any") if torch.endswith("+any") else f"{torch}+cpu"
            asked = [str(c) for c in (*pip, "--only-binary", ":all:", f"torch=={release}")]
            told = subprocess.run(asked, capture_output=True, text=True)
            # the second one where pip's configuration constrains torch
            if re.search(
                "No matching distribution found for torch|ResolutionImpossible", told.stderr
            ):
                return None
            if told.returncode != 0:
                raise SystemExit(told.stderr)
        run(*pip, *(["--no-deps"] if torch is None else []), wheel, stderr=subprocess.DEVNULL)
        smoke = shutil.copy(ROOT / ".ci" / "smoke.py", folder)
        outside = {"cwd": folder, "env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
        if torch is None:
            run(python, smoke, "--kernels", **outside)
            return "the compiled module alone; there is no CPU build of torch " + ", ".join(TORCH)
        run(python, "-m", "pip", "check", **outside)
        run(python, "-m", "seqconv", **outside)
        run(python, smoke, **outside)
        return f"torch {torch}"


def main() -> None:
    wheel = build()
    summary, tried = [], 0
    for version in PYTHONS:
        interpreter = find(version)
        if interpreter is None:
            summary.append(f"Python {version}: skipped, not found here")
            continue
        if version.endswith("t"):
            summary.append(f"Python {version}: skipped, an abi3 wheel is not for it")
            continue
        print(f"\nPython {version}", flush=True)
        done = [attempt(interpreter, wheel, torch) for torch in TORCH]
        missing = [t for t, result in zip(TORCH, done, strict=True) if result is None]
        done = [result for result in done if result] or [attempt(interpreter, wheel, None)]
        if len(missing) < len(TORCH) and missing:
            done.append(f"no CPU build of torch {', '.join(missing)}")
        summary.append(f"Python {version}: {'; '.join(done)}")
        tried += 1
    print(f"\n{wheel.name} on {platform.platform()}", *summary, sep="\n")
    if not tried:
        raise SystemExit("no Python was found to try the wheel with")


if __name__ == "__main__":
    main()
