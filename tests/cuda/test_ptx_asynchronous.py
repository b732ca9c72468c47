"""The PTX machine's asynchronous copies and mbarriers.

They are right when the program waits for them, whenever they happen. Otherwise they are a fault.
"""

import pytest
import torch
from ptx_text import OWN, WORD, run, stores

COPIES = [0, 1, 2]  # at once, as late as possible, the last first
NOWHERE = "mov.u64 %d8, 4096;\n"  # no system maps the lowest pages
FIRST = "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra {label};\n"
MAKE = FIRST.format(label="L1") + "mbarrier.init.shared.b64 [%r3+512], 1; L1: bar.sync 0;\n"
# Thread 0 asks for the rows of all threads, 64 bytes each, from d1 on.
ASK = (
    FIRST.format(label="L2")
    + "mbarrier.arrive.expect_tx.shared.b64 _, [%r3+512], 256;\n"
    + "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d1], 128, [%r3+512];\n"
    + "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3+128], [%d1+128], 128, [%r3+512];\n"
    + "L2: mov.u32 %r6, 0;\n"
)
WAIT = "L3: mbarrier.try_wait.parity.shared.b64 %p2, [%r3+512], 0; @!%p2 bra L3;\n"
READ = "ld.shared.u32 %r5, [%r2];" + stores("%r5")


def given() -> torch.Tensor:
    return torch.arange(64 * 16, dtype=WORD).view(64, 16)


@pytest.mark.parametrize("copies", COPIES)
def test_bulk_copy(copies):
    out = run(MAKE + ASK + WAIT + READ, given(), threads=64, copies=copies)
    assert out[:, 0].tolist() == list(range(64))


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize(
    "body, message",
    [
        (MAKE + ASK + READ, "asynchronous copy writes, which nobody waited for"),
        (MAKE + ASK, "the block ends while nobody has waited"),
        (ASK + WAIT, "no mbarrier was initialised there"),
        (MAKE.replace("bar.sync 0;", "mov.u32 %r6, 0;") + "bar.warp.sync -1;" + WAIT, "mbarrier|no thread can go on"),
        (MAKE + ASK.replace("256;", "512;") + WAIT, "no thread can go on"),
        (MAKE + ASK.replace("[%d1+128], 128", "[%d1+128], 120") + WAIT, "not a multiple of 16 bytes"),
        (MAKE + ASK.replace("[%r3+128]", "[%r3+960]") + WAIT, "outside of shared memory"),
        (MAKE + NOWHERE + ASK.replace("[%d1+128]", "[%d8]") + WAIT, "outside of global memory"),
        (OWN + "bar.sync 0;\n" + MAKE + ASK + WAIT + READ, "without a fence.proxy.async"),
        (MAKE + "ld.shared.u32 %r5, [%r2];", "read before it was written"),
    ],
)  # fmt: skip
def test_bulk_copies_that_go_wrong(body, message, copies):
    with pytest.raises(RuntimeError, match=message):
        run(body, given(), threads=64, copies=copies)


@pytest.mark.parametrize("copies", COPIES)
def test_a_fence_lets_a_bulk_copy_follow_stores(copies):
    fence = "fence.proxy.async.shared::cta; bar.sync 0;\n"
    out = run(OWN + fence + MAKE + ASK + WAIT + READ, given(), threads=64, copies=copies)
    assert out[:, 0].tolist() == list(range(64))


STORE = (
    "cp.async.bulk.global.shared::cta.bulk_group [%d2], [%r3], 128; cp.async.bulk.commit_group;\n"
)
STORE_OWN = OWN + "fence.proxy.async.shared::cta; bar.sync 0;\n" + FIRST.format(label="L4") + STORE
DONE = "cp.async.bulk.wait_group 0;\nL4: mov.u32 %r6, 0;\n"


@pytest.mark.parametrize("copies", COPIES)
def test_bulk_store(copies):
    out = run(STORE_OWN + DONE, threads=64, copies=copies)
    assert out.flatten()[:32].tolist() == list(range(32))
    with pytest.raises(RuntimeError, match="nobody has waited"):
        run(STORE_OWN + "L4: mov.u32 %r6, 0;\n", threads=64, copies=copies)
    with pytest.raises(RuntimeError, match="asynchronous store reads, which nobody waited for"):
        run(STORE_OWN + "st.shared.u32 [%r2], %r1;\n" + DONE, threads=64, copies=copies)
    with pytest.raises(RuntimeError, match="without a fence"):
        run(
            STORE_OWN.replace("fence.proxy.async.shared::cta;", "") + DONE,
            threads=64,
            copies=copies,
        )


PIECE = "mul.lo.u32 %r7, %r1, 16; add.s32 %r8, %r3, %r7; cp.async.cg.shared.global [%r8], [%d1], 16{more};\n"
COMMIT, AWAIT = "cp.async.commit_group;\n", "cp.async.wait_group 0;\n"
OWN_PIECE = "ld.shared.v4.u32 {%r10,%r11,%r12,%r13}, [%r8];" + stores(
    "%r10", "%r11", "%r12", "%r13"
)


@pytest.mark.parametrize("copies", COPIES)
def test_pieces(copies):
    """Bytes that cp.async does not read become zero. Other threads see a piece after a wait and a barrier."""
    for more, kept in (("", 4), (", 8", 2), (", 0", 0)):
        body = PIECE.format(more=more) + COMMIT + AWAIT + OWN_PIECE
        expected = given()[:, :4].clone()
        expected[:, kept:] = 0
        assert torch.equal(run(body, given(), threads=64, copies=copies)[:, :4], expected)
    other = "xor.b32 %r8, %r8, 512;" + OWN_PIECE  # of the other warp
    body = PIECE.format(more="") + COMMIT + AWAIT + "bar.sync 0;" + other
    out = run(body, given(), threads=64, copies=copies)
    assert torch.equal(out[:, :4], given()[:, :4].roll(32, 0))


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize(
    "body, message",
    [
        (COMMIT + OWN_PIECE + AWAIT, "nobody waited for"),
        (COMMIT + "cp.async.wait_group 1;\n" + OWN_PIECE, "nobody waited for"),
        (AWAIT + OWN_PIECE, "nobody waited for"),
        (
            COMMIT + AWAIT + "xor.b32 %r8, %r8, 512;" + OWN_PIECE,
            "race in shared memory|nobody wait|before it was",
        ),
        (COMMIT, "the block ends"),
    ],
)
def test_pieces_that_go_wrong(body, message, copies):
    with pytest.raises(RuntimeError, match=message):
        run(PIECE.format(more="") + body, given(), threads=64, copies=copies)


def test_more_arrivals_than_counted():
    """With a count of one the first arrival completes the phase. 64 threads overrun a count of two in the last."""
    arrive = "mbarrier.arrive.shared.b64 _, [%r3+512];\n"
    run(MAKE + arrive, threads=64)
    with pytest.raises(RuntimeError, match="more arrivals at an mbarrier"):
        run(MAKE.replace(", 1;", ", 0;") + arrive, threads=64)
