"""Files that take long to make, kept in the user's temporary folder for later runs of the tests."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def kept(name: str, state, make: Callable[[Path], None]) -> Path:
    """A file that make(path) writes, once for each state of what it depends on.

    Of several processes that want a file at the same time one makes it, and the others wait for it.
    """
    key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"seqconv-tests-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    target = folder / f"{key}-{name}"
    if not target.exists():
        with open(folder / f"{key}-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                part = target.with_name(f"{os.getpid()}-{target.name}")
                make(part)
                part.replace(target)
    return target
