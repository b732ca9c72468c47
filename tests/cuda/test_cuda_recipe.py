"""Calls that differ in addresses only share their launches, and others do not."""

import sys
import threading
import time
from array import array
from dataclasses import replace

import pytest
import torch
from cases import Case
from emulated import Emulator, OnDevice, forget_recipes
from half_cases import half_launches

from seqconv import fftconv, use_backend
from seqconv.backends.cuda import convolution
from seqconv.backends.cuda.arguments import CONVOLUTION
from seqconv.backends.cuda.problem import H100
from seqconv.backends.cuda.recipe import Recipe
from seqconv.backends.cuda.tables import CaptureError, Tables
from seqconv.backends.cuda.tables import build as build_table

SMALL = replace(H100, shared=20000, shared_total=20000, processors=1)
CASES = [
    Case(2, 3, 300, 300, taps_rev=40, skip="h", pre_gate=True, post_gate=True, activation="gelu"),
    Case(2, 3, 300, 310, heads=2, skip="ch", layout="blh"),
    Case(2, 4, 300, 300, heads=2, skip="h", per_sample=True, dtype=torch.bfloat16),
    Case(3, 2, 1024, 1024, skip="h", dtype=torch.float16, mode="circular"),
]


def results(device, case: Case, seed: int) -> list:
    torch.manual_seed(seed)
    with use_backend(OnDevice(device)):
        y, grads, _ = case.with_gradients(fftconv, case.tensors())
    return [y, *grads.values()]


def misses() -> int:
    return convolution._forward.cache_info().misses + convolution._backward.cache_info().misses


