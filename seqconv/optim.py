"""Optimiser groups: kernel parameters want a smaller learning rate and no weight decay."""

from torch import nn

from seqconv._layer import KernelGenerator


def param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict]:
    """Groups for torch.optim: every trainable parameter of the model exactly once.

    The first group has lr and weight_decay; each distinct override of a layer's kernel generator
    (see its docstring) has its own, with its learning rate capped at lr; what was overridden with 0
    is a buffer and in no group. Parameters are found by module, not by attributes on tensors, which
    deepcopy and sharding lose.

    The groups carry their own lr and weight_decay, so the optimiser's arguments of those names do not
    apply. A scheduler that sets learning rates outright needs one per group, for OneCycleLR
    max_lr=[g["lr"] for g in groups].

    Example:
        >>> from seqconv import S4D
        >>> groups = param_groups(S4D(8), lr=1e-2, weight_decay=0.05)
        >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]
        [(4, 0.01, 0.05), (4, 0.001, 0.0)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: model must be a module, got {type(model).__name__}")
    if not (lr >= 0 and weight_decay >= 0):
        raise ValueError(
            f"param_groups: lr and weight_decay must be >= 0, got {lr} and {weight_decay}"
        )
    overrides = {}
    for module in model.modules():
        if isinstance(module, KernelGenerator):
            for name, parameter in module.named_parameters():
                # A parametrized tensor's own parameters are called parametrizations.<name>.original.
                name = name.removeprefix("parametrizations.").split(".")[0]
                if name in module.overrides:
                    overrides[id(parameter)] = module.overrides[name]
    groups = {(lr, weight_decay): []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            override = overrides.get(id(parameter), {})
            key = min(lr, override.get("lr", lr)), override.get("weight_decay", weight_decay)
            groups.setdefault(key, []).append(parameter)
    return [{"params": p, "lr": key[0], "weight_decay": key[1]} for key, p in groups.items() if p]
