"""What the CUDA kernels should reach, what the planner predicts, and the sizes of the cases that show both."""

import torch

from bench.micro.contenders import DTYPES, Case
from seqconv.backends.cuda import convolution
from seqconv.backends.cuda.plan import make_plan
from seqconv.backends.cuda.problem import Limits

BATCH, CHANNELS = 64, 768
FIRST, OTHERS = 4096, (1024, 8192, 16384, 32768)
LENGTHS = tuple(sorted((FIRST, *OTHERS)))
# Time over that of a copy of the bytes that must move, with 16-bit tensors and 64 samples (one pass up to 32768).
FORWARD = {256: 1.75, 1024: 1.25, 2048: 1.25, 4096: 1.25, 8192: 1.25, 16384: 1.4, 32768: 1.55}
GATED = {256: 1.6, 1024: 1.2, 2048: 1.2, 4096: 1.2, 8192: 1.2, 16384: 1.25, 32768: 1.3}
BACKWARD = 1.4  # forward and backward together, up to 8192
FLOAT32 = 1.6
TWO_SIDED = 1.15  # beside causal
FASTER = 4.0  # than torch.fft, 16-bit tensors


def sized(length: int, dry: bool, **more) -> Case:
    """Returns a case of 64 samples and 768 channels, or of as many as fit beside torch.fft's temporaries."""
    if dry:
        return Case(batch=2, channels=1, length=length // 16, **more)
    most = (1 << 30) // (BATCH * length)
    return Case(batch=BATCH, channels=max(1, min(CHANNELS, most)), length=length, **more)


def limit_of(row: dict) -> float | None:
    """Returns how many times a copy of its bytes the row's case may take."""
    if row["dtype"] == "float32":
        return FLOAT32 if row["op"] == "forward" and row["length"] <= 16384 else None
    if row["op"] != "forward":
        return BACKWARD if row["mode"] == "causal" and row["length"] <= 8192 else None
    return {"causal": FORWARD, "gated": GATED}.get(row["mode"], {}).get(row["length"])


def predicted(case: Case, limits: Limits) -> dict:
    """Returns the seconds of the planner's model, and the bytes and warp instructions that they come from."""
    heads = (case.heads,) if case.heads > 1 else ()
    with torch.device("meta"):
        u = torch.empty(case.batch, case.channels, case.length, dtype=DTYPES[case.dtype])
        k = torch.empty(*heads, case.channels, case.kernel_taps)
    gates = (u, u) if case.mode == "gated" else (None, None)
    problem = convolution.describe(u, k, k if case.mode == "two_sided" else None, *gates)
    plans = [make_plan(problem, limits)]
    if case.op != "forward":
        plans.append(make_plan(problem, limits, backward=True))
    return {
        "predicted": sum(plan.seconds for plan in plans),
        "moved": sum(plan.moved for plan in plans),
        "work": sum(plan.work for plan in plans),
        "plan": str(plans[-1]),
    }
