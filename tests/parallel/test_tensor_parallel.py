"""Layers whose channels are divided among processes: equal to one process, in every gradient and in a step."""

import copy
import warnings

import pytest
import torch
from processes import run
from torch import nn

from seqconv import S4D, ButterflyConv, Hyena, LongConv, SGConv
from seqconv.layers.base import ConvLayer, KernelGenerator
from seqconv.parallel import plan

D, LENGTH, BATCH = 7, 20, 3
close = {"rtol": 1e-12, "atol": 1e-12}


class Taps(KernelGenerator):
    """It has no axis of channels to be divided by: every process makes the whole kernel."""

    reads = ("taps",)

    def __init__(self):
        super().__init__()
        self.d_model = D
        self.taps = nn.Parameter(torch.randn(LENGTH, D))

    def generate(self, tensors, length, rate):
        return (tensors[0].T * tensors[0].mean()).unsqueeze(0)[..., :length]


LAYERS = {
    "new": lambda: ConvLayer(D, Taps(), heads=1, bidirectional=False),
    "s4d": lambda: S4D(D, d_state=4, dropout=0.0),
    "s4d, two-sided heads": lambda: S4D(D, d_state=4, heads=2, bidirectional=True),
    "s4d, shared": lambda: S4D(8, d_state=4, n_ssm=2, kernel_lr=0.0),
    "s4d, real": lambda: S4D(D, d_state=3, init="real", is_real=True, dt_tie=False),
    "s4d, softmax": lambda: S4D(D, d_state=4, discretization="dss_softmax", postact=None),
    "long_conv": lambda: LongConv(D, l_max=30, kernel_dropout=0.0, lam=0.0, smooth="time"),
    "sgconv": lambda: SGConv(D, l_max=30, kernel_dim=4, heads=2, decay="power"),
    "sgconv, two-sided": lambda: SGConv(D, l_max=30, kernel_dim=4, bidirectional=True),
    "butterfly": lambda: ButterflyConv(D, l_max=30, kernel_dropout=0.0, lam=0.0, additive=True),
    "butterfly, heads": lambda: ButterflyConv(
        8, l_max=30, kernel_dropout=0.0, lam=0.0, heads=2, butterfly_heads=2, dft_activation="silu"
    ),
    "hyena": lambda: Hyena(D, l_max=30, order=3, filter_width=8),
}


