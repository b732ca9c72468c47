"""Tries an installed seqconv from outside its checkout: python smoke.py, or python smoke.py --kernels.

Compares the operator and a layer, and the gradients of both, with direct sums in float64, and requires
that the compiled kernels compute them. With --kernels it needs no torch: it calls the compiled module
alone. Exit code 0 means that all is right.
"""

import argparse
import importlib.machinery
import importlib.util
import random
import sys
from array import array
from pathlib import Path

ALLOWED = 2e-6  # relative error of float32, in the L2 norm


def require(name: str, error: float) -> None:
    print(f"{name}: relative error {error:.1e}")
    if not error < ALLOWED:
        raise SystemExit(f"{name}: the relative error is {error}, at most {ALLOWED} is allowed")


def distance(got, wanted) -> float:
    """||got - wanted|| / ||wanted|| of two sequences of numbers."""
    top = sum((a - b) ** 2 for a, b in zip(got, wanted, strict=True))
    return (top / sum(b**2 for b in wanted)) ** 0.5


def check_kernels() -> None:
    """The compiled module as it lies in the package, called with addresses, of an FFT and a direct sum."""
    spec = importlib.util.find_spec("seqconv")
    assert spec is not None and spec.submodule_search_locations, "seqconv is not installed"
    endings = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    folder = Path(spec.submodule_search_locations[0])
    found = [p for p in folder.glob("_C.*") if p.name.endswith(endings)]
    if not found:
        raise SystemExit(f"there is no compiled module in {folder} that this Python can load")
    spec = importlib.util.spec_from_file_location("seqconv._C", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(f"{found[0].name}: {module.isa()}, built by {module.compiler()}")

    draw = random.Random(0)
    for n, taps in ((700, 700), (90, 3)):
        u, k, dy = (array("f", [draw.gauss(0, 1) for _ in range(m)]) for m in (n, taps, n))
        y, du, dk = (array("f", [0.0] * m) for m in (n, n, taps))
        sizes = [
            1,
            1,
            1,
            n,
            taps,
            0,
            0,
            0,
            0,
        ]  # batch, heads, channels, .., the last: no activation
        here, absent = (
            [0, 0, 0, 0, 1],
            [0] * 5,
        )  # dtype, and strides of batch, head, channel and time
        inputs = here + here + absent * 5
        forward = sizes + inputs + here
        backward = sizes + inputs + here + inputs
        at = [a.buffer_info()[0] for a in (u, k, dy, y, du, dk)]
        none = [0] * 5
        packed = array("q", forward).tobytes()
        module.forward(packed, 1, at[0], at[1], *none, at[3])
        packed = array("q", backward).tobytes()
        module.backward(packed, 1, at[0], at[1], *none, at[2], at[4], at[5], *none)
        name = f"kernels, {taps} taps"
        reach = range(n)
        wanted = [sum(k[j] * u[t - j] for j in range(min(t + 1, taps))) for t in reach]
        require(f"{name}, y", distance(y, wanted))
        wanted = [sum(k[j] * dy[t + j] for j in range(min(n - t, taps))) for t in reach]
        require(f"{name}, du", distance(du, wanted))
        wanted = [sum(dy[t] * u[t - j] for t in range(j, n)) for j in range(taps)]
        require(f"{name}, dk", distance(dk, wanted))


def check_package() -> None:
    import torch
    import torch.nn.functional as F

    import seqconv

    torch.manual_seed(0)
    print(f"seqconv {seqconv.__version__}, torch {torch.__version__}, {seqconv.__file__}")

    def direct(u, k):
        """sum_j k[j] u[t - j] in float64, with the taps for rows of a matrix product."""
        n = u.shape[-1]
        padded = F.pad(u, (n - 1, 0)).unfold(-1, n, 1)  # [.., t, i] = u[t - n + 1 + i]
        return torch.einsum("bcti,ci->bct", padded, k.flip(-1))

    def compare(name, ours, theirs, inputs) -> None:
        """Two functions of `inputs`, and their gradients."""
        results = []
        for function, dtype in ((ours, torch.float32), (theirs, torch.float64)):
            leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
            y = function(*leaves)
            dy = 1 + torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            grads = torch.autograd.grad(y, leaves, dy)
            results.append((y, *grads))
        for number, (mine, other) in enumerate(zip(*results, strict=True)):
            error = ((mine.double() - other).norm() / other.norm()).item()
            require(f"{name}, {f'gradient {number}' if number else 'value'}", error)

    u, k = torch.randn(2, 3, 500), torch.randn(3, 500)
    for x in (u, u[..., :20]):
        plan = seqconv.explain(x, k[:, : x.shape[-1]])
        if plan.fallback is not None or plan.backend != "cpu":
            raise SystemExit(f"the compiled kernels are not in use: {plan}")
        compare(f"fftconv, {x.shape[-1]} steps", seqconv.fftconv, direct, (x, k[:, : x.shape[-1]]))

    layer = seqconv.LongConv(4, l_max=300, postact=None).eval()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def ours(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    def theirs(x, *values):
        p = dict(zip(names, values, strict=True))
        k = F.softshrink(p["kernel.kernel"][0], layer.kernel.lam)
        x = x.transpose(1, 2)
        y = F.gelu(direct(x, k) + p["skip"][0].unsqueeze(-1) * x)
        return F.linear(y.transpose(1, 2), p["linear.weight"], p["linear.bias"])

    compare("LongConv", ours, theirs, (torch.randn(2, 300, 4), *parameters))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernels", action="store_true", help="the compiled module alone, without torch"
    )
    options = parser.parse_args()
    check_kernels()
    if not options.kernels:
        check_package()
    print(f"Python {sys.version.split()[0]}: all right")
