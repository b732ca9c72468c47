"""Functions in several processes at once, over gloo: run(world, function, *args).

The processes are started once per session, for torch takes seconds to import. They end with the process that
started them.
"""

import atexit
import contextlib
import datetime
import faulthandler
import itertools
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

MOST = 4
START = 120  # seconds that a process may take to import torch
GRACE = 5  # seconds for the other ranks once one has failed


class Outcome(NamedTuple):
    """What became of a rank: it returned value, or raised error, or its process ended with an exit code."""

    value: Any = None
    error: str | None = None  # the traceback
    code: int | None = None  # -9 after SIGKILL
    log: str = ""  # what it wrote before it ended
    exception: Exception | None = None  # where it can be pickled
    when: float = 0.0  # it was raised

    @property
    def failed(self) -> bool:
        return self.error is not None or self.code is not None

    def told(self) -> str:
        return self.error or f"exit code {self.code}\n{self.log}"


class RankFailed(RuntimeError):
    """A rank's traceback, or how its process ended."""


def run(world: int, function: Callable, *args, timeout: float = 60) -> list:
    """The values of function(*args) in ranks 0..world-1 of a process group of their own.

    function is at the top of a module: it is sent by name. Values are pickled, tensors included; a DTensor is not.
    All ranks start from the same seed. Warnings are errors, as they are in tests.

    Raises:
        What a rank raised first, with every failed rank's traceback as the cause.
        TimeoutError: some ranks did not return in time; it says where each of them is. All processes are killed.
        RankFailed: the process of a rank ended.
    """
    outcomes = _pool.call(world, function, args, timeout, timeout + 30, GRACE)
    failed = [rank for rank, outcome in enumerate(outcomes) if outcome.failed]
    if failed:
        # Ranks that lose a peer fail later than it.
        told = sorted((outcomes[rank].when, rank) for rank in failed)
        text = "\n".join(f"rank {rank}: {outcomes[rank].told()}" for _, rank in told)
        raise outcomes[told[0][1]].exception or RankFailed(text) from RankFailed(text)
    return [outcome.value for outcome in outcomes]


def run_fresh(
    world: int, function: Callable, *args, timeout: float = 60, collective: float = 10
) -> list[Outcome]:
    """As run, in processes that are used for this call alone: a rank may raise, or end its process.

    Args:
        collective: seconds that a rank waits for the others in a collective. It is less than timeout.
    """
    pool = _Pool()
    try:
        return pool.call(world, function, args, timeout, collective)
    finally:
        pool.kill()


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection
    log: Path


class _Pool:
    """Processes that wait for work, at most four."""

    def __init__(self):
        self.workers: list[_Worker] = []
        self.calls = itertools.count()
        self.folder: Path | None = None

    def call(self, world, function, args, timeout, collective, grace=None) -> list[Outcome]:
        """The outcome of each rank. With grace the other ranks have only that long after the first failure."""
        assert 1 <= world <= MOST, f"{world} processes were asked for, of at most {MOST}"
        work = pickle.dumps(
            (function, args)
        )  # sys.path must be there before the function is looked up
        try:
            self.grow(world)
            workers = self.workers[:world]
            meet = str(self.folder / f"meet{next(self.calls)}")
            for rank, worker in enumerate(workers):
                worker.log.write_text("")
                call = (sys.path, work, rank, world, meet, collective, timeout)
                worker.pipe.send_bytes(pickle.dumps(call))
            outcomes = [Outcome()] * world
            waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
            end = time.monotonic() + timeout
            while waiting:
                ready = wait(list(waiting), max(0, end - time.monotonic()))
                if not ready and not (grace and any(o.failed for o in outcomes)):
                    where = _where(timeout, workers, sorted(waiting.values()))
                    failed = [i for i, outcome in enumerate(outcomes) if outcome.failed]
                    raise TimeoutError(
                        "\n".join([where, *(f"rank {i}: {outcomes[i].told()}" for i in failed)])
                    )
                for pipe in ready or list(waiting):
                    rank = waiting.pop(pipe)
                    outcomes[rank] = _outcome(workers[rank], bool(ready))
                    if grace and outcomes[rank].failed:
                        end = min(end, time.monotonic() + grace)
        except BaseException:
            self.kill()
            raise
        if any(outcome.code is not None or outcome.when == math.inf for outcome in outcomes):
            self.kill()
        return outcomes

    def grow(self, world: int) -> None:
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="processes"))
            atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        context = multiprocessing.get_context("spawn")
        started = []
        for number in range(len(self.workers), world):
            ours, theirs = context.Pipe()
            log = self.folder / f"log{number}"
            process = context.Process(target=_serve, args=(theirs, str(log)), daemon=True)
            process.start()
            theirs.close()
            started.append(_Worker(process, ours, log))
        self.workers += started
        for worker in started:
            if not worker.pipe.poll(START):
                raise TimeoutError(f"a process was not ready after {START} s")
            worker.pipe.recv_bytes()

    def kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.process.close()
            worker.pipe.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.workers, self.folder = [], None


def _outcome(worker: _Worker, ready: bool) -> Outcome:
    if not ready:
        return Outcome(error="did not return after another had failed", when=math.inf)
    try:
        return pickle.loads(worker.pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        worker.process.join()
        return Outcome(code=worker.process.exitcode, log=worker.log.read_text())


def _where(timeout: float, workers: list[_Worker], hung: list[int]) -> str:
    for rank in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[rank].process.pid, signal.SIGUSR1)
    time.sleep(0.5)  # the handlers write
    told = "\n".join(f"rank {rank}:\n{workers[rank].log.read_text()}" for rank in hung)
    return f"ranks {hung} of {len(workers)} did not return within {timeout} s\n{told}"


def show_where() -> None:
    """On SIGUSR1 this process writes where it is."""
    faulthandler.register(signal.SIGUSR1)


def _serve(pipe, log: str) -> None:
    """The loop of a process. The group of a call lives until the next, so that no rank leaves a slower one alone."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    faulthandler.enable()
    show_where()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("error")
    pipe.send_bytes(b"ready")
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            call = pickle.loads(pipe.recv_bytes())
            _end_group()
            pipe.send_bytes(_answer(*call))


def _answer(path, work, rank, world, meet, collective, timeout) -> bytes:
    sys.path[:] = path
    random.seed(0)
    torch.manual_seed(0)
    faulthandler.dump_traceback_later(timeout + 60, exit=True)  # nobody is left who would end it
    try:
        function, args = pickle.loads(work)
        store = dist.FileStore(meet, world)
        limit = datetime.timedelta(seconds=collective)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        return pickle.dumps(Outcome(function(*args)))
    except BaseException as error:  # CheckpointException is no Exception
        when = time.monotonic()
        outcome = Outcome(error=traceback.format_exc(), exception=error, when=when)
        _end_group()  # the others shall not wait for this rank
        with contextlib.suppress(Exception):
            pickled = pickle.dumps(outcome)
            pickle.loads(pickled)
            if isinstance(error, Exception):
                return pickled
        return pickle.dumps(outcome._replace(exception=None))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:  # it keeps meshes, whose groups are no more
        from torch.distributed.tensor import debug

        for cache in ("_python", "_fast_path", ""):  # one function since torch 2.11
            getattr(debug, f"_clear{cache}_sharding_prop_cache", lambda: None)()


_pool = _Pool()
