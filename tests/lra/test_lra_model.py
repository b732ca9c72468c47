"""bench.lra's classifier and the order of its samples."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

import seqconv
from bench.lra import options
from bench.lra.batches import Batch, EvalBatches, TrainBatches, same, thinned
from bench.lra.model import SequenceClassifier, pooled
from bench.lra.schedule import compare_step

LAYERS = ("s4d", "sgconv", "long_conv", "butterfly", "hyena")


SMALL = options.Model(2, 8, "layer", False, 0.0, "mean")


def small(layer="s4d", model=SMALL, **kind):
    kernel = options.KERNELS[layer]()
    kind = kind or {"channels": 1}
    return SequenceClassifier(layer, model, kernel, classes=3, l_max=32, **kind)


@pytest.mark.filterwarnings("ignore:LongConvKernel")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_padding_changes_nothing(layer, prenorm, pool):
    """A sample's answer is the same alone and padded in a batch, for every layer and pooling."""
    model = dataclasses.replace(SMALL, prenorm=prenorm, pool=pool)
    made = small(layer, model, vocab=7).double().eval()
    x = torch.randint(1, 7, (2, 20))
    lengths = torch.tensor([13, 20])
    together = made(x, lengths)
    alone = made(x[:1, :13])
    # Kernels are computed in float32.
    assert (together[0] - alone[0]).norm() < 1e-5 * alone.norm()
    changed = x.clone()
    changed[0, 13:] = 0
    assert torch.allclose(made(changed, lengths), together, rtol=1e-12)
    changed[0, 12] = x[0, 12] % 6 + 1
    assert not torch.allclose(made(changed, lengths)[0], together[0], rtol=1e-4)


def test_half_of_the_samples_have_the_same_answer():
    """Of a signal that changes slowly; without the rate the answer is another one."""
    sizes = {"classes": 3, "l_max": 400, "channels": 1}
    made = SequenceClassifier("s4d", SMALL, options.S4D(), **sizes).double().eval()
    t = torch.arange(400, dtype=torch.float64) / 400
    x = torch.stack([(3 * t).sin(), (5 * t).cos()]).unsqueeze(-1)
    whole, thin = made(x), thinned(Batch(x, torch.tensor([400, 399]), None), 2)
    assert thin.x.shape[1] == 200 and thin.lengths.tolist() == [200, 200]
    blind = made(thin.x)
    made.rate = 2.0
    half = made(thin.x)
    error = (half - whole).norm()
    assert error < 0.02 * whole.norm() and error < 0.5 * (blind - whole).norm()


