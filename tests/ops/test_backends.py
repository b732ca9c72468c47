"""Which backend carries out a call: the choice, its scope, and what the protocol promises."""

import threading

import pytest
import torch
from torch import profiler

import seqconv
from seqconv import backends, explain, fftconv, use_backend
from seqconv.backends import cpu, fallback


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends' functions, in the order in which they are called."""
    made = []

    def watch(backend, name):
        function = getattr(backend, name)

        def watched(*args):
            made.append(f"{backend.name} {name}")
            return function(*args)

        monkeypatch.setattr(backend, name, watched)

    for backend in (cpu, fallback):
        for name in ("fftconv", "fftconv_gradients", "ssm", "ssm_gradients"):
            watch(backend, name)
    return made


def problem():
    return torch.randn(2, 3, 50).requires_grad_(), torch.randn(3, 50).requires_grad_()


def test_a_block_ends_and_a_call_stays(calls):
    u, k = problem()
    with use_backend("reference"):
        fftconv(u, k)
        with use_backend("auto"):
            fftconv(u, k)
        fftconv(u, k)
    fftconv(u, k)
    assert calls == [f"{b} fftconv" for b in ("reference", "cpu", "reference", "cpu")]
    with use_backend("auto"):
        use_backend("reference")
        assert explain(u, k).backend == "reference"
    assert explain(u, k).fallback is None
    with use_backend("auto"):
        for _ in range(9):
            use_backend("reference")
        with use_backend("auto"):
            assert explain(u, k).fallback is None
        assert explain(u, k).backend == "reference" and len(backends._choices) < 4
    assert explain(u, k).fallback is None
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert explain(u, k).fallback is None


@pytest.mark.parametrize("forward, other", [("reference", "auto"), ("auto", "reference")])
@pytest.mark.parametrize("watched", [False, True], ids=["plain", "profiled"])
def test_backward_uses_the_choice_of_forward(calls, forward, other, watched):
    """Also where the operator goes through torch's dispatcher, which a profiler needs."""
    u, k = problem()
    name = {"reference": "reference", "auto": "cpu"}[forward]
    with use_backend(forward):
        y = fftconv(u, k)
    with use_backend(other):
        if watched:
            with profiler.profile(activities=[profiler.ProfilerActivity.CPU]):
                y.sum().backward()
        else:
            y.sum().backward()
    assert calls == [f"{name} fftconv", f"{name} fftconv_gradients"]


def test_backward_uses_it_with_create_graph_and_in_another_thread(calls):
    u, k = problem()
    with use_backend("reference"):
        y = fftconv(u, k)
    torch.autograd.grad(y.sum(), u, create_graph=True)
    z = fftconv(u, k)
    thread = threading.Thread(target=lambda: z.sum().backward())
    with use_backend("reference"):
        thread.start()
        thread.join()
    gradients = [name for name in calls if name.endswith("gradients")]
    assert gradients == ["reference fftconv_gradients", "cpu fftconv_gradients"]


def test_all_threads_share_the_choice(calls):
    u, k = problem()
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: fftconv(u, k))
        thread.start()
        thread.join()
    assert calls == ["reference fftconv"]


def test_every_operator_asks(calls):
    layer, x = seqconv.S4D(4), torch.randn(2, 30, 4)
    layer(x).sum().backward()
    assert {name.split()[0] for name in calls} == {"cpu"} and len(calls) == 4
    calls.clear()
    with use_backend("reference"):
        layer(x).sum().backward()
    assert {name.split()[0] for name in calls} == {"reference"} and len(calls) == 4


def test_compiled_code_asks_when_it_runs(calls):
    torch._dynamo.reset()
    call = torch.compile(fftconv, backend="eager", fullgraph=True)
    u, k = torch.randn(2, 3, 50), torch.randn(3, 50)
    call(u, k)
    with use_backend("reference"):
        call(u, k)
    assert calls == ["cpu fftconv", "reference fftconv"]


def test_the_choice_is_explained():
    u, k = problem()
    with use_backend("reference"):
        assert "use_backend('reference') asks for it" in str(explain(u, k))
    there = torch.zeros(1, 1, 8, device="meta")
    assert "device type 'meta'" in explain(there, there[0]).fallback


def test_contract():
    for wrong in ("cuda", "", "Reference"):
        with pytest.raises(ValueError, match=f"must be 'auto' or 'reference', got '{wrong}'"):
            use_backend(wrong)
    for wrong in (None, 1, torch.fft):
        with pytest.raises(
            TypeError, match=r"must be a name or a backend, got .* which lacks name, "
        ):
            use_backend(wrong)
    assert backends._asked is None


def test_second_derivatives_use_the_choice_of_forward(calls):
    u, k = problem()
    with use_backend("reference"):
        y = fftconv(u, k)
    (du,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    du.square().sum().backward()
    assert {name.split()[0] for name in calls} == {"reference"}


def test_blocks_of_threads_may_overlap():
    first, second = use_backend("reference"), use_backend("auto")
    first.__enter__(), second.__enter__()
    first.__exit__()
    assert backends._asked is None
    second.__exit__()
    assert backends._choices == []


def test_a_choice_may_be_entered_again(calls):
    u, k = problem()
    choice = use_backend("reference")
    for _ in range(2):
        with choice:
            fftconv(u, k)
        fftconv(u, k)
    assert calls == ["reference fftconv", "cpu fftconv"] * 2


def test_a_choice_inside_of_a_graph_is_refused():
    torch._dynamo.reset()

    def function(u, k):
        with use_backend("reference"):
            return fftconv(u, k)

    with pytest.raises(Exception, match="use_backend"):
        torch.compile(function, backend="eager", fullgraph=True)(*problem())
