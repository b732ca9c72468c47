"""Processes that make data. None of them outlives the process that wants the data.

Each has a pipe of its own and nothing is shared: no lock that a dead process could hold, no queue in which half
an answer could lie. concurrent.futures waits for ever where a worker is ended while it answers.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait

from bench.lra.data.cache import DataError

PATIENCE = 5.0  # seconds until a worker that was asked to end is killed


@contextlib.contextmanager
def _uninterrupted():
    """Puts Ctrl-C off until the end. Processes that are started meanwhile do not heed it: the parent alone decides.

    The handler puts it off here, since another thread (a progress bar has one) may take a signal that this thread
    blocks. The processes inherit that it is blocked.
    """
    came = []
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _serve(pipe: Connection) -> None:
    """Answers each (function, arguments) with (whether it succeeded, result or exception)."""
    # Ctrl-C reaches the whole group of processes, but the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, daemon=True).start()
    while True:
        try:
            function, arguments = pipe.recv()
            try:
                answer = True, function(*arguments)
            except Exception as error:
                answer = False, error
            pipe.send(answer)
        except (EOFError, ConnectionError):  # the parent has ended
            return


def _follow() -> None:
    """Ends this process when its parent ends, whatever the reason, and even in the middle of a task."""
    parent_process().join()
    os._exit(1)


def in_order(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator:
    """Yields function(*task) for each task, in their order, computed by so many processes. Tasks may be endless.

    Closing the generator, or any exception in it, ends the processes at once.
    """
    context, pool = get_context("spawn"), {}
    # Python starts this process with the first worker otherwise, and lets Ctrl-C through after that.
    resource_tracker.ensure_running()
    try:
        with _uninterrupted():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                pool[ours] = context.Process(target=_serve, args=(theirs,), daemon=True)
                pool[ours].start()
                theirs.close()
        yield from _results(function, iter(tasks), list(pool), 2 * workers)
    finally:
        with _uninterrupted():
            _end([process for process in pool.values() if process.pid], list(pool))


def _end(processes: list, pipes: list[Connection]) -> None:
    for process in processes:
        process.terminate()
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def _results(function: Callable, tasks: Iterator, idle: list[Connection], ahead: int) -> Iterator:
    given, wanted = 0, 0  # tasks handed out, and the one whose result is next
    busy: dict[Connection, int] = {}
    done: dict[int, object] = {}
    while True:
        while idle and tasks is not None and given - wanted < ahead:
            task = next(tasks, None)
            if task is None:
                tasks = None
                break
            pipe = idle.pop()
            pipe.send((function, task))
            busy[pipe] = given
            given += 1
        while wanted in done:
            yield done.pop(wanted)
            wanted += 1
        if tasks is not None and idle and given - wanted < ahead:
            continue
        if not busy:
            return
        for pipe in wait(list(busy)):
            try:
                good, result = pipe.recv()
            except (EOFError, ConnectionError):
                raise DataError("a process that makes data was ended (out of memory?)") from None
            if not good:
                raise result
            done[busy.pop(pipe)] = result
            idle.append(pipe)
