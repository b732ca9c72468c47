"""Layers that are sharded over processes: torch's fully_shard, with kernels in the precision that they need."""

from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as _fully_shard

from seqconv.layers.base import KernelGenerator


def fully_shard(
    model: nn.Module, *, mesh=None, mp_policy: MixedPrecisionPolicy | None = None, **options
) -> nn.Module:
    """torch.distributed.fsdp.fully_shard of a model with layers of this package, in place.

    Every kernel generator in the model is sharded on its own first, without mixed precision: its parameters
    are gathered, its kernel is computed and its gradients are reduced in their own dtype. Rounding them to
    bfloat16 makes another kernel, which the generators refuse; and torch does not shard parameters of two
    dtypes as one, which a layer after .to(bfloat16) has. The rest of the model is sharded as torch does.

    A large model is made on the meta device, sharded, given storage and then its initial values. Seed all
    processes alike: buffers are drawn by each.

        with torch.device("meta"):
            model = Model()
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        model.to_empty(device=device)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    Args:
        model: the model, or a part of it that shall be one group. Parts that are sharded already stay so.
        mesh, mp_policy, options: the arguments of torch's fully_shard. All but mp_policy go to the kernels as well.

    Returns:
        model, as torch's fully_shard does. Sharded parameters are gathered for forward passes, which S4D's step() and
        prefill() are not: unshard() every FSDPModule before them.

    Raises:
        TypeError: model is not a module, or mp_policy not a MixedPrecisionPolicy.
    """
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    if not isinstance(model, nn.Module):
        raise TypeError(f"fully_shard: model must be a module, got {type(model).__name__}")
    if not isinstance(policy, MixedPrecisionPolicy):
        wanted = "a torch.distributed.fsdp.MixedPrecisionPolicy"
        raise TypeError(f"fully_shard: mp_policy must be {wanted}, got {type(policy).__name__}")
    for module in model.modules():
        if not isinstance(module, KernelGenerator) or isinstance(module, FSDPModule):
            continue
        if module is model:
            policy = MixedPrecisionPolicy()
        elif any(True for _ in module.parameters()):
            _fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(), **options)
    _fully_shard(model, mesh=mesh, mp_policy=policy, **options)
    return model
