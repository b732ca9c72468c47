"""Wheel and sdist: what they carry, that they work from outside the checkout, and what happens without a compiler."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, cwd="/"
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result


def pip(*arguments: str, **environment: str) -> str:
    command = (
        sys.executable,
        "-m",
        "pip",
        "--no-cache-dir",
        "--disable-pip-version-check",
        *arguments,
    )
    result = run(*command, **environment)
    return result.stdout + result.stderr


def outside(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python with the copy installed in `folder`, far from the checkout.

    -S skips the hooks of editable installs, one of which would supply the checkout's modules where
    the copy lacks them.
    """
    path = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, cwd="/"
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory, in_turn) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with in_turn("sdist"):  # it works inside the checkout
        run(sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), str(ROOT))
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """From the sdist, in pip's isolated build environment."""
    folder = tmp_path_factory.mktemp("wheel")
    log = pip("wheel", "-v", "--no-deps", "--wheel-dir", str(folder), str(sdist))
    fetched = set(re.findall(r"^\s*Collecting ([A-Za-z0-9_-]+)", log, re.M))
    assert fetched <= {"setuptools"}, f"the build fetches {fetched}"
    (path,) = folder.glob("*.whl")
    return path


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "csrc").rglob("*.*")
        if p.suffix in (".h", ".cpp", ".cuh")
    }
    assert sources <= names
    assert {
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "seqconv/ops/fftconv.py",
        "tests/helpers/cases.py",
    } <= names


@pytest.mark.slow
def test_wheel_is_abi3_and_carries_the_sources(wheel):
    assert re.fullmatch(r"seqconv-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {
        "seqconv/py.typed",
        "seqconv/_C.abi3.so",
        "seqconv/csrc/cpu/transform.h",
        "seqconv/csrc/module.cpp",
        "seqconv/csrc/models.cpp",
        "seqconv/csrc/call.h",
    } <= names
    assert {"seqconv/backends/cuda/plan.py", "seqconv/csrc/device/half_shape.cuh"} <= names
    assert not any(n.startswith(("tests", "bench")) for n in names)
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.M)
    assert sorted(r.strip() for r in required) == ["einops>=0.7", "torch>=2.10"]
    assert "License-Expression: Apache-2.0" in metadata


