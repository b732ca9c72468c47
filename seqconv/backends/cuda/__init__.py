"""The CUDA backend: plans, launches and the compiled kernels of csrc/device."""

import torch
from torch import Tensor

from seqconv.backends.cuda import butterfly, convolution, driver, ssm
from seqconv.backends.cuda.plan import Plan, longest, make_plan, radix_bytes


def reason(device: torch.device, dtype: torch.dtype, length: int) -> str | None:
    """Why a call takes torch.fft instead of the kernels, or None."""
    if dtype == torch.float64:
        return "float64 has no CUDA kernels"
    try:
        index = _index(device)
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA, or no device
        return str(error)
    missing = driver.reason(index)
    if missing is None and length > (most := longest(driver.device(index).limits)):
        return f"rows of more than {most} steps have no CUDA plan"
    return missing


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _on(device: torch.device, function, *arguments):
    """function(driver's device, ...) where torch allocates and launches on that device."""
    index = _index(device)
    if index == torch.cuda.current_device():  # entering the context costs more than a launch
        return function(driver.device(index), *arguments)
    with torch.cuda.device(index):
        return function(driver.device(index), *arguments)


def forward(y: Tensor, u: Tensor, *inputs) -> None:
    _on(u.device, convolution.forward, y, u, *inputs)


def backward(grads, dy: Tensor, *inputs) -> None:
    _on(dy.device, convolution.backward, grads, dy, *inputs)


def holds(device: torch.device, n: int) -> bool:
    """Whether a block's memory holds n complex numbers, as the learned butterfly's kernels want."""
    return radix_bytes(n) <= driver.device(_index(device)).limits.shared


def butterfly_transform(x: Tensor, *inputs) -> Tensor:
    return _on(x.device, butterfly.transform, x, *inputs)


def butterfly_gradients(dz: Tensor, *inputs) -> tuple[Tensor, dict[int, Tensor]]:
    return _on(dz.device, butterfly.gradients, dz, *inputs)


def ssm_forward(k: Tensor, a: Tensor, w: Tensor) -> None:
    _on(k.device, ssm.forward, k, a, w)


def ssm_backward(da: Tensor, dw: Tensor, dk: Tensor, a: Tensor, w: Tensor) -> None:
    _on(dk.device, ssm.backward, da, dw, dk, a, w)


def explain(u: Tensor, k: Tensor, k_rev: Tensor | None, backward: bool = False) -> tuple[Plan, str]:
    """The plan and the architecture that its kernels are compiled for."""
    made = driver.device(_index(u.device))
    return make_plan(convolution.describe(u, k, k_rev), made.limits, backward), made.arch


def arch(device: torch.device) -> str:
    """What kernels are compiled for there."""
    return driver.device(_index(device)).arch
