"""Checks whether anything is wrong at all: every kind of call at every size against float64, forward and backward.
Outputs and scratch memory start as NaN."""

import time
from collections.abc import Iterator

import torch
from cases import Case
from judge import judge, sums

from bench.on_gpu.machine import poisoned
from bench.on_gpu.steps import PARTLY, RIGHT, WRONG
from seqconv import fftconv

LENGTHS = (4096, 256, 1000, 1024, 2048, 5000, 8192, 14113, 16384, 32768)
KINDS = {
    "causal": {"skip": "h"},
    "gated": {"skip": "h", "pre_gate": True, "post_gate": True},
    "two-sided": {"skip": "h", "taps_rev": -1},
    "heads": {"heads": 2, "skip": "ch", "activation": "silu"},
    "circular": {"mode": "circular", "skip": "h"},
    "blh": {"layout": "blh", "skip": "h", "activation": "gelu", "taps_rev": -1},
}
NEAR_THE_END = 3.0  # seconds in which no further case is begun
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cases(dry: bool) -> Iterator[tuple[str, Case, str]]:
    """Yields (kind, case, how 16-bit products are summed), the most informative first."""
    for dtype in DTYPES:
        for mode in ("fast", "accurate") if dtype != torch.float32 else ("fast",):
            for length in (256, 300) if dry else LENGTHS:
                for i, (kind, options) in enumerate(KINDS.items()):
                    # The emulator is slow, so it gets every kind and every dtype once.
                    if dry and (i + length + DTYPES.index(dtype)) % (3 if mode == "fast" else 6):
                        continue
                    options = dict(options)
                    if "taps_rev" in options:
                        options["taps_rev"] = length - 1
                    batch, channels = (2, 1) if dry else (5, 9)
                    yield kind, Case(batch, channels, length, length, dtype=dtype, **options), mode


def verdicts(machine, case: Case, mode: str) -> list:
    torch.manual_seed(0)
    tensors = case.tensors()
    tensors = {n: None if t is None else t.to(machine.device) for n, t in tensors.items()}
    with poisoned(), sums(mode):
        results = case.with_gradients(fftconv, tensors)
    return judge(case, tensors, *results, mode, case.dtype != torch.float32)


def run(machine, log) -> int:
    red = count = 0
    todo = list(cases(machine.dry))
    for kind, case, mode in todo:
        if log.left() < NEAR_THE_END:
            break
        start = time.perf_counter()
        found = verdicts(machine, case, mode)
        right = all(v.right for v in found)
        red, count = red + (not right), count + 1
        dtype = str(case.dtype).removeprefix("torch.")
        text = f"{kind}, {dtype}, {mode}, {case.length} steps"
        errors = ", ".join(map(str, found))
        took = time.perf_counter() - start
        log.say(f"{'ok' if right else 'WRONG'} {text}: {errors} ({took:.2f} s)")
        values = {v.name: v.l2 for v in found}
        log.row("smoke", case=text, right=right, errors=values)
    log.say(f"{count - red} of {count} right, {len(todo) - count} not reached")
    return WRONG if red else RIGHT if count == len(todo) else PARTLY


STEPS = {"smoke": run}
