"""The backends and the only place that chooses one of them.

A call goes to the kernels of its device where these can carry it out, and to torch.fft otherwise.
"""

import os
import threading
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from seqconv.backends import cpu, fallback
from seqconv.backends.cuda import gpu
from seqconv.backends.protocol import Backend, Explanation, Request

_MEMBERS = [m for m in (*Backend.__annotations__, *vars(Backend)) if not m.startswith("_")]
_BY_NAME: dict[str, Backend | None] = {"auto": None, "reference": fallback}


def _named(who: str, name) -> Backend | None:
    if isinstance(name, str):
        if name not in _BY_NAME:
            wanted = " or ".join(map(repr, _BY_NAME))
            raise ValueError(f"{who} must be {wanted}, got {name!r}")
        return _BY_NAME[name]
    if isinstance(name, type):
        raise TypeError(f"{who} must be a name or a backend, got the class {name.__name__}")
    lacks = [member for member in _MEMBERS if not hasattr(name, member)]
    if lacks:
        text = f"got {type(name).__name__}, which lacks {', '.join(lacks)}"
        raise TypeError(f"{who} must be a name or a backend, {text}")
    return name


# What the process is asked to use, None for each device's own; and what one thread has to use at the moment.
_variable = os.environ.get("SEQCONV_BACKEND") or "auto"
_at_start = _named("SEQCONV_BACKEND", _variable), f"SEQCONV_BACKEND={_variable}"
_asked, _asked_by = _at_start
_recorded = threading.local()


class use_backend:
    """Makes every operator of this process use one backend; as a context manager, until the block ends.

    "reference" is torch.fft, slower with the same answers: for comparing, and for finding out where
    a difference comes from. "auto" is the usual choice: the kernels of each tensor's device.
    The environment variable SEQCONV_BACKEND=reference makes that choice when the package is imported.

    The choice holds in all threads of the process. It is made when the forward pass runs: the backward
    pass of a call, of the second order as well, uses what its forward pass has used, in whatever thread
    and at whatever time it runs. Code that torch.compile has made, torch.func's transforms and a
    checkpoint that recomputes ask anew.

        seqconv.use_backend("reference")            # from here on, or to the end of the block around it
        with seqconv.use_backend("reference"):      # in this block
            y = layer(x)

    Raises:
        ValueError: backend is another name. TypeError: it is neither a name nor a backend.
        RuntimeError: inside of code that torch.compile compiles as one graph.
    """

    def __init__(self, backend: "str | Backend"):
        if torch.compiler.is_compiling():
            raise RuntimeError("use_backend: call it outside of what torch.compile compiles")
        self._backend = _named("use_backend: backend", backend)
        self._entered = False
        self._begin()

    def _begin(self) -> None:
        if len(_choices) > 1 and not (_choices[-2]._entered or _choices[-1]._entered):
            del _choices[-2]  # a call whose place another one has taken
        _choices.append(self)
        _settle()

    def __enter__(self) -> None:
        if not any(one is self for one in _choices):
            self._begin()
        self._entered = True

    def __exit__(self, *exception) -> None:
        """Ends this choice and those of calls inside of the block; blocks of other threads go on."""
        self._entered = False
        place = next((i for i, one in enumerate(_choices) if one is self), None)
        if place is not None:
            del _choices[place]
            while place < len(_choices) and not _choices[place]._entered:
                del _choices[place]
        _settle()


_choices: list[use_backend] = []  # of calls and blocks that hold, the last one first of all


def _settle() -> None:
    global _asked, _asked_by
    _asked, _asked_by = _at_start
    if _choices:
        _asked = _choices[-1]._backend
        _asked_by = f"use_backend({getattr(_asked, 'name', 'auto')!r})"


@contextmanager
def recorded(backend: Backend | None):
    """In this thread calls use the backend, or for None each device's own, whatever the process is asked to use."""
    before = vars(_recorded).copy()
    _recorded.backend = backend
    try:
        yield
    finally:
        vars(_recorded).clear()
        vars(_recorded).update(before)


def choose(operator: str, inputs, options: tuple) -> tuple[Backend, Backend | None]:
    """The backend that carries out a call, and the one that is asked for, None for each device's own."""
    asked = backend = getattr(_recorded, "backend", _asked)
    if backend is None:
        first = inputs[0]  # device.type takes five times as long as these
        backend = cpu if first.is_cpu else gpu if first.is_cuda else fallback
    if operator in backend.always or backend.why_not(Request(operator, inputs, options)) is None:
        return backend, asked
    return fallback, asked


_streams: dict[
    str, Backend
] = {}  # those that have made spectra of tiles, by the name of their layout


def stream(k: Tensor) -> Backend:
    """The backend that carries out the steps of a stream with the taps k."""
    backend, _ = choose("stream", (k,), ())
    _streams[backend.stream_name()] = backend
    return backend


def stream_by(made_by: str, spectra: Tensor) -> Backend:
    """The backend that has made spectra, whatever a call would take now: only it can read them."""
    backend = _streams.get(made_by)
    if backend is None or backend.stream_name() != made_by:
        raise ValueError(
            f"stream: the kernel's spectra were made by {made_by!r}, which is not in use; make them anew"
        )
    if (backend is cpu and not spectra.is_cpu) or (backend is gpu and not spectra.is_cuda):
        raise ValueError(
            f"stream: the kernel's spectra were made by {made_by!r} and are now on {spectra.device}; make them anew"
        )
    return backend


def explain(request: Request) -> Explanation:
    """Which backend carries out a call, how, and why not a faster one. Computes nothing."""
    backend, _ = choose(*request)
    if backend is not fallback:
        return backend.explain(request)
    kind = request.inputs[0].device.type
    own = _asked or {"cpu": cpu, "cuda": gpu}.get(kind)
    if own is None:
        reason = f"there is no fused kernel for device type {kind!r}"
    else:
        reason = own.why_not(request) or f"{_asked_by} asks for it"
    return replace(fallback.explain(request), fallback=reason)
