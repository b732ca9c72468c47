"""What kernel generators and layers share as modules: initial values, repr, and options kept with the state."""

import inspect
import json
import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Every kept state has so many bytes, because distributed checkpoints are read into tensors of the same size.
_KEPT = 512

# The list of missing keys, of which each load_state_dict makes one, that the last warning belonged to.
_warned_in = None


def kernel_dtype() -> torch.dtype:
    """The dtype of a new generator's parameters: torch's default dtype, but at least float32."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def fill(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Gives parameters and buffers of the module new values. They may be parametrized or sharded; sharded ones get
    the values of rank 0."""
    with torch.no_grad():
        for name, value in values.items():
            target = getattr(module, name)
            value = value.to(target.dtype)
            if parametrize.is_parametrized(module, name):
                setattr(module, name, value)
                continue
            if hasattr(target, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, target.device_mesh, target.placements)
            target.copy_(value)


def whole(t: Tensor) -> Tensor:
    """The tensor itself, or a sharded tensor put together from all its parts."""
    full = getattr(t, "full_tensor", None)
    return t if full is None else full()


class Described(nn.Module):
    """A module that shows its options, and keeps those without which its parameters mean nothing.

    repr shows the options in `shown`, and the others that differ from their defaults. The options in `meaning` are
    part of the state_dict, as JSON in bytes: loading it into a module with other options is an error that names
    them. A checkpoint without them loads with one UserWarning for each load_state_dict. An option is an
    attribute of the same name, or of the name that `attributes` gives for it.
    """

    shown: tuple[str, ...] = ()
    meaning: tuple[str, ...] = ()
    attributes: ClassVar[dict[str, str]] = {}

    def warn_once(self, about: str, text: str) -> None:
        """Gives a UserWarning the first time that this module warns about the subject `about`."""
        if torch.compiler.is_compiling() or about in self.__dict__.get("_said", ()):
            return
        self.__dict__.setdefault("_said", set()).add(about)
        warnings.warn(f"{type(self).__name__}: {text}", stacklevel=2)

    def option(self, name: str):
        return getattr(self, self.attributes.get(name, name), None)

    def extra_repr(self) -> str:
        first, *options = list(inspect.signature(type(self).__init__).parameters.values())[1:]
        parts = [str(self.option(first.name))]
        for p in options:
            value = self.option(p.name)
            if isinstance(value, (nn.Module, Tensor)) or not hasattr(
                self, self.attributes.get(p.name, p.name)
            ):
                continue
            if p.name in self.shown or value != p.default:
                parts.append(f"{p.name}={value!r}")
        return ", ".join(parts)

    def meant(self) -> dict:
        """The options in `meaning`, by name."""
        return {name: self.option(name) for name in self.meaning}

    def get_extra_state(self) -> Tensor:
        text = json.dumps(self.meant(), default=float).ljust(_KEPT)
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError where the state was made with other options."""
        there = json.loads(bytes(state.tolist()))
        here = json.loads(json.dumps(self.meant(), default=float))
        other = [
            f"{name} is {here.get(name)!r} here and {value!r} there"
            for name, value in there.items()
            if here.get(name) != value
        ]
        if there.keys().isdisjoint(here) and there:
            other = [f"they are another module's, of {', '.join(there)}"]
        if other:
            raise ValueError(
                f"{type(self).__name__}: the checkpoint's parameters mean another function: "
                f"{'; '.join(other)}. Make the layer with the checkpoint's options. (Without this key the "
                "parameters load whatever they mean.)"
            )

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *lists):
        key = prefix + "_extra_state"
        if key in state_dict:
            try:
                self.set_extra_state(state_dict[key])
            except ValueError as error:
                lists[-1].append(f"{key}: {error}")
                return
        elif any(name.startswith(prefix) for name in state_dict):
            self._warn_of_unknown_options(missing)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *lists)
        if key in missing:
            missing.remove(key)

    def _warn_of_unknown_options(self, missing: list) -> None:
        global _warned_in
        if _warned_in is missing:
            return
        _warned_in = missing
        warnings.warn(
            f"{type(self).__name__}: the checkpoint does not hold the options that its parameters were made for; "
            "they are taken to be this layer's. Saved again, it will hold them.",
            stacklevel=2,
        )
