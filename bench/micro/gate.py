"""Whether a contender's results are right: against float64, in two norms. Nothing is timed that is not."""

from dataclasses import replace

import torch

from bench.micro.contenders import DTYPES, Case
from bench.micro.timing import worst_errors
from seqconv import reference
from seqconv.backends.cuda.plan import OPERAND_ERROR


def call(case: Case, function, tensors, dy):
    """The contender's results: y, or y and the gradients of every input."""
    if case.op == "forward":
        with torch.no_grad():
            return [function(tensors)]
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(leaves)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def checked(case: Case, tensors, dy):
    """The case's first channels, as many as fit beside each other in float64: channels never meet."""
    channels = max(1, min(case.channels, (1 << 24) // (case.batch * case.length)))
    rows = -1 if case.layout == "blh" else -2
    axes = (rows, -2, -1, -2, rows, rows)  # of u, k, skip, k_rev, pre_gate, post_gate

    def cut(values, axes):
        pairs = zip(values, axes, strict=True)
        return [None if v is None else v.narrow(a, 0, channels) for v, a in pairs]

    def of_results(results):
        given = [a for a, t in zip(axes, tensors, strict=True) if t is not None]
        return cut(results, (rows, *given)[: len(results)])

    return replace(case, channels=channels), cut(tensors, axes), *cut([dy], [rows]), of_results


def oracle(case: Case, tensors, dy):
    """The same in float64."""

    def definition(leaves):
        u, k, skip, k_rev, pre_gate, post_gate = leaves
        gates = {"pre_gate": pre_gate, "post_gate": post_gate}
        return reference.fftconv_fft(u, k, skip, k_rev=k_rev, layout=case.layout, **gates)

    leaves, dy = ([None if t is None else t.double() for t in ts] for ts in (tensors, [dy]))
    return call(case, definition, leaves, *dy)


def errors(case: Case, results, exact) -> tuple[float, float]:
    """The worst relative L2 error of the results, and the worst element over the root mean square."""
    # The gradient of skip, a sum of both signs, beside what random signs leave.
    return worst_errors(results, exact, {3: (case.batch * case.heads * case.length) ** 0.5})


def tolerance(case: Case, baseline: tuple[float, float], exact, device: str) -> tuple[float, float]:
    """Of seqconv: relative L2 3e-7 up to 65,536 steps and 4.5e-7 beyond in float32, at other dtypes twice
    that of torch.fft; for the worst element, twice torch.fft's and two units in the last place of
    the largest. In float64 64 units in the last place: the oracle is no better."""
    if case.dtype == "float64":
        baseline = (2.0**-47, 2.0**-44)
    if device != "cpu" and case.dtype in ("bfloat16", "float16"):
        stated = 2 * OPERAND_ERROR[True]  # fp16 operands on tensor cores, twice in gradients
        baseline = (baseline[0] + stated / 2, baseline[1] + 4 * stated)
    l2 = {"float32": 3e-7 if case.length <= 65536 else 4.5e-7}.get(case.dtype, 2 * baseline[0])
    crest = max((x.abs().max() / x.square().mean().sqrt()).item() for x in exact)
    return l2, 2 * baseline[1] + 2 * torch.finfo(DTYPES[case.dtype]).eps * crest
