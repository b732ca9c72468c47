"""One convolution over several processes, once they know one another's sizes."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from seqconv.layers.base import KernelGenerator, cut
from seqconv.ops.fftconv import fftconv
from seqconv.parallel import exchange
from seqconv.parallel.packs import DividedPack
from seqconv.parallel.traffic import Problem


@dataclass
class Call:
    """The group, this process's rank in it, the convolution's problem, the method that was chosen for it, and the rows
    of a pack: signals then have no axis of samples."""

    group: dist.ProcessGroup
    rank: int
    problem: Problem
    method: str
    pack: DividedPack | None = None

    @property
    def length(self) -> int:
        """The steps that the kernel is made for."""
        return self.problem.shards.length if self.pack is None else self.pack.longest

    @property
    def channels(self) -> slice:
        """The channels of whole sequences that this rank convolves."""
        if self.method != "a2a":
            return slice(0, self.problem.channels)
        sizes = self.problem.channel_sizes
        first = sum(sizes[: self.rank])
        return slice(first, first + sizes[self.rank])

    def kernel(
        self,
        generator: KernelGenerator,
        *,
        rate: float = 1.0,
        length: int | None = None,
        reduce: bool = False,
    ) -> tuple[Tensor, bool]:
        """A kernel for the call's length, or another one, and whether it is that of this rank's channels only.

        With reduce=True the gradients of the generator's parameters are summed over the ranks.
        """
        parted = self.method == "a2a" and divides(generator)
        options: dict[str, Any] = {} if rate == 1.0 else {"rate": rate}
        if parted:
            options["channels"] = self.channels
        arguments = (self.length if length is None else length,)
        with random_numbers(generator, self.group, alike=not parted):
            if not reduce or not any(True for _ in generator.parameters()):
                return generator(*arguments, **options), parted
            names, values = zip(*generator.named_parameters(), strict=True)
            found = dict(zip(names, exchange.replicated(self.group, *values), strict=True))
            return functional_call(generator, found, arguments, options), parted

    def convolve(
        self,
        u: Tensor,
        k: Tensor,
        skip: Tensor | None,
        *,
        k_rev: Tensor | None = None,
        pre_gate: Tensor | None = None,
        post_gate: Tensor | None = None,
        bias: Tensor | None = None,
        activation: str | None = None,
        mode: str = "causal",
        layout: str = "bhl",
        parted: bool = False,
    ) -> Tensor:
        """seqconv.fftconv of this rank's steps; the other arguments are whole, but for a parted k and k_rev."""
        # Gates are products of a step with itself: they stay on this rank, in the precision of the kernels.
        wide = torch.promote_types(u.dtype, torch.float32)
        x = u if pre_gate is None else u.to(wide) * pre_gate.to(wide)
        whole = {"activation": activation, "layout": layout, "bias": bias}
        if self.method == "a2a":
            dtypes = (x.dtype, u.dtype) if post_gate is None else (wide, wide)
            y = self._by_channels(x, k, skip, k_rev, mode, parted, dtypes, whole)
        else:
            dtype = x.dtype if post_gate is None else wide
            y = self._by_halo(x, k, skip, k_rev, mode, dtype, whole)
        return (y if post_gate is None else y.to(wide) * post_gate.to(wide)).to(u.dtype)

    def _by_channels(self, x, k, skip, k_rev, mode, parted, dtypes, options) -> Tensor:
        x = self.to_channels(x, options["layout"]).to(dtypes[0])
        if not parted:
            k, k_rev = (self._own_channels(t, -2) for t in (k, k_rev))
        skip = self._own_channels(skip, -1)
        options = options | {"bias": self._own_channels(options["bias"], -1)}
        rows = self._rows(0, self.problem.shards.length)
        y = fftconv(x, k, skip, k_rev=k_rev, mode=mode, **options, **rows)
        return self.to_shards(y.to(dtypes[1]), options["layout"])

    def _own_channels(self, t: Tensor | None, axis: int) -> Any:
        return t if t is None else cut(t, axis % t.dim(), self.channels)

    def to_channels(self, x: Tensor, layout: str) -> Tensor:
        """All steps of this rank's channels, from this rank's steps of all channels."""
        known = self.problem.shards, self.problem.channel_sizes, self.rank, self.group
        return exchange.to_channels(x, *known, self._axes(layout))

    def to_shards(self, y: Tensor, layout: str) -> Tensor:
        """The way back of to_channels."""
        known = self.problem.shards, self.problem.channel_sizes, self.rank, self.group
        return exchange.to_shards(y, *known, self._axes(layout))

    def _axes(self, layout: str) -> tuple[int, int]:
        """The axes of channels and steps."""
        return (-2, -1) if layout == "bhl" else (-1, 1 if self.pack is None else 0)

    def _rows(self, first: int, size: int) -> dict:
        """What fftconv is told of the rows in a run of steps."""
        return {} if self.pack is None else {"cu_seqlens": self.pack.within(first, size)}

    def _by_halo(self, x, k, skip, k_rev, mode, dtype, options) -> Tensor:
        _, step = self._axes(options["layout"])
        shards = self.problem.shards
        longest = shards.length if self.pack is None else self.pack.longest_row
        reach = reach_of(k.shape[-1], 0 if k_rev is None else k_rev.shape[-1], longest)
        known = shards, self.rank, self.group, step, reach, mode == "circular"
        starts = [start for start, _ in shards.segments(self.rank)]
        out = []
        for start, (part, before, size) in zip(starts, exchange.with_halo(x, *known), strict=True):
            # The halo may begin inside a row, but holds all of it that the steps between the halos see.
            rows = self._rows(start - before, part.shape[step])
            y = fftconv(part.to(dtype), k, skip, k_rev=k_rev, **options, **rows)
            out.append(y.narrow(step % y.dim(), before, size))
        return out[0] if len(out) == 1 else torch.cat(out, step)


