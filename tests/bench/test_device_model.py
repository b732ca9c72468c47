"""The model of the CUDA kernels: machine code is read, counted and simulated as worked out by hand."""

import json
from dataclasses import replace

import pytest

from bench import device_model
from bench.model import code, estimate, flow, kernels, table
from bench.model.classes import count as count_classes
from bench.model.classes import lane_bytes
from bench.model.code import Instruction
from bench.model.kernels import Described
from bench.model.simulator import Device, Residents, simulate
from seqconv.backends.cuda import compiler
from seqconv.backends.cuda import kernels as shipped

REASON = compiler.compiler_reason() or code.disassembler_reason()
compiles = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def instructions(*lines: str, **control) -> list[Instruction]:
    """Each line is an opcode with its operands: "@P0 BRA 3" jumps to instruction 3."""
    made = []
    for line in lines:
        predicate, words = line[1:].split(" ", 1) if line[0] == "@" else ("", line)
        opcode, _, operands = words.partition(" ")
        target = int(operands.split()[-1]) if opcode.startswith("BRA") else None
        if target is not None:
            operands = operands.replace(str(target), f"`(.L_x_{target})")
        made.append(Instruction(opcode, operands, predicate, target, **control))
    return made


# ---- what nvdisasm prints ----

PRINTED = """
.text.other:
        /*0000*/                   EXIT ;                       /* 0x000000000000794d */
                                                                /* 0x000fea0003800000 */
.text.k:
.L_x_1:
        /*0000*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64+-0x800] ;   /* 0x000000040000a981 */
                                                                /* {:#018x} */
        /*0010*/               @P1 BRA `(.L_x_1) ;              /* 0x0000000000017947 */
                                                                /* 0x000fea000383ffff */
.L_x_2:
        /*0020*/                   BRA `(.L_x_2);               /* 0x0000000000017947 */
                                                                /* 0x000fc0000383ffff */
"""


def test_instructions_and_their_control_are_read():
    control = 13 | 2 << 5 | 1 << 8 | 0b101001 << 11
    load, back, end = code.parse(PRINTED.format(control << 41 | 0x1C3), "k")
    assert load == Instruction(
        "LDG.E.128", "R4, desc[UR4][R2.64+-0x800]", "!P0", None, 13, 2, 1, 0b101001
    )
    assert load.name == "LDG" and lane_bytes(load) == 16
    assert (back.target, back.predicate, back.may_fall_through) == (0, "P1", True)
    assert (end.target, end.stall, end.may_fall_through) == (2, 0, False)
    assert (end.written, end.read, end.waits) == (code.NO_SCOREBOARD, code.NO_SCOREBOARD, 0)


@pytest.mark.parametrize(
    "change, kernel, message",
    [
        (("x", "x"), "absent", "there is no kernel 'absent'"),
        (("(.L_x_2)", "(.L_x_3)"), "k", "the label of"),
        (("/* 0x000fea000383ffff */", ""), "k", "no second half"),
    ],
)
def test_what_is_not_understood_is_refused(change, kernel, message):
    with pytest.raises(ValueError, match=message):
        code.parse(PRINTED.format(0).replace(*change), kernel)


def test_the_disassembler_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("SEQCONV_NVDISASM", str(tmp_path / "nothing"))
    assert "SEQCONV_NVDISASM must name the file" in code.disassembler_reason()
    monkeypatch.delenv("SEQCONV_NVDISASM")
    monkeypatch.setattr(code, "PACKAGE", "no-such-package")
    with pytest.raises(code.NoDisassembler, match="pip install no-such-package"):
        code.disassembler()
    with pytest.raises(SystemExit, match="pip install no-such-package"):
        table.main([])


# ---- the path of a turn ----

# Instructions 1 to 8 are the loop over rows, 3 and 4 a loop inside it.
ROWS = (
    *("MOV", "BAR.SYNC", "@P0 BRA 5", "HMMA", "@P1 BRA 3"),
    *("FFMA", "@P2 BRA 8", "FMUL", "@P3 BRA 1", "EXIT"),
)
CORE = ("HMMA", "BAR")


