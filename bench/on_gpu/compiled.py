"""Checks that graphs which torch.compile(mode="reduce-overhead") records give the results of the eager calls."""

import os
import shutil

import torch

from bench.on_gpu.steps import ABSENT, RIGHT, WRONG
from bench.on_gpu.targets import CHANNELS, FIRST
from seqconv import fftconv

ALLOWED = 4e-2  # relative L2 error of bfloat16 results that were rounded once more
CALLS = 5  # the first is plain, the second is recorded, and the others are replayed


def step(u, k):
    return fftconv(u, k).sin()


def results(function, u, k) -> list:
    y = function(u, k)
    y = y.detach().clone() if y.requires_grad else y.clone(), y
    return [y[0], *torch.autograd.grad(y[1].float().square().sum(), (u, k))]


def timed(function, u, k):
    """Makes a call without a backward. Without the mark torch would wait for one, and record each call anew."""
    torch.compiler.cudagraph_mark_step_begin()
    return function(u, k).sum()


def has_compiler() -> bool:
    """torch.compile needs Triton on a GPU, which compiles C when it starts a kernel."""
    return bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang")))


def run(machine, log) -> int:
    if not machine.dry and not has_compiler():
        log.say("there is no C compiler, which Triton needs: torch.compile is not looked at")
        return ABSENT
    shape = (2, 2, 300) if machine.dry else (8, CHANNELS, FIRST)
    torch.manual_seed(0)
    k = (torch.randn(shape[1], shape[2]) / shape[2] ** 0.5).to(machine.device).requires_grad_()
    mode = {"backend": "eager"} if machine.dry else {"mode": "reduce-overhead"}
    compiled, right = torch.compile(step, fullgraph=True, **mode), True
    for i in range(CALLS):
        u = torch.randn(shape, dtype=torch.bfloat16).to(machine.device).requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        pairs = zip(results(compiled, u, k), results(step, u, k), strict=True)
        worst = max(((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)
        right &= worst <= ALLOWED
        log.row("compiled", call=i, error=worst, right=right)
        log.say(f"{'ok' if right else 'WRONG'} call {i}: y, du and dk differ by {worst:.1e}")
    for name, function in (("eager", step), ("reduce-overhead", compiled)):
        seconds = machine.events(lambda function=function: timed(function, u, k))
        took = min(seconds() for _ in range(5))
        log.row("compiled time", name=name, seconds=took)
        log.say(f"{name}: {took * 1e3:.3f} ms forward, events around one call")
    return RIGHT if right else WRONG


STEPS = {"compile": run}
