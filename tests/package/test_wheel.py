"""Release wheels: tag, symbols, the script that tries them; configuration, workflow and page agree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / ".ci" / "smoke.py"
BUILDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
PLATFORMS = {
    (system, arch) for system in ("linux", "macos", "windows") for arch in BUILDS[system]["archs"]
}
PYTHONS = [re.fullmatch(r"cp3(\d+)-\*", name)[1] for name in BUILDS["build"]]
PAGE = (ROOT / "docs" / "install.md").read_text()


def python(*arguments, path: Path = ROOT, cwd: Path | str = "/") -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def test_the_tag_is_abi3_from_the_oldest_python():
    code = (
        "import runpy, setuptools;"
        "given = []; setuptools.setup = lambda **options: given.append(options);"
        "runpy.run_path('setup.py');"
        "command = setuptools.Distribution(given[0]).get_command_obj('bdist_wheel');"
        "command.ensure_finalized(); print(*command.get_tag()[:2])"
    )
    result = python("-c", code, cwd=ROOT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=").replace(".", "")
    assert result.stdout.split() == [f"cp{oldest}", "abi3"], result.stderr
    assert BUILDS["build"][0] == f"cp{oldest}-*"


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="of glibc and libstdc++")
def test_the_symbols_are_those_of_manylinux_2_17():
    from seqconv import _C

    table = subprocess.check_output(["objdump", "-T", _C.__file__], text=True)
    newest = {"GLIBC": (2, 17), "GLIBCXX": (3, 4, 19), "CXXABI": (1, 3, 7)}
    found = re.findall(r"\((GLIBC|GLIBCXX|CXXABI)_([\d.]+)\) +(\w+)", table)
    assert len(found) > 20
    for library, version, symbol in found:
        asked = tuple(map(int, version.split(".")))
        assert asked <= newest[library], f"{symbol} is of {library} {version}"


def test_the_smoke_test_passes_here():
    result = python(SMOKE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all right" in result.stdout and "LongConv, value" in result.stdout


@pytest.mark.parametrize("option", [[], ["--kernels"]])
def test_the_smoke_test_fails_without_the_module(tmp_path, option):
    copy = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "seqconv", tmp_path / "seqconv", ignore=copy)
    result = python("-S", SMOKE, *option, path=tmp_path)  # -S: no hooks of editable installs
    assert result.returncode == 1
    assert "there is no compiled module" in result.stderr


def test_the_smoke_test_notices_a_wrong_kernel(tmp_path):
    """A module that leaves the outputs as they are."""
    source = (
        "def isa(): return 'none'\n"
        "def compiler(): return 'no one'\n"
        "def forward(*arguments): pass\n"
        "backward = forward\n"
    )
    (tmp_path / "seqconv").mkdir()
    (tmp_path / "seqconv" / "_C.py").write_text(source)
    patched = (
        "import importlib.machinery, runpy, sys;"
        "importlib.machinery.EXTENSION_SUFFIXES[:] = ['.py']; sys.argv[1:] = ['--kernels'];"
        f"runpy.run_path({str(SMOKE)!r}, run_name='__main__')"
    )
    result = python("-S", "-c", patched, path=tmp_path)
    assert result.returncode == 1 and "kernels, 700 taps, y: the relative error is" in result.stderr


def test_the_page_names_what_is_built():
    rows = re.findall(r"^\| (Linux|macOS|Windows) \| (\w+) \|", PAGE, re.M)
    assert {(system.lower(), arch) for system, arch in rows} == PLATFORMS
    assert len(rows) == len(PLATFORMS)
    named = re.search(r"built and tried with Python ([^\n]+?\d and 3\.\d+)\.", PAGE)[1]
    assert re.findall(r"3\.(\d+)", named) == PYTHONS
    assert len(PAGE.splitlines()) < 100


def test_the_workflow_builds_everything_before_it_publishes():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    triggers = workflow[True]  # YAML 1.1 reads `on` as a truth value
    assert set(triggers) == {"push", "workflow_dispatch"} and triggers["push"] == {"tags": ["v*"]}
    jobs = workflow["jobs"]
    assert set(jobs) == {"sdist", "wheels", "publish"}
    systems = {"linux": "ubuntu", "macos": "macos", "windows": "windows"}
    built = set()
    for entry in jobs["wheels"]["strategy"]["matrix"]["include"]:
        system = entry["name"].partition("-")[0]
        assert entry["os"].startswith(systems[system])
        built |= {(system, arch) for arch in entry["archs"].split()}
    assert built == PLATFORMS
    publish = jobs["publish"]
    assert set(publish["needs"]) == {"sdist", "wheels"}
    assert "refs/tags/" in publish["if"] and "vars.PUBLISH" in publish["if"]
    assert publish["permissions"] == {"id-token": "write"}
    assert workflow["permissions"] == {"contents": "read"}


def test_the_commands_exist():
    assert re.search(r"\{project\}/(\S+)", BUILDS["test-command"])[1] == ".ci/smoke.py"
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / ".ci/constraints.txt").read_text(), re.M))
    target = re.search(r"^wheel:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    tools = re.search(r"--constraint \S+ ([\w -]+)$", target, re.M)[1].split()
    assert {"auditwheel", "abi3audit"} <= set(tools) <= pinned
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    used = re.findall(r"pip install --constraint .ci/constraints.txt ([\w -]+)$", workflow, re.M)
    assert {tool for line in used for tool in line.split()} <= pinned
    found = re.search(r"^PYTHONS = \((.*)\)$", (ROOT / ".ci/wheel.py").read_text(), re.M)[1]
    assert re.findall(r'"3\.(\d+)"', found) == PYTHONS
