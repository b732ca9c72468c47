"""Optimiser groups: the parameters of kernels want a smaller learning rate and no weight decay."""

from numbers import Real

from torch import nn

from seqconv.layers.base import KernelGenerator


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict]:
    """Groups for torch.optim, which hold every trainable parameter of the model exactly once.

    The first group has lr and weight_decay. Each distinct override of a layer's kernel generator
    (see its docstring) has a group of its own, with its learning rate capped at lr. A parameter whose learning rate
    was overridden with 0 is a buffer and in no group. Parameters are found by module, not by attributes on tensors,
    which deepcopy and sharding lose. The parameters that parametrisations, pruning and weight_norm make of a
    kernel's parameter belong to the group of that parameter. The "name" of the first group is "weights", and the
    others are "kernels", "kernels2" and so on: loggers show it.

    The groups carry their own lr and weight_decay, so that the optimiser's arguments of those names do not
    apply. A scheduler that sets learning rates itself needs one for each group: for OneCycleLR
    max_lr=[g["lr"] for g in groups].

    Example:
        >>> from seqconv import S4D
        >>> groups = param_groups(S4D(8), lr=1e-2, weight_decay=0.05)
        >>> [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]
        [('weights', 4, 0.01, 0.05), ('kernels', 4, 0.001, 0.0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: model must be a module, got {type(model).__name__}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"param_groups: {name} must be a number, got {value!r}")
    if not (lr >= 0 and weight_decay >= 0):
        raise ValueError(
            f"param_groups: lr and weight_decay must be >= 0, got {lr} and {weight_decay}"
        )
    overrides = {}
    for module in model.modules():
        if isinstance(module, KernelGenerator):
            for name, parameter in module.named_parameters():
                overrides[id(parameter)] = module.overrides.get(_origin(module, name), {})
    groups = {(lr, weight_decay): []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            override = overrides.get(id(parameter), {})
            key = min(lr, override.get("lr", lr)), override.get("weight_decay", weight_decay)
            groups.setdefault(key, []).append(parameter)
    names = ("weights", "kernels", *(f"kernels{i}" for i in range(2, len(groups))))
    return [
        {"params": parameters, "lr": key[0], "weight_decay": key[1], "name": name}
        for name, (key, parameters) in zip(names, groups.items(), strict=False)
        if parameters
    ]


def _origin(module: KernelGenerator, name: str) -> str:
    """The key of `overrides` that a parameter of a kernel generator belongs to."""
    # A parametrised tensor's own parameters are called parametrizations.<name>.original.
    name = name.removeprefix("parametrizations.").split(".")[0]
    if name not in module.overrides:
        # The hooks of pruning and spectral_norm add the first suffix, and those of weight_norm the others.
        for suffix in ("_orig", "_g", "_v"):
            origin = name.removesuffix(suffix)
            if origin in module.overrides and origin not in module._parameters:
                return origin
    return name
