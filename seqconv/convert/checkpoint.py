"""A layer's part of a state_dict of another package, of which every key must be understood."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from seqconv.ops.checks import check_shape

Layer = TypeVar("Layer", bound=nn.Module)


def check_state_dict(function: str, state_dict, prefix: str = "") -> None:
    """Requires names, and tensors below the prefix."""
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise TypeError(f"{function}: state_dict must be a dict of tensors by name, got {kind}")
    if not isinstance(prefix, str):
        raise TypeError(f"{function}: prefix must be a string, got {prefix!r}")
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise TypeError(f"{function}: state_dict must have names as keys, got {name!r}")
        if name.startswith(prefix) and not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            hint = "; are the weights in it?" if isinstance(tensor, Mapping) else ""
            raise TypeError(f"{function}: state_dict[{name!r}] must be a tensor, got {kind}{hint}")


def _some(names: list[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more if names else "none"


class Checkpoint:
    """The part of a state_dict below a prefix. Every key in it must be asked for."""

    def __init__(self, function: str, state_dict: dict[str, Tensor], prefix: str):
        self.function, self.prefix = function, prefix
        check_state_dict(function, state_dict, prefix)
        self.rest = {
            k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)
        }
        self.keys = [prefix + name for name in self.rest]
        if not self.rest:
            text = f"a key that starts with {prefix!r}, got {_some([*state_dict])}"
            raise ValueError(f"{function}: state_dict must have {text}")

    def find(self, *names: str) -> str | None:
        return next((name for name in names if name in self.rest), None)

    def take(self, *names: str) -> Tensor:
        """The tensor by any of its names. A complex one is returned as (..., 2)."""
        name = self.find(*names)
        if name is None:
            wanted = " or ".join(repr(self.prefix + n) for n in names)
            near = [k.removesuffix(n) for n in names for k in self.rest if k.endswith(f".{n}")]
            untouched = len(self.rest) == len(self.keys)
            hint = f"; prefix={self.prefix + near[0]!r} may be meant" if near and untouched else ""
            text = f"state_dict must have {wanted}, got {_some(self.keys)}{hint}"
            raise ValueError(f"{self.function}: {text}")
        tensor = self.rest.pop(name).detach()
        return torch.view_as_real(tensor) if tensor.is_complex() else tensor

    def check(self, name: str, tensor: Tensor, *patterns: tuple) -> Tensor:
        check_shape(self.function, name, tensor, *patterns)
        return tensor

    def block(self) -> tuple[dict[str, Tensor], dict]:
        """The parameters that every layer has, under the names of this package, and the options they imply."""
        skip = self.take("D", "layer.D")
        skip = skip.reshape(1, -1) if skip.dim() == 1 else skip
        self.check("D", skip, (("heads", None), ("d_model", None)))
        heads, d_model = skip.shape
        # A convolution of width 1 and a product on the left have the same numbers as a Linear.
        weight = self.take("output_linear.0.weight", "output_linear.weight")
        weight = weight.squeeze(-1) if weight.dim() == 3 else weight
        columns = ("heads d_model", heads * d_model)
        rows = ((("2 d_model", 2 * d_model), columns), (("d_model", d_model), columns))
        self.check("output_linear's weight", weight, *rows)
        bias = self.take("output_linear.0.bias", "output_linear.bias").reshape(-1)
        self.check("output_linear's bias", bias, (("rows of its weight", len(weight)),))
        values = {"skip": skip, "linear.weight": weight, "linear.bias": bias}
        postact = "glu" if len(weight) == 2 * d_model else None
        return values, {"d_model": d_model, "heads": heads, "postact": postact}

    def directions(self, name: str, kernels: int, heads: int) -> bool:
        """Whether there are kernels for the future."""
        if kernels not in (heads, 2 * heads):
            wanted = f"heads={heads} kernels or twice as many (two-sided)"
            raise ValueError(f"{self.function}: {name} must hold {wanted}, got {kernels}")
        return kernels == 2 * heads

    def refuse_options(self, options: dict, **decided) -> dict:
        """The options of a layer: what the caller says, and what the checkpoint does."""
        if both := ", ".join(name for name in options if name in decided):
            raise TypeError(f"{self.function}: {both} must be left out, the checkpoint decides")
        return decided | options

    def refuse_rest(self) -> None:
        if self.rest:
            keys = ", ".join(repr(self.prefix + name) for name in self.rest)
            raise ValueError(f"{self.function}: unknown keys in state_dict: {keys}")

    def fill(self, layer: Layer, values: dict[str, Tensor]) -> Layer:
        self.refuse_rest()
        like = values["skip"]
        layer.to(device=like.device, dtype=like.dtype)
        # A layer refuses to load a kernel in half precision. Here it is cast, because it was trained with these
        # numbers.
        own = layer.state_dict()
        values = {name: t.to(own[name].dtype) for name, t in values.items()}
        # The caller has said with which options the checkpoint was made.
        values |= {name: t for name, t in own.items() if name.endswith("_extra_state")}
        layer.load_state_dict(values)
        return layer
