"""What is done to a model before and after context parallelism: freezing, copies, pickles."""

import copy
import io
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from context_cases import part, relative
from layer_table import D
from processes import run
from torch import nn

from seqconv import S4D, fftconv, parallel
from seqconv.parallel.shards import Shards, chunk_sizes


def same_gradients(change_before, change_after, bound=1e-12, length=21, **options):
    """Gradients of a divided model equal one process's, with changes made to both before and after the division."""
    models = []
    for divided in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(S4D(D), nn.Linear(D, D)).double()
        change_before(model)
        if divided:
            parallel.context_parallel(model, **options)
        change_after(model)
        models.append(model)
    plain, ours = models
    shards = Shards(chunk_sizes(length, dist.get_world_size()))
    g = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(2, length, D, generator=g, dtype=torch.float64) for _ in range(2))
    own = lambda t: part(t, shards, dist.get_rank(), 1)  # noqa: E731
    y, z = plain(x), ours(own(x))
    assert relative(z.detach(), own(y.detach())) < bound
    (y * weight).sum().backward()
    (z * own(weight)).sum().backward()
    for (path, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), path
        if p.grad is not None:
            assert relative(q.grad, p.grad) < bound, path


def leave(model):
    pass


def freeze(model):
    model.requires_grad_(False)


def train(model):
    model.requires_grad_(True)


def freeze_and_train(model):
    freeze(model)
    train(model)


@pytest.mark.parametrize("before, after", [(freeze, train), (leave, freeze_and_train)])
def test_parameters_that_are_trained_later_have_whole_gradients(before, after):
    run(2, same_gradients, before, after)


def pickles():
    layer = parallel.context_parallel(S4D(D, dropout=0.1))
    parameters = io.BytesIO()
    torch.save(layer.state_dict(keep_vars=True), parameters)
    parameters.seek(0)
    other = parallel.context_parallel(S4D(D))
    other.load_state_dict(torch.load(parameters), assign=True)
    with pytest.raises(RuntimeError, match=r"the gradient of skip \(S4D\) would not be summed"):
        other(torch.ones(1, 3, D))
    for model in (layer, nn.Sequential(layer), nn.Sequential(layer.dropout)):
        with pytest.raises(TypeError, match="cannot be pickled: save its state_dict"):
            torch.save(model, io.BytesIO())
    with torch.no_grad():
        copy.deepcopy(layer)(torch.ones(1, 3, D))


def test_pickles_hold_parameters_only():
    run(2, pickles)


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def other_generate(model):
    kernel, generate = model[0].kernel, model[0].kernel.generate
    kernel.generate = lambda *args: 3 * generate(*args)


def other_dropout(model):
    model[0].kernel.kernel_dropout = Half()


def hooked_dropout(model):
    model[0].kernel.kernel_dropout.register_forward_hook(lambda module, args, k: k.flip(1))


def hooked_kernel(model):
    model[0].kernel.register_forward_hook(lambda module, args, k: k.flip(1))


CHANGES = [other_generate, other_dropout, hooked_dropout, hooked_kernel]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["a2a", "halo"])
def test_changed_kernels_are_those_of_one_process(change, method):
    run(2, partial(same_gradients, method=method), leave, change)


def refuses_state(change):
    model = parallel.context_parallel(nn.Sequential(S4D(D)), method="state")
    change(model)
    with pytest.raises(
        ValueError, match="method must be one of 'auto', 'a2a', 'halo' for this S4D"
    ):
        model(torch.randn(1, 5, D))


@pytest.mark.parametrize("change", CHANGES)
def test_changed_kernels_have_no_state(change):
    run(2, refuses_state, change)


class Twice(S4D):
    def _convolve(self, x, rate):
        return 2 * super()._convolve(x, rate)


def divides_twice():
    with pytest.raises(TypeError, match="Twice convolves by a _convolve of its own"):
        parallel.context_parallel(Twice(D))


def test_layers_with_another_convolution():
    run(1, divides_twice)


def compiled(method):
    """Values and gradients at two lengths, of which the second has another graph, with a compiled model."""
    warnings.simplefilter("ignore")  # torch warns of its own modules
    compile_ = lambda model: model.compile(backend="aot_eager")  # noqa: E731
    for length in (21, 8):
        same_gradients(leave, compile_, method=method, length=length)


@pytest.mark.parametrize("method", ["a2a", "state"])
def test_compiled_models(method):
    run(2, compiled, method, timeout=200)


def compiled_fftconv():
    warnings.simplefilter("ignore")
    u, k = torch.randn(1, 4, 6), torch.randn(4, 9)
    own = u.chunk(2, -1)[dist.get_rank()]
    run_ = torch.compile(lambda u, k: 2 * parallel.fftconv(u, k), backend="aot_eager")
    wanted = 2 * fftconv(u, k).chunk(2, -1)[dist.get_rank()]
    assert relative(run_(own, k), wanted) < 1e-6


def test_compiled_fftconv():
    run(2, compiled_fftconv, timeout=200)
