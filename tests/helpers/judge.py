"""By how much the results of the CUDA kernels may differ from float64."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accuracy import EPS, max_over_rms, rel_l2
from cases import Case, double, oracle

from seqconv import reference
from seqconv.backends.cuda.plan import OPERAND_ERROR

# The relative L2 error of the tensor cores' fp16 operands. The rounding of the stored result comes on top. Twice as
# much is allowed behind an activation, which may leave little of its input, and in gradients, where two such
# transforms meet. The largest error over the root mean square stays below 8 times this.
STATED = {"fast": OPERAND_ERROR, "accurate": 1e-6}  # accurate: in float32
ROUNDING = {
    torch.float16: 2.9e-4,
    torch.bfloat16: 2.3e-3,
}  # the largest error that storing a result adds


@contextmanager
def sums(mode: str):
    """Sets torch's own switches so that tensor cores may sum products in fp16 ("fast") or must not ("accurate")."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    usual = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, mode == "fast")
    try:
        yield mode
    finally:
        for name, value in zip(names, usual, strict=True):
            setattr(matmul, name, value)


@dataclass(frozen=True)
class Verdict:
    """Both errors of one result, and what is allowed."""

    name: str
    l2: float
    peak: float
    allowed_l2: float
    allowed_peak: float

    @property
    def right(self) -> bool:
        return self.l2 <= self.allowed_l2 and self.peak <= self.allowed_peak  # False for NaN

    def __str__(self) -> str:
        text = f"{self.name} {self.l2:.1e}"
        if self.right:
            return text
        return f"{text} (allowed {self.allowed_l2:.1e}; largest {self.peak:.1e}, allowed {self.allowed_peak:.1e})"


def _norm_of_terms(name: str, case: Case, tensors, dy) -> float:
    """The L2 norm of all terms of the sums d skip or d bias without an activation: dy post_gate x, or dy post_gate."""
    given = double(tensors)
    terms = dy.double()
    if given.get("post_gate") is not None:
        terms = terms * given["post_gate"]
    if name == "dbias":
        return terms.norm().item()
    x = given["u"] if given.get("pre_gate") is None else given["u"] * given["pre_gate"]
    if x.dim() < terms.dim():
        x = x.unsqueeze(2 if case.layout == "blh" else 1)  # heads
    return (terms * x).norm().item()


def judge(case: Case, tensors, y, grads, dy, mode: str, on_tensor_cores: bool) -> list[Verdict]:
    """Judges results against float64. Radix kernels must be as exact as float32, and others as exact as is stated."""
    exact, definition = oracle(case)
    y64, grads64, _ = exact.with_gradients(definition, double(tensors), dy.double())
    y_fft, grads_fft, _ = case.with_gradients(reference.fftconv_fft, tensors, dy)
    results = [("y", y, y_fft, y64)]
    results += [(f"d{n}", g, grads_fft[n], grads64[n]) for n, g in grads.items()]
    found = []
    for name, value, baseline, wanted in results:
        assert (value.shape, value.dtype) == (wanted.shape, baseline.dtype), name
        if wanted.numel() == 0:
            continue
        if not wanted.any():
            found.append(Verdict(name, value.double().abs().max().item(), 0.0, 0.0, 0.0))
            continue
        crest = (wanted.abs().max() / wanted.square().mean().sqrt()).item()
        # The gradients of skip and bias are direct sums in float32; through an activation they have v's error, of
        # random signs.
        direct = name in ("dskip", "dbias") and case.activation is None
        if not on_tensor_cores or direct:
            ulps = 8 * EPS[value.dtype]
            l2, peak = 3 * rel_l2(baseline, wanted) + ulps, 3 * max_over_rms(baseline, wanted)
            if direct:
                # What round-off in float32 makes of a sum whose terms cancel, however lucky the baseline is.
                lost = (
                    8
                    * EPS[torch.float32]
                    * _norm_of_terms(name, case, tensors, dy)
                    / wanted.norm().item()
                )
                l2, peak = l2 + lost, peak + lost * max(crest, 1.0)
            allowed = l2, peak + ulps * crest
        else:
            times = {"y": 1 + (case.activation is not None), "dskip": 4, "dbias": 4}
            stated = STATED[mode] * times.get(name, 2)
            l2 = stated + ROUNDING.get(value.dtype, 0)
            allowed = l2, 8 * stated + crest * EPS.get(value.dtype, 0)
        found.append(Verdict(name, rel_l2(value, wanted), max_over_rms(value, wanted), *allowed))
    return found
