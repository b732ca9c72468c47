"""How long one multiprocessor takes for a turn of a kernel's loop over rows: a simulation, not a measurement.

Warps run their instructions in order. Four schedulers issue one instruction a cycle each. A warp waits for the
stall counts and the scoreboards that the compiler has written into the machine code, for the pipe of its next
instruction, for barriers and for asynchronous copies. Shared memory, the way to the cache, the cache and the memory
each serve one request after another. Branches cost their issue slot, and every access hits what it is said to hit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, linear_regression

from bench.model.classes import lane_bytes, pipe_of
from bench.model.code import NO_SCOREBOARD, Instruction
from seqconv.backends.cuda.problem import H100

SCHEDULERS = 4
APART = 220  # cycles between the first instructions of two groups of warps, in a long path
MEETING = 20  # cycles from the last arrival at a barrier to the next instruction
SHARED_LATENCY, SHARED_READ = 24, 8  # beyond the cycles in which the memory works: result, operands
SHARED_BYTES, STORED_BYTES, LOADED_BYTES = 128, 64, 128  # a cycle
SHORT_LATENCY = {
    **dict.fromkeys(("SHFL", "REDUX", "CREDUX"), 24),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "S2R"), 20),
    **dict.fromkeys(("LDC", "LDL", "STL"), 30),
}
LEAST_LATENCY, LEAST_READ = 2, 8


@dataclass(frozen=True)
class Device:
    """What the simulation takes of a device. The figures that no document gives are to be calibrated on a GPU."""

    hmma: int = 4  # cycles between two tensor core instructions of a scheduler
    bandwidth: float = 3.0e12  # bytes a second that a copy reaches
    processors: int = H100.processors
    clock: float = H100.clock
    memory_latency: int = 700  # cycles
    cache_latency: int = 300
    cache_bytes: float = 32.0  # of the L2 cache, a cycle and multiprocessor

    @property
    def memory_bytes(self) -> float:
        """Bytes a cycle and multiprocessor."""
        return self.bandwidth / self.processors / self.clock

    def seconds(self, cycles: float, count: int) -> float:
        """The time of `count` rows, spread over all multiprocessors, each of which takes `cycles` a row."""
        return cycles * count / self.processors / self.clock


@dataclass(frozen=True)
class Residents:
    """What runs on a multiprocessor at a time: blocks of `slots` groups of warps. Each group has rows of its own."""

    warps: int
    slots: int = 1
    blocks: int = 1


class _Step:
    """One instruction of the path, in the numbers that the simulation needs."""

    def __init__(self, instruction: Instruction, device: Device):
        name = instruction.name
        pipe, self.taken = pipe_of(instruction)
        self.pipe = -1 if pipe == "N" else "TFHMA".index(pipe)
        if pipe == "T":
            self.taken = device.hmma
        self.stall = max(1, instruction.stall)
        self.written, self.read = instruction.written, instruction.read
        self.waits = [bit for bit in range(6) if instruction.waits >> bit & 1]
        self.size = 32 * lane_bytes(instruction)
        self.latency = SHORT_LATENCY.get(name, 0)
        self.kind, self.shared, self.keep, self.whole = "", 0, -1, False
        if name in ("LDS", "LDSM", "STS", "STSM", "ATOMS"):
            self.kind = "shared"
            self.shared = max(1, self.size // SHARED_BYTES)  # cycles
        elif name in ("LDGSTS", "LDGDEPBAR"):
            self.kind = name
        elif name in ("LDG", "LD", "ATOMG", "ATOM"):
            self.kind = "load"
        elif name in ("STG", "ST", "RED"):
            self.kind = "store"
        elif name == "DEPBAR" and instruction.operands.startswith("SB0"):
            self.keep = int(instruction.operands.split(",")[1], 16)  # copies' groups still open
        elif name == "BAR" and "SYNC" in instruction.opcode:
            self.kind, self.whole = "barrier", "," not in instruction.operands


@dataclass(eq=False)
class _Group:
    """Warps that meet at a barrier."""

    size: int
    here: list = field(default_factory=list)


class _Warp:
    def __init__(self, group: _Group, block: _Group, scheduler: int, start: int):
        self.group, self.groups = group, (group, block)
        self.scheduler, self.ready = scheduler, start
        self.place = self.turns = self.open = 0
        self.board, self.copied = [0] * 6, []


def simulate(
    path: Sequence[Instruction],
    residents: Residents,
    device: Device = Device(),
    memory: float | None = None,
    turns: int | None = None,
) -> float:
    """Returns the cycles in which a multiprocessor does one turn of one group, with all residents at work.

    path: what a warp runs in a turn (bench.model.flow.turn).
    memory: the bytes that a turn of a group moves from and to memory. Asynchronous copies and stores move them
        first, and loads the rest. The L2 cache has what else they ask for. By default all of copies and stores
        go to memory, and no loads.
    turns: of each group, of which those in the middle count; by default enough for a mean.
    """
    if not path:
        raise ValueError("path: at least one instruction is wanted, got none")
    for name in ("warps", "slots", "blocks"):
        if getattr(residents, name) < 1:
            raise ValueError(f"residents: {name} must be positive, got {getattr(residents, name)}")
    return _Multiprocessor(path, residents, device, memory).run(turns)


class _Multiprocessor:
    def __init__(self, path, residents: Residents, device: Device, memory: float | None):
        self.device, self.warps_of_a_group = device, residents.warps
        self.steps = [_Step(instruction, device) for instruction in path]
        self.schedulers: list[list[_Warp]] = [[] for _ in range(SCHEDULERS)]
        self.groups = residents.slots * residents.blocks
        for b in range(residents.blocks):
            block = _Group(residents.warps * residents.slots)
            for s in range(residents.slots):
                group, number = _Group(residents.warps), b * residents.slots + s
                for w in range(residents.warps):
                    at = (number * residents.warps + w) % SCHEDULERS
                    warp = _Warp(group, block, at, number * min(APART, len(path)))
                    self.schedulers[at].append(warp)
        self.share_of_streams, self.share_of_loads = self._shares(memory)
        self.pipes = [[0] * 5 for _ in range(SCHEDULERS)]
        self.shared = self.way = self.cache = self.memory = 0.0  # when each is free again
        self.wake = [0.0] * SCHEDULERS

    def _shares(self, memory: float | None) -> tuple[float, float]:
        """Of the bytes that copies and stores, and that loads ask for, the parts that the memory moves."""
        streams = sum(s.size for s in self.steps if s.kind in ("LDGSTS", "store"))
        loads = sum(s.size for s in self.steps if s.kind == "load")
        streams, loads = streams * self.warps_of_a_group, loads * self.warps_of_a_group
        if memory is None:
            return 1.0, 0.0
        of_streams = min(1.0, memory / streams) if streams else 0.0
        return of_streams, min(1.0, max(0.0, memory - streams) / loads) if loads else 0.0

    def run(self, turns: int | None) -> float:
        turns = turns or (24 if self.groups > 1 else 10)  # groups that differ need more for a mean
        self.turns, self.left = turns, sum(map(len, self.schedulers))
        self.done: list[float] = []
        current = [0] * SCHEDULERS  # the warp that issued last goes on while it can
        wake = self.wake
        while self.left:
            now = min(wake)
            for s in range(SCHEDULERS):
                if wake[s] > now:
                    continue
                warps, pipes, later = self.schedulers[s], self.pipes[s], math.inf
                for q in range(len(warps)):
                    at = (current[s] + q) % len(warps)
                    warp = warps[at]
                    ready = warp.ready
                    if ready < later:
                        pipe = self.steps[warp.place].pipe
                        if pipe >= 0 and pipes[pipe] > ready:
                            ready = pipes[pipe]
                        if ready <= now:
                            current[s], later = at, now + 1
                            wake[s] = later  # a barrier may wake it before
                            self._issue(warp, now)
                            break
                        later = min(later, ready)
                wake[s] = later
        done, together = sorted(self.done), self.warps_of_a_group
        groups = [fmean(done[k : k + together]) for k in range(0, len(done), together)]
        groups = groups[len(groups) // 4 : len(groups) * 4 // 5 + 1]
        cycles, _ = linear_regression(range(len(groups)), groups)
        return cycles

    def _issue(self, warp: _Warp, now: float) -> None:
        step = self.steps[warp.place]
        if step.pipe >= 0:
            self.pipes[warp.scheduler][step.pipe] = now + step.taken
        latency, read_latency = self._serve(step, warp, now)
        board = warp.board
        if step.written != NO_SCOREBOARD:
            board[step.written] = now + max(latency, LEAST_LATENCY)
        if step.read != NO_SCOREBOARD:
            before = board[step.read] if step.read == step.written else 0
            board[step.read] = max(before, now + max(read_latency, LEAST_LATENCY))
        warp.place += 1
        if warp.place == len(self.steps):
            warp.place, warp.turns = 0, warp.turns + 1
            self.done.append(now)
        following = self.steps[warp.place]
        ready = now + step.stall
        for bit in following.waits:
            if board[bit] > ready:
                ready = board[bit]
        open_groups = len(warp.copied) - following.keep
        if following.keep >= 0 and open_groups > 0:
            ready = max(ready, *warp.copied[:open_groups])
        warp.ready = ready
        if step.kind == "barrier":
            self._meet(warp, warp.groups[step.whole], now)
        if warp.turns == self.turns:
            warp.ready = math.inf
            self.left -= 1

    def _meet(self, warp: _Warp, group: _Group, now: float) -> None:
        """Stops the warp, unless it is the last one to arrive: then all of them go on."""
        if group.size == 1:
            return
        group.here.append((warp, warp.ready))
        warp.ready = math.inf
        if len(group.here) == group.size:
            for other, ready in group.here:
                if other.turns == self.turns:
                    continue
                other.ready = max(ready, now + MEETING)
                self.wake[other.scheduler] = min(self.wake[other.scheduler], other.ready)
            group.here = []

    def _serve(self, step: _Step, warp: _Warp, now: float) -> tuple[float, float]:
        """Lets the memories do their part. Returns the cycles until the result is there, and the operands are read."""
        device, kind = self.device, step.kind
        if kind == "shared":
            start = max(now, self.shared)
            self.shared = start + step.shared
            over = self.shared - now
            return over + SHARED_LATENCY, over + SHARED_READ
        if kind == "LDGSTS":
            self.way = max(now, self.way) + step.size / STORED_BYTES
            warp.open = max(warp.open, self._stream(step, now) + device.memory_latency)
            return 0, 16
        if kind == "LDGDEPBAR":
            warp.copied = [*warp.copied, warp.open][-16:]
        elif kind == "store":
            start = max(now, self.way)
            self.way = start + step.size / STORED_BYTES
            self._stream(step, now)
            return 0, start - now + 16
        elif kind == "load":
            self.way = max(now, self.way) + step.size / LOADED_BYTES
            self.cache = max(now, self.cache) + step.size / device.cache_bytes
            arrival = self.cache
            if self.share_of_loads:
                self.memory = (
                    max(now, self.memory) + step.size * self.share_of_loads / device.memory_bytes
                )
                arrival = max(arrival, self.memory)
            slow = self.share_of_loads * (device.memory_latency - device.cache_latency)
            return arrival - now + device.cache_latency + slow, 12
        return step.latency, LEAST_READ

    def _stream(self, step: _Step, now: float) -> float:
        """Moves what a copy or a store asks for. Returns when that is done."""
        taken = step.size * self.share_of_streams / self.device.memory_bytes
        self.memory = max(now, self.memory) + taken
        return self.memory
