"""Machine code comes from prebuilt files, the cache or NVRTC. Where there is none, the error says what to do."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accuracy import rel_l2
from emulated import Emulator, OnDevice, build
from fake_driver import Device, Driver

import seqconv
from seqconv import __main__, fftconv, prebuild, reference, use_backend
from seqconv.backends.cuda import compiler, driver, kernels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that only counts its calls."""
    compiled = []

    def compile_source(source, arch, kind="cubin", **_):
        compiled.append(arch)
        return f"{len(compiled)} {arch} ".encode() * 100

    monkeypatch.setenv("SEQCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "compile_source", compile_source)
    monkeypatch.setattr(compiler, "version", lambda: "13.5.37")
    return SimpleNamespace(folder=tmp_path / "cache", compiled=compiled)


def test_what_was_compiled_is_kept_by_all_that_it_depends_on(cache, monkeypatch):
    first = compiler.compile_kernel("spectrum", "sm_90")
    assert compiler.compile_kernel("spectrum", "sm_90") == first and len(cache.compiled) == 1
    assert compiler.compile_kernel("taps_divisors", "sm_90") != first
    assert compiler.compile_kernel("spectrum", "sm_80") != first
    monkeypatch.setattr(compiler, "version", lambda: "13.5.38")
    assert compiler.compile_kernel("spectrum", "sm_90") != first
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-lineinfo"))
    assert compiler.compile_kernel("spectrum", "sm_90") != first
    monkeypatch.setattr(kernels, "source", lambda name: "another state")
    assert compiler.compile_kernel("spectrum", "sm_90") != first
    assert len(cache.compiled) == 6 == len(list(cache.folder.iterdir()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "short", "cut", "longer", "one bit", "zeros"],
)
def test_damaged_files_are_compiled_again(cache, damage):
    compiler.compile_kernel("spectrum", "sm_90")
    (path,) = cache.folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = compiler.compile_kernel("spectrum", "sm_90")
    assert again.startswith(b"2 sm_90") and len(cache.compiled) == 2
    assert compiler.compile_kernel("spectrum", "sm_90") == again and len(cache.compiled) == 2


def test_a_process_that_dies_while_it_writes_leaves_no_kernel(cache, monkeypatch):
    def died(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", died)
        with pytest.raises(KeyboardInterrupt):
            compiler.compile_kernel("spectrum", "sm_90")
    assert list(cache.folder.iterdir()) == []
    assert compiler.compile_kernel("spectrum", "sm_90").startswith(b"2")


def test_the_cache_keeps_what_was_used_last(cache, monkeypatch):
    names = list(kernels.KERNELS)[:5]
    monkeypatch.setattr(compiler, "CACHE_BYTES", 3 * 1000)  # each file is about 830 bytes
    cache.folder.mkdir()
    left = cache.folder / f"{names[0]}-sm_90-0123.seqconvabcd"  # by a process that was killed
    left.write_bytes(bytes(500))
    foreign = cache.folder / "notes.txt"
    foreign.write_bytes(bytes(9000))
    for age, name in enumerate(names[:3]):
        compiler.compile_kernel(name, "sm_90")
        (path,) = cache.folder.glob(f"{name}-sm_90-*.seqconv")
        os.utime(path, (1000 + age, 1000 + age))
    os.utime(left, (1, 1))
    compiler.compile_kernel(names[0], "sm_90")  # now the newest
    compiler.compile_kernel(names[3], "sm_90")
    kept = {path.name.split("-")[0] for path in cache.folder.glob("*.seqconv")}
    assert kept == {names[0], names[2], names[3]} and not left.exists() and foreign.exists()


def test_other_users_may_read_what_is_kept(cache):
    """The umask decides, since SEQCONV_CACHE may name a folder that a group shares."""
    usual = os.umask(0o022)
    try:
        compiler.compile_kernel("spectrum", "sm_90")
    finally:
        os.umask(usual)
    (path,) = cache.folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_another_user_keeps_stays(cache, monkeypatch, recwarn):
    """In a folder of many users nobody may delete the files of others, which is no reason to warn."""

    def refuse(*_, **__):
        raise PermissionError("not yours")

    compiler.compile_kernel("spectrum", "sm_90")
    monkeypatch.setattr(compiler, "CACHE_BYTES", 0)
    monkeypatch.setattr(Path, "unlink", refuse)
    compiler.compile_kernel("taps_divisors", "sm_90")
    assert not recwarn.list and len(list(cache.folder.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_said_and_nothing_else(cache, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept.*cache.*SEQCONV_CACHE"):
        assert compiler.compile_kernel("spectrum", "sm_90").startswith(b"1 sm_90")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SEQCONV_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compiler.Path, "home", homeless)
    with pytest.warns(UserWarning, match="home directory.*SEQCONV_CACHE"):
        assert compiler.compile_kernel("spectrum", "sm_90").startswith(b"2 sm_90")


@pytest.fixture
def bare(monkeypatch):
    """There is no NVRTC anywhere, and no cuda.core."""

    def missing():
        raise compiler.NoCompiler("NVRTC is missing: pip install nvidia-cuda-nvrtc")

    monkeypatch.setattr(compiler, "nvrtc", missing)
    monkeypatch.setattr(compiler, "version", lambda: missing())
    monkeypatch.setitem(sys.modules, "cuda.core", None)


def test_prebuilt_kernels_need_no_compiler(bare, tmp_path, monkeypatch):
    """The kernels that are there run. The error names one that is not, the folders, and both ways to get it."""
    monkeypatch.setenv("SEQCONV_CUBINS", str(tmp_path))
    for name in ("spectrum", "forward_f32"):
        code = b"\x7fELF " + name.encode()
        (tmp_path / kernels.cubin_name(name, "sm_90")).write_bytes(code)
    device = Device(0, Driver(Emulator(build())))
    u, k = torch.randn(2, 3, 300), torch.randn(3, 300)
    with use_backend(OnDevice(device)):
        y = fftconv(u, k)
        assert rel_l2(y, reference.fftconv_fft(u.double(), k.double())) < 1e-6
        with pytest.raises(compiler.NoCompiler) as caught:
            fftconv(u.half(), k)
    text = str(caught.value)
    for wanted in ("half_forward_f16_512_any", "sm_90", str(tmp_path), str(compiler.PACKAGED)):
        assert wanted in text
    assert "pip install nvidia-cuda-nvrtc" in text
    assert "python -m seqconv.prebuild --arch sm_90" in text and driver._hint(caught.value) == ""


def test_what_launches_asks_for_no_compiler(bare):
    pytest.importorskip("cuda.bindings.driver")
    assert driver.packages_reason() is None
    assert "NVRTC" in compiler.compiler_reason()
    assert prebuild.main(["--arch", "sm_90"]) == 1


@pytest.mark.parametrize(
    "bindings, torchs, wanted",
    [
        (None, None, "pip install --upgrade cuda-python nvidia-cuda-nvrtc"),
        (None, "13.0", "pip install --upgrade cuda-python nvidia-cuda-nvrtc"),
        (None, "12.8", "pip install --upgrade 'cuda-python<13' nvidia-cuda-nvrtc-cu12"),
        ("11.8.7", None, "pip install --upgrade cuda-python nvidia-cuda-nvrtc"),
        ("12.6.2.post1", "12.6", "pip install --upgrade 'cuda-python<13' nvidia-cuda-nvrtc-cu12"),
        ("12.8.0", "13.0", "pip install nvidia-cuda-nvrtc-cu12"),
        ("13.10.0", "12.8", "pip install nvidia-cuda-nvrtc"),
    ],
)
def test_the_remedy_fits_what_is_there(monkeypatch, bindings, torchs, wanted):
    found = SimpleNamespace(__version__=bindings, driver=None) if bindings else None
    monkeypatch.setitem(sys.modules, "cuda.bindings", found)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", found)
    monkeypatch.setattr(torch.version, "cuda", torchs)
    assert compiler.remedy() == wanted
    reason = driver.packages_reason()
    assert (reason is None) == ("--upgrade" not in wanted)
    assert reason is None or (reason.endswith(wanted) and "cuda.bindings" in reason)


def test_the_report_says_what_compiles(cache, monkeypatch, capsys, tmp_path):
    line = lambda name, text: print(name, text)  # noqa: E731
    monkeypatch.setattr(compiler, "bindings_version", lambda: "13.4.4")
    monkeypatch.setattr(compiler, "compiler_reason", lambda: None)
    __main__.compiler_lines(line)
    text = capsys.readouterr().out
    assert "13.4.4" in text and "NVRTC 13.5.37" in text and str(cache.folder) in text
    assert "cuda.core not needed" in text
    (tmp_path / "a.cubin").write_bytes(b"")
    monkeypatch.setenv("SEQCONV_CUBINS", str(tmp_path))
    monkeypatch.setattr(compiler, "compiler_reason", lambda: "NVRTC is missing: pip install it")
    __main__.compiler_lines(line)
    text = capsys.readouterr().out
    assert "pip install it" in text and f"1 prebuilt kernels in {tmp_path}" in text
    assert str(cache.folder) not in text


@pytest.fixture
def nvrtc():
    if compiler.compiler_reason():
        pytest.skip(compiler.compiler_reason())


SOURCE = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'


def test_machine_code_or_its_text(nvrtc):
    assert compiler.compile_source(SOURCE, "sm_90")[:4] == b"\x7fELF"
    log = io.StringIO()
    options = ("--ptxas-options=-v", "-lineinfo")
    text = compiler.compile_source(SOURCE, "sm_90", "ptx", log=log, options=options)
    assert ".target sm_90" in text and ".entry twice" in text
    assert "\0" not in text and ".loc" in text and "registers" in log.getvalue()
    assert compiler.version() in text and compiler.version().count(".") == 2
    with pytest.raises(ValueError, match="kind must be 'cubin' or 'ptx', got 'sass'"):
        compiler.compile_source(SOURCE, "sm_90", "sass")
    with pytest.raises(RuntimeError, match=r"NVRTC for sm_90: \w+COMPILATION: .*undefined_thing"):
        compiler.compile_source("__global__ void f() { undefined_thing; }", "sm_90")
    with pytest.raises(RuntimeError, match="NVRTC for sm_12345"):
        compiler.compile_source(SOURCE, "sm_12345")


def test_another_nvrtc_is_taken_or_refused(nvrtc, tmp_path):
    """A SEQCONV_NVRTC that is no file, or that the bindings do not take, is an error and leads to no other compiler."""
    unit, other = tmp_path / "other.cpp", tmp_path / "libother.so"
    unit.write_text('extern "C" int nvrtcVersion(int* a, int* b) { *a = 4; *b = 2; return 0; }')
    subprocess.run(["g++", "-shared", "-fPIC", str(unit), "-o", str(other)], check=True)
    (known,) = {
        row.split()[-1]
        for row in Path("/proc/self/maps").read_text().splitlines()
        if os.path.basename(row.split()[-1]).startswith("libnvrtc.so")
    }
    script = (
        "from seqconv.backends.cuda import compiler as c; print(c.compiler_reason() or c.version())"
    )
    for path, wanted in (
        (known, compiler.version()),
        (str(other), f"SEQCONV_NVRTC={other} is NVRTC 4.2, but cuda.bindings loaded "),
        (str(tmp_path / "libnvrtc.so.13"), "SEQCONV_NVRTC must name the file"),
    ):
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            env=os.environ | {"SEQCONV_NVRTC": path},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0 and wanted in result.stdout, result.stdout + result.stderr


def test_packaged_machine_code_is_looked_for_where_setup_puts_it():
    assert compiler.PACKAGED == Path(seqconv.__file__).parent / "cubins"
