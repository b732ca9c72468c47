"""Packed rows on the CUDA kernels, run on the host: each as if it stood alone, whoever reads the offsets."""

from dataclasses import replace

import pytest
import torch
from device_cases import FEW
from emulated import OnDevice, forget_recipes
from packed_cases import CASES, PASSES, Pack, Reading, check, results, wrong
from torch.utils._python_dispatch import TorchDispatchMode

from seqconv import fftconv, use_backend
from seqconv.backends.cuda import convolution, kernels
from seqconv.backends.cuda.groups import USUAL, Group, grouped, plan_of, size_of, sizes
from seqconv.backends.cuda.packed import describe
from seqconv.backends.cuda.problem import H100
from seqconv.backends.cuda.recipe import Recipe
from seqconv.backends.inputs import Inputs

BF16, F16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_rows_are_as_if_alone(machine, case):
    """Results and gradients, against float64 rows one by one, with offsets that the host groups."""
    pack, limits = case
    check(machine.device(limits), pack)


@pytest.mark.parametrize("narrow", [False, True], ids=["int64", "int32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_rows_are_as_if_alone_by_offsets_on_the_device(machine, case, narrow):
    """The plan is that of the longest row, or of rows that are longer still."""
    pack, limits = case
    offsets = pack.offsets.to(torch.int32) if narrow else pack.offsets
    check(machine.device(limits), pack, offsets, max(pack.lengths) + 40 * narrow)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16], ids=str)
