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
from seqconv.parallel.traffic import Problem


@dataclass
class Call:
    """The group, this process's rank in it, the convolution's problem, and the method that was chosen for it."""

    group: dist.ProcessGroup
    rank: int
    problem: Problem
    method: str

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
        """A kernel for the whole length, or another one, and whether it is that of this rank's channels only.

        With reduce=True the gradients of the generator's parameters are summed over the ranks.
        """
        parted = self.method == "a2a" and divides(generator)
        options: dict[str, Any] = {} if rate == 1.0 else {"rate": rate}
        if parted:
            options["channels"] = self.channels
        arguments = (self.problem.shards.length if length is None else length,)
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
        activation: str | None = None,
        mode: str = "causal",
        layout: str = "bhl",
        parted: bool = False,
    ) -> Tensor:
        """seqconv.fftconv of this rank's steps; the other arguments are whole, but for a parted k and k_rev."""
        # Gates are products of a step with itself: they stay on this rank, in the precision of the kernels.
        wide = torch.promote_types(u.dtype, torch.float32)
        x = u if pre_gate is None else u.to(wide) * pre_gate.to(wide)
        whole = {"activation": activation, "layout": layout}
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
        y = fftconv(x, k, skip, k_rev=k_rev, mode=mode, **options)
        return self.to_shards(y.to(dtypes[1]), options["layout"])

    def _own_channels(self, t: Tensor | None, axis: int) -> Any:
        return t if t is None else cut(t, axis % t.dim(), self.channels)

    def to_channels(self, x: Tensor, layout: str) -> Tensor:
        """All steps of this rank's channels, from this rank's steps of all channels."""
        known = self.problem.shards, self.problem.channel_sizes, self.rank, self.group
        return exchange.to_channels(x, *known, _axes(layout))

    def to_shards(self, y: Tensor, layout: str) -> Tensor:
        """The way back of to_channels."""
        known = self.problem.shards, self.problem.channel_sizes, self.rank, self.group
        return exchange.to_shards(y, *known, _axes(layout))

    def _by_halo(self, x, k, skip, k_rev, mode, dtype, options) -> Tensor:
        _, step = _axes(options["layout"])
        reach = reach_of(k.shape[-1], 0 if k_rev is None else k_rev.shape[-1], self.problem.shards)
        known = self.problem.shards, self.rank, self.group, step, reach, mode == "circular"
        out = []
        for part, before, size in exchange.with_halo(x, *known):
            y = fftconv(part.to(dtype), k, skip, k_rev=k_rev, **options)
            out.append(y.narrow(step % y.dim(), before, size))
        return out[0] if len(out) == 1 else torch.cat(out, step)


def reach_of(taps: int, future: int, shards) -> tuple[int, int]:
    """The lags of the past and of the future that a kernel reads in a sequence of the shards' length."""
    return min(max(taps - 1, 0), max(shards.length - 1, 0)), min(future, shards.length)


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
        seed = seed.to(exchange_device(group))
        dist.broadcast(seed, group_src=0, group=group)
        number = int(seed)
    else:
        number = (int(seed) + 0x9E3779B97F4A7C15 * (dist.get_rank(group) + 1)) % (1 << 62)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(number)
        yield


def exchange_device(group) -> torch.device:
    """The device through which a group exchanges small numbers: the CPU where the group can."""
    devices = getattr(group, "_device_types", [torch.device("cpu")])
    return torch.device("cpu") if torch.device("cpu") in devices else devices[0]


def _axes(layout: str) -> tuple[int, int]:
    """The axes of channels and steps."""
    return (-2, -1) if layout == "bhl" else (-1, 1)
