"""Sharded layers over gloo: python two_shards.py RANK FOLDER, in two processes at once.

Every layer, on its half of a batch, must do what the whole layer does on all of it in one process: forward, gradients,
a step of an optimiser, checkpoints; in float32, and under a bfloat16 policy to that precision.
"""

import copy
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layer_table import EVERY, D, generators, states
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard

from seqconv import param_groups
from seqconv.parallel import fully_shard

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def relative(ours, wanted) -> float:
    return ((whole(ours).double() - wanted.double()).norm() / wanted.double().norm()).item()


def close(name, ours, wanted, bound):
    for path, t in wanted.items():
        error = relative(ours[path], t)
        assert error < bound, f"{name}: {path} differs by {error:.1e}"


def trains(name, make, mesh, policy, bound, cast=None):
    """One step of SGD, with the gradients that lead to it, and the output after it."""
    torch.manual_seed(1)
    plain = make().to(cast or torch.float32)
    x = torch.randn(4, 50, D).to(cast or torch.float32)
    sharded = fully_shard(copy.deepcopy(plain), mesh=mesh, mp_policy=policy)
    half = x[2 * mesh.get_local_rank() :][:2]
    wanted = copy.deepcopy(plain).float()(half.float())
    with torch.no_grad():
        error = relative(sharded(half), wanted)
    # Against float32, whatever else is rounded: linear maps and outputs are, to 0.4 %.
    assert error < (1e-4 if policy is cast is None else 1e-2), f"{name}: {error:.1e} off"
    for model, given in ((plain, x), (sharded, half)):
        model(given).square().mean().backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (sharded, plain))
    assert all(
        whole(p).dtype == q.dtype for p, q in zip(ours.values(), theirs.values(), strict=True)
    )
    close(f"{name}, gradients", ours, theirs, bound)
    for model in (plain, sharded):
        torch.optim.SGD(param_groups(model, lr=0.1)).step()
    close(
        f"{name}, parameters",
        dict(sharded.named_parameters()),
        dict(plain.named_parameters()),
        bound,
    )
    with torch.no_grad():
        error = relative(sharded(half), plain(half))
    assert error < bound, f"{name}: the output differs by {error:.1e}"
    return plain, sharded, x


def alone(name, make, mesh):
    """torch's own function rounds kernels, too, which the layer refuses, and cannot shard two dtypes as one."""
    layer = torch_fully_shard(make(), mesh=mesh, mp_policy=HALF)
    try:
        layer(torch.randn(1, 50, D))
    except TypeError as error:
        assert "seqconv.parallel.fully_shard" in str(error), error
    else:
        raise AssertionError(f"{name}: a kernel in bfloat16 was not noticed")


def checkpoints(name, make, mesh, plain, sharded, x, folder):
    """As one state, as a state of shards, and through a distributed checkpoint."""
    gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(sharded, options=gather)
    if dist.get_rank() == 0:  # the others have nothing of it
        other = make()
        other.load_state_dict(full)
        close(f"{name}, gathered", states(other), states(plain), 1e-4)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for how in ("full", "shards", "files"):
        fresh = fully_shard(make(), mesh=mesh)
        if how == "full":
            set_model_state_dict(fresh, full, options=spread)
        elif how == "shards":
            fresh.load_state_dict(sharded.state_dict())
        else:
            dcp.save(get_model_state_dict(sharded), checkpoint_id=folder)
            found = get_model_state_dict(fresh)
            dcp.load(found, checkpoint_id=folder)
            set_model_state_dict(fresh, found)
        with torch.no_grad():
            assert relative(fresh(x[:1]), plain(x[:1])) < 1e-4, f"{name}: {how}"
    changed = make()
    generator = next(iter(generators(changed).values()))
    option = generator.meaning[0] if generator.meaning else "lam"
    setattr(generator, generator.attributes.get(option, option), "another")
    other = fully_shard(changed, mesh=mesh)
    found = get_model_state_dict(other)
    dcp.load(found, checkpoint_id=folder)
    try:
        set_model_state_dict(other, found)
    except RuntimeError as error:
        assert "'another' here" in str(error), error
    else:
        raise AssertionError(f"{name}: a checkpoint of other options was loaded")


def starts_empty(name, make, mesh):
    """Meta device, shards, storage, initial values: the same on every rank, whatever its random state."""
    torch.manual_seed(10 + dist.get_rank())
    with torch.device("meta"):
        model = fully_shard(make(), mesh=mesh)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    values = {n: whole(t) for n, t in states(model).items()}
    for path, t in values.items():
        other = t.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, t), f"{name}: {path} differs between ranks"
    x = torch.randn(1, 50, D)
    plain = make()
    plain.load_state_dict(values | {n: t for n, t in plain.state_dict().items() if n not in values})
    assert relative(model(x), plain(x)) < 1e-4, name


def streams(name, make, mesh):
    torch.manual_seed(3)
    plain = make()
    if not hasattr(plain, "step"):
        return
    sharded = fully_shard(copy.deepcopy(plain), mesh=mesh)
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    x = torch.randn(2, D)
    ours, theirs = (m.step(x, m.init_state(2))[0] for m in (sharded, plain))
    assert relative(ours, theirs) < 1e-4, name


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = dist.init_device_mesh("cpu", (2,))
    for name, make in EVERY.items():
        torch.manual_seed(2)
        made = trains(name, make, mesh, None, 1e-4)
        checkpoints(name, make, mesh, *made, f"{folder}/{name}")
        trains(f"{name}, bfloat16 policy", make, mesh, HALF, 3e-2)
        trains(f"{name}, cast to bfloat16", make, mesh, None, 3e-2, torch.bfloat16)
        model = fully_shard(nn.Sequential(nn.Linear(D, D), make()), mesh=mesh, mp_policy=HALF)
        y = model(torch.randn(1, 50, D))
        assert y.dtype == torch.bfloat16
        alone(name, make, mesh)
        starts_empty(name, make, mesh)
        streams(name, make, mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
