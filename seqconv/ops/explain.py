"""Which kernels a call of fftconv takes, without the call."""

from torch import Tensor

from seqconv import backends
from seqconv.backends.inputs import Inputs
from seqconv.backends.protocol import Explanation, Request
from seqconv.ops.fftconv import check, check_exact, packed_inputs, prepare


def explain(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    *,
    k_rev: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    mode: str = "causal",
    layout: str = "bhl",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    exact_causal: bool = False,
) -> Explanation:
    """Which backend and plan `fftconv` takes for these arguments, and why not a faster one. Computes nothing.

    On a GPU the plan ends with a time, which is not a measurement. It says "simulated" where a model of an H100 has
    run the kernels' machine code, and "lower bound" where bytes and instructions were counted.

    Example:
        >>> import torch
        >>> explain(torch.zeros(1, 4, 1000), torch.zeros(4, 1000)).fallback is None
        True
    """
    inputs = Inputs(u, k, k_rev, skip, pre_gate, post_gate, bias)
    options = (activation or "none", layout == "blh")
    if cu_seqlens is not None or max_seqlen is not None:
        rows = cu_seqlens, max_seqlen
        packed = packed_inputs(inputs, activation, mode, layout, *rows, exact_causal)
        longest = -1 if max_seqlen is None else max_seqlen
        return backends.explain(Request("fftconv_packed", packed, (*options, longest)))
    check(inputs, activation, mode, layout)
    if exact_causal is not False:
        check_exact(k_rev, mode, exact_causal)
    prepared = prepare(inputs, mode, layout)
    return backends.explain(Request("fftconv", prepared, (*options, exact_causal)))
