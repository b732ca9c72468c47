"""Argument checks with one voice: which argument, what was wanted with sizes filled in, what came."""

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OFFSETS = (torch.int32, torch.int64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(
    function: str,
    name: str,
    value,
    *,
    dtypes=FLOATS,
    device: torch.device | None = None,
    why: str = "",
    owner: str = "u",
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{function}: {name} must be a dense tensor, got {value.layout}")
    if value.dtype not in dtypes:
        wanted = ", ".join(_name(d) for d in dtypes)
        wanted = f"one of {wanted}" if len(dtypes) > 1 else wanted
        raise TypeError(f"{function}: {name} must be {wanted}{why}, got {_name(value.dtype)}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{function}: {name} must be on {owner}'s device {device}, got {value.device}"
        )


def casts(device: torch.device) -> bool:
    """Whether autocast is on for a device. Torch does not know the meta device there."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _matches(shape, pattern: tuple) -> bool:
    if len(shape) != len(pattern):
        return False
    for size, (_, wanted) in zip(shape, pattern, strict=True):
        if wanted is not None and size != wanted:
            return False
    return True


def check_shape(
    function: str, name: str, value: Tensor, *patterns: tuple, why: Callable[[], str] = str
) -> None:
    """Each pattern is a tuple of (axis name, size), size None meaning any; the shape must match one of them.
    why() is asked where none does."""
    shape = value.shape
    for pattern in patterns:
        if _matches(shape, pattern):
            return
    wanted = " or ".join(
        "("
        + ", ".join(n if s is None else f"{n}={s}" for n, s in p)
        + ("," if len(p) == 1 else "")
        + ")"
        for p in patterns
    )
    raise ValueError(f"{function}: {name} must be {wanted}{why()}, got {tuple(value.shape)}")


def check_choice(function: str, name: str, value, choices: tuple) -> None:
    if value not in choices:
        wanted = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{function}: {name} must be one of {wanted}, got {value!r}")


def check_positive(function: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{function}: {name} must be an integer >= 1, got {value!r}")


def check_flag(function: str, **flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{function}: {name} must be True or False, got {value!r}")


def _short(value) -> str:
    return type(value).__name__ if isinstance(value, Tensor) else repr(value)


def check_number(function: str, **values: float) -> None:
    for name, value in values.items():
        known = isinstance(value, (Real, torch.SymFloat, torch.SymInt))
        if not known or isinstance(value, bool):
            raise TypeError(f"{function}: {name} must be a number, got {_short(value)}")


def check_sampling(function: str, rate: float) -> None:
    """Steps of a kernel per step of its input."""
    check_number(function, rate=rate)
    if not 0 < rate < math.inf:
        raise ValueError(f"{function}: rate must be positive and finite, got {rate!r}")


def check_learning_rate(function: str, **values: float) -> None:
    """Learning rates."""
    for name, value in values.items():
        if not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"{function}: {name} must be a number >= 0, got {value!r}")


def check_probability(function: str, **values: float) -> None:
    for name, value in values.items():
        check_number(function, **{name: value})
        if not 0 <= value <= 1:
            raise ValueError(f"{function}: {name} must be a number from 0 to 1, got {value!r}")


def check_length(function: str, length, name: str = "length") -> None:
    if not isinstance(length, (Integral, torch.SymInt)) or isinstance(length, bool) or length < 0:
        raise ValueError(f"{function}: {name} must be an integer >= 0, got {_short(length)}")


def check_offsets(function: str, cu_seqlens, device: torch.device | None) -> None:
    """Requires offsets by their kind, on the CPU or on u's device; their values are checked where they are read."""
    check_tensor(function, "cu_seqlens", cu_seqlens, dtypes=OFFSETS)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        text = f"must be (rows + 1,), got {tuple(cu_seqlens.shape)}"
        raise ValueError(f"{function}: cu_seqlens {text}")
    if not torch.compiler.is_compiling() and _mapped(cu_seqlens):
        raise ValueError(f"{function}: cu_seqlens must be the same for all calls of a vmap")
    if device is not None and cu_seqlens.device.type != "cpu" and cu_seqlens.device != device:
        text = f"must be on the CPU or on the input's device {device}, got {cu_seqlens.device}"
        raise ValueError(f"{function}: cu_seqlens {text}")


def _mapped(t: Tensor) -> bool:
    functorch = torch._C._functorch  # pyright: ignore
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def require(valid: Tensor, text: str, got: Tensor | None = None) -> None:
    """Raises ValueError unless all of `valid` is true, with the numbers of `got` where it is not. In a compiled graph
    the check is made when the graph runs, and its message is without them."""
    if torch.compiler.is_compiling():
        torch._assert_async(valid.all(), text)  # pyright: ignore
        return
    functorch = torch._C._functorch  # pyright: ignore
    while functorch.is_functorch_wrapped_tensor(valid):  # all samples of a vmap at once
        valid = functorch.get_unwrapped(valid)
    if not (valid.is_meta or valid.all()):
        if got is not None and not functorch.is_functorch_wrapped_tensor(got):
            bad = got[~valid][:4].tolist()
            text = f"{text}, got {', '.join(map(str, bad[:3]))}{', ...' if len(bad) > 3 else ''}"
        raise ValueError(text)
