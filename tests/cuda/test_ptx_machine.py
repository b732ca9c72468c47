"""What the instructions of the PTX machine compute, and each fault that it must report."""

import pytest
import torch
from ptx_text import OWN, WORD, loads, run, stores


def rows_of(*parts: torch.Tensor) -> torch.Tensor:
    """What each thread reads, which is the parts one after another as words."""
    words = torch.cat([part.contiguous().view(WORD) for part in parts], 1)
    return torch.nn.functional.pad(words, (0, 16 - words.shape[1])).contiguous()


# ---- matrix products, against the layouts that CUTLASS gives (MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>) ----
def strided(thread: tuple, value: tuple) -> torch.Tensor:
    """An index for each value of each thread, by CuTe's layout ((shapes), (strides)) of both."""

    def index(i: int, shape: tuple, stride: tuple) -> int:
        total = 0
        for size, step in zip(shape, stride, strict=True):
            total, i = total + i % size * step, i // size
        return total

    values = torch.tensor(value[0]).prod().item()
    return torch.tensor(
        [[index(t, *thread) + index(v, *value) for v in range(values)] for t in range(32)]
    )


OF_A = strided(((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128)))  # m + 16 k
OF_B = strided(((4, 8), (16, 1)), ((2, 2), (8, 64)))  # n + 8 k
OF_C = strided(((4, 8), (32, 1)), ((2, 2), (16, 8)))  # m + 16 n
FRAGMENTS = [f"%r{i}" for i in range(10, 16)]
PRODUCTS = {
    "f32.f16.f16.f32": (torch.float16, torch.float32),
    "f32.bf16.bf16.f32": (torch.bfloat16, torch.float32),
    "f16.f16.f16.f16": (torch.float16, torch.float16),
}


