"""A training step with the fused operator against the same model on torch.fft."""

import contextlib
import copy
import time
from statistics import median
from unittest import mock

import torch
from torch import Tensor, nn

import seqconv
from bench.lra.model import loss_of
from seqconv import reference

PLACES = ("seqconv.layers.base.fftconv", "seqconv.layers.hyena.fftconv")


def compare_step(model: nn.Module, batch, rounds: int, autocast: tuple) -> dict:
    """Medians in milliseconds over interleaved rounds of whole training steps, dropout and AdamW with them, on a
    copy of the model, after checking that the gradients without dropout agree:
    {"seqconv", "torch.fft", "ratio" (median of the ratios), "difference" (relative L2, worst)}, and on
    a GPU "peak_mib", the most memory of a step of each. autocast: dtype and whether it is on.

    RuntimeError if the gradients differ by 1e-3 or more.
    """
    x, lengths, labels = batch
    model = copy.deepcopy(model)
    x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0
    )  # every step begins with the same weights

    def step(formulation) -> tuple[float, list[Tensor]]:
        with contextlib.ExitStack() as stack:
            for place in PLACES:
                stack.enter_context(mock.patch(place, formulation))
            synchronize(x.device)
            start = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast(x.device.type, *autocast):
                loss = loss_of(model(x, lengths), labels)
            loss.backward()
            if model.training:
                optimizer.step()
            synchronize(x.device)
            return time.perf_counter() - start, [p.grad for p in model.parameters()]

    contenders = (seqconv.fftconv, reference.fftconv_fft)
    model.eval()  # both must compute the same
    ours, theirs = (step(f)[1] for f in contenders)
    # Beside the whole gradient: a parameter before a norm may have a gradient of round-off alone.
    whole = torch.stack([b.norm() for b in theirs]).norm()
    worst = max(
        ((a - b).norm() / b.norm().clamp_min(1e-3 * whole)).item()
        for a, b in zip(ours, theirs, strict=True)
    )
    if not worst < 1e-3:
        raise RuntimeError(f"gradients differ by {worst:.1e} (relative L2): no time is shown")
    del ours, theirs
    model.train()
    step(contenders[0])  # makes AdamW's state
    peaks = {}
    for name, f in zip(("seqconv", "torch.fft"), contenders, strict=True):
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats(x.device)
        step(f)
        if x.is_cuda:
            peaks[name] = torch.cuda.max_memory_allocated(x.device) / 2**20
    times = [[step(f)[0] for f in contenders] for _ in range(rounds)]
    fast, slow = (1e3 * median(t[i] for t in times) for i in range(2))
    ratio = median(t[1] / t[0] for t in times)
    found = {"seqconv": fast, "torch.fft": slow, "ratio": ratio, "difference": worst}
    return found | ({"peak_mib": peaks} if peaks else {})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
