"""fftconv with exact_causal=True: no output has a trace of the future, and neither has a gradient."""

from functools import partial

import pytest
import torch
from accuracy import assert_accurate
from cases import Case, double, oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import seqconv
from seqconv import fftconv, reference
from seqconv.backends import cpu, exact

exact_fftconv = partial(fftconv, exact_causal=True)
GATES = {"skip": "h", "pre_gate": True, "post_gate": True}
CASES = [
    Case(length=1, taps=1, **GATES),
    Case(length=33, taps=33, skip="h", bias="h", dtype=torch.float64),
    Case(length=1000, taps=1000, bias="h", activation="gelu", **GATES),
    Case(length=520, taps=1100, channels=9, skip="h", activation="silu", post_gate=True),
    Case(length=700, taps=33, skip="h", activation="relu"),
    Case(length=700, taps=100, heads=2, layout="blh", activation="gelu", **GATES),
    Case(length=513, taps=513, heads=3, batch=1, bias="ch", **{**GATES, "skip": "ch"}),
    Case(length=300, taps=300, heads=2, per_sample=True, bias="h", dtype=torch.bfloat16, **GATES),
    Case(length=300, taps=300, layout="blh", dtype=torch.float16, **GATES),
    Case(length=300, taps=0, skip="h"),
    Case(length=300, taps=20, bias="h"),
    Case(length=0, taps=5, skip="h"),
    Case(batch=0, heads=2),
    Case(heads=0, length=100, taps=100),
    Case(length=2300, taps=2300, channels=2, activation="gelu", **GATES),  # two levels
    Case(length=1300, taps=300, batch=5, channels=1, skip="h"),  # reaches less than half the blocks
    Case(length=64, taps=64, skip="h", pre_gate=True),  # all in one block
]
MARKS = [torch.nan, torch.inf, -torch.inf, 6e4, None]


