"""Layers under DistributedDataParallel and fully_shard do what they do whole in one process: forward, gradients and
steps. Batches and channels do not divide among the processes."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from layer_table import EVERY, D, generators, states
from processes import run
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from seqconv import S4D, param_groups
from seqconv.layers.module import whole
from seqconv.parallel import fully_shard

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
BFLOAT16 = 3e-2  # linear maps and gradients are rounded to it
every = pytest.mark.parametrize("name", EVERY)


def quiet() -> None:
    """torch's linear map returns a view, of which fully_shard warns, and it draws no random DTensors on CPUs."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    warnings.filterwarnings("ignore", "DTensor random operators may not")
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # of torch 2.10's own


def off(ours, wanted) -> float:
    """The error of a part of a tensor, or of a whole one that is sharded; of nothing it is 0."""
    ours, wanted = whole(ours).double(), whole(wanted).double()
    assert ours.shape == wanted.shape
    return ((ours - wanted).norm() / wanted.norm()).item() if wanted.numel() else 0.0


def close(what: str, ours: dict, wanted: dict, bound: float) -> None:
    assert ours.keys() == wanted.keys()
    for path, t in wanted.items():
        error = off(ours[path], t)
        assert error < bound, f"{what}: {path} differs by {error:.1e}"


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def steps(layer, x, bound, wrap, model_of=lambda m: m) -> None:
    """Two steps of SGD in one process on x and in all on shares of it, with the gradients that lead to them."""
    world = dist.get_world_size()
    share, rank = x.tensor_split(world), dist.get_rank()
    model = wrap(copy.deepcopy(layer))
    for at in range(2):
        y, ours = layer(x), model(share[rank])
        error = off(ours, y.tensor_split(world)[rank])
        assert error < bound, f"output {at} differs by {error:.1e}"
        y.square().mean().backward()
        (ours.square().sum() * (world / y.numel())).backward()  # the mean over processes is taken
        close(f"gradients {at}", gradients(model_of(model)), gradients(layer), bound)
        for found, wanted in zip(model.parameters(), layer.parameters(), strict=True):
            assert found.dtype == found.grad.dtype == wanted.dtype
        for trained in (layer, model_of(model)):
            optimizer = torch.optim.SGD(param_groups(trained, lr=0.1))
            optimizer.step()
            optimizer.zero_grad()
        close(
            f"parameters {at}",
            *(dict(m.named_parameters()) for m in (model_of(model), layer)),
            bound,
        )


