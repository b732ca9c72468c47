"""The reference against the definition written as loops, and its two forms against each other."""

import itertools

import pytest
import torch
from accuracy import assert_accurate
from cases import Case

from seqconv import LongConv, fftconv, reference, use_backend


def loops(u, k, skip, k_rev, mode):
    """v for one row, by the sentence that defines it."""
    length = len(u)
    v = [0.0] * length
    for t, s in itertools.product(range(length), range(length)):
        if mode == "circular":
            v[t] += k[(t - s) % length] * u[s] if (t - s) % length < len(k) else 0.0
        elif s <= t:
            v[t] += k[t - s] * u[s] if t - s < len(k) else 0.0
        elif s - t - 1 < len(k_rev):
            v[t] += k_rev[s - t - 1] * u[s]
    return [a + skip * b for a, b in zip(v, u, strict=True)]


@pytest.mark.parametrize("function", [reference.fftconv, reference.fftconv_fft])
@pytest.mark.parametrize("mode", ["causal", "two-sided", "circular"])
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 1), (5, 5), (7, 3), (9, 0), (4, 6)])
def test_definition(function, mode, length, taps):
    if mode == "circular" and taps > length:
        taps = length
    u, k = torch.randn(1, 2, length, dtype=torch.float64), torch.randn(2, taps, dtype=torch.float64)
    skip = torch.randn(2, dtype=torch.float64)
    k_rev = torch.randn(2, taps, dtype=torch.float64) if mode == "two-sided" else None
    y = function(u, k, skip, k_rev=k_rev, mode="circular" if mode == "circular" else "causal")
    for h in range(2):
        rev = [] if k_rev is None else k_rev[h].tolist()
        wanted = loops(u[0, h].tolist(), k[h].tolist(), skip[h].item(), rev, mode)
        torch.testing.assert_close(
            y[0, h], torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "case",
    [
        Case(
            length=40,
            taps=40,
            taps_rev=39,
            heads=2,
            skip="ch",
            pre_gate=True,
            post_gate=True,
            bias="ch",
            activation="gelu",
        ),
        Case(
            length=41,
            taps=20,
            heads=3,
            per_sample=True,
            skip="h",
            post_gate=True,
            bias="h",
            activation="silu",
        ),
        Case(length=30, taps=50, taps_rev=60, skip="h", pre_gate=True, activation="relu"),
        Case(length=30, taps=0, taps_rev=3, post_gate=True),
        Case(length=30, taps=9, bias="h"),
        Case(length=1, taps=1, taps_rev=1, skip="h", activation="gelu"),
    ],
    ids=str,
)
def test_closed_form_gradient(case):
    """reference.backward, which serves as the fallback, against autograd through the definition."""
    tensors = {n: None if t is None else t.double() for n, t in case.tensors().items()}
    _, grads, dy = case.with_gradients(reference.fftconv, tensors)
    order = ("u", "k", "k_rev", "skip", "pre_gate", "post_gate", "bias")
    closed = reference.backward(dy, *[tensors[n] for n in order], case.activation)
    for name, value in zip(order, closed, strict=True):
        assert (value is None) == (tensors[name] is None)
        if value is not None:
            torch.testing.assert_close(value, grads[name], rtol=1e-10, atol=1e-10)


def test_blh_is_a_transposition():
    u, k, gate = torch.randn(2, 3, 20), torch.randn(4, 3, 20), torch.randn(2, 4, 3, 20)
    y = reference.fftconv(u, k, post_gate=gate)
    turned = reference.fftconv(u.movedim(-1, 1), k, post_gate=gate.movedim(-1, 1), layout="blh")
    assert torch.equal(turned, y.movedim(-1, 1))


@pytest.fixture
def real_sizes(monkeypatch):
    """The sizes of all real transforms that torch.fft is asked for meanwhile."""
    sizes = set()

    def watch(name, points):
        function = getattr(torch.fft, name)

        def watched(x, n=None, dim=-1, norm=None):
            sizes.add(points(x.shape[dim]) if n is None else n)
            return function(x, n, dim, norm)

        monkeypatch.setattr(torch.fft, name, watched)

    watch("rfft", lambda size: size)
    watch("irfft", lambda size: 2 * (size - 1))
    return sizes


