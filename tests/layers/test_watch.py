"""What is made of parameters is kept for as long as they have the same values, however they change."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from seqconv.backends import cpu
from seqconv.layers.watch import Snapshot, unchanged


def tensors():
    return [torch.randn(3, 4), torch.randn(5, dtype=torch.float64), torch.arange(7)]


@pytest.fixture(params=["bytes", "torch.equal"])
def way(request, monkeypatch):
    """With the compiled comparison and without it."""
    if request.param == "torch.equal":
        monkeypatch.setattr(cpu, "missing", "it is not built")
        monkeypatch.setattr(cpu, "same_bytes", None)


def test_values_are_compared(way):
    found = tensors()
    kept = [t.clone() for t in found]
    assert unchanged(kept, found) and unchanged([], [])
    assert not unchanged(kept, found[:2]) and not unchanged(kept[:2], found)
    for i, t in enumerate(found):
        for place in (0, -1):
            t.data.view(-1)[place] += 1
            assert not unchanged(kept, found)
            t.data.copy_(kept[i])
            assert unchanged(kept, found)


def test_how_values_lie_in_memory_does_not_matter_and_what_they_are_does(way):
    x = torch.randn(4, 4)
    for other in (x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0], torch._neg_view(-x)):
        assert unchanged([x], [other]) and unchanged([other], [x])
    changed = [x.t(), x.double(), x.view(2, 8), x.view(torch.int32), torch._neg_view(x)]
    changed += [x.to("meta"), torch._efficientzerotensor((4, 4))]
    for other in changed:
        assert not unchanged([x], [other]), other
    assert unchanged([torch.zeros(4, 4)], [torch._efficientzerotensor((4, 4))])
    assert unchanged([x.to("meta")], [x.to("meta")])
    assert unchanged([x[:0]], [x[:0].clone()])


def test_bytes_tell_apart_what_numbers_do_not():
    nan = torch.tensor([math.nan])
    assert unchanged([nan.clone()], [nan])
    assert not unchanged([torch.zeros(1)], [-torch.zeros(1)])


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("table", torch.randn(3))
        self.register_buffer("last", torch.randn(3))
        self.scale, self.cut = 1.5, torch.tensor(0.1)


def set_data(change):
    def apply(m):
        m.weight.data = change(m.weight.data)

    return apply


def exchange_names(m):
    """The same objects in the same order."""
    first, second = m._buffers.pop("table"), m._buffers.pop("last")
    m._buffers |= {"last": first, "table": second}


CHANGES = {
    "in place": lambda m: m.weight.data.mul_(2),
    "new data": set_data(lambda w: 2 * w),
    "transposed": set_data(lambda w: w.t()),
    "negated": set_data(torch._neg_view),
    "of other bits": lambda m: setattr(m, "table", m.table.view(torch.int32)),
    "fewer": lambda m: m.table.resize_(2),
    "buffer": lambda m: m.table.fill_(1.0),
    "option": lambda m: setattr(m, "scale", 1.25),
    "option, a tensor": lambda m: m.cut.fill_(0.2),
    "option, no tensor any more": lambda m: setattr(m, "cut", 0.1),
    "another option": lambda m: setattr(m, "later", 1),
    "a parameter that becomes a buffer": lambda m: m.register_buffer(
        "other", m._parameters.pop("weight").detach()
    ),
    "buffers that exchange their names": exchange_names,
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", nn.Softplus()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change):
    module = Module()
    kept = Snapshot(module)
    assert kept.fits(module)
    CHANGES[change](module)
    assert not kept.fits(module)
    kept = Snapshot(module)
    assert kept.fits(module)


def test_other_objects_of_the_same_value_are_no_change():
    module = Module()
    kept = Snapshot(module)
    module.weight = nn.Parameter(module.weight.detach().clone())
    module.table = module.table.clone()
    module.scale = float("1.5")
    assert kept.fits(module)
    module.weight.data = module.weight.data.clone()
    assert kept.fits(module)
    module.weight.data.view(-1)[0] += 1
    assert not kept.fits(module)


def test_parametrized_tensors_are_formed_and_compared():
    module = Module()
    parametrize.register_parametrization(module, "weight", nn.Softplus())
    kept = Snapshot(module)
    assert kept.fits(module)
    module.parametrizations.weight.original.data.view(-1)[3] += 1
    assert not kept.fits(module)


def test_what_has_no_values_fits_nothing():
    module = Module().to("meta")
    assert not Snapshot(module).fits(module)
