"""Processes that make data, none of which outlives the one that wants it.

Each has a pipe of its own and nothing that is shared: no lock that a dead process could hold, no queue in which half
an answer could lie. That is why this is not concurrent.futures, which waits for ever where a worker is ended while
it answers.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait

from bench.lra.data.cache import DataError

PATIENCE = 5.0  # seconds until a worker that was asked to end is killed


def _serve(pipe: Connection) -> None:
    """Answers each (function, arguments) with (whether it went well, result or exception)."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group: the parent decides
    threading.Thread(target=_follow, daemon=True).start()
    while True:
        try:
            function, arguments = pipe.recv()
            try:
                answer = True, function(*arguments)
            except Exception as error:
                answer = False, error
            pipe.send(answer)
        except (EOFError, ConnectionError):  # the parent is no more
            return


def _follow() -> None:
    """Ends this process with its parent, however that ended, and also in the middle of a task."""
    parent_process().join()
    os._exit(1)


def in_order(function: Callable, tasks: Iterable[tuple], workers: int) -> Iterator:
    """function(*task) for each task, in their order, by so many processes; tasks may be endless.

    Closing the generator, or any exception in it, ends the processes at once.
    """
    context, pool = get_context("spawn"), {}
    try:
        # Ctrl-C reaches the whole group, but the parent alone decides: they inherit that it is blocked.
        usual = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                pool[ours] = context.Process(target=_serve, args=(theirs,), daemon=True)
                pool[ours].start()
                theirs.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, usual)
        yield from _results(function, iter(tasks), list(pool), 2 * workers)
    finally:
        begun = [process for process in pool.values() if process.pid]
        for process in begun:
            process.terminate()
        for pipe in pool:
            pipe.close()
        for process in begun:
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