def test_backbone_is_the_papers():
    """Against the equations, with the layers and norms taken from the model."""
    x = torch.randn(4, 16, 1)
    for prenorm in (True, False):
        made = small(model=dataclasses.replace(SMALL, norm="batch", prenorm=prenorm)).train()
        h = made.encoder(x)

        def norm(z, i, made=made):
            mean, var = z.mean((0, 1)), z.var((0, 1), unbiased=False)
            bn = made.norms[i].norm
            return (z - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias

        for i, layer in enumerate(made.layers):
            h = h + layer(norm(h, i)) if prenorm else norm(h + layer(h), i)
        assert len(made.norms) == 2 + prenorm
        h = norm(h, 2) if prenorm else h
        wanted = made.decoder(h.mean(1))
        assert torch.allclose(made(x), wanted, atol=1e-5)


def test_pairs_and_pooling():
    made = small(vocab=7, pair=True).eval()
    a, b = torch.randint(1, 7, (2, 3, 20))
    features = []
    made.decoder.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    logits = made(torch.cat([a, b]))
    assert logits.shape == (3, 3)
    first, second, difference, product = features[0].chunk(4, dim=1)
    assert torch.equal(difference, first - second) and torch.equal(product, first * second)
    made(torch.cat([b, a]))
    assert torch.allclose(features[1].chunk(4, dim=1)[0], second, atol=1e-6)
    x = torch.arange(12.0).view(1, 6, 2)
    assert torch.equal(pooled(x, torch.tensor([3]), "mean"), x[:, :3].mean(1))
    assert torch.equal(pooled(x, torch.tensor([3]), "last"), x[:, 2])
    assert torch.equal(pooled(x, None, "last"), x[:, 5])
    with pytest.raises(ValueError, match="one of channels and vocab"):
        small(channels=1, vocab=2)


def test_dropout_is_tied_and_dt_has_its_rate():
    made = small(model=dataclasses.replace(SMALL, dropout=0.5)).train()
    dropped = made.dropout(torch.ones(4, 10, 8))
    assert (dropped == dropped[:, :1]).all() and 0 < (dropped == 0).float().mean() < 1
    kernel = options.S4D(kernel_lr=1e-3, dt_lr=5e-3)
    made = SequenceClassifier("s4d", SMALL, kernel, classes=2, l_max=9, channels=1)
    groups = seqconv.param_groups(made, lr=1e-2, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    k = made.layers[0].kernel
    assert found[id(k.inv_dt)] == (5e-3, 0) and found[id(k.inv_A_real)] == (1e-3, 0)
    assert found[id(k.C)] == found[id(made.decoder.weight)] == (1e-2, 0.1)
    for rates, wanted in (
        ((1e-3, 0.0), {"inv_A_real", "inv_A_imag", "B", "C"}),
        ((0.0, 1e-3), {"inv_dt", "C"}),
    ):
        kernel = options.S4D(kernel_lr=rates[0], dt_lr=rates[1])
        made = SequenceClassifier("s4d", SMALL, kernel, classes=2, l_max=9, channels=1)
        assert dict(made.layers[0].kernel.named_parameters()).keys() == wanted


# ---- the order of samples ----


class Numbers:
    """Sample i is the number i."""

    def __init__(self, count, lengths=None):
        self.labels = np.arange(count)
        self.lengths = np.ones(count, int) if lengths is None else lengths

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        return self.labels[indices, None, None].astype("f4"), self.lengths[indices], indices


def passes(batches, count) -> list[list[int]]:
    return [part[2].tolist() for _ in range(count) for part in batches]


def test_order_is_a_permutation_that_any_position_resumes():
    def make(**options):
        return TrainBatches(Numbers(23), batch=4, period=3, seed=1, **options)

    whole = passes(make(), 6)  # 18 batches of 5 per epoch
    assert len(make()) == 3 and len(whole) == 18
    for epoch in range(3):
        seen = [i for part in whole[5 * epoch : 5 * epoch + 5] for i in part]
        assert len(seen) == len(set(seen)) == 20
    assert whole[:5] != whole[5:10]
    assert passes(make(), 1) == whole[:3]
    assert passes(TrainBatches(Numbers(23), batch=4, period=3, seed=2), 1) != whole[:3]
    for stop in range(1, 17):
        first = make()
        got = []
        while len(got) < stop:
            for part in first:
                got.append(part[2].tolist())
                if len(got) == stop:
                    break
        state = first.state_dict()
        assert state == {"seed": 1, "epoch": stop // 5, "position": stop % 5}
        second = make()
        second.load_state_dict(state)
        while len(got) < 18:
            got += passes(second, 1)
        assert got == whole
    parts = [passes(make(rank=rank, world=2), 6) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(w) for w in whole]
    halves = passes(make(accumulate=2), 6)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole
    with pytest.raises(ValueError, match="at most 23"):
        TrainBatches(Numbers(23), batch=24, period=1, seed=0)
    with pytest.raises(ValueError, match="multiple of"):
        make(world=3)
    with pytest.raises(ValueError, match="seed was 5"):
        make().load_state_dict({"seed": 5, "epoch": 0, "position": 0})


def test_evaluation_sees_every_sample_once():
    lengths = np.array([5, 1, 4, 2, 3, 9, 8])
    for world in (1, 2):
        shares = [
            EvalBatches(Numbers(7, lengths), batch=2, rank=r, world=world) for r in range(world)
        ]
        seen = [i for share in shares for part in share for i in part[2].tolist()]
        assert sorted(seen) == list(range(7))
    order = [i for part in EvalBatches(Numbers(7, lengths), batch=2) for i in part[2].tolist()]
    assert lengths[order].tolist() == sorted(lengths)


def test_splits_that_are_the_same_are_noticed():
    one = Numbers(9)
    assert same(one, Numbers(9)) and not same(one, Numbers(8))
    assert not same(one, Numbers(9, 1 + np.arange(9) % 2))
    other = Numbers(9)
    other.batch = lambda indices: (indices[:, None, None] + 1, None, None)
    assert not same(one, other)


def test_an_error_in_reading_is_not_lost():
    class Broken(Numbers):
        def batch(self, indices):
            raise OSError("sample 3 cannot be read")

    with pytest.raises(OSError, match="sample 3"):
        next(iter(TrainBatches(Broken(9), batch=3, period=3, seed=0)))


def test_what_is_timed_is_a_training_step(monkeypatch):
    """With dropout and the optimiser, of a copy; nothing is timed while the gradients differ."""
    made = small(model=dataclasses.replace(SMALL, dropout=0.5))
    before = copy.deepcopy(made.state_dict())
    batch = Batch(torch.randn(4, 32, 1), torch.full((4,), 32), torch.arange(4) % 3)
    seen, stepped = [], []
    forward, optimizer_step = SequenceClassifier.forward, torch.optim.AdamW.step

    def watched(self, *inputs):
        seen.append(self.training)
        return forward(self, *inputs)

    def counted(self, *arguments):
        stepped.append(
            all(p.grad is not None for group in self.param_groups for p in group["params"])
        )
        return optimizer_step(self, *arguments)

    monkeypatch.setattr(SequenceClassifier, "forward", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    found = compare_step(made, batch, 3, "32-true")
    assert seen == [False] * 3 + [True] * 13 and stepped == [True] * 13
    assert found["difference"] < 1e-3 and found["ratio"] > 0 and found["seqconv"] > 0
    after = made.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in made.parameters())
    wrong = lambda *a, through, **k: 1.01 * seqconv.fftconv(*a, **k)  # noqa: E731
    monkeypatch.setattr("bench.micro.natural.fftconv", wrong)
    with pytest.raises(RuntimeError, match="gradients differ"):
        compare_step(made, batch, 3, "32-true")
