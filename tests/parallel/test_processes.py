"""The processes that the other tests of this folder run in: values, exceptions, hangs and ends come back."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from processes import RankFailed, run, run_fresh


def total(more: torch.Tensor) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    mine = more + dist.get_rank()
    dist.all_reduce(mine)
    return dist.get_world_size(), os.getpid(), mine, torch.randn(2)


def fails(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"planted in rank {rank}")
    dist.barrier()


def hangs(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def fails_or_hangs(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"planted in rank {rank}")
    time.sleep(60)


def is_killed(rank: int) -> int:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return dist.get_rank()


def opaque() -> None:
    raise Opaque(lambda: None)


def leaves() -> None:
    raise SystemExit(3)


def ends() -> None:
    print("last words", flush=True)
    os._exit(3)


class Opaque(Exception):
    """It cannot be pickled."""


def works(world: int) -> list[int]:
    found = run(world, total, torch.tensor([1.0, 2.0]))
    wanted = torch.tensor([1.0, 2.0]) * world + world * (world - 1) / 2
    for ranks, _, ours, drawn in found:
        assert ranks == world
        assert torch.equal(ours, wanted)
        assert torch.equal(drawn, found[0][3])
    processes = [process for _, process, _, _ in found]
    assert len({*processes, os.getpid()}) == world + 1
    return processes


def test_values_come_back_from_processes_that_stay():
    first = works(2)
    assert works(3)[:2] == first
    assert works(1) == first[:1]
    assert works(2) == first


def test_an_exception_is_raised_here_with_the_traceback_of_its_rank():
    with pytest.raises(ValueError, match="planted in rank 1") as caught:
        run(2, fails, 1)
    assert isinstance(caught.value.__cause__, RankFailed)
    assert "rank 1: Traceback" in str(caught.value.__cause__)
    assert "in fails" in str(caught.value.__cause__)
    with pytest.raises(RankFailed, match="Opaque"):
        run(1, opaque)
    with pytest.raises(RankFailed, match="SystemExit: 3"):
        run(1, leaves)
    works(2)


def test_a_hang_ends_and_says_where():
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 did not return") as caught:
        run(2, hangs, 1, timeout=1)
    assert time.monotonic() - begin < 50
    assert "in hangs" in str(caught.value)
    works(2)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2 did not return") as caught:
        run_fresh(2, fails_or_hangs, 1, timeout=1)
    assert "in fails_or_hangs" in str(caught.value)
    assert "rank 1: Traceback" in str(caught.value) and "planted in rank 1" in str(caught.value)


@pytest.mark.slow
def test_a_killed_rank():
    with pytest.raises(RankFailed, match="rank 1: exit code -9"):
        run(2, is_killed, 1)
    with pytest.raises(RankFailed, match="rank 0: exit code 3\nlast words"):
        run(1, ends)
    works(2)


def test_processes_of_their_own_say_how_each_rank_ended():
    stay = works(2)
    killed, alive = run_fresh(2, is_killed, 0)
    assert killed.code == -signal.SIGKILL
    assert "in is_killed" in alive.error
    assert works(2) == stay


def test_a_function_must_have_a_name():
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        run(2, lambda: None)