def names_of(path) -> str:
    return " ".join(i.name for i in path)


def test_a_loop_inside_turns_as_often_as_declared():
    for turns in (1, 2, 5):
        path = flow.turn(instructions(*ROWS), [turns], CORE)
        assert names_of(path) == f"BAR BRA{' HMMA BRA' * turns} FFMA BRA FMUL BRA"


def test_a_loop_that_does_not_turn_is_gone_around():
    path = flow.turn(instructions(*ROWS), [0], CORE)
    assert names_of(path) == "BAR BRA FFMA BRA FMUL BRA"
    with pytest.raises(ValueError, match="no path leads to the end of a turn, around"):
        flow.turn(instructions("HMMA", "FADD", "@P0 BRA 1", "@P1 BRA 0", "EXIT"), [0])


def test_turns_may_follow_from_the_loops():
    def turns(inner, rows):
        assert [loop.count("HMMA") for loop in inner] == [1] and rows.count("FFMA") == 1
        return [7]

    assert names_of(flow.turn(instructions(*ROWS), turns, CORE)).count("HMMA") == 7


def test_rare_blocks_are_jumped_over():
    path = flow.turn(instructions(*ROWS), [1], CORE, rare=lambda block: block[0].name == "FMUL")
    assert names_of(path) == "BAR BRA HMMA BRA FFMA BRA BRA"


@pytest.mark.parametrize(
    "lines, turns, path",
    [  # the condition is on top, in the middle, and below with another loop inside
        (("HMMA", "@P0 BRA 4", "FADD", "BRA 1", "@P1 BRA 0", "EXIT"), [2], "HMMA BRA FADD BRA BRA FADD BRA BRA BRA"),
        (("HMMA", "FADD", "@P0 BRA 4", "MOV", "@P1 BRA 7", "FMUL", "BRA 1", "@P2 BRA 0"), [2],
         "HMMA FADD BRA MOV BRA FMUL BRA FADD BRA MOV BRA BRA"),
        (("HMMA", "FADD", "FMUL", "@P0 BRA 2", "@P1 BRA 1", "@P2 BRA 0"), [2, 3],
         "HMMA FADD" + " FMUL BRA" * 3 + " BRA FADD" + " FMUL BRA" * 3 + " BRA BRA"),
        # an out-of-line part that jumps back is no loop, and rows without a loop go from begin to end
        (("HMMA", "BRA.DIV 4", "@P0 BRA 0", "EXIT", "SHFL", "BRA 2"), [], "HMMA BRA BRA"),
        (("@P0 EXIT", "HMMA", "FADD", "@P1 BRA 2", "EXIT", "HMMA"), [2], "EXIT HMMA FADD BRA FADD BRA EXIT"),
    ],
)  # fmt: skip
def test_paths(lines, turns, path):
    assert names_of(flow.turn(instructions(*lines), turns)) == path


def test_a_loop_without_a_way_out_is_refused():
    lines = ("HMMA", "FADD", "FMUL", "@P0 BRA 2", "BRA 1", "@P1 BRA 0", "EXIT")
    with pytest.raises(ValueError, match=r"no path leads to the end of a turn$"):
        flow.turn(instructions(*lines), [2, 2])
    # Only the branch that is not usual leads out.
    lines = ("HMMA", "FADD", "@P0 BRA 5", "FMUL", "BRA 1", "MOV", "@P1 BRA 1", "@P2 BRA 0", "EXIT")
    with pytest.raises(ValueError, match="the usual path does not come to the end"):
        flow.turn(instructions(*lines), [2])


@pytest.mark.parametrize("turns", [[], [1, 2], [-1], [1.5]])
def test_turns_that_do_not_fit_are_refused(turns):
    with pytest.raises(ValueError, match=r"turns: "):
        flow.turn(instructions(*ROWS), turns, CORE)


