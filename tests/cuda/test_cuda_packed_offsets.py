"""What the CUDA backend makes of offsets: wrong ones stay inside of the tensors, and mistakes with right ones show."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from device_cases import FEW
from emulated import OnDevice
from packed_cases import PASSES, Pack, Reading, results, wrong
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from seqconv import fftconv, use_backend
from seqconv.backends.cuda import groups, packed
from seqconv.backends.cuda.plan import longest
from seqconv.backends.inputs import Inputs
from seqconv.backends.protocol import Request
from seqconv.ops.packed import PackedInputs

HUGE = 1 << 62
TOTAL, MOST, PAD = 700, 300, 1000
BAD = {  # no step is in two rows, because two blocks would write it, which the PTX machine reports
    "negative": [-5, 90, 300, 700],
    "huge": [600, HUGE, 600, 600],
    "negative and huge": [-HUGE, -HUGE - 5, HUGE, HUGE],
    "decreasing": [650, 600, 300, 0],
    "beyond the end": [0, 200, 690, 2000],
    "a row too long": [0, 10, 650, 700],
    "behind the end": [900, 950, 1000, 1700],
}


def surrounded(t: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """t with `value` before and behind each of its rows; and the memory of both."""
    memory = torch.full((*t.shape[:-1], t.shape[-1] + 2 * PAD), value, dtype=t.dtype)
    inside = memory[..., PAD : PAD + t.shape[-1]]
    inside.copy_(t)
    return inside, memory


def spans(offsets: list[int], most: int) -> list[tuple[int, int]]:
    """Where the kernels take the rows to be, whatever the offsets are."""
    at = [min(max(o, 0), TOTAL) for o in offsets]
    return [(a, a + min(max(b - a, 0), most)) for a, b in pairwise(at)]


def with_offsets(device, offsets: list[int], taps: int, most: int = MOST) -> None:
    """Convolves, and computes gradients, by offsets that nobody has checked, between numbers that must not be read
    and numbers that must stay."""
    pack = Pack((TOTAL,), taps, taps_rev=9, skip="h", pre_gate=True, activation="gelu")
    t = pack.tensors()
    u, _ = surrounded(t["u"], torch.nan)
    gate, _ = surrounded(t["pre_gate"], torch.nan)
    dy, _ = surrounded(torch.randn_like(u), torch.nan)
    inputs = Inputs(u, t["k"], t["k_rev"], t["skip"], gate, None, None)
    y, *kept = surrounded(torch.full_like(u, 7.0), 7.0)
    du, of_du = surrounded(torch.full_like(u, 7.0), 7.0)
    dgate, of_gate = surrounded(torch.full_like(u, 7.0), 7.0)
    taps_grads = (torch.empty_like(t[name]) for name in ("k", "k_rev", "skip"))
    grads = Inputs(du, *taps_grads, dgate, None, None)
    backend, told = Reading(device), torch.tensor(offsets)
    backend.fftconv_packed(y, inputs, told, "gelu", most)
    backend.fftconv_packed_gradients(grads, dy, inputs, told, "gelu", most)
    rows = torch.zeros(TOTAL, dtype=torch.bool)
    for begin, end in spans(offsets, most):
        rows[begin:end] = True
    for written, memory in zip((y, du, dgate), (*kept, of_du, of_gate), strict=True):
        assert torch.isfinite(memory).all()
        assert (written[:, ~rows] == 7.0).all() and (written[:, rows] != 7.0).all()
        assert (memory[:, :PAD] == 7.0).all() and (memory[:, PAD + TOTAL :] == 7.0).all()
    assert all(torch.isfinite(g).all() for g in grads if g is not None)


@pytest.mark.parametrize("taps", [300, 20])
@pytest.mark.parametrize("name", BAD)
def test_no_offset_leads_out_of_the_tensors(machine, name, taps):
    with_offsets(machine.device(FEW), BAD[name], taps)


@pytest.mark.parametrize("name", BAD)
def test_no_offset_leads_out_of_the_tensors_in_three_passes(machine, name):
    # All 700 steps may be one row, of which the plan would hold 3,000.
    with_offsets(machine.device(PASSES), BAD[name], 3000, 3000)


def ptx(**options):
    """A device of the PTX machine, which refuses accesses outside of all tensors. Wrong rows may overlap."""
    ptx_device = pytest.importorskip("ptx_device")
    if ptx_device.compiler.compiler_reason():
        pytest.skip(ptx_device.compiler.compiler_reason())
    return ptx_device.PtxDevice(FEW, **options)


def packs_with(before: str, after: str):
    """A change of the source of the kernels of packs."""

    def change(kernel: str, source: str) -> str:
        if not kernel.startswith("packed"):
            return source
        assert source.count(before) == 1, source.count(before)
        return source.replace(before, after)

    return change


UNCHECKED = {  # a row that ends before it begins has no steps in any case
    "no first step": ("at < 0 ? 0 : at > a.length", "at > a.length", "negative"),
    "no last step": ("at > a.length ? a.length : at;", "at;", "beyond the end"),
    "no longest row": ("steps > a.longest ? a.longest : steps", "steps", "a row too long"),
}


@pytest.mark.parametrize("name", UNCHECKED)
def test_what_is_not_clamped_is_noticed(name):
    before, after, which = UNCHECKED[name]
    with pytest.raises((AssertionError, RuntimeError)):
        with_offsets(ptx(change=packs_with(before, after)), BAD[which], 20)


MISTAKES = {
    "offsets shifted by one": ("((const i64*)a.offsets)[row];", "((const i64*)a.offsets)[row] + 1;"),
    "narrow offsets shifted by one": ("((const int*)a.offsets)[row] :", "((const int*)a.offsets)[row] + 1 :"),
    "two rows joined": ("offset(a, row + 1) - begin", "offset(a, row + 1 + (row == 1)) - begin"),
    "a row of one step skipped": ("> window * (int)a.step) return", "> window * (int)a.step + 1) return"),
    "rows in another order": (": a.rows[b];", ": b;"),
    "the first row's taps": ("return {row_number(a, b),", "return {row_number(a, 0),"),
    "taps beyond the row": ("a.taps < steps ? a.taps : steps", "a.taps"),
    "later taps beyond the row": ("a.taps_rev < later ? a.taps_rev : later", "a.taps_rev"),
    "the last step in a later window": ("row.steps - before,", "row.steps - before - (window > 0),"),
}  # fmt: skip
SEVERAL = Pack((90, 33, 90, 0, 1, 2), 64, taps_rev=70, heads=1, per_row=True)
CUT = Pack((3000, 1, 2001), 60, skip="h", channels=1)


def outcome(device, pack: Pack, offsets=None, max_seqlen=None) -> str:
    """ "right", "wrong", or what the machine reports."""
    torch.manual_seed(2)
    try:
        tensors, found, dy = results(device, pack, offsets, max_seqlen)
    except RuntimeError as error:
        return str(error)
    beyond = 0.0
    if pack.per_row:  # the gradient of taps that meet no output is exactly zero
        for row, length in enumerate(pack.lengths):
            beyond += found["k"][row, ..., length:].abs().sum().item()
            beyond += found["k_rev"][row, ..., max(length - 1, 0) :].abs().sum().item()
    return "wrong" if beyond or wrong(pack, tensors, found, dy) else "right"


def outcomes(**options) -> set[str]:
    found = {outcome(ptx(**options), pack) for pack in (SEVERAL, CUT)}
    narrow = SEVERAL.offsets.to(torch.int32)
    return found | {outcome(ptx(**options), SEVERAL, narrow, max(SEVERAL.lengths))}


def test_without_a_mistake_all_is_right():
    assert outcomes() == {"right"}


@pytest.mark.one_of(5)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_kernels(name):
    assert outcomes(change=packs_with(*MISTAKES[name])) != {"right"}


def _skipping(offsets):
    found, order = usual_grouped(offsets)
    return found[1:], order


def _shifted(offsets):
    found, order = usual_grouped(offsets)
    return found, order.roll(1)


def _short(offsets):
    found, order = usual_grouped(offsets)
    return [group._replace(longest=group.longest - 1) for group in found], order


usual_grouped = groups.grouped


@pytest.mark.parametrize("mistake", [_skipping, _shifted, _short])
def test_mistakes_in_the_groups(emulator, monkeypatch, mistake):
    """A group left out, rows of a neighbouring group, and rows whose last step is cut off."""
    pack = Pack((90, 33, 700, 40), 64, skip="h")
    monkeypatch.setattr(packed, "grouped", mistake)
    assert outcome(emulator.device(FEW), pack) != "right"
    monkeypatch.setattr(packed, "grouped", usual_grouped)
    assert outcome(emulator.device(FEW), pack) == "right"


def test_gradients_of_groups_left_out_are_noticed(emulator, monkeypatch):
    pack, device = Pack((90, 33, 700, 40), 64, taps_rev=5, skip="h"), emulator.device(FEW)
    usual = packed._of_group
    for kept in (0, 2):

        def some(device, grads, dy, inputs, activation, group, tables, kept=kept):
            usual(device, grads, dy, inputs, activation, group, tables)
            if group.size != (64, 128, 1024)[kept]:
                grads.k.zero_()

        monkeypatch.setattr(packed, "_of_group", some)
        tensors, found, dy = results(device, pack)
        assert list(wrong(pack, tensors, found, dy)) == ["k"]


def test_offsets_on_the_host_are_copied_without_a_wait(monkeypatch):
    """From pinned memory, behind what the device is doing."""
    asked = []

    def pinned(table):
        def to(device, non_blocking):
            asked.append((device, non_blocking))
            return table

        return SimpleNamespace(to=to)

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    like = SimpleNamespace(is_cuda=True, device="cuda:0")
    device = SimpleNamespace(table=SimpleNamespace(capturing=lambda: False))
    pack = packed._Pack(device, torch.tensor([0, 5, 5, 40]), like, None)
    assert asked == [("cuda:0", True)]
    found = [(group.count, offsets.tolist(), rows.tolist()) for group, (offsets, rows) in pack]
    assert found == [(1, [0, 5, 5, 40], [0]), (1, [0, 5, 5, 40], [2])]
    device.table.capturing = lambda: True
    with pytest.raises(RuntimeError, match="give cu_seqlens on the GPU, and max_seqlen"):
        packed._Pack(device, torch.tensor([0, 5]), like, None)
    packed._Pack(device, torch.tensor([0, 5]), like, 5)  # nothing is copied


def request(lengths, max_seqlen=-1, offsets=None, dtype=torch.float32, total=None) -> Request:
    offsets = Pack(lengths, 1).offsets if offsets is None else offsets
    u = torch.zeros(1, 1, dtype=dtype).expand(2, total or sum(lengths))
    k = torch.zeros(2, 50)
    inputs = PackedInputs(u, k, *[None] * 5, offsets)
    return Request("fftconv_packed", inputs, ("none", False, max_seqlen))


def test_why_there_is_no_kernel(emulator):
    backend = OnDevice(emulator.device())
    most = longest(emulator.device().limits)
    assert backend.why_not(request((5, 90))) is None
    assert backend.why_not(request((5, most, most))) is None
    assert f"rows of more than {most}" in backend.why_not(request((5, most + 1)))
    assert backend.why_not(request((5, most), most + 1)) is None
    assert "float64" in backend.why_not(request((5,), dtype=torch.float64))
    assert "packs of more than" in backend.why_not(request((5, 6), total=1 << 31))
    with FakeTensorMode():
        unknown = torch.zeros(3, dtype=torch.int64, device="cuda")
    assert backend.why_not(request((5, 90), offsets=unknown)) is None
    assert f"more than {most}" in backend.why_not(request((5, most), offsets=unknown))
    assert backend.why_not(request((5, most), most, offsets=unknown)) is None
    assert f"more than {most}" in backend.why_not(request((5, most), most + 1, offsets=unknown))


def test_explanation_is_of_the_longest_row(emulator):
    backend = OnDevice(emulator.device())
    found = backend.explain(request((5, 2000, 90)))
    assert (found.backend, found.fft_size, found.blocks, found.isa) == ("cuda", 256, 10, "sm_90")
    assert "float32" in str(found)
    assert backend.explain(request((5, 30, 31))).fft_size == 32
    assert Reading(emulator.device()).explain(request((5, 30, 31), 60)).fft_size == 64
    assert backend.explain(request((5, 30, 31), 60)).fft_size == 32
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] must be the number of steps, 9, got 8"):
        backend.explain(request((5, 4), offsets=torch.tensor([0, 5, 8])))


def test_a_compiled_graph_asks_for_the_longest_row(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    u, k, offsets = (torch.zeros(s, device="meta") for s in ((2, 9), (2, 3), (2,)))
    with pytest.raises(
        ValueError, match=r"max_seqlen must be given inside of torch.compile for offsets on meta"
    ):
        fftconv(u, k, cu_seqlens=offsets.long())


def test_windows_behind_the_end_of_a_row_are_skipped():
    """Counted in instructions of the PTX that the machine has run. A block takes 16 windows at a time."""
    device = ptx()

    def instructions(pack: Pack) -> int:
        tensors, name = pack.tensors(), "packed_forward_f32_256"
        counts = lambda: sum(warps for warps, *_ in device.program(name).counts())  # noqa: E731
        before = counts()
        with use_backend(Reading(device)):
            pack.packed(tensors, None, 30000)
        assert device.launches[-1][0] == name
        return counts() - before

    long, short = (30000,) * 8, (30000, *[9] * 7)
    few, many = (instructions(Pack(lengths, 60, channels=1)) for lengths in (short, long))
    assert few < many / 4
