"""Steps of streams by the CUDA kernels on the host: against the whole convolution, and step by step against torch's."""

from array import array
from dataclasses import replace

import pytest
import torch
from emulated import OnDevice
from stream_problems import Stream, clocks_of, one_step, rings_for
from torch.utils._python_dispatch import TorchDispatchMode

from seqconv import backends, use_backend
from seqconv.backends import cpu, fallback, gpu, tiles
from seqconv.backends.cuda import stream as launches
from seqconv.backends.cuda.problem import H100
from seqconv.backends.protocol import Request
from seqconv.ops import stream

PIECES = replace(H100, shared=600)  # a block holds 64 points
BF16, FP16 = torch.bfloat16, torch.float16
ALL = "none", "gelu", "silu", "relu"


def stream_on(device, case: Stream):
    given = case.tensors()
    return given, case.run(given, OnDevice(device))


def check(device, case: Stream) -> None:
    given, y = stream_on(device, case)
    assert case.error(y, given) < 1


CASES = [  # with pieces of 64 points
    Stream(2, 1, 3, 1, 35),
    Stream(1, 3, 5, 97, 230, activation="gelu", gates="pre post", dtype=BF16),
    Stream(2, 1, 35, 97, 140, spread=True, activation="silu", gates="post"),
]
CASES += [
    Stream(2, 2, 3, taps, 2 * stream.period_of(taps) + 7, spread, ALL[i % 4], **more)
    for i, (taps, more) in enumerate(
        [
            (31, {"gates": "pre"}),
            (33, {"gates": "post", "dtype": FP16}),
            (34, {"dtype": BF16}),
            (129, {}),
            (130, {"gates": "pre post", "dtype": FP16}),
        ]
    )
    for spread in (False, True)
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[pytest.mark.slow, pytest.mark.one_of(2)] * (c.steps > 300))
        for c in CASES
    ],
    ids=str,
)
def test_a_stream_is_the_whole_convolution(machine, case):
    device = machine.device(PIECES)
    check(device, case)
    names = {name for name, *_ in device.launches}
    few = {"stream_spectra", "stream_step"}
    if case.spread:
        assert names == few | {"stream_tiles", "stream_clocks"}
    else:
        assert names - few <= {"stream_tile_32", "stream_tile_64"}
        assert ("stream_tile_64" in names) == (case.taps > 33)


@pytest.mark.parametrize("spread", [False, True], ids=["plain", "spread"])
def test_a_step_of_any_age(machine, spread):
    """From a random state, with tiles of one piece and of several, whose spectra have all middle lags."""
    period, channels = 512, 133 if spread else 33  # three groups, and a part of a quadruple
    seen = set()
    for end in (1, 96, 64, 256, 512):
        clock = torch.full((2,), end - 1)
        clock[1] = (
            37 * end % period
        )  # A plain state has such clocks when rows of others have joined it.
        if spread:
            for at in clock.tolist():
                seen |= {(c + 1) & -(c + 1) for c in clocks_of(channels, period, at)}
        device = machine.device(PIECES)
        assert one_step(OnDevice(device), 2, 2, channels, period, clock, spread) < 1e-6
    assert not spread or seen >= {32, 64, 128, 256, 512}


def state_of(machine, case: Stream, order: int = 0, **options) -> list:
    torch.manual_seed(0)
    given = case.tensors()
    device = OnDevice(machine.device(PIECES, order, **options))
    rings, taps = case.start(given, device)
    rings.inputs.normal_()
    rings.sums.normal_()
    rings.clock.fill_(AFTER[case])
    y = [
        stream.step(*case.signals(given, t), rings, taps, case.activation, case.spread)
        for t in range(case.steps)
    ]
    return [*y, *rings, taps.spectra]


AFTER = {Stream(1, 1, 2, 130, 2): 126, Stream(1, 2, 35, 130, 3, spread=True): 30}
ORDERS = list(AFTER)  # and after which step they begin, from a random state


@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_order_of_threads(machine, case):
    right = state_of(machine, case)
    for order in (1, 7):
        assert all(map(torch.equal, state_of(machine, case, order), right))


@pytest.mark.slow
def test_every_barrier_is_needed(emulator):
    right = [state_of(emulator, case) for case in ORDERS]
    visited = emulator.library.emulator_visited().decode().split()
    sites = [site for site in visited if site.startswith("stream")]
    assert len(sites) == 2
    for site in sites:
        for case, wanted in zip(ORDERS, right, strict=True):
            try:
                found = state_of(emulator, case, without=site)
            except RuntimeError as error:
                assert "race" in str(error)
                continue
            assert not all(map(torch.equal, found, wanted)), f"{site} is not needed"


class Late:
    """A device that launches tiles one step late."""

    def __init__(self, device):
        self.device, self.limits, self.table, self.waiting = device, device.limits, device.table, []

    def launch(self, kernel, *launch):
        if kernel.startswith("stream_tile"):
            self.waiting.append((kernel, *launch))
            return
        self.device.launch(kernel, *launch)
        if kernel == "stream_step":
            while self.waiting:
                self.device.launch(*self.waiting.pop())