def test_a_kernel_without_the_core_is_refused():
    with pytest.raises(ValueError, match="should have instructions IMMA, got none"):
        flow.turn(instructions(*ROWS), [1], core=("IMMA",))
    path = flow.turn(instructions("FFMA", "STG", "@P0 BRA 1", "EXIT"), core=("STG",))
    assert names_of(path) == "STG BRA"


def test_classes():
    lines = ("HMMA.16816.F16", "HFMA2", "FFMA", "IMAD.MOV.U32", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128", "LDL.64",
             "BAR.SYNC.DEFER_BLOCKING 0x0", "BSYNC B0", "LOP3.LUT", "F2FP.F16")  # fmt: skip
    found = count_classes(instructions(*lines))
    assert found == {
        **dict.fromkeys(("HMMA", "half2", "float32", "shared", "global", "local", "barrier", "branch", "convert"), 1),
        "integer": 2,
    }  # fmt: skip
    sizes = [lane_bytes(i) for i in instructions("STSM.16.M88.2", "LDS.U16", "STG.E", "LDS.64")]
    assert sizes == [8, 2, 4, 8]


# ---- cycles ----

ONE = Residents(1)
FAST = Device(bandwidth=1e18)  # memory that never limits


def about(value: float, error: float = 0.01):
    """The mean is taken over warps that do not all end their turns at the same distance."""
    return pytest.approx(value, rel=error)


def cycles(path, residents=ONE, device=FAST, **more) -> float:
    return simulate(path, residents, device, turns=96, **more)


def test_a_warp_waits_for_its_stall_counts():
    assert cycles(instructions("FFMA", "FFMA", "MOV", stall=4)) == about(12)
    assert cycles(instructions("FFMA", "IMAD", stall=1)) == 2


def test_a_warp_waits_for_a_scoreboard():
    """Shared memory takes one cycle, and its result 24 more. The next instruction is the one that needs it."""
    load = Instruction("LDS", stall=2, written=3)
    need = Instruction("FFMA", waits=1 << 3)
    assert cycles([load, need]) == 26
    assert cycles([load, need._replace(waits=1 << 2)]) == 3
    assert cycles([load._replace(opcode="LDS.128"), need]) == 29


@pytest.mark.parametrize("interval", [4, 6])
def test_products_take_their_interval(interval):
    device = replace(FAST, hmma=interval)
    path = instructions(*["HMMA.16816.F16"] * 5)
    assert cycles(path, Residents(4), device) == about(5 * interval)
    assert cycles(path, Residents(16), device) == about(20 * interval)  # four warps share a pipe


def test_schedulers_issue_one_instruction_a_cycle():
    assert cycles(instructions(*["FFMA"] * 6), Residents(16)) == about(24)
    assert cycles(instructions(*["IADD3"] * 6), Residents(16)) == about(48)  # sixteen lanes


def test_all_warps_share_one_shared_memory():
    path = instructions("LDS.128", "STSM.16.M88.4", "LDS.64", written=0, read=0, waits=1)
    assert cycles(path, Residents(16)) == about(16 * (4 + 4 + 2))


def test_warps_meet_at_a_barrier():
    path = instructions("FFMA", "BAR.SYNC R9, 0x40", stall=10)
    assert cycles(path, Residents(2)) == about(
        30
    )  # both arrive after 10 cycles, and go on 20 later
    assert cycles(path, ONE) == about(20)  # a warp alone waits for nobody
    # Four slots of one warp: a barrier with a count is a slot's, one without is the block's.
    assert cycles(path, Residents(1, 4)) == about(20 / 4)
    whole = instructions("FFMA", "BAR.SYNC 0x0", stall=10)
    assert cycles(whole, Residents(1, 4)) == about(30 / 4)


SLOW = Device(bandwidth=8.0 * 132 * 1.755e9, cache_bytes=1e9)


