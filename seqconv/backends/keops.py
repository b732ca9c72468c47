"""The sum of exponentials by PyKeOps, which computes every exponential anew and stores none."""

import torch
from torch import Tensor


def mode_sum(a: Tensor, w: Tensor, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """k (heads, channels, length) as in seqconv.ops.ssm. In float32 the phases of long kernels are off by
    their rounding. Neither length nor w is empty."""
    if torch.compiler.is_compiling():
        raise ValueError("ssm_kernel: backend='keops' does not work inside torch.compile")
    try:
        import pykeops
        from pykeops.torch import LazyTensor
    except ImportError as error:
        raise ImportError(
            "ssm_kernel: backend='keops' needs PyKeOps: pip install 'pykeops>=2.3'"
        ) from error
    pykeops.set_verbose(False)
    channels, modes, _ = a.shape
    a, w = a.to(dtype), w.to(dtype)
    # (h l 1) and (h n .) tensors, with the batch on both sides: PyKeOps does not broadcast a missing one.
    steps = torch.arange(length, dtype=dtype, device=a.device)
    l_i = LazyTensor(steps.view(1, length, 1, 1).expand(channels, length, 1, 1).contiguous())
    weight = w.permute(1, 2, 3, 0).contiguous()  # (h n 2 c)
    a_re, a_im = (LazyTensor(t.reshape(channels, 1, modes, 1).contiguous()) for t in a.unbind(-1))
    w_re, w_im = (LazyTensor(weight[:, None, :, i].contiguous()) for i in range(2))
    phase = a_im * l_i
    k = ((a_re * l_i).exp() * (w_re * phase.cos() - w_im * phase.sin())).sum(dim=2)  # (h l c)
    return k.permute(2, 0, 1)
