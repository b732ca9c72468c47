"""The real compilers compile the CUDA kernels without a GPU: NVRTC for several architectures, nvcc if installed."""

import io
import os
import re
import shutil
import subprocess
import sys

import pytest

from seqconv import prebuild
from seqconv.backends.cuda import compiler, kernels

if compiler.compiler_reason():
    pytest.skip(f"seqconv: {compiler.compiler_reason()}", allow_module_level=True)

NAMES = tuple(kernels.KERNELS)
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
SHARE = 32  # one of so many is compiled at each commit
HALF_SHARE = 8  # and of the kernels on tensor cores for sm_90
REGISTERS = 65536  # of a multiprocessor
# Of a thread on sm_90, by what a kernel's name begins with, the longest that fits: a little above what it takes.
# Where 512 threads leave 128, and the compiler takes them, it must not have to spill any.
CEILINGS = {
    "spectrum": 120,
    "taps_divisors": 40,
    "taps_gradient": 128,
    "skip_gradient": 40,
    "bias_sums": 48,
    "long_taps": 120,
    "long_input": 120,
    "long_input_gradient": 124,
    "long_output": 124,
    "long_gradient": 128,
    "butterfly": 192,
    "butterfly_backward": 208,
    "ssm_powers": 40,
    "ssm_forward": 96,
    "ssm_backward": 124,
    "ssm_gradients": 72,
    "ssm_step": 64,
    "stream_step": 48,
    "stream_clocks": 16,
    "stream_tiles": 128,
    "stream_spectra": 128,
    "stream_tile": 128,
    "forward": 128,
    "backward": 128,
}


# Bytes that a thread may spill outside of the butterflies, a few words in a row. With registers for all of them a
# multiprocessor would hold fewer blocks.
SPILLS = {f"backward_{kind}_8192": 40 for kind in ("f32", "bf16", "f16")}
# Tiles have the sums that wait beside the results; where the first radix is 2, those of several columns.
SPILLS |= {"stream_tile_32": 32, "stream_tile_512": 12, "stream_tile_8192": 20}
SPILLS |= {"stream_tile_16384": 8, "stream_tiles": 24}
# On tensor cores no kernel forward spills, and those backward spill little, but for one whose sums take more registers
# than it has.
HALF_SPILLS = {"half_forward": 0, "half_backward": 96}
HALF_SPILLS |= {"half_backward_16384": 560, "half_backward_16384_ragged": 560}
# Of packed rows this one length takes more registers than the dense kernel, which leaves fewer blocks to a processor.
PACKED_REGISTERS = {f"packed_backward_{kind}_512": 168 for kind in ("f32", "bf16", "f16")}
ELSEWHERE = 192  # on other architectures and by other releases, for which registers were not tuned


