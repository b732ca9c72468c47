"""The steps of the two parts, the most informative first. Standard library only, so that the first line comes soon."""

from dataclasses import dataclass
from importlib import import_module

# Exit codes of a step's process. Any other code (1: an exception), or a signal, is a crash.
# ABSENT: there is nothing to run. PARTLY: everything was right until the time was over.
RIGHT, WRONG, ABSENT, PARTLY = 0, 3, 4, 5


@dataclass(frozen=True)
class Step:
    """One process. It calls `STEPS[name](machine, log)` of a module, which returns one of the exit codes."""

    name: str
    seconds: float  # after which it is cut
    module: str
    what: str
    vital: bool = False  # the next steps would fail without it
    extra: bool = False  # runs only with --all or by name

    def run(self, machine, log) -> int:
        return import_module(f"bench.on_gpu.{self.module}").STEPS[self.name](machine, log)


PROVE = (
    Step("versions", 45, "facts", "what is installed, and whether the kernels load", vital=True),
    Step("smoke", 60, "smoke", "results and gradients against float64"),
    Step("streams", 30, "streams", "steps of streams against float64, and their times"),
    Step("ceilings", 30, "ceilings", "bandwidth of a copy, interval of mma.sync, a launch"),
    Step("times-4k", 40, "benchmark", "graph replays of 4096 steps"),
    Step("times", 60, "benchmark", "graph replays of 1K, 8K, 16K and 32K steps"),
    Step("tests", 75, "suite", "the most informative of tests/cuda/gpu"),
    Step("tests-all", 240, "suite", "all of tests/cuda/gpu", extra=True),
)
MEASURE = (
    Step("counters", 80, "profile", "ncu: 4K and 16K forward, 4K backward, 4K gated"),
    Step("benchmark-4k", 60, "benchmark", "4096 steps beside torch.fft and other contenders"),
    Step("sanitizer", 75, "profile", "compute-sanitizer: racecheck and memcheck"),
    Step("compile", 60, "compiled", "graphs of torch.compile, reduce-overhead"),
    Step("benchmark", 120, "benchmark", "every other length"),
)
PARTS = {"prove": (PROVE, 210.0), "measure": (MEASURE, 270.0)}  # steps, and seconds in all
ALL_SECONDS = 480.0  # of a part that runs its extra steps
BY_NAME = {step.name: step for step in (*PROVE, *MEASURE)}
