"""Processes that generate data sets."""

import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def pool_of(workers: int) -> ProcessPoolExecutor:
    """They leave Ctrl-C, which reaches them as well, to the process that started them."""
    ignore = (signal.SIGINT, signal.SIG_IGN)
    return ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, ignore)