def allowed(name: str, arch: str) -> tuple[int, int]:
    """The most registers that a thread may take, and the largest spill."""
    _, _, threads, blocks = kernels.KERNELS[name]
    release = tuple(map(int, compiler.version().split(".")[:2]))
    most = min(255, REGISTERS // (threads * blocks) // 8 * 8)
    half = name in kernels.HALF_SHAPES
    name = name.removeprefix("packed_")  # those of packs take what those of dense rows take
    plain = name.replace("_bf16", "").replace("_f16", "")
    spills = SPILLS.get(name, 0)
    if half:
        spills = HALF_SPILLS.get(plain, HALF_SPILLS["_".join(plain.split("_")[:2])])
    if arch != "sm_90" or release < (13, 5):
        return most, max(spills * 5 // 4, ELSEWHERE)
    kind = max((k for k in CEILINGS if name.startswith(k)), key=len, default="")
    return (most if half else CEILINGS[kind]), spills


def pairs() -> list[tuple[str, str]]:
    """For sm_90 every kernel but those on tensor cores, and of these and of other architectures samples that
    SEQCONV_COMPILE moves, or "all".

    With another NVRTC (SEQCONV_NVRTC) everything is sampled. `make device-compilers` compiles all by each of them.
    """
    every = [(arch, name) for arch in ARCHS for name in kernels.names(arch)]
    asked = os.environ.get("SEQCONV_COMPILE", "0")
    if asked == "all":
        return every
    own = [] if os.environ.get("SEQCONV_NVRTC") else [p for p in every if p[0] == "sm_90"]
    always = [pair for pair in own if pair[1] not in kernels.HALF_SHAPES]
    halves = [pair for pair in own if pair[1] in kernels.HALF_SHAPES]
    left = [pair for pair in every if pair not in own]
    return (
        always + halves[int(asked) % HALF_SHARE :: HALF_SHARE] + left[int(asked) % SHARE :: SHARE]
    )


def resources(name: str, arch: str) -> dict:
    log = io.StringIO()
    code = compiler.compile_kernel(name, arch, cached=False, log=log)
    text = log.getvalue()
    assert code[:4] == b"\x7fELF"
    return {
        "registers": int(re.search(r"Used (\d+) registers", text)[1]),
        "spills": max(int(n) for n in re.findall(r"(\d+) bytes spill", text)),
        "shared": sum(int(n) for n in re.findall(r"(\d+) bytes smem", text)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("arch, name", pairs(), ids=lambda value: value)
def test_compiles_within_its_resources(arch, name):
    used = resources(name, arch)
    registers, spills = allowed(name, arch)
    registers = max(registers, PACKED_REGISTERS.get(name, 0))
    assert used["registers"] <= registers and used["spills"] <= spills, (used, registers, spills)
    _, _, threads, blocks = kernels.KERNELS[name]
    assert used["registers"] * threads * blocks <= REGISTERS
    assert used["shared"] == 0  # all of it is dynamic, and planned


def ptx(name: str) -> str:
    return compiler.compile_source(kernels.source(name), "sm_90", "ptx")


PRODUCTS = {  # of a warp for each tile: in the outer passes, and of the inner points
    "half_forward_bf16_1024": (4 + 4, 32),
    "half_forward_bf16_1024_gated": (4 + 4, 32),
    "half_forward_f16_4096": (4 + 4, 32),
    "half_forward_bf16_16384": (4 + 4, 32),
    "half_forward_bf16_1024_any": (4 + 4, 32),
    # x and dv there, dx back, and the skip's sum; dk's sum is with the inner points
    "half_backward_bf16_1024": (4 + 4 + 4 + 2, 3 * 16 + 4),
    "half_backward_bf16_1024_gated": (4 + 4 + 4, 3 * 16 + 4),
    "half_backward_bf16_1024_any": (4 + 4 + 4, 3 * 16 + 4),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_instructions(name):
    """There are as many tensor core instructions as products in the source: no path repeats them. A loop over many
    inner tiles takes four in a turn."""
    shape, (outer, inner) = kernels.HALF_SHAPES[name], PRODUCTS[name]
    tiles = shape.points // 256 // shape.warps
    of_turn = tiles if tiles < 8 else 4
    text = ptx(name)
    assert text.count("mma.sync.aligned.m16n8k16") == outer * tiles + inner * of_turn
    assert text.count("m16n8k16.row.col.f16.f16.f16.f16") >= (inner - 4) * of_turn


def test_what_is_not_asked_for_is_not_there():
    """Gates bring copies, rows that are not whole bring conditions, and an activation its function."""
    plain, gated = ptx("half_forward_bf16_1024"), ptx("half_forward_bf16_1024_gated")
    ragged, other = ptx("half_forward_bf16_1024_ragged"), ptx("half_forward_bf16_1024_any")
    copies = [text.count("cp.async.cg") for text in (plain, gated, ragged, other)]
    assert copies[0] == copies[2] and copies[1] > 2 * copies[0] > copies[3] == 0
    assert len(plain) < len(ragged) < len(other)
    assert (
        "tanh" not in plain and "ex2" not in plain and "ex2" in ptx("half_forward_bf16_1024_gelu")
    )


def test_source_is_one_text_without_includes():
    for name in NAMES:
        text = kernels.source(name)
        told = kernels.KERNELS[name].arguments
        assert "#include" not in text and f" {name}(const {told} a)" in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["backward_f32", "half_forward_bf16_1024", "spectrum"])
def test_compiles_with_nvcc(name, tmp_path):
    unit = tmp_path / f"{name}.cu"
    unit.write_text(kernels.source(name))
    command = [
        "nvcc",
        "-std=c++17",
        "-cubin",
        "-arch=sm_90",
        str(unit),
        "-o",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_prebuild_into_a_folder_is_found(tmp_path, monkeypatch, capsys):
    """The loader finds what prebuild writes, also for a later minor version, but not for another source."""
    asked = ["--arch", "sm_80", "--out", str(tmp_path), "--kernels", "^taps_divisors$"]
    assert prebuild.main(asked) == 0
    assert "1 kernels" in capsys.readouterr().out
    monkeypatch.setenv("SEQCONV_CUBINS", str(tmp_path))
    code = compiler.find_prebuilt("taps_divisors", 8, 0)
    assert code and code[:4] == b"\x7fELF" and compiler.find_prebuilt("taps_divisors", 8, 6) == code
    assert compiler.find_prebuilt("taps_divisors", 9, 0) is None
    assert compiler.find_prebuilt("spectrum", 8, 0) is None
    monkeypatch.setattr(kernels, "source", lambda name: "another state of the source")
    assert compiler.find_prebuilt("taps_divisors", 8, 0) is None


def test_prebuild_refuses_what_it_does_not_know(capsys):
    for arguments in (
        ["--arch", "90"],
        ["--arch", "sm_50"],
        ["--arch", "sm_90", "--kernels", "nothing"],
        ["--arch", "sm_90", "--kernels", "("],
        [],
    ):
        with pytest.raises(SystemExit):
            prebuild.main(arguments)
    capsys.readouterr()
    for arguments in (["--arch", "sm_999"], ["--arch", "sm_90", "--out", "/proc/nothing"]):
        assert prebuild.main(arguments) == 1
        assert capsys.readouterr().err.startswith("seqconv: ")


@pytest.mark.slow
def test_cache_is_safe_under_concurrent_processes(tmp_path):
    """Several processes that compile the same kernel into one empty cache all get the same code."""
    script = (
        "import sys, hashlib; from seqconv.backends.cuda import compiler;"
        "print(hashlib.sha256(compiler.compile_kernel('taps_divisors', 'sm_90')).hexdigest())"
    )
    command = [sys.executable, "-c", script]
    environment = {"SEQCONV_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    results = {process.communicate()[0] for process in running}
    assert len(results) == 1 and len(results.pop()) == 65
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 1000]


def test_prebuild_fills_the_cache(tmp_path, monkeypatch, capsys):
    """What it compiled is not compiled again, and another state of the source is another entry."""
    monkeypatch.setenv("SEQCONV_CACHE", str(tmp_path))
    entries = lambda: [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 1000]  # noqa: E731
    assert prebuild.main(["--arch", "sm_90", "--kernels", "^taps_divisors$"]) == 0
    capsys.readouterr()
    assert len(entries()) == 1
    before = [p.stat().st_ino for p in entries()]
    code = compiler.compile_kernel("taps_divisors", "sm_90")
    assert code[:4] == b"\x7fELF" and [p.stat().st_ino for p in entries()] == before
    usual = kernels.source
    monkeypatch.setattr(kernels, "source", lambda name: usual(name) + "// another state\n")
    assert compiler.compile_kernel("taps_divisors", "sm_90") and len(entries()) == 2
