"""Checkpoints of sharded layers and their optimisers are read by any number of processes, to the bit."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layer_table import EVERY, D, generators, states
from processes import run
from test_fsdp import every, quiet
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from seqconv import param_groups
from seqconv.layers.module import whole
from seqconv.parallel import fully_shard

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Training:
    """A model with its kernels in float32 and the rest in bfloat16, and its optimiser."""

    def __init__(self, name: str, seed: int, shard: bool):
        torch.manual_seed(seed)
        self.model = nn.Sequential(EVERY[name](d_model=7), nn.Linear(7, 3)).to(torch.bfloat16)
        if shard:
            fully_shard(self.model[0])
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, 1e-2, 0.05))

    def step(self) -> None:
        """On all rows in every process, so that any number of processes does the same."""
        x = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(7))
        self.model(x.bfloat16()).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder: str) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def load(self, folder: str) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )

    def values(self) -> dict[str, torch.Tensor]:
        """All tensors of model and optimiser, whole, and the settings of the optimiser's groups."""
        found = {path: whole(t).detach().clone() for path, t in states(self.model).items()}
        paths = {p: path for path, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                for key, t in self.optimizer.state.get(p, {}).items():
                    found[f"{paths[p]} {key}"] = whole(t).clone()
                settings = [group["lr"], group["weight_decay"]]
                found[f"{paths[p]} settings"] = torch.tensor(settings, dtype=torch.float64)
        return found


def saves(name: str, folder: str) -> dict[str, torch.Tensor]:
    quiet()
    training = Training(name, 1, shard=True)
    training.step()
    training.step()
    training.save(folder)
    return training.values()


def moves(name: str, source: str, target: str, shard: bool) -> dict[str, torch.Tensor]:
    """What was loaded, and saved again."""
    quiet()
    training = Training(name, 2, shard)
    before = training.values()
    training.load(source)
    found = training.values()
    assert any(not torch.equal(t, found[path]) for path, t in before.items())
    training.save(target)
    return found


def goes_on(name: str, source: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The training that saved takes a step more, and the one that loaded does, too."""
    quiet()
    found = []
    for seed, steps in ((1, 3), (2, 1)):
        training = Training(name, seed, shard=True)
        if seed == 2:
            training.load(source)
        for _ in range(steps):
            training.step()
        found.append(training.values())
    return tuple(found)


def quick(name: str):
    """The name of a layer, marked slow unless its parameters are unlike those of the others."""
    return (
        name
        if name in ("s4d", "hyena", "butterfly")
        else pytest.param(name, marks=pytest.mark.slow)
    )


@pytest.mark.parametrize("name", [quick(name) for name in EVERY])
def test_resharded_to_the_bit(name, tmp_path):
    folders = [str(tmp_path / str(i)) for i in range(4)]
    wanted, _ = run(2, saves, name, folders[0])
    assert len(wanted) > 8
    ways = [(3, True), (1, False), (2, True)]
    for i, (world, shard) in enumerate(ways):
        for found in run(world, moves, name, folders[i], folders[i + 1], shard):
            assert found.keys() == wanted.keys()
            for path, t in wanted.items():
                assert found[path].dtype == t.dtype and torch.equal(found[path], t), path
    for ours, loaded in run(2, goes_on, name, folders[3]):
        assert ours.keys() == loaded.keys()
        for path, t in ours.items():
            assert torch.equal(loaded[path], t), path


def gathered(name: str, folder: str) -> None:
    """As one state, as a state of shards, and through files."""
    quiet()
    plain = EVERY[name]()
    model = fully_shard(copy.deepcopy(plain))
    full = get_model_state_dict(model, options=WHOLE)
    if dist.get_rank() == 0:  # the others have nothing of it
        other = EVERY[name]()
        other.load_state_dict(full)
        same(other, plain)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for how in ("full", "shards", "files"):
        fresh = fully_shard(EVERY[name]())
        if how == "full":
            set_model_state_dict(fresh, full, options=spread)
        elif how == "shards":
            fresh.load_state_dict(model.state_dict())
        else:
            dcp.save(get_model_state_dict(model), checkpoint_id=folder)
            found = get_model_state_dict(fresh)
            dcp.load(found, checkpoint_id=folder)
            set_model_state_dict(fresh, found)
        same(fresh, plain)
    refuses_other_options(name, folder)


def same(model: nn.Module, wanted: nn.Module) -> None:
    """The values to the bit, and what is made of them to round-off."""
    for path, t in states(wanted).items():
        assert torch.equal(whole(states(model)[path]), t), path
    x = torch.randn(1, 50, D, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted(x))


def refuses_other_options(name: str, folder: str) -> None:
    changed = EVERY[name]()
    generator = next(iter(generators(changed).values()))
    option = generator.meaning[0] if generator.meaning else "lam"
    setattr(generator, generator.attributes.get(option, option), "another")
    other = fully_shard(changed)
    found = get_model_state_dict(other)
    dcp.load(found, checkpoint_id=folder)
    with pytest.raises(RuntimeError, match="'another' here"):
        set_model_state_dict(other, found)


@every
def test_states_are_gathered_spread_and_checked(name, tmp_path):
    run(2, gathered, name, str(tmp_path))
