"""How wrong a result may be: against float64, measured in the error that plain torch makes at the same precision."""

import torch
from torch import Tensor

EPS = {
    torch.float64: 2.0**-46,  # 64 units in the last place: the oracle itself is no better
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def rel_l2(value: Tensor, oracle: Tensor) -> float:
    return ((value.double() - oracle).norm() / oracle.norm()).item()


def max_over_rms(value: Tensor, oracle: Tensor) -> float:
    return ((value.double() - oracle).abs().max() / oracle.square().mean().sqrt()).item()


def assert_accurate(
    fast: Tensor,
    baseline: Tensor,
    oracle: Tensor,
    factor: float = 2.0,
    ulps: float = 2.0,
    what: str = "y",
) -> None:
    """Both errors of `fast` are at most `factor` times those of `baseline` plus `ulps` units in the
    last place of its dtype.

    oracle is float64, computed from the same rounded inputs; baseline is the torch.fft form at
    fast's precision. The relative L2 error alone would forgive one wrong element, the largest alone
    a small bias everywhere.
    """
    assert oracle.dtype == torch.float64
    assert fast.shape == oracle.shape, (
        f"{what}: shape {tuple(fast.shape)}, wanted {tuple(oracle.shape)}"
    )
    assert fast.dtype == baseline.dtype, f"{what}: dtype {fast.dtype}, wanted {baseline.dtype}"
    if oracle.numel() == 0:
        return
    assert torch.isfinite(fast).all(), f"{what}: not finite"
    if not oracle.any():
        assert not fast.any(), f"{what}: must be zero"
        return
    ulp = ulps * EPS[fast.dtype]
    crest = (oracle.abs().max() / oracle.square().mean().sqrt()).item()
    for norm, floor in ((rel_l2, ulp), (max_over_rms, ulp * crest)):
        error, allowed = norm(fast, oracle), factor * norm(baseline, oracle) + floor
        assert error <= allowed, f"{what}: {norm.__name__} {error:.2e}, allowed {allowed:.2e}"
