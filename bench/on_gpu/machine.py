"""The device under test behind one interface: a GPU, or the emulator in its place. Only this module calls CUDA."""

import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module

import torch

from bench.micro.timing import Clock
from seqconv import use_backend
from seqconv.backends.cuda import driver
from seqconv.backends.cuda.problem import Limits

SHORT = 5e-4  # seconds; Python takes longer than the kernels of a shorter call
LEAST = 2e-3  # seconds that one reading of the clock covers
ASLEEP = 1_000_000  # cycles for which a GPU waits while Python puts a call in its queue


class WrongReplay(Exception):
    """The replay of a graph does not give the results of the call that it recorded."""


def check_replay(replay: Callable[[], object], recorded, called) -> None:
    """Raises WrongReplay unless a replay fills the recorded results anew with those of the call."""
    pairs = [(a, b) for a, b in zip(recorded, called, strict=True) if isinstance(a, torch.Tensor)]
    for a, _ in pairs:
        a.fill_(torch.nan)
    replay()
    for i, (a, b) in enumerate(pairs):
        if not torch.allclose(
            a.float(), b.float(), rtol=1e-3, atol=1e-3 * b.float().abs().max().item()
        ):
            raise WrongReplay(f"result {i} of a graph's replay is not the call's")


@dataclass
class Timer:
    """Returns the seconds of one call, by its clock, when it is called."""

    clock: str
    read: Callable[[], float]

    def __call__(self) -> float:
        return self.read()


class Machine(ABC):
    dry: bool
    made: str | None  # module:function of a dry run's device
    device: str  # of torch's tensors
    replayed = "graph replays, back to back"  # what the clocks are called
    between_events = "events, behind a flushed cache"
    limits: Limits

    @abstractmethod
    def reason(self) -> str | None:
        """Returns why the kernels do not run here, or None."""

    @abstractmethod
    def facts(self) -> dict:
        """Returns what the hardware says of itself."""

    @property
    @abstractmethod
    def launcher(self):
        """What the CUDA backend launches its kernels on."""

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def replays(self, function: Callable[[], object]) -> Callable[[], float]:
        """Records one call in a graph. Returns a function that gives the seconds of one replay among many."""

    @abstractmethod
    def events(self, function: Callable[[], object]) -> Callable[[], float]:
        """Returns a function that gives the seconds of one call between two events."""

    @abstractmethod
    def times_of_warps(self, kernel: str, blocks: int, threads: int, iterations: int) -> list[list]:
        """Runs a kernel of mma.cu. Returns [first cycle, last cycle, first ns, last ns] of every warp."""

    @abstractmethod
    def profiled(self) -> AbstractContextManager:
        """Returns a context in which a profiler records."""

    @abstractmethod
    def release(self) -> None:
        """Gives back memory that is no longer used."""

    def launched(self, function: Callable[[], object]) -> list[str]:
        """Returns the names of the kernels that a call launches, in their order."""
        device, names = self.launcher, []
        launch = device.launch

        def recorded(kernel: str, *arguments) -> None:
            names.append(kernel)
            launch(kernel, *arguments)

        device.launch = recorded
        try:
            function()
            self.synchronize()
        finally:
            del device.launch
        return names

    def timer(self, function: Callable[[], object], replay: bool = False) -> Timer:
        """Times short calls, or all if `replay`, by graph replays. Events time the others, and calls that no graph can
        hold."""
        try:
            replayed = self.replays(function)
        except RuntimeError as error:  # no memory for both, or something that no graph can hold
            if replay:
                raise
            self.release()
            reason = " ".join(str(error).split())[:80]
            return Timer(f"{self.between_events} (no graph: {reason})", self.events(function))
        if replay or min(replayed() for _ in range(2)) < SHORT:
            return Timer(self.replayed, replayed)
        del replayed
        self.release()
        return Timer(self.between_events, self.events(function))


@contextmanager
def poisoned():
    """Makes torch fill what it allocates with NaN, which shows what a kernel does not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Cuda(Machine):
    dry, made, device = False, None, "cuda"

    def __init__(self):
        self.index = torch.cuda.current_device()
        self._clock = None

    @property
    def launcher(self):
        return driver.device(self.index)

    @property
    def limits(self) -> Limits:
        return self.launcher.limits

    def reason(self) -> str | None:
        return driver.reason(self.index)

    def facts(self) -> dict:
        of = torch.cuda.get_device_properties(self.index)
        known = {"name": of.name, "arch": f"sm_{of.major}{of.minor}", "memory": of.total_memory}
        return known | {"processors": of.multi_processor_count, "cuda": torch.version.cuda}

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def replays(self, function):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # the first call compiles, loads and keeps things
                called = function()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = function()
        if isinstance(called, (list, tuple)):
            check_replay(graph.replay, recorded, called)
        del called
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def seconds(count: int) -> float:
            start.record()
            for _ in range(count):
                graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / count

        seconds(1)
        count = max(1, round(LEAST / seconds(3)))
        return lambda: seconds(count)

    def events(self, function):
        if self._clock is None:
            self._clock = Clock(self.device, ahead=lambda: torch.cuda._sleep(ASLEEP))
        return lambda: self._clock(function)

    def times_of_warps(self, kernel, blocks, threads, iterations):
        times = torch.zeros(blocks * threads // 32, 4, dtype=torch.int64, device=self.device)
        arguments = array("q", [times.data_ptr(), iterations])
        driver.device(self.index).launch(kernel, blocks, threads, 0, arguments)
        torch.cuda.synchronize()
        return times.tolist()

    def profiled(self):
        return torch.cuda.profiler.profile()

    def release(self) -> None:
        torch.cuda.empty_cache()


class Dry(Machine):
    """The emulated kernels on tensors of the CPU. The times are those of the wall clock and mean nothing."""

    dry, device = True, "cpu"
    replayed, between_events = "wall clock for graph replays", "wall clock for events"

    def __init__(self, made: str):
        self.made, emulated = made, import_module("emulated")
        module, function = made.split(":")
        self.emulator = getattr(import_module(module), function)()
        self.limits = self.emulator.limits
        use_backend(emulated.OnDevice(self.emulator))

    @property
    def launcher(self):
        return self.emulator

    def reason(self) -> str | None:
        return None

    def facts(self) -> dict:
        known = {"name": "the emulator (dry run)", "arch": "sm_90", "memory": 0}
        return known | {"processors": self.limits.processors, "cuda": torch.version.cuda}

    def synchronize(self) -> None: ...

    def replays(self, function):
        function()
        return self.events(function)

    def events(self, function):
        def seconds() -> float:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start

        return seconds

    def times_of_warps(self, kernel, blocks, threads, iterations):
        cycles = iterations * 8 * threads // 128  # as if one could be issued every cycle
        return [[0, cycles, 0, cycles]] * (blocks * threads // 32)

    def profiled(self):
        return nullcontext()

    def release(self) -> None: ...


def connect(dry: str | None) -> Machine:
    if not dry and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device")
    return Dry(dry) if dry else Cuda()