PLAIN = Stream(1, 1, 3, 97, 330)


def test_a_tile_one_step_late_is_noticed(emulator):
    given = PLAIN.tensors()
    assert PLAIN.error(PLAIN.run(given, OnDevice(emulator.device(PIECES))), given) < 1
    assert PLAIN.error(PLAIN.run(given, OnDevice(Late(emulator.device(PIECES)))), given) > 1e3


def test_a_stale_spectrum_is_noticed(emulator, monkeypatch):
    """The present block's taps are the kernel's, and the spectra are an older one's."""
    given, backend = PLAIN.tensors(), OnDevice(emulator.device(PIECES))
    old = backend.stream_spectra(given["k"] * 1.001, stream.period_of(PLAIN.taps))
    monkeypatch.setattr(backend, "stream_spectra", lambda *_: old, raising=False)
    assert PLAIN.error(PLAIN.run(given, backend), given) > 10


MISTAKES = {  # in one of the kernels of csrc/device/stream.cuh
    "a sum that is not cleared": ("step", "sum.at[i] = 0.f;", ""),
    "a sum that was put out": ("step", "if (at < s) continue;", "if (at + 1 < s) continue;"),
    "a tap too far": ("step", "kBlock - s + first", "kBlock + 1 - s + first"),
    "no activation": ("step", "v = activate(v, a.activation);", ""),
    "a clock that does not turn": ("clocks", "+ 1) & (a.period - 1)", "+ 1)"),
    "another channel's tile": ("tiles", "+ missing % 2;", "+ 1 - missing % 2;"),
    "sums of the piece before": ("tile_64", "(i64)piece * m;\n", "(i64)(piece ^ 1) * m;\n"),
    "a lag of the piece before": ("tile_64", "(i64)(piece - from) * m;", "(i64)(from - piece) * m;"),
    "sums that are not added to": ("tile_32", "*to.at = to.before + x", "*to.at = x"),
    "a slot without a row writes": ("tile_32", "const bool real = unit < count;", "const bool real = true;"),
    "taps before the lag left out": ("spectra", "if (t > 0 && lag", "if (t > m && lag"),
}  # fmt: skip
GATED = Stream(2, 1, 3, 35, 5, activation="gelu", gates="post")


def is_noticed(device) -> bool:
    """Whether a fault or a wrong number comes of the first steps of a stream, or of a step from a random state."""
    given, backend = GATED.tensors(), OnDevice(device)
    try:
        wrong = [GATED.error(GATED.run(given, backend), given)]
        for end, spread in ((1, False), (96, False), (128, False), (1, True), (128, True)):
            clock = torch.tensor([end - 1])
            wrong.append(1e6 * one_step(backend, 1, 1, 35, 128, clock, spread))
    except (RuntimeError, AssertionError) as error:
        assert "NVRTC" not in str(error)  # a mistake that compiles
        return True
    return max(wrong) > 10


def test_without_a_mistake_nothing_is_noticed():
    ptx_device = pytest.importorskip("ptx_device")
    assert not is_noticed(ptx_device.PtxDevice(PIECES))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (i > 1)) for i, n in enumerate(MISTAKES)]
)
def test_mistakes_are_noticed(name):
    ptx_device = pytest.importorskip("ptx_device")
    which, before, after = MISTAKES[name]

    def change(kernel, source):
        assert source.count(before) == 1
        return source.replace(before, after) if kernel == f"stream_{which}" else source

    assert is_noticed(ptx_device.PtxDevice(PIECES, change=change))


class Recorded:
    """A device that keeps its launches, as a CUDA graph does: their grids and numbers, and addresses in these."""

    def __init__(self, device):
        self.device, self.limits, self.table, self.kept = device, device.limits, device.table, []

    def launch(self, kernel, grid, threads, shared, arguments):
        self.kept.append((kernel, grid, threads, shared, array("q", arguments)))
        self.device.launch(*self.kept[-1])


def test_a_spread_step_can_be_replayed(machine):
    """The launches of the first step, with the same numbers, are those of every step."""
    case = Stream(1, 1, 35, 97, 34, spread=True, gates="pre post", activation="gelu")
    given = case.tensors()
    device = Recorded(machine.device(PIECES))
    rings, taps = case.start(given, OnDevice(device))
    device.kept.clear()
    held = [t.clone() for t in case.signals(given, 0)]
    y = stream.step(*held, rings, taps, case.activation, True)
    found, graph = [y.clone()], list(device.kept)
    for t in range(1, case.steps):
        for into, new in zip(held, case.signals(given, t), strict=True):
            into.copy_(new)
        for launch in graph:
            device.device.launch(*launch)
        found.append(y.clone())
    assert case.error(torch.stack(found, -1), given) < 1


def test_a_step_allocates_nothing(emulator):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    for case, allowed in ((PLAIN, {"aten.fill_.Scalar"}), (replace(PLAIN, spread=True), set())):
        given, device, names = case.tensors(), emulator.device(PIECES), []
        rings, taps = case.start(given, OnDevice(device))
        rings.clock.fill_(31)
        y, (u, *gates) = torch.empty(1, 1, 3), case.signals(given, 0)
        with Seen():
            told = rings, taps.taps, taps.spectra, "none", case.spread
            launches.step(device, y, u, *gates, *told)
        assert len(device.launches) == 3 + case.spread
        assert set(names) <= allowed