@pytest.mark.parametrize("mma", [0, 1, 2], ids=["exact", "in order", "pessimistic"])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_matrix_product(kind, mma):
    """Exact sums are rounded once. The others stay within what they may lose, and do lose something."""
    dtype, sums = PRODUCTS[kind]
    a, b, c = (
        torch.randn(16, 16).to(dtype),
        torch.randn(16, 8).to(dtype),
        torch.randn(16, 8).to(sums),
    )
    given = rows_of(a.T.reshape(-1)[OF_A], b.reshape(-1)[OF_B], c.T.reshape(-1)[OF_C])
    d = [f"%r{i}" for i in range(20, 24 if sums == torch.float32 else 22)]
    body = loads(*FRAGMENTS, *d)
    d, lists = ", ".join(d), [", ".join(FRAGMENTS[:4]), ", ".join(FRAGMENTS[4:])]
    body += f"mma.sync.aligned.m16n8k16.row.col.{kind} {{{d}}}, {{{lists[0]}}}, {{{lists[1]}}}, {{{d}}};\n"
    out = run(body + stores(*d.split(", ")), given, mma=mma)
    found = torch.zeros(128, dtype=sums)
    found[OF_C.flatten()] = out[:, : len(d.split(", "))].contiguous().view(sums).flatten()
    found, exact = found.view(8, 16).T, a.double() @ b.double() + c.double()
    rounded = exact.to(sums) if sums == torch.float32 else exact.float().to(sums)
    if mma == 0:
        assert (found - exact).abs().max() <= (rounded - exact).abs().max() * 1.0001
        return
    allowed = 2.0**-22 if sums == torch.float32 else 2.0**-10
    error = (found.double() - exact).abs().max()
    assert 0 < error <= 24 * allowed * exact.abs().max()
    assert mma == 1 or error >= (rounded.double() - exact).abs().max()


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix(transposed):
    """ldmatrix of a's rows, and with .trans of its columns, gives the operand that the product takes."""
    a = torch.randn(16, 16).half()
    memory = (a.T if transposed else a).contiguous().view(WORD)
    given = torch.zeros(32, 16, dtype=WORD)
    for lane in range(
        32
    ):  # lane 8 m + r: row r of matrix m; matrices by row half first, or by column half
        row, half = lane % 8 + 8 * (lane // 8 % 2), lane // 16
        if transposed:
            row, half = lane % 8 + 8 * (lane // 16), lane // 8 % 2
        given[lane, :4] = memory[row, 4 * half : 4 * half + 4]
    body = f"""ld.global.v4.u32 {{%r10,%r11,%r12,%r13}}, [%d1]; shl.b32 %r5, %r1, 4; add.s32 %r5, %r5, %r3;
    st.shared.v4.u32 [%r5], {{%r10,%r11,%r12,%r13}}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4{".trans" * transposed}.shared.b16 {{%r20,%r21,%r22,%r23}}, [%r5];\n"""
    out = run(body + stores("%r20", "%r21", "%r22", "%r23"), given)
    found = out[:, :4].contiguous().view(torch.float16).view(32, 8)
    assert torch.equal(found, a.T.reshape(-1)[OF_A])


@pytest.mark.parametrize("transposed", [False, True])
def test_store_matrix_undoes_load_matrix(transposed):
    trans = ".trans" * transposed
    body = f"""{loads("%r10", "%r11", "%r12", "%r13")} shl.b32 %r5, %r1, 4; add.s32 %r5, %r5, %r3;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5], {{%r10,%r11,%r12,%r13}}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20,%r21,%r22,%r23}}, [%r5];\n"""
    given = torch.randint(-(2**31), 2**31, (32, 16), dtype=WORD)
    out = run(body + stores("%r20", "%r21", "%r22", "%r23"), given)
    assert torch.equal(out[:, :4], given[:, :4])


def test_conversions_and_pairs():
    x = torch.cat(
        [
            torch.randn(26, 3),
            torch.tensor([[1.0, 65536, 1e-8], [torch.nan, torch.inf, -torch.inf]] * 3),
        ]
    )
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        body = (
            loads("%f1", "%f2", kind="f32")
            + f"cvt.rn.{kind}x2.f32 %r5, %f1, %f2;\n"
            + stores("%r5")
        )
        found = run(body, rows_of(x))[:, :1].contiguous().view(dtype)
        assert torch.equal(found, x[:, [1, 0]].to(dtype)) or torch.allclose(
            found, x[:, [1, 0]].to(dtype), rtol=0, atol=0, equal_nan=True
        )  # the first is the upper half
    h = torch.randn(32, 6).half()
    body = (
        loads("%r5", "%r6", "%r7") + "fma.rn.f16x2 %r8, %r5, %r6, %r7; mul.rn.f16x2 %r9, %r5, %r6;"
    )
    found = run(body + stores("%r8", "%r9"), rows_of(h))[:, :2].contiguous().view(torch.float16)
    a, b, c = h.double().split(2, 1)
    assert torch.equal(found[:, :2], (a * b + c).half()) and torch.equal(
        found[:, 2:], (a * b).half()
    )


def pairs_of(text: str, given: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """%r8 as two numbers, computed from %r5, %r6 and %r7, which are the six numbers of a row."""
    out = run(loads("%r5", "%r6", "%r7") + text + stores("%r8"), rows_of(given))
    return out[:, :1].contiguous().view(dtype)


@pytest.mark.parametrize("kind, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_pairs(kind, dtype):
    """abs, max, and fma and mul rounded once, which tells ties from what is close to one."""
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0]
    x = torch.randn(32, 6).to(dtype)
    x[:30, 0] = torch.tensor(special * 5, dtype=dtype)
    x[:30, 2] = torch.tensor(special, dtype=dtype).repeat_interleave(5)
    a, b, c = x.split(2, 1)
    size = pairs_of(f"abs.{kind}x2 %r8, %r5;\n", x, dtype)
    assert torch.equal(size.nan_to_num(7.0), a.abs().nan_to_num(7.0))
    assert not size[~size.isnan()].signbit().any()
    top, wanted = pairs_of(f"max.{kind}x2 %r8, %r5, %r6;\n", x, dtype), torch.fmax(a, b)
    assert torch.equal(top.isnan(), wanted.isnan())
    assert torch.equal(top.nan_to_num(7.0), wanted.nan_to_num(7.0))
    zero = (a == 0) & (b == 0)
    assert zero.any() and torch.equal(top.signbit()[zero], (a.signbit() & b.signbit())[zero])

    y = torch.randn(32, 6).to(dtype)
    a, b, c = y.split(2, 1)
    found = pairs_of(f"fma.rn.{kind}x2 %r8, %r5, %r6, %r7;\n", y, dtype)
    exact = a.double() * b.double() + c.double()
    near = exact.to(dtype)  # through float32, whose tie may go the wrong way
    assert ((found.double() - exact).abs() <= (near.double() - exact).abs() * 1.001).all()
    # (1 + eps) 1.5 is a tie between 1.5 + eps and 1.5 + 2 eps; what is added decides.
    one, little = torch.finfo(dtype).eps, 2.0 ** (-70 if kind == "bf16" else -24)
    y[:, :2], y[:, 2:4], y[:, 4], y[:, 5] = 1 + one, 1.5, little, -little
    found = pairs_of(f"fma.rn.{kind}x2 %r8, %r5, %r6, %r7;\n", y, dtype).double()
    assert (found[:, 0] == 1.5 + 2 * one).all() and (found[:, 1] == 1.5 + one).all()
    y[:, 4:] = 0
    assert (pairs_of(f"mul.rn.{kind}x2 %r8, %r5, %r6;\n", y, dtype).double() == 1.5 + 2 * one).all()


def test_move_matrix():
    """movmatrix transposes what ldmatrix without .trans loads."""
    given = torch.randint(-(2**31), 2**31, (32, 16), dtype=WORD)
    out = run(
        loads("%r5") + "movmatrix.sync.aligned.m8n8.trans.b16 %r6, %r5;\n" + stores("%r6"), given
    )
    before, after = (x[:, :1].contiguous().view(torch.int16).view(8, 8) for x in (given, out))
    assert torch.equal(after, before.T) and not torch.equal(after, before)


@pytest.mark.parametrize("by, clamp", [(5, 31), (37, 31), (3, 0x1C1F), (9, 0x1807), (20, 16)])
def test_shuffle_from_a_lane(by, clamp):
    """shfl.idx names a lane of its own segment; beyond the clamp lanes keep their own value."""
    body = f"shfl.sync.idx.b32 %r5|%p1, %r1, {by}, {clamp}, -1; selp.u32 %r6, 1, 0, %p1;\n"
    out = run(body + stores("%r5", "%r6"))
    lane, segment = torch.arange(32), clamp >> 8 & 31
    last = (lane & segment) | (clamp & 31 & ~segment)
    source = (lane & segment) | (by & 31 & ~segment)
    inside = source <= last
    assert torch.equal(out[:, 0].long(), torch.where(inside, source, lane))
    assert torch.equal(out[:, 1].bool(), inside)


@pytest.mark.parametrize("by, clamp", [(5, 31), (16, 31), (16, 0x100F), (3, 0x1C1F)])
def test_shuffle(by, clamp):
    """In shfl.bfly, lanes beyond the segment's clamp keep their own value and say so."""
    body = f"shfl.sync.bfly.b32 %r5|%p1, %r1, {by}, {clamp}, -1; selp.u32 %r6, 1, 0, %p1;\n"
    out = run(body + stores("%r5", "%r6"))
    lane = torch.arange(32)
    segment = clamp >> 8 & 31
    last = (lane & segment) | (clamp & 31 & ~segment)
    inside = (lane ^ by) <= last
    assert torch.equal(out[:, 0].long(), torch.where(inside, lane ^ by, lane))
    assert torch.equal(out[:, 1].bool(), inside)


INTEGERS = {
    "bfi.b32 %r8, %r5, %r6, 4, 8": lambda a, b: (b & ~0xFF0) | (a & 0xFF) << 4,
    "bfe.u32 %r8, %r5, 5, 9": lambda a, b: a >> 5 & 0x1FF,
    "prmt.b32 %r8, %r5, %r6, 0x5410": lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 %r8, %r5, %r6, 0xb": lambda a, b: (a >> 31) * 255 | (a & 255) * 0x1010100,
    "shf.l.wrap.b32 %r8, %r5, %r6, 7": lambda a, b: (b << 7 | a >> 25) & 0xFFFFFFFF,
    "mul.hi.u32 %r8, %r5, %r6": lambda a, b: a * b >> 32,
    "mad.lo.s32 %r8, %r5, %r6, %r5": lambda a, b: (a * b + a) & 0xFFFFFFFF,
    "shl.b32 %r8, %r5, 33": lambda a, b: 0,
    "popc.b32 %r8, %r5": lambda a, b: a.bit_count(),
    "clz.b32 %r8, %r5": lambda a, b: 32 - a.bit_length(),
    "rem.u32 %r8, %r5, 1000": lambda a, b: a % 1000,
}


@pytest.mark.parametrize("text", INTEGERS, ids=lambda text: text.split()[0])
def test_integers(text):
    given = torch.randint(-(2**31), 2**31, (32, 16), dtype=WORD)
    out = run(loads("%r5", "%r6") + text + ";\n" + stores("%r8"), given)
    pairs = [[x & 0xFFFFFFFF for x in row] for row in given[:, :2].tolist()]
    assert [x & 0xFFFFFFFF for x in out[:, 0].tolist()] == [INTEGERS[text](a, b) for a, b in pairs]


# ---- faults ----
TO_NEIGHBOUR = "xor.b32 %r4, %r2, 4; ld.shared.u32 %r5, [%r4];"
HALF = "setp.lt.u32 %p1, %r1, 16;\n@%p1 bra L1;\n"
PRODUCT = "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
PRODUCT += "{%r20,%r21}, {%r10,%r11,%r12,%r13}, {%r14,%r15}, {%r20,%r21};"
# Every lane gives the address of its own 16 bytes.
OWN_ROW = "shl.b32 %r4, %r1, 4; add.s32 %r4, %r4, %r3; st.shared.v4.u32 [%r4], {%r1,%r1,%r1,%r1};"
LOAD_MATRIX = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r10,%r11,%r12,%r13}, [%r4];"
STORE_MATRIX = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r10,%r11,%r12,%r13};"
UNORDERED = "read after write|read before it was written"  # by which of the two came first
FAULTS = {
    "write after write": ("st.shared.u32 [%r3], %r1;", "race in shared memory: write after write"),
    "read after write in a warp": (OWN + TO_NEIGHBOUR, UNORDERED),
    "shuffles order nothing": (
        OWN + "shfl.sync.bfly.b32 %r6|%p1, %r1, 1, 31, -1; " + TO_NEIGHBOUR,
        UNORDERED,
    ),
    "a matrix loaded where each lane stored": (OWN_ROW + LOAD_MATRIX, "read after write"),
    "a matrix stored where each lane loaded": (
        OWN_ROW + "bar.warp.sync -1; ld.shared.u32 %r5, [%r4]; " + STORE_MATRIX,
        "write after read",
    ),
    "a matrix stored where it was loaded": (
        OWN_ROW + "bar.warp.sync -1;" + LOAD_MATRIX + STORE_MATRIX,
        "write after read of several threads of warp",
    ),
    "write after read": (
        OWN + "bar.sync 0; " + TO_NEIGHBOUR + " st.shared.u32 [%r2], %r1;",
        "race in shared memory: (write after read|read after write)",
    ),
    "a warp's barrier orders no other warp": (
        OWN + "bar.warp.sync -1; xor.b32 %r4, %r2, 128; ld.shared.u32 %r5, [%r4];",
        UNORDERED,
    ),
    "never written": ("ld.shared.u32 %r5, [%r2];", "read before it was written"),
    "global memory": (
        "st.global.u32 [%d2], %r1; sub.s64 %d4, %d2, %d3; ld.global.u32 %r5, [%d4];",
        "race in global memory: (read after write|write after read)",
    ),
    "outside of shared memory": (
        "add.s32 %r2, %r2, 1024; st.shared.u32 [%r2], %r1;",
        r"outside of shared memory: offset \d+ of 1024",
    ),
    "null": ("mov.u64 %d4, 0; ld.global.u32 %r5, [%d4];", "outside of global memory: 0x0"),
    "beyond a tensor": (
        "add.s64 %d2, %d2, 4096; st.global.u32 [%d2], %r1;",
        "outside of global memory",
    ),
    "misaligned": ("ld.global.v2.u32 {%r5,%r6}, [%d1+4];", "misaligned address"),
    "a shared address as a global one": (
        "cvt.u64.u32 %d4, %r2; cvta.shared.u64 %d4, %d4; cvta.to.global.u64 %d4, %d4; ld.global.u32 %r5, [%d4];",
        "cvta.to.global of a shared address",
    ),
    "different collectives": (
        HALF
        + "bar.warp.sync -1; bra L2;\nL1: shfl.sync.bfly.b32 %r5|%p2, %r1, 1, 31, -1;\nL2: mov.u32 %r6, 0;",
        "in different collectives",
    ),
    "a product for some lanes": (
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 " + PRODUCT,
        "a collective for some of the lanes|lane 16 has ended|a lane of the warp has ended",
    ),
    "a product after lanes have ended": (
        "setp.lt.u32 %p1, %r1, 3; @%p1 ret; " + PRODUCT,
        "a lane of the warp has ended|lane 0 has ended",
    ),
    "threads end while others wait": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;",
        "waits at a barrier, while 32 threads ended",
    ),
    "barriers at two places": (
        HALF + "bar.sync 0; bra L2;\nL1: bar.sync 0;\nL2: mov.u32 %r6, 0;",
        "at different barriers",
    ),
    "some at a barrier, some in a collective": (
        HALF + "bar.sync 0; bra L2;\nL1: bar.warp.sync -1;\nL2: mov.u32 %r6, 0;",
        "in different collectives",
    ),
    "different members": (
        "mov.u32 %r6, -1; setp.eq.u32 %p1, %r1, 5; @%p1 mov.u32 %r6, 0xffff; bar.warp.sync %r6;",
        "name different members",
    ),
    "before the parameters": (
        "ld.param.u64 %d4, [k_param_0+-8];",
        "outside of the parameters",
    ),
    "a named barrier that some never reach": (
        "setp.lt.u32 %p1, %r1, 32; @%p1 bra L1;\nbar.sync 1, 64; L1: mov.u32 %r6, 0;",
        "threads ended|no thread",
    ),
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_reported(name, order):
    """Faults are reported with kernel, block, thread and the line of the PTX."""
    body, message = FAULTS[name]
    with pytest.raises(RuntimeError, match=message) as error:
        run(body, threads=64, order=order)
    assert str(error.value).startswith("k, block 0, thread ") and ", line " in str(error.value)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_is_ordered_is_no_fault(order):
    """These are barriers of blocks and of warps, named ones, and lanes that reach one collective on different ways."""
    assert run(OWN + "bar.warp.sync -1; " + TO_NEIGHBOUR + stores("%r5"), threads=64, order=order)[
        :, 0
    ].tolist() == [i ^ 1 for i in range(64)]
    across = OWN + "bar.sync 0; xor.b32 %r4, %r2, 128; ld.shared.u32 %r5, [%r4];" + stores("%r5")
    assert run(across, threads=64, order=order)[:, 0].tolist() == [i ^ 32 for i in range(64)]
    named = OWN + "bar.sync 3, 64; xor.b32 %r4, %r2, 128; ld.shared.u32 %r5, [%r4];" + stores("%r5")
    assert run(named, threads=64, order=order)[:, 0].tolist() == [i ^ 32 for i in range(64)]
    apart = "mov.u32 %r4, 0;\nL1: add.s32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, %r1; @%p2 bra L1;\nbar.warp.sync -1;"
    assert run(apart + stores("%r4"), order=order)[:, 0].tolist() == [max(1, i) for i in range(32)]


# Every thread writes, waits at the barrier of its half of the block, and may read what another one wrote.
HALVES = """{write} shr.u32 %r4, %r1, 6; add.s32 %r4, %r4, 1; bar.sync %r4, 64;
and.b32 %r4, %r1, {distance}; setp.eq.u32 %p1, %r4, 0; @%p1 bra L1; {read}\nL1: mov.u32 %r6, 0;"""
SPACES = {
    "global": ("st.global.u32 [%d2], %r1;", "sub.s64 %d4, %d2, {}; ld.global.u32 %r5, [%d4];", 64),
    "shared": (OWN, "sub.s32 %r4, %r2, {}; ld.shared.u32 %r5, [%r4];", 4),
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("space", SPACES)
def test_named_barriers_order_their_own_threads_only(space, order):
    write, read, step = SPACES[space]
    for distance in (32, 64):
        text = HALVES.format(write=write, read=read.format(step * distance), distance=distance)
        if distance == 32:
            run(text, threads=128, order=order)
            continue
        with pytest.raises(RuntimeError, match=f"race in {space}|read before it was written"):
            run(text, threads=128, order=order)


def test_blocks_are_never_ordered():
    read = "ld.global.u32 %r5, [%d2]; "
    body = read + "mov.u32 %r6, %ctaid.x; setp.eq.u32 %p1, %r6, 1; @%p1 st.global.u32 [%d2], %r5;"
    for text, message in (
        (stores("%r1"), "write after write of another"),
        (body, "write after read of another"),
    ):
        with pytest.raises(RuntimeError, match=message) as error:
            run(text, grid=2)
        assert "block 1" in str(error.value)
    run(read, grid=2)


def test_memory_that_is_not_mapped():
    with pytest.raises(RuntimeError, match="memory that is not mapped"):
        run("mov.u64 %d4, 8; ld.global.u32 %r5, [%d4];", bounded=False)
