"""Convolutions step by step: the whole convolution, on every backend, and what its mistakes would look like."""

import math
import resource

import pytest
import torch
from accuracy import rel_l2

from seqconv import fftconv, use_backend
from seqconv.backends import cpu, fallback, tiles
from seqconv.ops import stream
from seqconv.streaming import StreamingConv

SIZES = [  # batch, heads, channels, taps, steps
    (2, None, 3, 1, 40),
    (1, 2, 5, 32, 130),
    (2, 1, 17, 33, 100),
    (3, None, 4, 34, 150),
    (1, 3, 2, 100, 400),
    (2, None, 70, 257, 300),
    (0, 2, 3, 50, 70),
    (2, None, 3, 0, 40),
    (2, 1, 0, 40, 33),
]
DTYPES = {
    torch.float64: 1e-14,
    torch.float32: 5e-7,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}


def problem(sizes, dtype, activation, gated):
    batch, heads, channels, taps, steps = sizes
    wide = torch.promote_types(dtype, torch.float32)
    axes = () if heads is None else (heads,)
    k = torch.randn(*axes, channels, taps, dtype=wide)
    skip = torch.randn(*axes, channels, dtype=wide)
    u, pre = (torch.randn(batch, channels, steps).to(dtype) for _ in range(2))
    post = torch.randn(batch, *axes, channels, steps).to(dtype)
    return k, skip, u, *((pre, post) if gated else (None, None))


def stepped(conv, u, pre_gate, post_gate, state):
    found = []
    for t in range(u.shape[-1]):
        gates = {
            name: None if gate is None else gate[..., t]
            for name, gate in (("pre_gate", pre_gate), ("post_gate", post_gate))
        }
        found.append(conv.step(u[..., t], state, **gates)[0])
    return torch.stack(found, -1)


def error(sizes, dtype=torch.float64, activation="gelu", gated=True, spread=False) -> float:
    k, skip, u, pre, post = problem(sizes, dtype, activation, gated)
    conv = StreamingConv(k, skip, activation=activation)
    y = stepped(conv, u, pre, post, conv.init_state(len(u), spread=spread))
    assert y.dtype == dtype
    wide = [None if t is None else t.double() for t in (u, k, skip, pre, post)]
    gates = {"pre_gate": wide[3], "post_gate": wide[4], "activation": activation}
    wanted = fftconv(*wide[:3], **gates)
    assert y.shape == wanted.shape
    return rel_l2(y, wanted) if wanted.numel() else 0.0


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_steps_are_the_convolution(sizes, spread):
    for dtype, bound in DTYPES.items():
        assert error(sizes, dtype, spread=spread) < bound, dtype
    for activation in (None, "silu", "relu"):
        assert error(sizes, activation=activation, gated=False, spread=spread) < 1e-14


@pytest.mark.parametrize("spread", [False, True])
def test_every_instruction_set(isa, spread):
    for sizes in ((2, 2, 19, 70, 270), (1, None, 3, 300, 600)):
        for dtype in (torch.float64, torch.float32):
            assert error(sizes, dtype, spread=spread) < DTYPES[dtype]


@pytest.mark.parametrize("spread", [False, True])
def test_torch_alone(spread):
    with use_backend("reference"):
        for sizes in SIZES[:5] + SIZES[6:]:
            assert error(sizes, spread=spread) < 1e-14
        assert error(SIZES[3], torch.bfloat16, spread=spread) < 4e-3


def test_a_state_goes_from_one_backend_to_the_other():
    k, skip, u, *_ = problem((2, None, 5, 100, 300), torch.float64, None, False)
    wanted, found = fftconv(u, k, skip), []
    conv = StreamingConv(k, skip)
    state = conv.init_state(2)
    for t in range(300):
        with use_backend("reference" if t % 70 > 30 else "auto"):
            conv._taps.clear()
            found.append(conv.step(u[..., t], state)[0])
    assert rel_l2(torch.stack(found, -1), wanted) < 1e-14


def test_a_non_finite_input_spoils_its_own_kernels_reach_and_no_more():
    k, u = torch.randn(3, 40), torch.randn(2, 3, 300)
    conv = StreamingConv(k)
    wanted = fftconv(u, k)
    u[1, 2, 50] = torch.inf
    y = stepped(conv, u, None, None, conv.init_state(2))
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    torch.testing.assert_close(y[others], wanted[others], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y[1, 2, :50], wanted[1, 2, :50], atol=1e-4, rtol=1e-4)
    assert y[1, 2, 50:90].isnan().any() or y[1, 2, 50:90].isinf().any()
    # A tile's transform spreads it over the tile's outputs, of which the last is 2 * 64 steps later.
    torch.testing.assert_close(y[1, 2, 192:], wanted[1, 2, 192:], atol=1e-4, rtol=1e-4)


def late(y, u, pre_gate, post_gate, rings, *rest):
    """A tile one step late: the sums that it adds to are moved by one."""
    step(y, u, pre_gate, post_gate, rings, *rest)
    if int(rings.clock[0]) % 64 == 0:
        rings.sums.copy_(rings.sums.flatten(1).roll(1, -1).view_as(rings.sums))


def stale(y, u, pre_gate, post_gate, rings, taps, spectra, *rest):
    step(y, u, pre_gate, post_gate, rings, taps, torch.zeros_like(spectra), *rest)