def test_what_a_step_refuses(emulator):
    case = Stream(2, 1, 3, 97, 1)
    given, device = case.tensors(), emulator.device(PIECES)
    backend = OnDevice(device)
    rings, taps = case.start(given, backend)

    def step(rings=rings, u=given["u"][..., 0], device=backend, taps=taps, spread=False):
        y = torch.empty(2, 1, 3)
        told = rings, taps.taps, taps.spectra, "none", spread
        device.stream_step(y, u, None, None, *told)

    step()
    with pytest.raises(TypeError, match=r"16 bits wide, got .*float64"):
        step(u=given["u"][..., 0].double())
    with pytest.raises(ValueError, match=r"inputs must be contiguous float32 .* torch.float64"):
        step(rings._replace(inputs=rings.inputs.double()))
    with pytest.raises(ValueError, match="sums must be contiguous"):
        step(rings._replace(sums=rings.sums.transpose(0, 1).contiguous().transpose(0, 1)))
    with pytest.raises(ValueError, match="on one device, got meta and cpu"):
        step(rings._replace(clock=rings.clock.to("meta")), spread=True)
    with pytest.raises(ValueError, match="no tiles of 64 points"):
        step(device=OnDevice(emulator.device(replace(PIECES, shared=300))))
    assert len(device.launches) == 2  # of the spectra and of the first step


def test_a_graph_does_not_repeat_a_plain_step(device):
    """The driver's own device, which knows whether a stream of CUDA is being captured."""
    for case in (PLAIN, replace(PLAIN, spread=True)):
        given = case.tensors()
        rings, taps = case.start(given, OnDevice(device))
        (u, *gates), told = case.signals(given, 0), (rings, taps, "none", case.spread)
        stream.step(u, *gates, *told)
        device.capturing = True
        if case.spread:
            stream.step(u, *gates, *told)
        else:
            with pytest.raises(RuntimeError, match="at the same clock; use a spread state"):
                stream.step(u, *gates, *told)
        assert rings.clock.item() == 1 + case.spread
        device.capturing = False


@pytest.mark.parametrize("spread", [False, True], ids=["plain", "spread"])
def test_rows_do_not_meet(machine, spread):
    """A NaN stays in its sample and channel, though rows share blocks of threads."""
    case = Stream(2, 1, 3 + 30 * spread, 40, 34, spread)
    given = case.tensors()
    clean = case.run(given, OnDevice(machine.device()))
    given["u"][1, 0, 3] = torch.nan
    spoilt = case.run(given, OnDevice(machine.device()))
    assert spoilt[1, :, 0, 3:].isnan().any() and torch.equal(spoilt[..., :3], clean[..., :3])
    spoilt[1, :, 0] = clean[1, :, 0]
    assert torch.equal(spoilt, clean)


def test_spectra_do_not_change_their_device(monkeypatch):
    """Kernels that were told of another device's memory would crash the process."""
    for backend, place in ((gpu, "cpu"), (cpu, "meta")):
        monkeypatch.setitem(backends._streams, backend.stream_name(), backend)
        rings, u = rings_for(1, 1, 3, 32, device=place), torch.zeros(1, 3, device=place)
        taps, spectra = torch.zeros(1, 3, 64, device=place), torch.zeros(99, device=place)
        taps = stream.Taps(taps, spectra, backend.stream_name())
        with pytest.raises(ValueError, match=f"{backend.name}.* are now on {place}; make them"):
            stream._step(u, None, None, *rings, *taps, "none", False)


def test_float64_takes_torch(emulator):
    with use_backend(OnDevice(emulator.device())):
        taps = stream.taps_of(torch.randn(1, 3, 50, dtype=torch.float64), None)
    assert taps.made_by == fallback.name
    y = stream.step(
        torch.randn(2, 3, dtype=torch.float64),
        None,
        None,
        rings_for(2, 1, 3, 64, dtype=torch.float64),
        taps,
        "none",
        False,
    )
    assert y.dtype == torch.float64


def test_explain(emulator):
    request = Request("stream", (torch.randn(1, 3, 50),), ())
    with use_backend(OnDevice(emulator.device())):
        assert str(backends.explain(request)) == "cuda (sm_90, 512 threads): right-angle fft"


def test_torch_steps_tensors_elsewhere_by_a_clock_on_the_host():
    """Tensors without memory refuse a clock of another device as those of a GPU do."""
    with torch.device("meta"):
        u, y, k = torch.empty(2, 3), torch.empty(2, 2, 3), torch.empty(2, 3, 100)
        rings, taps = rings_for(2, 2, 3, 128), torch.empty(2, 3, 64)
    rings = rings._replace(clock=torch.full((2,), 63))
    tiles.step(y, u, u, y, rings, taps, tiles.spectra(k, 128), "gelu", False)
    assert rings.clock.tolist() == [64, 64]