def made(name) -> nn.Module:
    torch.manual_seed(3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return LAYERS[name]()
    finally:
        torch.set_default_dtype(before)


def divided(layer, **options):
    from torch.distributed.tensor.parallel import parallelize_module

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return parallelize_module(layer, mesh, plan(layer, **options))


def states(layer):
    return {name: t for name, t in layer.state_dict().items() if not name.endswith("_extra_state")}


def equal_to_one_process(names):
    for name in names:
        layer = made(name)
        own = divided(copy.deepcopy(layer))
        assert type(own).__name__ == type(layer).__name__ and isinstance(own, type(layer))
        assert {n: t.shape for n, t in states(own).items()} == {
            n: t.shape for n, t in states(layer).items()
        }
        for n, t in states(own).items():
            torch.testing.assert_close(t.full_tensor(), states(layer)[n], rtol=0, atol=0)
        x = torch.randn(BATCH, LENGTH, layer.d_model, dtype=torch.float64)
        results = []
        for one in (layer, own):
            optimiser = torch.optim.SGD(one.parameters(), lr=0.1)
            leaf = x.clone().requires_grad_()
            y = one(leaf)
            assert type(y) is torch.Tensor
            y.sin().sum().backward()
            optimiser.step()
            results.append((y, leaf.grad, {n: p.grad for n, p in one.named_parameters()}))
        (y, dx, grads), (our_y, our_dx, our_grads) = results
        torch.testing.assert_close(our_y, y, **close)
        torch.testing.assert_close(our_dx, dx, **close)
        assert grads.keys() == our_grads.keys()
        for n, grad in grads.items():
            assert grad.abs().max() > 1e-9, n
            torch.testing.assert_close(our_grads[n].full_tensor(), grad, **close)
        for n, t in states(own).items():
            torch.testing.assert_close(t.full_tensor(), states(layer)[n], **close)
        channels = -(-layer.d_model // torch.distributed.get_world_size())
        if torch.distributed.get_rank() == 0:
            assert own.skip.to_local().shape[1] == channels


def packs_are_equal_to_one_process(names):
    offsets = torch.tensor([0, 9, 9, 10, LENGTH])
    for name in names:
        layer = made(name)
        own = divided(copy.deepcopy(layer))
        x, found = torch.randn(LENGTH, layer.d_model, dtype=torch.float64), []
        for one in (layer, own):
            leaf = x.clone().requires_grad_()
            y = one(leaf, cu_seqlens=offsets)
            y.sin().sum().backward()
            grads = [p.grad for p in one.parameters()]
            found.append(
                [y, leaf.grad, *[getattr(g, "full_tensor", lambda g=g: g)() for g in grads]]
            )
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, **close)


def test_packs_are_equal_to_one_process():
    run(2, packs_are_equal_to_one_process, [n for n in LAYERS if "butterfly" not in n])


@pytest.mark.parametrize(
    "world",
    [3, *[pytest.param(n, marks=[pytest.mark.slow, pytest.mark.one_of(2)]) for n in (2, 4)]],
)
def test_equal_to_one_process(world):
    run(world, equal_to_one_process, list(LAYERS))


class Block(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(conv.d_model), conv

    def forward(self, x, **masks):
        return x + self.conv(self.norm(x), **masks)


def masks_and_layouts(_):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x = torch.randn(4, LENGTH, D, dtype=torch.float64)
    lengths = torch.tensor([20, 13, 1, 0])
    padding = torch.arange(LENGTH) >= lengths.unsqueeze(1)
    for name in ("s4d", "hyena"):
        layer = made(name)
        y = layer(x, padding)
        own = divided(copy.deepcopy(layer))
        mesh = own.skip.device_mesh
        minus = torch.zeros(4, LENGTH, dtype=torch.float64).masked_fill(padding, -torch.inf)
        whole = distribute_tensor(padding, mesh, [Shard(0)])
        for masks in ({"mask": padding}, {"mask": minus}, {"lengths": lengths}, {"mask": whole}):
            leaf = x.clone().requires_grad_()
            found = own(leaf, **masks)
            torch.testing.assert_close(found, y, **close)
            found.square().sum().backward()
            assert not leaf.grad[padding].any() and leaf.grad[~padding].abs().min() > 0
        with pytest.raises(ValueError, match="lengths must be between 0 and length=20"):
            own(x, lengths=lengths + 1)
        with pytest.raises(ValueError, match="mask and lengths exclude each other"):
            own(x, padding, lengths=lengths)
        with pytest.raises(ValueError, match=r"x must be \(batch, length, d_model=7\)"):
            own(x[..., :4])

        samples = x.chunk(world)[rank]
        cut = {"input_layouts": Shard(0), "output_layouts": Shard(1)}
        half = divided(copy.deepcopy(layer), **cut)(samples, padding)
        torch.testing.assert_close(half, y.chunk(world, 1)[rank], **close)
        kept = divided(copy.deepcopy(layer), use_local_output=False)
        found = kept(distribute_tensor(x, mesh, [Shard(2)]), padding)
        assert isinstance(found, DTensor) and found.placements == (Replicate(),)
        torch.testing.assert_close(found.to_local(), y, **close)
        torch.testing.assert_close(copy.deepcopy(own)(x, padding), y, **close)
        with pytest.raises(ValueError, match="is divided already"):
            plan(own)._apply(own, mesh)

        model = nn.Sequential(Block(layer), Block(made(name))).double()
        again = copy.deepcopy(model)
        parallelize_module(again, mesh, {"*.conv": plan(layer)})
        torch.testing.assert_close(again(x), model(x), **close)
        with pytest.raises(TypeError, match=r"plan: layer must be .*, got LayerNorm"):
            parallelize_module(again, mesh, {"*.norm": plan(layer)})
        taken = {
            n: t if n.endswith("_extra_state") else t + 1 for n, t in model.state_dict().items()
        }
        model.load_state_dict(taken)
        for n, t in states(again).items():
            if isinstance(t, DTensor):
                taken[n] = distribute_tensor(taken[n], mesh, t.placements)
        again.load_state_dict(taken)
        torch.testing.assert_close(again(x), model(x), **close)


def test_masks_layouts_and_models():
    run(2, masks_and_layouts, None)


def with_dropout(_):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DTensor random operators may not")  # on CPUs
        dropout_is_alike()


def dropout_is_alike():
    for make in (
        lambda: S4D(D, d_state=4, dropout=0.5, kernel_dropout=0.5),
        lambda: LongConv(D, l_max=30, dropout=0.5, tie_dropout=True, lam=0.0),
    ):
        torch.manual_seed(3)
        layer = make()
        own = divided(copy.deepcopy(layer))
        x = torch.randn(2, LENGTH, D)
        torch.manual_seed(5)
        y = own(x)
        everywhere = [torch.empty_like(y) for _ in range(2)]
        torch.distributed.all_gather(everywhere, y.detach())
        assert torch.equal(*everywhere)
        assert not torch.equal(own(x), y)
        y.sum().backward()
        layer.eval(), own.eval()
        torch.testing.assert_close(own(x), layer(x), rtol=1e-5, atol=1e-5)


def test_dropout():
    run(2, with_dropout, None)


def data_and_tensors(_):
    from torch.distributed.tensor.parallel import parallelize_module

    from seqconv.parallel import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    group = mesh["data"].get_local_rank()
    for name in ("s4d", "sgconv", "hyena"):
        layer = Block(made(name)).double()
        own = copy.deepcopy(layer)
        parallelize_module(own, mesh["tensor"], {"conv": plan(layer.conv)})
        fully_shard(own, mesh=mesh["data"])
        x = torch.randn(4, LENGTH, D, dtype=torch.float64)
        layer(x).square().mean().backward()
        own(x[2 * group : 2 * group + 2]).square().mean().backward()
        for (n, p), q in zip(layer.named_parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=n, **close)


def test_with_fully_shard():
    run(4, data_and_tensors, None)


def test_what_is_no_layer_is_refused():
    for other in (nn.Linear(2, 2), S4D(4).kernel, "s4d", S4D):
        with pytest.raises(TypeError, match="plan: layer must be S4D"):
            plan(other)
    with pytest.raises(TypeError, match="plan: input_layouts must be a Placement, got int"):
        plan(S4D(4), input_layouts=0)


def drops_parts_of_kernels():
    """The taps that dropout has left, of this process's channels, and the next random number."""
    torch.manual_seed(0)
    layer = divided(LongConv(5, l_max=40, kernel_dropout=0.5, lam=0.0))
    layer(torch.randn(2, 40, 5))
    kept = layer.kernel(40).to_local().detach() != 0
    return kept, torch.rand(()).item()


def test_kernel_dropout_leaves_processes_in_the_same_random_state():
    """With 3 channels on one process and 2 on the other; and their channels have masks of their own."""
    (first, number), (second, other) = run(2, drops_parts_of_kernels)
    assert number == other
    assert 0.2 < first.double().mean() < 0.8 and 0.2 < second.double().mean() < 0.8
    assert not torch.equal(first[:, :2], second)