@pytest.fixture
def on_reference():
    with use_backend("reference"):
        yield


@pytest.mark.parametrize("mode", ["causal", "two-sided", "circular"])
@pytest.mark.parametrize("heads", [(), (2,)], ids=["one", "heads"])
def test_real_transforms_have_even_sizes(mode, heads, real_sizes, on_reference):
    """torch's inverse real transform of odd sizes is wrong on Apple's GPUs, and the fallback serves them."""
    options = {"mode": "circular"} if mode == "circular" else {}
    for length in range(1, 71):
        taps = max(1, (2 * length) // 3) if mode == "circular" else length + length % 3 - 1
        shapes = [(2, 3, length), (*heads, 3, taps), (3,)]
        shapes += [(*heads, 3, length // 2)] if mode == "two-sided" else []

        def run(function, tensors):
            leaves = [t.clone().requires_grad_() for t in tensors]
            k_rev = {"k_rev": leaves[3]} if mode == "two-sided" else {}
            y = function(*leaves[:3], **k_rev, **options)
            loss = y.square().sum()
            return [y, *torch.autograd.grad(loss, leaves, materialize_grads=True)]

        tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
        wanted = run(reference.fftconv, tensors)
        assert wanted[0].abs().max() > 1e-3
        for function in (fftconv, reference.fftconv_fft):
            real_sizes.clear()
            for ours, theirs in zip(run(function, tensors), wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            assert real_sizes or (mode == "circular" and length % 2)
            assert all(n % 2 == 0 for n in real_sizes), (length, real_sizes)


def test_layers_ask_for_no_odd_real_transform_either(real_sizes, on_reference):
    for length in (5, 7, 8, 9, 12, 13, 15):
        for smooth in ("frequency", None):
            layer = LongConv(2, l_max=length, bidirectional=True, smooth=smooth)
            layer(torch.randn(1, length, 2)).sum().backward()
    assert real_sizes and all(n % 2 == 0 for n in real_sizes)


def test_ssm_kernel_of_the_published_vectors():
    """A = -1/2 + i pi n, N = 64, dt = 0.01, B = C = 1."""
    f64 = {"dtype": torch.float64}
    imag = torch.pi * torch.arange(32, **f64)
    A = torch.stack([torch.full_like(imag, -0.5), imag], -1).unsqueeze(0)
    C = torch.tensor([1.0, 0.0], **f64).expand(1, 1, 32, 2)
    zoh = [0.605249, 0.426175, 0.167921, -0.040841, -0.118517, -0.072227, 0.022057, 0.080778]
    bilinear = [0.593748, 0.434323, 0.194666, -0.017574, -0.122405, -0.106117, -0.018720, 0.064432]
    for name, wanted in (("zoh", zoh), ("bilinear", bilinear)):
        log_dt = torch.tensor([0.01], **f64).log()
        k = reference.ssm_kernel(log_dt, A, C, 8, discretization=name)
        torch.testing.assert_close(k[0, 0], torch.tensor(wanted, **f64), rtol=0, atol=6e-7)


@pytest.mark.parametrize("wrong", ["zeros", "one element", "shifted", "small bias everywhere"])
def test_the_gate_rejects(wrong):
    """assert_accurate itself: what it is there to catch."""
    oracle = torch.randn(1, 1, 16384, dtype=torch.float64)
    baseline = oracle.bfloat16()
    bad = baseline.clone()
    if wrong == "zeros":
        bad.zero_()
    elif wrong == "one element":
        bad[0, 0, 777] += 1
    elif wrong == "shifted":
        bad = bad.roll(1, -1)
    else:
        bad = (oracle * 1.03).bfloat16()
    assert_accurate(baseline, baseline, oracle)
    with pytest.raises(AssertionError):
        assert_accurate(bad, baseline, oracle)
    with pytest.raises(AssertionError, match="must be zero"):
        assert_accurate(bad + 1, baseline, torch.zeros_like(oracle))
