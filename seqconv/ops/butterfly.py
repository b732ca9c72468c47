"""The learned butterfly as torch operators: the transform of reference.butterfly, and the product of two of them.

The transform has x (batch, channels, length); matrices (heads, sum of the squares of the sizes, 2), the
matrices of every size that occurs, in the order in which `radices` names them, flattened; z (batch, channels,
n, 2), at least in float32. The compiled kernels on a CPU, CUDA's where a block holds a row,
reference.butterfly elsewhere.

The product has v = Re ifft(u k)[:length] of two such z: u (batch, channels, n, 2) and k (heads, channels, n, 2),
both float32 or both float64; v (batch, heads, channels, length), with channels last in memory. The compiled
kernels on a CPU, reference.butterfly_product elsewhere.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from seqconv import reference
from seqconv.backends import products
from seqconv.backends.fallback import radix_sizes, split
from seqconv.backends.pack import DTYPES
from seqconv.ops.register import Operator, exporting
from seqconv.ops.sharding import SUM


class Inputs(NamedTuple):
    x: Tensor
    matrices: Tensor


def _check(inputs: Inputs, radices) -> None:
    """Kernels trust what they are given."""
    x, matrices = inputs
    elements, n = sum(size * size for size in radix_sizes(radices)), math.prod(radices)
    for name, t in (("x", x), ("matrices", matrices)):
        if t.dtype not in DTYPES:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"Butterfly: {name} must be one of {wanted}, got {t.dtype}")
    if matrices.dim() != 3 or matrices.shape[1:] != (elements, 2) or not matrices.shape[0]:
        text = f"(heads >= 1, {elements}, 2) for passes of {tuple(radices)}"
        raise ValueError(f"Butterfly: matrices must be {text}, got {tuple(matrices.shape)}")
    heads = matrices.shape[0]
    if x.dim() != 3 or x.shape[2] > n or x.shape[1] % heads:
        text = f"(batch, multiple of {heads}, length <= {n})"
        raise ValueError(f"Butterfly: x must be {text}, got {tuple(x.shape)}")
    if x.device != matrices.device:
        raise ValueError(f"Butterfly: x must be on {matrices.device}, got {x.device}")


def _empty(inputs: Inputs, radices) -> Tensor:
    x, _ = inputs
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(*x.shape[:2], math.prod(radices), 2, dtype=wide)


def _empty_gradients(inputs: Inputs, *options) -> Inputs:
    return Inputs(*[t.new_empty(t.shape) for t in inputs])


def _forward(backend, inputs: Inputs, radices) -> Tensor:
    _check(inputs, radices)
    z = _empty(inputs, radices)
    if not inputs.x.numel():
        return z.zero_()
    backend.butterfly(z, inputs, tuple(radices))
    return z


def _gradients(backend, dz, inputs: Inputs, radices, wanted) -> Inputs:
    _check(inputs, radices)
    x, _ = inputs
    if dz.shape != (*x.shape[:2], math.prod(radices), 2) or dz.device != x.device:
        text = f"got {tuple(dz.shape)} on {dz.device}"
        raise ValueError(f"Butterfly: dz must be like the output, {text}")
    grads = _empty_gradients(inputs)
    if x.numel():
        backend.butterfly_gradients(grads, dz, inputs, tuple(radices))
        return grads
    return Inputs(*[grad.zero_() for grad in grads])


def _plain(inputs: Inputs, radices, activation: str | None = None) -> Tensor:
    return reference.butterfly(
        inputs.x, split(inputs.matrices, radices), tuple(radices), activation
    )


def _shardings(inputs: Inputs, radices, *, ranks: int) -> list[tuple]:
    rows = [(0, {"x": 0}), (SUM, {"x": SUM})]
    heads = inputs.matrices.shape[0]
    if heads == 1:
        rows.append((1, {"x": 1}))
    elif heads % ranks == 0:  # A head has neighbouring channels.
        rows.append((1, {"x": 1, "matrices": 0}))
    return rows


operator = Operator(
    "butterfly",
    Inputs,
    "int[] radices",
    _plain,
    forward=_forward,
    gradients=_gradients,
    empty=_empty,
    empty_gradients=_empty_gradients,
    shardings=_shardings,
)


class Spectra(NamedTuple):
    """u (batch, channels, n, 2) and k (heads, channels, n, 2), real and imaginary parts last."""

    u: Tensor
    k: Tensor


def _check_spectra(inputs: Spectra, length: int) -> None:
    u, k = inputs
    n = u.shape[2] if u.dim() == 4 else 0
    if n < 2 or n % 2 or u.shape[3] != 2 or not 0 <= length <= n:
        text = f"(batch, channels, n, 2) with an even n >= length={length}, got {tuple(u.shape)}"
        raise ValueError(f"butterfly_product: u must be {text}")
    if k.dim() != 4 or k.shape[1:] != u.shape[1:]:
        text = f"(heads, {', '.join(map(str, u.shape[1:]))}), got {tuple(k.shape)}"
        raise ValueError(f"butterfly_product: k must be {text}")
    if u.dtype not in (torch.float32, torch.float64) or k.dtype != u.dtype:
        text = f"both torch.float32 or both torch.float64, got {u.dtype} and {k.dtype}"
        raise TypeError(f"butterfly_product: u and k must be {text}")
    if u.device != k.device:
        raise ValueError(f"butterfly_product: k must be on {u.device}, got {k.device}")


def _shape_of_product(inputs: Spectra, length: int) -> tuple:
    return (inputs.u.shape[0], *inputs.k.shape[:2], length)


def _empty_product(inputs: Spectra, length: int) -> Tensor:
    batch, heads, channels, _ = _shape_of_product(inputs, length)
    # The layer goes on with channels last.
    return inputs.u.new_empty(batch, length, heads, channels).permute(0, 2, 3, 1)


def _forward_product(backend, inputs: Spectra, length: int) -> Tensor:
    _check_spectra(inputs, length)
    v = _empty_product(inputs, length)
    if v.numel():
        backend.butterfly_product(v, inputs)
    return v


def _product_gradients(backend, dv: Tensor, inputs: Spectra, length: int, wanted) -> list:
    _check_spectra(inputs, length)
    wide = {"memory_format": torch.contiguous_format}
    grads = [
        torch.empty_like(t, **wide) if want else None
        for t, want in zip(inputs, wanted, strict=True)
    ]
    if dv.shape != _shape_of_product(inputs, length) or dv.device != inputs.u.device:
        text = f"got {tuple(dv.shape)} on {dv.device}"
        raise ValueError(f"butterfly_product: dv must be like the output, {text}")
    if dv.numel():
        backend.butterfly_product_gradients(grads, dv, inputs)
        return grads
    return [grad if grad is None else grad.zero_() for grad in grads]


_PRODUCT_SHARDINGS = [  # samples, heads, channels; and the product is linear in both
    (0, {"u": 0}),
    (1, {"k": 0}),
    (2, {"u": 1, "k": 1}),
    (SUM, {"u": SUM}),
    (SUM, {"k": SUM}),
]


product = Operator(
    "butterfly_product",
    Spectra,
    "SymInt length",
    lambda tensors, length: reference.butterfly_product(*tensors, length).contiguous(),
    forward=_forward_product,
    gradients=_product_gradients,
    empty=_empty_product,
    shardings=lambda *_, ranks: _PRODUCT_SHARDINGS,
)


def transform(
    x: Tensor, matrices: Tensor, radices: tuple[int, ...], activation: str | None = None
) -> Tensor:
    """reference.butterfly by the operator; what it lacks, activations between the passes, in plain torch."""
    inputs = Inputs(x, matrices)
    _check(inputs, radices)
    if activation is None:
        return operator(inputs, radices)
    if exporting():  # Few runtimes have complex numbers.
        return products.butterfly(x, split(matrices, radices), radices, activation)
    return _plain(inputs, radices, activation)