@pytest.mark.parametrize("n", kernels.KNOWN)
def test_every_length_that_kernels_know(machine, n, dtype):
    device = machine.device(FEW)
    check(device, Pack((n - 5, n, 3, n // 2 + 1), n, taps_rev=7, skip="h", channels=1, dtype=dtype))
    ran = {kernel for kernel, *_ in device.launches}
    suffix = {torch.float32: "f32", BF16: "bf16", F16: "f16"}[dtype]
    names = {f"packed_{way}ward_{suffix}_{n}" for way in ("for", "back")}
    assert ran >= names & set(kernels.KERNELS)


def test_the_cases_launch_every_kernel_of_packs(monkeypatch):
    class Recording:
        def __init__(self, limits):
            self.limits, self.found = limits, set()

        def table(self, function, *arguments):
            return torch.zeros(1)

        def launch(self, kernel, *launch):
            self.found.add(kernel)

    found = set()
    known = [
        (Pack((n,), n, channels=1, dtype=dtype), FEW)
        for n in kernels.KNOWN
        for dtype in (torch.float32, BF16, F16)
    ]
    for pack, limits in CASES + known:
        device = Recording(limits)
        results(device, pack)
        found |= {kernel for kernel in device.found if kernel.startswith("packed")}
    assert found == {kernel for kernel in kernels.KERNELS if kernel.startswith("packed")}


def test_thread_order_does_not_matter(machine):
    for pack, limits in (CASES[1], CASES[3], CASES[8], CASES[10]):
        found = []
        for order in (0, 1, 7):
            torch.manual_seed(0)
            found.append(results(machine.device(limits, order), pack)[1])
        for other in found[1:]:
            assert all(torch.equal(found[0][name], other[name]) for name in other)


def in_company(device, pack: Pack, tensors: dict, row: int, max_seqlen=None) -> list:
    """y and the gradient of u of one row."""
    u = tensors["u"].clone().requires_grad_()
    kind = OnDevice if max_seqlen is None else Reading
    with use_backend(kind(device)):
        y = pack.packed(tensors | {"u": u}, max_seqlen=max_seqlen)
    (du,) = torch.autograd.grad(y, u, torch.ones_like(y))
    begin = sum(pack.lengths[:row])
    return [t[..., begin : begin + pack.lengths[row]].detach() for t in (y, du)]


@pytest.mark.parametrize("taps", [300, 20])
def test_a_row_has_the_same_bits_in_any_company(machine, taps):
    """NaN in other rows does not reach it, and their lengths, number and places do not matter."""
    device = machine.device(FEW)
    lengths = (300, 40, 500, 270, 300)
    pack = Pack(lengths, taps, skip="h", activation="gelu")
    tensors = pack.tensors()
    clean = in_company(device, pack, tensors, 3)
    spoilt = tensors["u"].clone()
    spoilt[:, : sum(lengths[:3])] = torch.nan
    spoilt[:, sum(lengths[:4]) :] = torch.inf
    own = spoilt[:, sum(lengths[:3]) : sum(lengths[:4])]
    for found in (
        in_company(device, pack, tensors | {"u": spoilt}, 3),
        in_company(device, replace(pack, lengths=(270,)), tensors | {"u": own}, 0),
        in_company(device, replace(pack, lengths=(0, 270, 9)), tensors | {"u": torch.cat([own, spoilt[:, :9]], 1)}, 1),
    ):  # fmt: skip
        for a, b in zip(clean, found, strict=True):
            assert torch.isfinite(a).all() and torch.equal(a, b)
    clean = in_company(device, pack, tensors, 3, 500)
    found = in_company(device, pack, tensors | {"u": spoilt}, 3, 500)
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))


def test_rows_are_grouped_by_plan(emulator):
    """A spectrum and a launch for each group, however many rows it has; and one group where the device has offsets."""
    pack = Pack((5, 30, 300, 0, 40, 290, 511, 6), 400, channels=1)
    device = emulator.device(FEW)
    results(device, pack)
    ran = [kernel for kernel, *_ in device.launches]
    forward, backward = ran[:6], ran[6:]
    names = ["packed_forward_f32", "packed_forward_f32", "packed_forward_f32_512"]
    assert forward == [name for one in names for name in ("spectrum", one)]
    assert len(backward) == 9 and backward.count("spectrum") == 3 == backward.count("taps_gradient")
    device = emulator.device(FEW)
    results(device, pack, max_seqlen=511)
    ran = [kernel for kernel, *_ in device.launches]
    assert ran[:2] == ["spectrum", "packed_forward_f32_512"] and len(ran) == 2 + 3


def test_groups_hold_every_row_once():
    generator = torch.Generator().manual_seed(1)
    for most in (1, 31, 33, 1000, 70000):
        lengths = torch.randint(0, most + 1, (50,), generator=generator)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        groups, order = grouped(offsets)
        assert sorted(order.tolist()) == list(range(50))
        rest = order[len(order) - sum(group.count for group in groups) :]
        assert not lengths[order[: len(order) - len(rest)]].any()
        for group, rows in zip(groups, rest.split([g.count for g in groups]), strict=True):
            own = lengths[rows].tolist()
            assert max(own) == group.longest <= group.size
            assert {size_of(length) for length in own} == {group.size}
    assert grouped(torch.zeros(1, dtype=torch.int64))[0] == []
    assert sizes(40000).tolist()[-4:] == [24576, 32768, 49152, 65536]


def test_the_plan_of_a_row_is_its_own():
    """Other rows of a group change the blocks of a launch, not what transforms a row."""
    for taps, longest, limits in ((5000, 5000, H100), (60, 5000, H100), (5000, 5000, PASSES)):
        problem = describe(torch.zeros(8, 9), torch.zeros(8, taps), None, Group(1, 8192, longest))
        plans = [
            plan_of(problem, Group(count, 8192, longest), limits, backward)
            for backward in (False, True)
            for count in (1, USUAL, 1000)
        ]
        for same in (plans[:3], plans[3:]):
            assert len({(plan.n, plan.outer, plan.step, plan.lead) for plan in same}) == 1
        assert {plan.engine for plan in plans} == {"radix"}


class NoWait(TorchDispatchMode):
    """Refuses what waits for a device: to hand a value over, or to find out how large a result is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal")
        assert (kwargs or {}).get("device") is None or name != "_to_copy"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("pack", [CASES[1][0], CASES[3][0]], ids=str)
def test_offsets_on_the_device_cause_no_wait(emulator, pack, monkeypatch):
    """The offsets come with the first launch. Before it the memory holds numbers that are no offsets."""
    monkeypatch.setattr(convolution, "Recipe", Recipe)  # the watched one looks into memory itself
    forget_recipes()
    device = emulator.device(FEW)
    usual, late = device.launch, torch.full((len(pack.lengths) + 1,), -7)

    def launch(*arguments):
        late.numpy()[:] = pack.offsets
        usual(*arguments)

    device.launch = launch
    tensors = pack.tensors()
    inputs = Inputs(*(tensors.get(name) for name in Inputs._fields))
    lead = () if pack.heads is None else (pack.heads,)
    y = torch.empty(*lead, *inputs.u.shape, dtype=pack.dtype)
    dy = torch.randn_like(y)
    grads = Inputs(*(t if t is None else torch.empty_like(t) for t in inputs))
    backend, longest = Reading(device), max(pack.lengths)
    with NoWait():
        backend.fftconv_packed(y, inputs, late, pack.activation or "none", longest)
        late.numpy()[:] = -7
        backend.fftconv_packed_gradients(
            grads, dy, inputs, late, pack.activation or "none", longest
        )
    forget_recipes()
    names = [name for name, grad in zip(Inputs._fields, grads, strict=True) if grad is not None]
    found = {"y": y, **{name: getattr(grads, name) for name in tensors}}
    assert set(names) == set(tensors) and not wrong(pack, tensors, found, dy)
    with pytest.raises(AssertionError), NoWait():
        y[0].max().item()


def test_the_operator_leaves_offsets_on_the_device_unread(emulator):
    """With max_seqlen only; otherwise they are checked, and the longest row is found."""
    pack = Pack((5, 30, 300), 40, channels=1)
    bad = torch.tensor([0, 40, 5, 335])
    t = pack.tensors()
    with use_backend(Reading(emulator.device(FEW))):
        pack.packed(t, bad, 300)
        with pytest.raises(ValueError, match=r"cu_seqlens\[2\] must be >= cu_seqlens\[1\]=40"):
            pack.packed(t, bad)
    with use_backend(OnDevice(emulator.device(FEW))):
        with pytest.raises(ValueError, match=r"cu_seqlens\[2\] must be >= cu_seqlens\[1\]=40"):
            pack.packed(t, bad, 300)
        with pytest.raises(ValueError, match="max_seqlen must be at least the length of every row"):
            pack.packed(t, None, 299)


def test_second_derivatives(emulator):
    pack = Pack((40, 0, 33, 5), 20, skip="h", activation="gelu", channels=1)
    t = {name: x.double().float() for name, x in pack.tensors().items()}

    def curvature(backend, dtype):
        own = {name: x.to(dtype).requires_grad_() for name, x in t.items()}
        with use_backend(backend):
            y = pack.packed(own)
            first = torch.autograd.grad(y.square().sum(), list(own.values()), create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), list(own.values()))

    found = curvature(OnDevice(emulator.device(FEW)), torch.float32)
    for a, b in zip(found, curvature("reference", torch.float64), strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("kind, most", [(OnDevice, None), (Reading, 90)])
def test_compiled_once_for_all_packs(emulator, kind, most):
    """A compiler's tensors have no values, which the choice of a backend must not ask for."""
    k = (torch.randn(2, 50) / 7).requires_grad_()

    def step(u, offsets):
        y = fftconv(u, k, cu_seqlens=offsets, max_seqlen=most, activation="gelu")
        return y.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with use_backend(kind(emulator.device(FEW))):
        for lengths in ((40, 9, 70), (3, 90), (60, 0, 1, 33)):
            u, offsets = torch.randn(2, sum(lengths)), Pack(lengths, 50).offsets
            with torch._dynamo.config.patch(error_on_recompile=lengths != (40, 9, 70)):
                (ours,) = torch.autograd.grad(compiled(u, offsets), k)
            (theirs,) = torch.autograd.grad(step(u, offsets), k)
            assert torch.equal(ours, theirs)


def test_nothing_to_do(emulator):
    """Rows without steps, a pack without rows, and offsets that are none; nothing is launched."""
    device = emulator.device()
    with use_backend(OnDevice(device)):
        for lengths in ((), (0, 0)):
            pack = Pack(lengths, 7, skip="h")
            t = {name: x.requires_grad_() for name, x in pack.tensors().items()}
            y = pack.packed(t)
            grads = torch.autograd.grad(y, list(t.values()), torch.zeros_like(y))
            assert y.shape == (2, 0) and not any(g.any() for g in grads)
    tensors = Pack((5,), 7, per_row=True, heads=1).tensors()
    u, k = tensors["u"], tensors["k"]
    y, nothing = torch.full((1, 2, 5), 3.0), torch.zeros(1, dtype=torch.int64)
    inputs = Inputs(u, k, *[None] * 5)
    grads = Inputs(torch.full_like(u, 3.0), torch.full_like(k, 3.0), *[None] * 5)
    Reading(device).fftconv_packed(y, inputs, nothing, "none", 5)
    Reading(device).fftconv_packed_gradients(grads, y, inputs, nothing, "none", 5)
    assert not y.any() and not grads.u.any() and not grads.k.any() and not device.launches
