"""Kernels stay in float32 or float64 when a model is cast to a half precision."""

import contextlib

import torch
from torch import Tensor

from seqconv.layers.module import Described

HALF = (torch.bfloat16, torch.float16)


def full_precision(device: torch.device):
    """A context in which products keep the precision of their operands, also under autocast."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class KeepsPrecision(Described):
    """A module whose own tensors are never in half precision: casts leave them in float32, and loading refuses."""

    def _check_precision(self, name: str, value: Tensor, way: str = "") -> None:
        if value.dtype not in HALF:
            return
        dtype = str(value.dtype).removeprefix("torch.")
        way = way or (
            "layer.to(dtype) keeps kernels in float32, and so does seqconv.parallel.fully_shard under a "
            "mixed precision policy; .float() of the generator brings them back"
        )
        raise TypeError(
            f"{type(self).__name__}: {name} must be float32 or float64, got {dtype}: rounded to that it makes "
            f"another kernel; {way}"
        )

    def _apply(self, fn, recurse=True):
        def keep_precision(t: Tensor) -> Tensor:
            out = fn(t)
            if out.dtype not in HALF:
                return out
            return (
                out.float()
                if out.is_meta or t.is_meta or t.dtype in HALF
                else t.to(out.device).float()
            )

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        way = "a checkpoint that is cast has to leave kernels in float32"
        for key, value in state_dict.items():
            if key.startswith(prefix) and isinstance(value, Tensor):
                self._check_precision(f"{key} of the checkpoint", value, way)
        super()._load_from_state_dict(state_dict, prefix, *rest)