@pytest.mark.slow
def test_wheel_works_from_outside(wheel, tmp_path):
    pip("install", "--no-deps", "--target", str(tmp_path), str(wheel))
    code = (
        "import torch, seqconv; y = seqconv.S4D(4)(torch.randn(1, 99, 4)); y.sum().backward();"
        "print(seqconv.__file__, seqconv.explain(torch.zeros(1, 1, 99), torch.zeros(1, 99)).fallback)"
    )
    result = outside(tmp_path, "-W", "error", "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "seqconv" / "__init__.py"), "None"]


@pytest.mark.slow
def test_installed_copy_compiles_its_cuda_kernels(wheel, tmp_path):
    """NVRTC finds the device sources inside the installation; no GPU is needed."""
    site, out = tmp_path / "site", tmp_path / "cubins"
    pip("install", "--no-deps", "--target", str(site), str(wheel))
    asked = ["--arch", "sm_90", "--out", str(out), "--kernels", "^taps_divisors$"]
    # with site's hooks, through which NVRTC's library is found; the copy comes first
    command = [sys.executable, "-W", "error", "-m", "seqconv.prebuild", *asked]
    run(*command, PYTHONPATH=str(site))
    where = "import seqconv.backends.cuda.kernels as k; print(k.folder())"
    assert str(site) in run(sys.executable, "-c", where, PYTHONPATH=str(site)).stdout
    (cubin,) = out.iterdir()
    assert cubin.name.startswith("taps_divisors-sm_90-") and cubin.suffix == ".cubin"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.one_of(2)
def test_wheel_with_cubins(sdist, tmp_path):
    """SEQCONV_BUILD_CUBINS: nvcc's code is in the wheel under the name that the loader looks for."""
    asked = {"SEQCONV_BUILD_CUBINS": "sm_90,sm_80", "SEQCONV_BUILD_KERNELS": "taps_divisors"}
    pip("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist), **asked)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(site), str(wheel))
    code = (
        "from seqconv.backends.cuda import driver;"
        "print([bool(driver.find_prebuilt('taps_divisors', 9, 0)), bool(driver.find_prebuilt('spectrum', 9, 0))])"
    )
    result = outside(site, "-W", "error", "-c", code)
    assert result.stdout.strip() == "[True, False]", result.stderr


def without_compiler(folder: Path) -> dict[str, str]:
    return {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


def without_headers(folder: Path) -> dict[str, str]:
    """A real compiler that is not told where Python.h is."""
    include = sysconfig.get_path("include")
    for name in ("gcc", "g++"):
        script = folder / name
        script.write_text(
            f'#!/bin/sh\nfor a; do shift; [ "$a" = "-I{include}" ] || set -- "$@" "$a"; done\nexec {name} "$@"\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
    return {"CC": str(folder / "gcc"), "CXX": str(folder / "g++")}


@pytest.mark.slow
@pytest.mark.parametrize("lacking", [without_compiler, without_headers])
def test_installs_without_a_compiler_or_headers(sdist, tmp_path, lacking):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    log = pip(
        "wheel", "-v", "--no-deps", "--wheel-dir", str(wheels), str(sdist), **lacking(tmp_path)
    )
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WARNING: seqconv is installed without its compiled CPU kernels" in log
    pip("install", "--no-deps", "--target", str(site), str(wheel))
    code = "import torch, seqconv; print(seqconv.fftconv(torch.ones(1, 1, 3), torch.ones(1, 3)).tolist())"
    result = outside(site, "-c", code)
    assert result.stdout.strip() == "[[[1.0, 2.0, 3.0]]]", result.stderr
    assert result.stderr.count("seqconv._C is not installed") == 1
    report = outside(site, "-W", "ignore", "-m", "seqconv")
    assert report.returncode == 1
    assert "seqconv._C is not installed" in report.stdout and "g++ python3-dev" in report.stdout


@pytest.mark.one_of(2)
@pytest.mark.slow
def test_the_readmes_commands_lead_to_the_kernels(tmp_path):
    """In a clone, and in an environment that has everything but the package: what the README says, in its order."""
    clone, env = tmp_path / "the clone", tmp_path / "env"
    left_out = (
        "*.so",
        ".*",
        "build",
        "dist",
        "runs",
        "results",
        "__pycache__",
        "*.egg-info",
    )
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*left_out))
    run(sys.executable, "-m", "venv", str(env))
    (site,) = env.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # its own .pth files are not read
    environment = os.environ | {"PATH": f"{env / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def shell(command: str) -> subprocess.CompletedProcess:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, shell=True, cwd=clone, env=environment, **pipes)

    # Before, the warning says what to do.
    code = "import seqconv, sys; print(seqconv.__file__)"
    before = shell(f'python -c "{code}"').stdout
    assert str(clone) in before and f"pip install --editable '{clone}' builds it there" in before
    readme = (clone / "README.md").read_text()
    install = re.search(r"```\n(pip install --editable \. .*?)```", readme, re.S)[1]
    for line in install.splitlines():
        done = shell(line)
        assert done.returncode == 0 and "RuntimeWarning" not in done.stdout, done.stdout
    # Whatever else is installed in the clone is installed so that the clone finds its kernels.
    lines = re.findall(r"pip install [^\n`]*'?\.(?:\[\w+\]'?)?(?=[ `\n])", readme)
    assert len(lines) >= 4 and all("--editable" in line for line in lines), lines
    fit = "python -W error::RuntimeWarning -m bench.lra fit digits --optim.epochs 1 --out run"
    done = shell(fit)
    assert done.returncode == 0, done.stdout
    operator = json.loads((clone / "run/run.json").read_text())["operator"]
    assert operator.startswith("cpu (") and "fallback" not in operator
