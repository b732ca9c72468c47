"""Random problems for the operator: one description, tensors of any dtype, and its oracle."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqconv import fftconv, reference

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    batch: int = 2
    channels: int = 3
    length: int = 64
    taps: int = 64
    taps_rev: int | None = None
    heads: int | None = None  # None: k is (channels, K)
    per_sample: bool = False
    skip: str = ""  # "", "h" or "ch"
    pre_gate: bool = False
    post_gate: bool = False
    bias: str = ""  # as skip
    activation: str | None = None
    mode: str = "causal"
    layout: str = "bhl"
    dtype: torch.dtype = torch.float32
    kernel_dtype: torch.dtype | None = None  # None: float32, or u's if that is float64

    def __str__(self) -> str:
        default = Case()
        parts = [f"{self.batch}x{self.channels}x{self.length}-k{self.taps}"]
        for name in ("taps_rev", "heads", "skip", "bias", "activation", "mode", "layout"):
            if getattr(self, name) != getattr(default, name):
                parts.append(f"{name}={getattr(self, name)}")
        parts += [name for name in ("per_sample", "pre_gate", "post_gate") if getattr(self, name)]
        return "-".join([*parts, str(self.dtype).removeprefix("torch.")])

    def tensors(self, scale: float = 1.0) -> dict[str, Tensor | None]:
        """The operator's tensor arguments by name, None where absent."""
        b, h, n = self.batch, self.channels, self.length
        kernel_dtype = self.kernel_dtype or (
            torch.float64 if self.dtype == torch.float64 else torch.float32
        )
        heads = () if self.heads is None else (self.heads,)
        leading = ((b,) if self.per_sample else ()) + heads + (h,)

        def signal(*inner):
            shape = (b, *inner, h, n) if self.layout == "bhl" else (b, n, *inner, h)
            return (scale * torch.randn(shape)).to(self.dtype)

        def kernel(*shape):
            return torch.randn(shape).to(kernel_dtype)

        def scalars(axes):
            return kernel(*{"h": (h,), "ch": (*heads, h)}[axes]) if axes else None

        return {
            "u": signal(),
            "k": kernel(*leading, self.taps) / max(1, self.taps) ** 0.5,
            "skip": scalars(self.skip),
            "k_rev": None
            if self.taps_rev is None
            else kernel(*leading, self.taps_rev) / max(1, self.taps_rev) ** 0.5,
            "pre_gate": signal() if self.pre_gate else None,
            "post_gate": signal(*heads) if self.post_gate else None,
            "bias": scalars(self.bias),
        }

    def options(self) -> dict:
        return {"activation": self.activation, "mode": self.mode, "layout": self.layout}

    def run(self, function, tensors: dict) -> Tensor:
        tensors = dict(tensors)
        return function(tensors.pop("u"), tensors.pop("k"), **tensors, **self.options())

    def with_gradients(
        self, function, tensors: dict, dy: Tensor | None = None
    ) -> tuple[Tensor, dict, Tensor]:
        """y, the gradients by name, and the dy that was used."""
        leaves = {
            n: None if t is None else t.detach().clone().requires_grad_()
            for n, t in tensors.items()
        }
        y = self.run(function, leaves)
        dy = torch.randn_like(y) if dy is None else dy.to(y.dtype)
        names = [n for n, t in leaves.items() if t is not None]
        if y.requires_grad:
            grads = torch.autograd.grad(y, [leaves[n] for n in names], dy, materialize_grads=True)
        else:  # the definition of a sum without terms
            assert function is not fftconv
            grads = [torch.zeros_like(leaves[n]) for n in names]
        return y.detach(), dict(zip(names, grads, strict=True)), dy


def double(tensors: dict) -> dict:
    return {n: None if t is None else t.double() for n, t in tensors.items()}


def oracle(case: Case):
    """float64: the definition where it is quick, else the FFT form, which test_reference ties to the definition."""
    exact = replace(case, dtype=torch.float64)
    slow = case.length * max(case.taps, case.taps_rev or 0) > 1 << 17
    return exact, reference.fftconv_fft if slow else reference.fftconv


__all__ = ["FLOATS", "Case", "double", "fftconv", "oracle"]