def test_memory_limits_copies_and_stores():
    assert SLOW.memory_bytes == pytest.approx(8)
    path = instructions("STG.E.128", "STG.E", "LDGSTS.E.128", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1")
    moved = 512 + 128 + 512  # by a warp
    assert cycles(path, Residents(1, 32), SLOW) == about(moved / 8, 0.05)
    assert cycles(path, Residents(1, 32), SLOW, memory=moved / 2) == about(moved / 16, 0.05)


def test_loads_take_what_copies_and_stores_leave():
    path = instructions("STG.E.128", "LDG.E.128", "LDG.E.128", written=0, waits=1)
    residents = Residents(32)
    assert cycles(path, residents, SLOW, memory=32 * 1536) == about(32 * 192)
    assert cycles(path, residents, SLOW, memory=32 * 1024) == about(32 * 128)
    assert cycles(path, residents, SLOW, memory=32 * 256) < 32 * 64


def test_a_warp_waits_for_its_copies():
    path = instructions("LDGSTS.E.128", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0")
    assert 700 < cycles(path) < 710
    later = instructions("LDGSTS.E.128", "LDGDEPBAR", "DEPBAR.LE SB0, 0x1")
    assert cycles(later) == pytest.approx(350, rel=0.02)  # two turns' copies are on their way


def test_a_longer_latency_and_more_blocks_are_seen():
    path = instructions("LDGSTS.E.128", "LDGDEPBAR", "DEPBAR.LE SB0, 0x0")
    assert cycles(path, device=replace(FAST, memory_latency=1400)) > 1400
    assert cycles(path, Residents(1, 1, 4)) == pytest.approx(cycles(path) / 4, rel=0.02)


@pytest.mark.parametrize("residents", [Residents(0), Residents(1, 0), Residents(1, 1, -1)])
def test_residents_are_positive(residents):
    with pytest.raises(ValueError, match="must be positive"):
        simulate(instructions("FFMA"), residents)
    with pytest.raises(ValueError, match="path: "):
        simulate([], ONE)


# ---- descriptions ----


def test_kernels_of_16_bit_rows_are_described_by_their_shape():
    forward = kernels.describe("half_forward_bf16_4096")
    assert (forward.traffic, forward.products, forward.residents) == (4, 160, Residents(4, 2, 2))
    assert kernels.describe("half_forward_f16_4096_gated").traffic == 8
    backward = kernels.describe("half_backward_bf16_4096")
    assert (backward.traffic, backward.products, backward.rare) == (6, 264, "FMUL")
    pair = shipped.HALF_SHAPES["half_forward_bf16_4096"]._replace(pair=2)
    assert kernels.half(False, pair).products == 320
    for unknown in ("half_forward_bf16_4096_any", "half_forward_bf16_4096_ragged", "spectrum"):
        assert kernels.describe(unknown) is None


def test_turns_follow_from_the_products():
    rows = instructions("HMMA", "HMMA", "HMMA", "@P0 BRA 1", "@P1 BRA 0", "EXIT")
    described = Described(4096, 4, 4.0, turns=None, products=9)
    assert names_of(described.path(rows)).count("HMMA") == 9  # 1 + 4 x 2
    for products in (8, 1, 0):
        with pytest.raises(ValueError, match=f"cannot make {products}"):
            replace(described, products=products).path(rows)
    with pytest.raises(ValueError, match="not known for 1 loops"):
        replace(described, products=None).path(rows)
    with pytest.raises(ValueError, match="5 are described, and 7 are there"):
        replace(described, turns=[3], products=5).path(rows)


def counted(path, described) -> estimate.Count:
    return estimate.Count("k", "sm_90", len(path), {}, 32, 0, 0, described, tuple(path))


def test_simulated_seconds_are_those_of_all_multiprocessors():
    found = counted(instructions(*["FFMA"] * 10000), Described(4096, 4, 4.0, rows=2))
    device, rows = Device(), 264
    assert found.simulated(rows) == about(2 * 5000 / 1.755e9)  # two rows a multiprocessor
    assert found.floor(rows) == pytest.approx(264 * 4096 * 4 / 3e12)
    slow = replace(device, bandwidth=1e9)
    assert found.simulated(rows, slow) == found.floor(rows, slow) == about(264 * 4096 * 4 / 1e9)


def test_loads_of_a_row_come_from_memory():
    path = [Instruction("LDG.E.128", written=0), Instruction("FFMA", waits=1)]
    near, far = (counted(path, Described(512, 1, bytes_)).simulated(132) for bytes_ in (0.0, 1.0))
    assert 300 < near * 1.755e9 < 350 and 700 < far * 1.755e9 < 750


# ---- a kernel of our own, compiled ----

TINY = """
extern "C" __global__ void tiny(unsigned* x, int rows) {
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    unsigned* at = x + 1024 * row + threadIdx.x;
    unsigned a = at[0], b = at[32];
    const unsigned c = at[64];
#pragma unroll 1
    for (int i = 0; i < 5; ++i)
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%2,%2,%2}, {%2,%2}, {%0,%1};"
                   : "+r"(a), "+r"(b) : "r"(c));
    __syncthreads();
    at[0] = a;
    at[32] = b;
  }
}
"""
OF_TINY = Described(1024, 1, 0.625, blocks=8, shared=100, turns=[5], products=5, core=CORE)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shipped.GUESTS, "tiny", TINY)
    monkeypatch.setattr(kernels, "describe", lambda name: OF_TINY if name == "tiny" else None)
    monkeypatch.setattr(table, "names", lambda arch: ["tiny", "taps_divisors"])


@compiles
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_a_compiled_kernel_is_counted(tiny, arch, monkeypatch):
    found = device_model.count("tiny", arch)
    assert found.by_class["HMMA"] == 5 and found.by_class["barrier"] >= 1
    assert found.by_class["global"] == 5 and found.by_class["branch"] >= 5 + 1
    assert found.instructions == sum(found.by_class.values()) == len(found.path)
    assert 8 < found.registers < 64 and found.spills == 0 and found.shared == 100
    assert any(i.waits for i in found.path) and any(i.stall > 1 for i in found.path)
    assert found.floor(3000) == pytest.approx(640 * 3000 / 3e12)
    monkeypatch.setattr(kernels, "describe", lambda name: replace(OF_TINY, warps=3, rows=2))
    assert device_model.count("tiny", arch).instructions == 1.5 * found.instructions
    times = [found.simulated(3000, Device(hmma=h)) for h in (4, 600)]
    assert times[0] >= found.floor(3000) and times[1] > 2 * times[0]


@compiles
def test_descriptions_that_do_not_fit_the_code_are_refused(tiny, monkeypatch):
    with pytest.raises(ValueError, match="does not describe 'spectrum'"):
        device_model.count("spectrum")
    monkeypatch.setattr(kernels, "describe", lambda name: replace(OF_TINY, turns=[5, 2]))
    with pytest.raises(
        ValueError, match=r"tiny for sm_90: turns: one number is wanted for each of 1"
    ):
        device_model.count("tiny")
    with pytest.raises(ValueError, match=r"a name of seqconv.backends.cuda.kernels is wanted"):
        code.compiled("nothing", "sm_90")


@compiles
def test_the_table_shows_every_kernel(tiny, tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.json"
    assert table.main(["--hmma", "4", "8", "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "times are simulated" in shown and "tiny" in shown and "taps_divisors" in shown
    ours, other = json.loads(path.read_text())
    assert ours["instructions"] == device_model.count("tiny").instructions
    assert ours["simulated"]["4"] >= ours["floor"] and set(ours["simulated"]) == {"4", "8"}
    assert ours["rows"] == estimate.ROWS == 64 * 768
    assert set(other) == {"kernel", "arch", "registers", "spills"} and other["registers"] > 8
    monkeypatch.setattr(kernels, "describe", lambda name: replace(OF_TINY, products=6))
    assert table.main(["--kernel", "tiny"]) == 1
    assert "6 are described, and 5 are there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no kernel's name contains 'absent'"):
        table.main(["--kernel", "absent"])
    with pytest.raises(SystemExit, match="sm_90 or a like name is wanted, got '90'"):
        table.main(["--arch", "90"])
    with pytest.raises(SystemExit, match="positive numbers"):
        table.main(["--hmma", "0"])