def no_skip(y, u, pre_gate, post_gate, rings, taps, *rest):
    taps = taps.clone()
    taps[..., tiles.BLOCK] -= 0.5
    step(y, u, pre_gate, post_gate, rings, taps, *rest)


def kept_sums(y, u, pre_gate, post_gate, rings, *rest):
    """What has been put out stays in the ring."""
    before = rings.sums.clone()
    step(y, u, pre_gate, post_gate, rings, *rest)
    rings.sums.copy_(torch.where(rings.sums == 0, before, rings.sums))


def zeros(y, *rest):
    y.zero_()


def stopped_clock(y, u, pre_gate, post_gate, rings, *rest):
    now = rings.clock.clone()
    step(y, u, pre_gate, post_gate, rings, *rest)
    if int(now[0]) == 45:
        rings.clock.copy_(now)


step = cpu.stream_step


@pytest.mark.parametrize("mistake", [late, stale, no_skip, kept_sums, zeros, stopped_clock])
def test_mistakes_are_seen(mistake, monkeypatch):
    sizes = (2, None, 5, 100, 300)
    assert error(sizes) < 1e-14
    monkeypatch.setattr(cpu, "stream_step", mistake)
    assert error(sizes) > 1e-6


def test_gradients_and_other_arguments_that_a_step_refuses():
    conv = StreamingConv(torch.randn(3, 40))
    state = conv.init_state(2)
    u = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"no_grad\(\), or take prefill"):
        conv.step(u.requires_grad_(), state)
    u = u.detach()
    with pytest.raises(RuntimeError, match="has no gradient"):
        trained = StreamingConv(torch.randn(3, 40, requires_grad=True))
        trained.step(u, trained.init_state(2))
    for call, kind, text in [
        (lambda: StreamingConv(torch.randn(40)), ValueError, "k must be"),
        (lambda: StreamingConv(torch.ones(2, 3, dtype=torch.int64)), TypeError, "k must be"),
        (lambda: StreamingConv(torch.randn(3, 4), torch.randn(2)), ValueError, "skip must be"),
        (lambda: StreamingConv(torch.randn(3, 4), activation="tanh"), ValueError, "activation"),
        (lambda: conv.step(u.double(), state), TypeError, "u must be float32"),
        (lambda: conv.step(u[:, :2], state), ValueError, r"u must be \(batch, channels=3\)"),
        (lambda: conv.step(u, state, pre_gate=u.bfloat16()), TypeError, "pre_gate must be"),
        (lambda: conv.step(u, state, post_gate=u[:1]), ValueError, "post_gate must be"),
        (lambda: conv.step(u, conv.init_state(3)), ValueError, "batch=2 like the input, got 3"),
        (lambda: conv.init_state(2, length=-1), ValueError, "length must be"),
        (lambda: conv.init_state(2, spread=1), ValueError, "spread must be"),
        (lambda: StreamingConv(torch.randn(3, 40)).step(u, state), ValueError, "another kernel"),
    ]:
        with pytest.raises(kind, match=text):
            call()


def test_the_operator_as_torch_checks_it():
    conv = StreamingConv(torch.randn(2, 3, 40))
    state = conv.init_state(2)
    rings, taps = stream.Rings(state.inputs, state.sums, state.clock), conv.taps(None)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (torch.randn(2, 3), None, torch.randn(2, 2, 3), *rings, *taps, "gelu", False)
    torch.library.opcheck(torch.ops.seqconv.stream_step.default, arguments, test_utils=tests)


def test_spectra_belong_to_the_backend_that_made_them(monkeypatch):
    conv = StreamingConv(torch.randn(3, 40))
    state = conv.init_state(1)
    conv.step(torch.randn(1, 3), state)
    monkeypatch.setattr(cpu, "stream_name", lambda: "cpu other")
    with pytest.raises(ValueError, match="not in use; make them anew"):
        conv.step(torch.randn(1, 3), state)
    assert fallback.stream_name() == "reference"


def test_tiles_of_all_sizes_are_due_at_any_time():
    """With `spread`, at every step about as many rows as at any other one have a tile, and one of these a large one."""
    period = 4096
    for channels, batch in ((256, 4), (64, 16), (320, 3)):
        clock = tiles.first_clocks(batch, channels, period, True)
        for t in range(0, period, 7):
            end = tiles.clocks((clock + t) % period, channels, period, True) + 1
            due = torch.where(end % tiles.BLOCK == 0, end & -end, 0)[:, :: tiles.TOGETHER]
            points = due[due > 0].sort(descending=True).values
            count = len(points)
            assert abs(count - batch * channels // tiles.TOGETHER / tiles.BLOCK) < 3
            # Half of them have the least size, a quarter twice as many points, and so on.
            assert points[1:].sum() <= tiles.BLOCK // 2 * count * (math.log2(count) + 1.5)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_many_steps_stay_at_round_off_in_flat_memory(spread):
    k = torch.randn(4, 700) * torch.linspace(1, 0.1, 700)
    conv = StreamingConv(k)
    state = conv.init_state(1, spread=spread)
    u = torch.randn(1, 4, 100_000)
    y = torch.empty(1, 4, 60_000)
    for t in range(60_000):
        y[..., t], _ = conv.step(u[..., t], state)
    assert rel_l2(y[..., 59_000:], fftconv(u.double(), k.double())[..., 59_000:60_000]) < 1e-6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for t in range(60_000, 100_000):
        conv.step(u[..., t], state)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000  # KiB