def check(case: Case) -> None:
    """As exact as torch.fft, with gradients; and bit for bit without the future."""
    tensors = case.tensors()
    y, grads, dy = case.with_gradients(exact_fftconv, tensors)
    wide, definition = oracle(case)
    y64, grads64, _ = wide.with_gradients(definition, double(tensors), dy.double())
    y_fft, grads_fft, _ = case.with_gradients(reference.fftconv_fft, tensors, dy)
    few = y.numel() < 64
    assert_accurate(y, y_fft, y64, ulps=16.0 if few else 2.0)
    for name, grad in grads.items():
        ulps = 16.0 if few or grad.numel() < 64 else 2.0
        assert_accurate(grad, grads_fft[name], grads64[name], 3.0, ulps, f"d{name}")
    times = {1, case.length // 3, case.length // 2 + 1, case.length - 1, 32, 64, 96, 128, 256, 2048}
    for time in sorted(t for t in times if 0 < t < case.length and y.numel()):
        check_future(case, tensors, y, time, MARKS[time % len(MARKS)])


def time_first(case: Case, t):
    return t.movedim(-1 if case.layout == "bhl" else 1, 0)


def check_future(case: Case, tensors: dict, y, time: int, value: float | None) -> None:
    """Edits from `time` on, and the end of the sequence there, change no bit of what lies before."""
    past = time_first(case, y)[:time]
    moved = dict(tensors)
    for name in ("u", "pre_gate", "post_gate"):
        if tensors[name] is not None:
            moved[name] = tensors[name].clone()
            part = time_first(case, moved[name])[time:]
            part.copy_(torch.randn_like(part)) if value is None else part.fill_(value)
    leaves = {n: t if t is None else t.detach().requires_grad_() for n, t in moved.items()}
    again = time_first(case, case.run(exact_fftconv, leaves))
    assert torch.equal(again[:time], past)

    # The gradient of the outputs before `time`: the same as without the edit, and nothing afterwards.
    signals = [n for n in ("u", "pre_gate", "post_gate") if moved[n] is not None]
    weights = torch.zeros_like(again)
    weights[:time] = torch.randn_like(past)
    for leaf in leaves.values():
        assert leaf is None or leaf.grad is None
    found = torch.autograd.grad(again, [leaves[n] for n in signals], weights)
    clean = {n: t if t is None else t.detach().requires_grad_() for n, t in tensors.items()}
    wanted = time_first(case, case.run(exact_fftconv, clean))
    wanted = torch.autograd.grad(wanted, [clean[n] for n in signals], weights)
    for name, ours, theirs in zip(signals, found, wanted, strict=True):
        ours, theirs = time_first(case, ours), time_first(case, theirs)
        assert not ours[time:].any(), f"d{name} has the future"
        assert torch.equal(ours[:time], theirs[:time]), f"d{name}"

    if seqconv.explain(torch.zeros(1, 1, 1), torch.zeros(1, 1)).backend == "reference":
        return  # torch.fft may round by the number of rows
    short = {
        n: time_first(case, t)[:time].movedim(0, -1 if case.layout == "bhl" else 1)
        if n in signals
        else t
        for n, t in tensors.items()
    }
    assert torch.equal(time_first(case, case.run(exact_fftconv, short)), past), "the length matters"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_gradients_and_the_future(case, isa):
    check(case)


@st.composite
def problems(draw) -> Case:
    heads = draw(st.one_of(st.none(), st.integers(1, 2)))
    return Case(
        batch=draw(st.integers(1, 3)),
        channels=draw(st.integers(1, 4)),
        length=draw(st.integers(1, 400)),
        taps=draw(st.integers(0, 420)),
        heads=heads,
        per_sample=heads is not None and draw(st.booleans()),
        skip=draw(st.sampled_from(["", "h"])),
        pre_gate=draw(st.booleans()),
        post_gate=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "gelu", "silu", "relu"])),
        layout=draw(st.sampled_from(["bhl", "blh"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    )


@settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(problems())
def test_any_problem(case):
    torch.manual_seed(0)
    check(case)


@pytest.fixture
def one_thread():
    """For many small transforms, whose threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_without_kernels(one_thread):
    """torch.fft has no direct sums: the first taps are summed by slices."""
    with seqconv.use_backend("reference"):
        for case in (CASES[1], CASES[5], CASES[7], CASES[9], CASES[11]):
            check(case)


def test_bits_depend_on_the_row_alone(one_thread):
    """Not on the threads, nor on the other samples."""
    u = torch.randn(9, 2, 3, 700)[:, 0]
    k = torch.randn(2, 3, 700)

    def run(u):
        leaf = u.detach().requires_grad_()
        y = exact_fftconv(leaf, k, activation="silu")
        return y, *torch.autograd.grad(y.sum(), leaf)

    wanted = run(u)
    torch.set_num_threads(3)
    assert all(map(torch.equal, run(u), wanted))
    alone = run(u[4:5])
    assert all(map(torch.equal, alone, (t[4:5] for t in wanted)))


@pytest.mark.parametrize("taps", [9000, 60_000])
def test_three_levels(taps, isa):
    """And more taps than any row has: against the plain convolution and the beginnings of the row."""
    u, k = torch.randn(1, 2, 9000).double().requires_grad_(), torch.randn(2, taps).double()
    y, wanted = exact_fftconv(u, k), fftconv(u, k)
    assert (y - wanted).norm() < 1e-13 * wanted.norm()
    dy = torch.randn_like(y)
    grads = (torch.autograd.grad(found, u, dy)[0] for found in (y, wanted))
    grad, wanted = grads
    assert (grad - wanted).norm() < 1e-13 * wanted.norm()
    for time in (64, 512, 513, 4096, 4097, 4609, 8192, 8500):
        assert torch.equal(exact_fftconv(u[..., :time], k), y[..., :time])
        spoilt = u.detach().clone()
        spoilt[..., time:] = torch.nan
        assert torch.equal(exact_fftconv(spoilt, k)[..., :time], y[..., :time])


def test_a_nan_spoils_only_the_taps_it_meets():
    """Up to 32 taps, which are summed one by one."""
    u, k = torch.randn(1, 2, 200), torch.randn(2, 20)
    u[..., 100] = torch.nan
    spoilt = exact_fftconv(u, k)[0, 0].isnan()
    assert spoilt[100:120].all() and not spoilt[:100].any() and not spoilt[120:].any()


@pytest.mark.parametrize("length", [50, 500])
def test_taps_beyond_the_length_do_not_matter(length):
    u, k = torch.randn(1, 2, length), torch.randn(2, 2 * length)
    y = exact_fftconv(u, k)
    k[:, length : length + 10], k[:, length + 10 :] = torch.nan, torch.inf
    again = exact_fftconv(u, k.requires_grad_())
    torch.testing.assert_close(again, y)
    (dk,) = torch.autograd.grad(again.sum(), k)
    assert dk[:, :length].isfinite().all() and not dk[:, length:].any()


def test_the_future_of_a_compiled_call():
    """One graph for every length, and no trace of the future in it."""
    torch._dynamo.reset()
    call = torch.compile(exact_fftconv, backend="aot_eager", fullgraph=True, dynamic=True)
    k = torch.randn(2, 300)
    for length in (300, 170, 50):
        u = torch.randn(1, 2, length, requires_grad=True)
        moved = u.detach().clone()
        moved[..., 45:] = torch.nan
        moved.requires_grad_()
        y, spoilt = call(u, k), call(moved, k)
        assert torch.equal(y, exact_fftconv(u, k))
        assert torch.equal(spoilt[..., :45], y[..., :45]) and spoilt[..., 45:].isnan().all()
        (grad,) = torch.autograd.grad(spoilt[..., :45].sum(), moved)
        assert grad[..., :45].isfinite().all() and not grad[..., 45:].any()


def test_derivatives_by_torch_func_and_of_second_order_see_no_future():
    """For finite values: their products with zero are zeros."""
    u, k = torch.randn(1, 2, 100), torch.randn(2, 100)
    jacobian = torch.func.jacrev(lambda u: exact_fftconv(u, k, activation="gelu")[0, 0])(u)
    assert not jacobian[:, 0, 0].triu(1).any() and jacobian[:, 0, 0].tril().any()
    leaf = u.clone().requires_grad_()
    y = exact_fftconv(leaf, k, activation="gelu")[..., :40]
    (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert not second[..., 40:].any() and second[..., :40].all()


def test_explain():
    u, k = torch.zeros(1, 4, 1000), torch.zeros(4, 1000)
    plan = seqconv.explain(u, k, exact_causal=True)
    assert plan.algorithm == "1 level of exactly causal tiles"
    assert (plan.backend, plan.fft_size, plan.fallback) == ("cpu", 64, None)
    plan = seqconv.explain(u, torch.zeros(4, 20_000), exact_causal=True)
    assert plan.algorithm == "2 levels of exactly causal tiles" and plan.fft_size == 512
    assert seqconv.explain(u, k[:, :32], exact_causal=True).algorithm == "direct sum"
    several = seqconv.explain(u, k.expand(1, 3, 4, 1000), exact_causal=True)
    assert several.fft_size == 64
    with seqconv.use_backend("reference"):
        plan = seqconv.explain(u, k, exact_causal=True)
        assert plan.algorithm == "7 levels of exactly causal tiles, the longest by torch.fft"
        plan = seqconv.explain(u, k[:, :8], exact_causal=True)
        assert plan.algorithm == "sum of shifted rows" and plan.fallback is not None


@pytest.mark.parametrize("function", [fftconv, seqconv.explain])
def test_refusals(function):
    u, k = torch.zeros(1, 4, 10), torch.zeros(4, 10)
    with pytest.raises(ValueError, match="exact_causal must be False with k_rev"):
        function(u, k, k_rev=k, exact_causal=True)
    with pytest.raises(ValueError, match="exact_causal must be False with mode='circular'"):
        function(u, k, mode="circular", exact_causal=True)
    with pytest.raises(TypeError, match="exact_causal must be True or False, got int"):
        function(u, k, exact_causal=1)


# ---- the tests test ----


def check_all() -> None:
    for case in CASES:
        check(case)


_ADD, _WINDOWS, _LEVELS = exact._add, exact._windows, exact.levels
TILING = {
    "outputs one step early": (
        "_add",
        lambda v, start, level, rows: _ADD(v, start and start - 1, level, rows),
    ),
    "inputs one step late": (
        "_windows",
        lambda t, start, level: _WINDOWS(t, start or 1, level),
    ),
    "the first level left out": ("levels", lambda *sizes: _LEVELS(*sizes)[1:]),
    "the last level left out": ("levels", lambda *sizes: _LEVELS(*sizes)[:-1]),
    "0 times NaN": ("_chained", lambda g, factor: g if factor is None else g * factor),
}


@pytest.mark.parametrize("name", TILING)
def test_mistakes_without_kernels_are_caught(name, monkeypatch, one_thread):
    monkeypatch.setattr(exact, *TILING[name])
    with seqconv.use_backend("reference"), pytest.raises(AssertionError):
        check_all()


_FORWARD, _GRADIENTS = cpu.fftconv_exact, cpu.fftconv_exact_gradients
KERNELS = {
    # Right up to round-off, but with the future in it.
    "the plain convolution": ("fftconv_exact", cpu.fftconv),
    "the plain gradient": ("fftconv_exact_gradients", cpu.fftconv_gradients),
    "nothing": ("fftconv_exact", lambda y, inputs, activation: y.zero_()),
    "inputs one step late": (
        "fftconv_exact",
        lambda y, inputs, activation: _FORWARD(
            y, inputs._replace(u=inputs.u.roll(1, -1)), activation
        ),
    ),
    "taps cut at the length": (
        "fftconv_exact",
        lambda y, inputs, activation: _FORWARD(
            y, inputs._replace(k=inputs.k[..., : inputs.u.shape[-1]]), activation
        ),
    ),
    "no skip": (
        "fftconv_exact_gradients",
        lambda grads, dy, inputs, activation: _GRADIENTS(
            grads._replace(skip=None), dy, inputs._replace(skip=None), activation
        ),
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_mistakes_of_the_kernels_are_caught(name, monkeypatch):
    monkeypatch.setattr(cpu, *KERNELS[name])
    with pytest.raises(AssertionError):
        check_all()