def made(name: str, d_model: int, dtype=torch.float64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    return EVERY[name](d_model=d_model).to(dtype), torch.randn(5, 50, d_model).to(dtype)


def replicated(name: str, d_model: int) -> None:
    def wrap(layer):
        for p in layer.parameters():  # rank 0's are broadcast
            p.data.add_(dist.get_rank())
        return DistributedDataParallel(layer)

    steps(*made(name, d_model), 1e-12, wrap, lambda model: model.module)


def replicated_under_autocast(name: str, d_model: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        layer, x = made(name, d_model, torch.float32)
        kernels_stay(copy.deepcopy(layer), layer)
        steps(layer, x, BFLOAT16, DistributedDataParallel, lambda model: model.module)


def sharded(name: str, d_model: int) -> None:
    quiet()
    layer, x = made(name, d_model)
    steps(layer, x, 1e-12, fully_shard)
    steps(layer, x[:2], 1e-12, fully_shard)  # of three processes one has no rows


def sharded_in_bfloat16(name: str, d_model: int) -> None:
    """Under a policy, and a layer that was cast."""
    quiet()
    layer, x = made(name, d_model, torch.float32)
    model = fully_shard(copy.deepcopy(layer), mp_policy=HALF)
    kernels_stay(model, layer)
    assert off(model(x), layer(x)) < BFLOAT16
    steps(layer, x, BFLOAT16, lambda layer: fully_shard(layer, mp_policy=HALF))
    steps(*made(name, d_model, torch.bfloat16), BFLOAT16, fully_shard)
    model = fully_shard(nn.Sequential(nn.Linear(D, D), EVERY[name]()), mp_policy=HALF)
    assert model(torch.randn(1, 50, D)).dtype == torch.bfloat16


def kernels_stay(model: nn.Module, layer: nn.Module) -> None:
    """Each generator in model makes of float32 parameters what the one in layer makes of the same arguments."""
    made, wanted = {}, {}

    def keep(path, generator):
        def hook(module, given, kernel):
            made[path] = kernel.detach()
            assert {p.dtype for p in module.parameters()} == {torch.float32}
            with torch.autocast("cpu", enabled=False):
                wanted[path] = generator.forward(*given)  # without this hook

        return hook

    for (path, module), generator in zip(
        generators(model).items(), generators(layer).values(), strict=True
    ):
        module.register_forward_hook(keep(path, generator))
    model(torch.randn(2, 50, layer.d_model))
    close("kernel", made, wanted, 1e-6)
    assert made and all(made[path].dtype == kernel.dtype for path, kernel in wanted.items())


def sharded_by_torch_alone(name: str) -> None:
    """It rounds kernels, too, which a layer refuses, and cannot shard two dtypes as one."""
    quiet()
    layer = torch_fully_shard(EVERY[name](), mp_policy=HALF)
    with pytest.raises(TypeError, match=r"seqconv\.parallel\.fully_shard"):
        layer(torch.randn(1, 50, D))


def starts_empty(name: str) -> None:
    """Meta device, shards, storage, initial values: the same on every rank, whatever its random state."""
    quiet()
    torch.manual_seed(10 + dist.get_rank())
    with torch.device("meta"):
        model = fully_shard(EVERY[name]())
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    values = {n: whole(t) for n, t in states(model).items()}
    for path, t in values.items():
        other = t.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, t), f"{path} differs between ranks"
    x = torch.randn(1, 50, D)
    plain = EVERY[name]()
    plain.load_state_dict(values | {n: t for n, t in plain.state_dict().items() if n not in values})
    assert off(model(x), plain(x)) < 1e-4


def streams(name: str) -> None:
    quiet()
    plain = EVERY[name]().eval()
    model = fully_shard(copy.deepcopy(plain))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    x = torch.randn(2, D)
    with torch.no_grad():
        ours, theirs = (m.step(x, m.init_state(2))[0] for m in (model, plain))
    assert off(ours, theirs) < 1e-4


def on_a_square(name: str) -> None:
    """Two replicas of two shards each."""
    quiet()
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    steps(*made(name, 7), 1e-12, lambda layer: fully_shard(layer, mesh=mesh))
    model = fully_shard(EVERY[name](), mesh=mesh)
    assert all(isinstance(p, DTensor) and p.device_mesh == mesh for p in model.parameters())


@every
@pytest.mark.parametrize("way", [replicated, sharded], ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    "world", [pytest.param(2, marks=[pytest.mark.slow, pytest.mark.one_of(2)]), 3]
)
def test_equals_one_process(way, world, name):
    run(world, way, name, 7)


@every
@pytest.mark.parametrize(
    "way", [replicated_under_autocast, sharded_in_bfloat16], ids=lambda way: way.__name__
)
@pytest.mark.parametrize(
    "world", [2, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.one_of(2)])]
)
def test_kernels_stay_in_float32(way, world, name):
    run(world, way, name, 7)


@every
@pytest.mark.parametrize(
    "what", [sharded_by_torch_alone, starts_empty], ids=lambda what: what.__name__
)
def test_sharded(what, name):
    run(2, what, name)


@pytest.mark.parametrize("name", [name for name, make in EVERY.items() if hasattr(make(), "step")])
def test_steps_of_a_sharded_layer(name):
    run(2, streams, name)


@pytest.mark.slow
@every
def test_replicas_of_shards(name):
    run(4, on_a_square, name)


def test_fully_shard_checks_its_arguments():
    with pytest.raises(TypeError, match="model must be a module, got generator"):
        fully_shard(S4D(D).parameters())
    with pytest.raises(TypeError, match=r"mp_policy must be a .*MixedPrecisionPolicy, got dtype"):
        fully_shard(S4D(D), mp_policy=torch.bfloat16)
