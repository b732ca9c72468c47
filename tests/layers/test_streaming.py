"""Layers step by step: forward's outputs, whatever pieces the input comes in."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_table import EVERY, LAYERS, D, relative
from stream_layers import every_stream, forward, make, run

from seqconv import ButterflyConv, reference, streaming
from seqconv.layers.streaming import KEPT

pytestmark = pytest.mark.filterwarnings("ignore:.*is not seen")  # inputs longer than kernels


LENGTH = 260  # the kernels have 80 to 128 taps


@st.composite
def pieces(draw):
    found, rest = [], LENGTH
    while rest:
        n = draw(st.integers(1, min(rest, 100)))
        found.append(n if draw(st.booleans()) else -n)
        rest -= n
    return found


@every_stream
@settings(max_examples=4, deadline=None)
@given(pieces(), st.booleans(), st.integers(0, 3))
def test_any_pieces_give_what_forward_gives(name, cut, spread, batch):
    layer = make(name)
    x = torch.randn(batch, LENGTH, D, dtype=torch.float64)
    with torch.no_grad():
        y, _ = run(layer, x, cut, layer.init_state(batch, spread=spread))
        assert y.shape == x.shape
        if batch:
            assert relative(y, forward(layer, x)) < 1e-12


@every_stream
def test_pieces_in_the_layers_dtype(name):
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        layer = make(name, dtype)
        x = torch.randn(2, 150, D).to(dtype)
        with torch.no_grad():
            y, _ = run(layer, x, [70, -40, 40], layer.init_state(2))
            assert y.dtype == dtype and relative(y, layer(x)) < bound


@every_stream
def test_gradients_pass_through_the_state(name):
    """Backpropagation through chunks is that of the whole, and it can be cut between them."""
    layer = make(name)
    x = torch.randn(2, 200, D, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    y, _ = run(layer, x, [-77, -1, -50, -72], layer.init_state(2))
    found = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative(ours, theirs) < 1e-9
    _, state = layer.prefill(x[:, :77], layer.init_state(2))
    y, _ = layer.prefill(x[:, 77:], state.map(torch.Tensor.detach))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not dx[:, :77].any() and dx[:, 77:].any()


@every_stream
def test_padding_is_no_step(name):
    """Rows of different lengths in one chunk, padded left or right, twice in a row."""
    layer = make(name)
    x = torch.randn(3, 200, D, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x)
        counts = torch.tensor([5, 0, 60])
        y, state = layer.prefill(x[:, :60], layer.init_state(3), lengths=counts)
        for row, n in enumerate(counts.tolist()):
            assert n == 0 or relative(y[row, :n], wanted[row, :n]) < 1e-12
        starts = torch.tensor([7, 40, 0])  # padding on the left, now
        mask = torch.arange(70) < starts.unsqueeze(1)
        chunk = torch.randn(3, 70, D, dtype=torch.float64)
        for row in range(3):
            n = 70 - starts[row]
            chunk[row, starts[row] :] = x[row, counts[row] : counts[row] + n]
        y, state = layer.prefill(chunk, state, mask)
        ends = counts + 70 - starts
        for row in range(3):
            first = starts[row]
            assert relative(y[row, first:], wanted[row, counts[row] : ends[row]]) < 1e-12
        for t in range(40):
            now = torch.stack([x[row, ends[row] + t] for row in range(3)])
            y, state = layer.step(now, state)
            then = torch.stack([wanted[row, ends[row] + t] for row in range(3)])
            assert relative(y, then) < 1e-12


def serve(layer, rounds, seed, spread):
    """Rows that come, go, branch and join at random; each with its own history. The largest relative error."""
    draw = torch.Generator().manual_seed(seed)
    pick = lambda n: int(torch.randint(n, (), generator=draw))  # noqa: E731
    past = [torch.zeros(0, D, dtype=torch.float64) for _ in range(4)]
    state, worst = layer.init_state(4, spread=spread), 0.0
    for _ in range(rounds):
        what = pick(5)
        if what == 0:
            rows = [pick(4) for _ in range(4)]
            state, past = state.select(rows), [past[i] for i in rows]
        elif what == 1:
            row = pick(4)
            state.reset([row])
            past[row] = past[row][:0]
        elif what == 2:
            x = torch.randn(2, 1 + pick(90), D, dtype=torch.float64)
            _, other = layer.prefill(x, layer.init_state(2, spread=spread))
            more = torch.randn(2, pick(40), D, dtype=torch.float64)
            for now in more.unbind(1):
                _, other = layer.step(now, other)
            rows = torch.randperm(4, generator=draw)[:2]
            state.insert(rows, other)
            for i, row in enumerate(rows.tolist()):
                past[row] = torch.cat([x[i], more[i]])
        for _ in range(pick(45)):
            now = torch.randn(4, D, dtype=torch.float64)
            y, state = layer.step(now, state)
            past = [torch.cat([p, x.unsqueeze(0)]) for p, x in zip(past, now, strict=True)]
        if len(past[0]) and min(map(len, past)):
            now = torch.randn(4, D, dtype=torch.float64)
            y, state = layer.step(now, state)
            past = [torch.cat([p, x.unsqueeze(0)]) for p, x in zip(past, now, strict=True)]
            wanted = torch.stack([forward(layer, p.unsqueeze(0))[0, -1] for p in past])
            worst = max(worst, relative(y, wanted))
    return worst


@every_stream
@pytest.mark.parametrize("spread", [False, True])
def test_rows_come_go_branch_and_join(name, spread):
    torch.manual_seed(1)
    with torch.no_grad():
        assert serve(make(name), 14, 3, spread) < 1e-12


@every_stream
def test_a_state_is_a_tree_of_tensors(name, tmp_path):
    layer = make(name)
    x = torch.randn(2, 120, D, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x)
        _, state = run(layer, x[:, :70], [70], layer.init_state(2))
        leaves, tree = torch.utils._pytree.tree_flatten(state)
        copies = [copy.deepcopy(state), torch.utils._pytree.tree_unflatten(leaves, tree)]
        torch.save(state, tmp_path / "state.pt")
        copies[1] = copy.deepcopy(copies[1])
        copies += [torch.load(tmp_path / "state.pt"), state.to("cpu"), state.select([0, 1])]
        assert all(t.shape[0] == 2 for t in leaves) and state.batch == 2
        assert "batch=2" in repr(state) and state.dtype == torch.float64
        for one in copies:
            y, _ = run(copy.deepcopy(layer), x[:, 70:], [-20, 30], copy.deepcopy(one))
            assert relative(y, wanted[:, 70:]) < 1e-12
        buffer = io.BytesIO()
        torch.save(layer, buffer)  # a layer keeps what steps need, and does not save it
        assert len(buffer.getvalue()) < 200_000


def test_the_states_of_many_lengths_share_spectra():
    k = torch.randn(2, 200, dtype=torch.float64)
    u, conv = torch.randn(1, 2, 150, dtype=torch.float64), streaming.StreamingConv(k)
    for length in range(1, 150, 4):
        state = conv.init_state(1, length=length)
        y = torch.stack([conv.step(now, state)[0] for now in u[..., :length].unbind(-1)], -1)
        assert relative(y, reference.fftconv(u[..., :length], k)) < 1e-12
        y, _ = conv.prefill(u[..., :length], conv.init_state(1, length=length))
        assert relative(y, reference.fftconv(u[..., :length], k)) < 1e-12
    assert len(conv._taps) == 4


@pytest.mark.parametrize("name", ["s4d", "long_conv", "hyena"])
def test_rows_are_inserted_from_the_same_state(name):
    layer, x = make(name), torch.randn(3, 40, D, dtype=torch.float64)
    with torch.no_grad():
        _, state = run(layer, x, [40], layer.init_state(3))
        for rows, function in [([2, 1, 0], lambda t: t), ([1, 2], lambda t: t[:2])]:
            source = state.map(function)
            wanted = state.leaves()
            wanted = [
                t.index_copy(0, torch.tensor(rows), s.clone())
                for t, s in zip(wanted, source.leaves(), strict=True)
            ]
            state.insert(rows, source)
            assert all(map(torch.equal, state.leaves(), wanted))


def with_gradients(layer, x, state):
    with torch.enable_grad():
        return layer.step(x, state)


def test_states_of_many_lengths_do_not_fill_the_memory():
    layer, x = make("long_conv"), torch.randn(1, D, dtype=torch.float64)
    with torch.no_grad():
        first = layer.init_state(1, length=60)
        for length in range(1, 40):
            y, _ = layer.step(x, layer.init_state(1, length=length))
            again, _ = layer.step(x, layer.init_state(1, length=length))
            assert torch.equal(y, again)
        assert len(layer._kept[1]) == KEPT
        layer.step(x, first)  # which makes what it needs anew


def test_threads_step_states_of_different_lengths():
    layer, x = make("long_conv"), torch.randn(30, 1, D, dtype=torch.float64)

    def serve(length):
        with torch.no_grad():
            state = layer.init_state(1, length=length)
            return torch.stack([layer.step(now, state)[0] for now in x])

    lengths = [*range(30, 38)] * 2
    wanted = [serve(length) for length in lengths]
    with ThreadPoolExecutor(4) as pool:
        for y, alone in zip(pool.map(serve, lengths), wanted, strict=True):
            assert torch.equal(y, alone)


@every_stream
def test_errors_name_what_is_wrong(name):
    layer, x = make(name), torch.randn(2, D, dtype=torch.float64)
    own = type(layer).__name__
    with torch.no_grad():
        state = layer.init_state(2)
        for call, error, text in [
            (
                lambda: layer.step(x[:1], state),
                ValueError,
                "state must have batch=1 like (x|the input), got 2",
            ),
            (lambda: layer.step(x.float(), state), TypeError, "x must be float64"),
            (lambda: layer.step(x[:, 1:], state), ValueError, r"x must be \(batch, d_model=6\)"),
            (lambda: layer.step(x, x), TypeError, "state must be .*State, got Tensor"),
            (lambda: with_gradients(layer, x, None), TypeError, "state must be .*State, got None"),
            (lambda: layer.prefill(x, state), ValueError, "x must be"),
            (lambda: layer.init_state(-1), ValueError, "batch must be"),
            (lambda: layer.init_state(2.0), ValueError, "batch must be"),
            (lambda: layer.step(x, make(name).init_state(2)), ValueError, "another"),
            (lambda: layer.init_state(2, length=-1), ValueError, "init_state: length must be"),
            (lambda: layer.init_state(2, length="1"), ValueError, "init_state: length must be"),
            (lambda: state.select(2), TypeError, "rows must be a sequence"),
            (lambda: state.select([2]), ValueError, "rows must be between 0 and batch - 1 = 1"),
            (lambda: state.select([0.5]), TypeError, "rows must be integers"),
            (lambda: state.reset(1), TypeError, "rows must be a sequence"),
            (lambda: state.reset([True, False]), TypeError, "rows must be integers"),
            (lambda: state.to(torch.float64), TypeError, "device must be a device"),
            (lambda: state.reset(torch.zeros(1)), TypeError, "rows must be integers"),
            (lambda: state.insert([0, 0], layer.init_state(2)), ValueError, "must be different"),
            (
                lambda: state.insert([0], layer.init_state(2)),
                ValueError,
                "batch=1 like rows, got 2",
            ),
            (lambda: state.insert([0], x), TypeError, "other must be"),
            (
                lambda: state.insert([0], make(name).init_state(1)),
                ValueError,
                "other is of another layer",
            ),
        ]:
            with pytest.raises(error, match=text) as caught:
                call()
            assert own in str(caught.value) or "State" in str(caught.value)


@pytest.mark.parametrize("name", LAYERS)
def test_two_sided_layers_say_why_they_have_no_steps(name):
    layer = LAYERS[name](bidirectional=True)
    for call in (lambda: layer.init_state(1), lambda: layer.step(torch.randn(1, D), None)):
        with pytest.raises(TypeError, match=r"two-sided.*bidirectional=False"):
            call()


def test_a_butterfly_says_why_it_has_no_steps():
    layer = EVERY["butterfly"]()
    assert not hasattr(layer, "step") and not hasattr(ButterflyConv, "step")
    for method in ("init_state", "step", "prefill"):
        with pytest.raises(TypeError, match=r"sees every input.*LongConv"):
            getattr(layer, method)
    with pytest.raises(AttributeError, match="nothing"):
        layer.nothing  # noqa: B018


def test_dropout_of_taps_has_no_steps():
    layer = EVERY["long_conv"](kernel_dropout=0.5)
    with pytest.raises(ValueError, match=r"kernel_dropout in training.*eval"):
        layer.init_state(1)
    layer.eval().init_state(1)


@pytest.mark.parametrize("name", ["long_conv", "sgconv", "hyena", "long_conv, smooth, two heads"])
def test_a_bounded_state_is_small_and_ends(name):
    layer = make(name)
    x = torch.randn(2, 51, D, dtype=torch.float64)
    with torch.no_grad():
        state = layer.init_state(2, length=50)
        y, state = run(layer, x[:, :50], [20, -13, 17], state)
        assert relative(y, layer(x[:, :50])) < 1e-12
        assert sum(t.numel() for t in state.leaves()) < sum(
            t.numel() for t in layer.init_state(2).leaves()
        )
        with pytest.raises(ValueError, match="length=50 steps, and this would be step 51"):
            layer.step(x[:, 50], state)
        state.reset([0, 1])
        y, _ = run(layer, x[:, :50], [50], state)
        assert relative(y, layer(x[:, :50])) < 1e-12


@pytest.mark.parametrize("name", ["long_conv", "hyena"])
def test_a_step_has_no_gradient_and_says_so(name):
    layer = make(name)
    with pytest.raises(RuntimeError, match=r"no_grad\(\), or take prefill"):
        layer.step(torch.randn(1, D, dtype=torch.float64), layer.init_state(1))


def test_states_of_several_layers_are_one():
    layers = [make(name) for name in ("s4d", "hyena", "long_conv")]
    x = torch.randn(3, 20, D, dtype=torch.float64)

    def model(x, states):
        for layer, state in zip(layers, states, strict=True):
            x, _ = layer.step(x, state)
        return x

    with torch.no_grad():
        all_of, alone = (streaming.States(layer.init_state(n) for layer in layers) for n in (3, 1))
        for t in range(10):
            model(x[:, t], all_of)
        states = all_of.select([2, 1])
        states.reset([1])
        states.insert([1], alone)
        assert len(states) == 3 and states.batch == 2 and states[1] is list(states)[1]
        for t in range(10, 20):
            y, own = model(x[[2, 0], t], states), model(x[:, t], all_of)
            torch.testing.assert_close(y[0], own[2], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(y[1:], model(x[:1, t], alone), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"same batch, got \[3, 2\]"):
        streaming.States([all_of[0], states[0]])


@pytest.mark.parametrize("name", ["s4d", "s4d, real, two heads"])
def test_a_recurrence_takes_other_rates(name):
    layer = make(name)
    x = torch.randn(2, 90, D, dtype=torch.float64)
    with torch.no_grad():
        wanted, state = layer(x, rate=0.7), layer.init_state(2)
        y, state = layer.prefill(x[:, :40], state, lengths=torch.tensor([40, 40]), rate=0.7)
        found = [y]
        for now in x[:, 40:].unbind(1):
            y, state = layer.step(now, state, rate=0.7)
            found.append(y.unsqueeze(1))
    assert relative(torch.cat(found, 1), wanted) < 1e-12
    with pytest.raises(ValueError, match="rate must be"):
        layer.step(x[:, 0], state, rate=-1.0)


def test_the_public_names():
    for name in streaming.__all__:
        assert len(getattr(streaming, name).__doc__) > 60