def same(some, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_second_call_prepares_nothing(library, case, monkeypatch):
    """It gives for other numbers at other addresses the same bits as a first call."""
    device = Emulator(library)
    first = results(device, case, 1)
    launched = list(device.launches)
    forget_recipes()
    kept = results(device, case, 0)

    def refuse(*_):
        raise AssertionError("prepared again")

    monkeypatch.setattr(convolution, "Call", refuse)
    device.launches.clear()
    again = results(device, case, 1)
    assert same(first, again) and device.launches == launched and not same(kept, again)
    assert misses() == 2


@pytest.mark.parametrize("layout", ["bhl", "blh"])
def test_channels_in_turn(library, layout, monkeypatch):
    """Long rows take some channels at a time. One recipe serves all parts of one size, at addresses further on."""
    case = Case(2, 5, 9000, 9000, skip="h", activation="silu", post_gate=True, layout=layout)
    limits = replace(SMALL, tensor_cores=False)
    whole = results(Emulator(library, limits), case, 0)
    forget_recipes()
    monkeypatch.setattr(convolution, "SCRATCH_BYTES", 1 << 21)
    device = Emulator(library, limits)
    assert same(whole, results(device, case, 0)) and same(whole, results(device, case, 0))
    known = convolution._backward.cache_info()
    assert (known.misses, known.hits) == (1, 1)
    assert sum(name == "long_gradient_f32" for name, *_ in device.launches) > 2


def inputs(**changed) -> dict:
    torch.manual_seed(0)
    found = {"u": torch.randn(2, 3, 300), "k": torch.randn(3, 300), "skip": torch.randn(3)}
    return found | changed


def strided(*shape) -> torch.Tensor:
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


HALF = {"u": torch.randn(2, 3, 300, dtype=torch.bfloat16)}
CHANGED = {
    "batch": {"u": torch.randn(3, 3, 300)},
    "channels": {"u": torch.randn(2, 4, 300), "k": torch.randn(4, 300), "skip": torch.randn(4)},
    "length": {"u": torch.randn(2, 3, 301)},
    "taps": {"k": torch.randn(3, 299)},
    "heads": {"k": torch.randn(1, 3, 300)},
    "no skip": {"skip": None},
    "k_rev": {"k_rev": torch.randn(3, 5)},
    "pre_gate": {"pre_gate": torch.randn(2, 3, 300)},
    "post_gate": {"post_gate": torch.randn(2, 3, 300)},
    "activation": {"activation": "relu"},
    "stride of u": {"u": strided(2, 3, 300)},
    "stride of k": {"k": strided(3, 300)},
    "stride of skip": {"skip": strided(3)},
    "stride of a batch": {"u": torch.randn(1, 3, 300).expand(2, 3, 300)},
    "layout of y": {"u": torch.randn(2, 300, 3), "layout": "blh"},
    "dtype of u": HALF,
    "dtype of k": {"k": torch.randn(3, 300, dtype=torch.bfloat16)},
    "dtype of skip": {"skip": torch.randn(3, dtype=torch.float16)},
}


@pytest.mark.parametrize("name", CHANGED)
def test_whatever_changes_is_prepared_anew(library, name):
    device, changed = Emulator(library), inputs(**CHANGED[name])
    with use_backend(OnDevice(device)):
        right = fftconv(**changed)
        forget_recipes()
        usual = fftconv(**inputs())
        assert misses() == 1
        assert torch.equal(fftconv(**changed), right) and misses() == 2
        assert torch.equal(fftconv(**inputs()), usual) and misses() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torchs_switches_are_asked_in_every_call(library, dtype):
    matmul, found = torch.backends.cuda.matmul, {}
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    name = f"allow_{kind}_reduced_precision_reduction"
    usual = getattr(matmul, name)
    try:
        for fast in (True, False, True, False):
            setattr(matmul, name, fast)
            device = Emulator(library)
            with use_backend(OnDevice(device)):
                y = fftconv(**inputs(u=HALF["u"].to(dtype)))
            assert torch.equal(found.setdefault(fast, y), y)
            ran = half_launches(device)
            assert bool(ran) == fast
    finally:
        setattr(matmul, name, usual)
    assert misses() == 2 and not torch.equal(found[True], found[False])


def test_limits_of_the_device_are_asked_in_every_call(library):
    device = Emulator(library)
    for limits, long in ((H100, False), (SMALL, True), (H100, False)):
        device.limits = limits
        device.launches.clear()
        with use_backend(OnDevice(device)):
            fftconv(torch.randn(1, 2, 3000), torch.randn(2, 3000))
        assert any(kernel.startswith("long") for kernel, *_ in device.launches) == long
    assert misses() == 2


@pytest.mark.parametrize("wanted", ["u", "k", "skip", "u skip"])
def test_other_gradients_are_prepared_anew(library, wanted):
    device = Emulator(library)

    def gradients(names):
        leaves = {n: t.requires_grad_(n in names) for n, t in inputs().items()}
        y = fftconv(**leaves)
        return torch.autograd.grad(y, [leaves[n] for n in names], torch.ones_like(y))

    with use_backend(OnDevice(device)):
        every = dict(zip(("u", "k", "skip"), gradients(["u", "k", "skip"]), strict=True))
        known = convolution._backward.cache_info().misses
        some = wanted.split()
        assert same(gradients(some), [every[n] for n in some])
    assert convolution._backward.cache_info().misses == known + 1


def test_lazy_tensors_behind_a_recipe(library):
    """Negated and all-zero tensors may have no memory of their own yet when a recipe is there already."""
    negated = torch.imag(torch.randn(2, 3, 300, dtype=torch.complex64).conj())
    zeros = torch._efficientzerotensor((2, 3, 300))
    assert negated.is_neg() and zeros.data_ptr() == 0
    with use_backend(OnDevice(Emulator(library))):
        for lazy, real in ((negated, negated.resolve_neg()), (zeros, torch.zeros(2, 3, 300))):
            wanted = fftconv(**inputs(u=real))
            assert torch.equal(fftconv(**inputs(u=lazy)), wanted)
            assert torch.equal(fftconv(**inputs(u=real)), wanted)


class Slow:
    """Looks at the arguments of a launch only after other threads have had their turn."""

    limits = H100

    def __init__(self):
        self.table = Tables(lambda words: words, lambda: False)
        self.mine, self.wrong = threading.local(), []

    def launch(self, kernel, grid, threads, shared, arguments: array) -> None:
        time.sleep(1e-4)
        u, y = self.mine.addresses
        if kernel.startswith("forward"):
            places = CONVOLUTION.places
            self.wrong += [arguments[places["u"]] != u or arguments[places["y"]] != y]


def test_threads_that_run_one_recipe():
    device = Slow()

    def work():
        given = inputs()
        for _ in range(20):
            u, y = given["u"].clone(), torch.empty(2, 3, 300)
            device.mine.addresses = (u.data_ptr(), y.data_ptr())
            tensors = (u, given["k"], None, given["skip"], *[None] * 3)
            convolution.forward(device, y, *tensors, "none")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert device.wrong == [False] * 80


class Capturing(Emulator):
    """A device with tables of its own, which may be capturing."""

    capturing = False

    def __init__(self, library):
        super().__init__(library)
        self.table = Tables(lambda words: words, lambda: self.capturing)


def test_captures_keep_the_tables_of_a_recipe(library):
    """A recipe holds no tables. Those of a graph are kept, and one that was dropped is an error before any launch."""
    device = Capturing(library)
    with use_backend(OnDevice(device)):
        device.capturing = True
        with pytest.raises(CaptureError, match="once before the capture"):
            fftconv(**inputs())
        device.capturing = False
        y = fftconv(**inputs())
        for n in range(64):
            device.table(torch.zeros, n + 1)
        device.capturing = True
        device.launches.clear()
        with pytest.raises(CaptureError, match="once before the capture"):
            fftconv(**inputs())
        assert not device.launches
        device.capturing = False
        assert torch.equal(fftconv(**inputs()), y)
        device.capturing = True
        assert torch.equal(fftconv(**inputs()), y)
        device.capturing = False
        (key,) = device.table.captured
        assert key[0] is build_table
        for n in range(64):
            device.table(torch.ones, n + 1)
        device.capturing = True
        assert torch.equal(fftconv(**inputs()), y)


def test_recipes_are_bounded():
    for kept in (convolution._forward, convolution._backward):
        assert 64 <= kept.cache_info().maxsize <= 4096


def test_scratch_is_used_again(library, monkeypatch):
    """A gradient behind an activation makes the taps' spectra twice, one after the other, in the same memory."""
    monkeypatch.setattr(convolution, "Recipe", Recipe)  # without bands
    case = Case(2, 3, 300, 300, activation="gelu")
    results(Emulator(library), case, 0)
    sizes = []
    for activation in ("none", "gelu"):
        tensors = [torch.randn(2, 3, 300), torch.randn(3, 300)]
        known = convolution.geometries([tensors[0], *tensors, *[None] * 5, *tensors, *[None] * 5])
        prepared = convolution._backward(H100, activation, True, *known)
        sizes.append(prepared.floats)
    assert sizes[0] <= sizes[1] <= sizes[0] + 2 * 3 * 300 + 128


def calls(function) -> int:
    """How many Python functions it enters, which is the fewest of three times."""
    found = []

    def profile(frame, event, argument):
        found[-1] += event == "call"

    usual = sys.getprofile()
    for _ in range(3):
        function()
        found.append(0)
        sys.setprofile(profile)
        try:
            function()
        finally:
            sys.setprofile(usual)
    return min(found)


class Nothing(Slow):
    def launch(self, *_) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_call_costs(dtype, monkeypatch):
    """In entered functions, which no load of the machine changes. Planning and packing for every call took 98 and
    258 of them; 42 of the latter are torch's own for a Function that does nothing."""
    monkeypatch.setattr(convolution, "Recipe", Recipe)  # without bands
    leaves = [t.requires_grad_() for t in inputs(u=HALF["u"].to(dtype)).values()]
    dy = torch.ones(2, 3, 300, dtype=dtype)
    with use_backend(OnDevice(Nothing())):
        with torch.no_grad():
            forward = calls(lambda: fftconv(*leaves))
        both = calls(lambda: torch.autograd.grad(fftconv(*leaves), leaves, dy))
    assert forward <= 60 and both <= 142, (forward, both)