def reach_of(taps: int, future: int, length: int) -> tuple[int, int]:
    """The lags of the past and of the future that a kernel reads in a sequence of that length."""
    return min(max(taps - 1, 0), max(length - 1, 0)), min(future, length)


def most_taps(generator: KernelGenerator, length: int) -> int:
    """The largest number of taps that a generator's kernel may have for the length."""
    known = getattr(generator, "taps", getattr(generator, "l_max", length))
    return min(known, length) if isinstance(known, int) else length


def hooked(module) -> bool:
    """Whether hooks on a module or its parts may change what it returns. Those of torch.distributed gather parameters
    only."""
    hooks = [hook for part in module.modules() for hook in part._forward_hooks.values()]
    return any(not getattr(h, "__module__", "").startswith("torch.distributed") for h in hooks)


def divides(generator: KernelGenerator) -> bool:
    """Whether a call of the generator can make the kernel of some channels."""
    own = type(generator).forward is KernelGenerator.forward and "forward" not in vars(generator)
    return own and generator.makes_parts and not hooked(generator)


def random(module: torch.nn.Module) -> bool:
    """Whether a module draws random numbers in its forward pass."""
    kinds = torch.nn.modules.dropout._DropoutNd
    return any(isinstance(m, kinds) and m.p > 0 and m.training for m in module.modules())


@contextlib.contextmanager
def random_numbers(module: torch.nn.Module, group, *, alike: bool):
    """A context in which the ranks of a group draw the same random numbers, or different ones.

    Programs seed all processes alike, so that ranks would draw the same masks for different steps or channels. The
    numbers follow from the default generator of the CPU, which one draw takes further.
    """
    if not random(module):
        yield
        return
    seed = torch.randint(1 << 62, ())
    if alike:
        seed = seed.to(exchange.device_of(group))
        dist.broadcast(seed, group_src=0, group=group)
        number = int(seed)
    else:
        number = (int(seed) + 0x9E3779B97F4A7C15 * (dist.get_rank(group) + 1)) % (1 << 62)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(number)
        yield
