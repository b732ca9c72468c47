"""What patch has done: a table of the layers, with their errors, times and memory, and the way back."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

MIB = 2**20


@dataclass
class Row:
    """A patched layer. error is relative to the original's output; ms and mib are those of a forward and a backward
    pass, before and after."""

    name: str
    kind: str
    package: str
    error: float = float("nan")
    ms: tuple[float, float] = (float("nan"), float("nan"))
    mib: tuple[float, float] = (float("nan"), float("nan"))


@dataclass
class Report:
    """The layers that patch has replaced, and those that it has left as they were. Calling it restores the model.

    Attributes:
        rows: a Row for each patched layer.
        left: (name, class, why) of each layer that was left alone.
    """

    rows: list[Row]
    left: list[tuple[str, str, str]]
    _replaced: list[tuple[nn.Module, Any]] = field(default_factory=list, repr=False)

    def __call__(self) -> None:
        """Gives every patched layer its own forward back. A second call does nothing."""
        for module, forward in self._replaced:
            if vars(module).get("forward") is forward:  # and not one that was set since
                del module.forward
        self._replaced.clear()

    undo = __call__

    def __str__(self) -> str:
        left = [f"left: {name or '(the model)'} ({kind}): {why}" for name, kind, why in self.left]
        if not self.rows:
            return "\n".join(["no layer was replaced", *left])
        head = ("layer", "class", "error", "ms before", "after", "MiB before", "after")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            numbers = [f"{value:.3g}" for value in (*row.ms, *row.mib)]
            kind = f"{row.kind} of {row.package}"
            lines.append((row.name or "(the model)", kind, f"{row.error:.1e}", *numbers))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, *left])


class _Memory(TorchDispatchMode):
    """The largest sum of bytes of the tensors that operators have made and that were alive together."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and _storage(t)._cdata not in given:
                storage = _storage(t)
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _storage(t: Tensor):
    return t.untyped_storage()


def run(module: nn.Module, x: Tensor) -> None:
    """A forward and a backward pass."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = output(module(x))
        torch.autograd.grad(y.sum(), [x, *wanted], allow_unused=True)


def compare(theirs: nn.Module, ours: nn.Module, x: Tensor) -> tuple[float, str | None]:
    """The relative error of our output, and why ours is no replacement, which also looks at the rest of what is
    returned and at gradients. Where their output is no finite number, ours need not be one either."""
    (wanted, kinds, grads), (found, own_kinds, own_grads) = _all(theirs, x), _all(ours, x)
    if kinds != own_kinds:
        return float("nan"), f"it returns {kinds}, and not {own_kinds}"
    error = max((_error(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)
    # Some of these packages compute in float32 whatever the dtype.
    limit = max(torch.finfo(x.dtype).eps ** 0.5, 1e-5)
    if error > limit:
        return error, f"it computes something else: outputs would differ by {error:.1e}"
    largest = max(grad.nan_to_num(0.0, 0.0, 0.0).norm().item() for grad in grads.values())
    for name, grad in grads.items():
        # Gradients of a few numbers are sums of many that cancel, some of them to nothing.
        if _error(own_grads[name], grad, 1e-3 * largest) > 100 * limit:
            return error, f"it computes something else: the gradient of {name} would be another"
    return error, None


def _all(module: nn.Module, x: Tensor) -> tuple[list[Tensor], str, dict[str, Tensor]]:
    """The tensors that a call returns, of what kinds they are, and the gradients of their sum."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        leaves, structure = tree_flatten(module(x))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        kinds = [f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else t for t in leaves]
        names = {"its input": x} | {n: p for n, p in module.named_parameters() if p.requires_grad}
        total = sum(t.sum() for t in tensors if t.is_floating_point() and t.requires_grad)
        grads = torch.autograd.grad(total, [*names.values()], allow_unused=True)  # pyright: ignore
    pairs = zip(names.items(), grads, strict=True)
    whole = {n: torch.zeros_like(t) if grad is None else grad for (n, t), grad in pairs}
    return [t.detach() for t in tensors], str(tree_unflatten(kinds, structure)), whole


def _error(found: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """||found - wanted|| / max(||wanted||, least) over what is finite in `wanted`; infinite where `found` is not."""
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    found, wanted = found.to(wide), wanted.to(wide)
    finite = wanted.isfinite()
    found, wanted = found[finite], wanted[finite]
    if not found.isfinite().all():
        return float("inf")
    return ((found - wanted).norm() / wanted.norm().clamp(min=max(least, 1e-30))).item()


def output(y) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def measure(module: nn.Module, x: Tensor, repeats: int) -> tuple[float, float]:
    """The median of the milliseconds, and the MiB. On a GPU the latter is what torch has allocated, and
    elsewhere the bytes of the tensors that operators return; neither counts what a kernel needs inside."""
    run(module, x)
    cuda = x.is_cuda
    if cuda:
        torch.cuda.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        run(module, x)
        peak = torch.cuda.max_memory_allocated(x.device) - before
    else:
        with _Memory() as memory:
            run(module, x)
        peak = memory.peak
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(module, x)
        if cuda:
            torch.cuda.synchronize(x.device)
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2], peak / MIB
