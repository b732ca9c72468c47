"""Forms of the kernels on tensor cores, on the PTX machine: right, the same for any grid, and for rows of any kind.

test_emulator.py and test_device.py run some of the same kernels as source.
"""

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from accuracy import rel_l2
from cases import Case, double
from device_cases import FEW, case_inputs, check, compare, results, run
from emulated import OnDevice, forget_recipes
from half_cases import forms_of, half_case, half_launches, sampled, tensor_cores_only
from judge import ROUNDING, STATED

from seqconv import fftconv, use_backend
from seqconv.backends.cuda import convolution
from seqconv.backends.cuda.plan import make_plan
from seqconv.backends.cuda.problem import H100, Problem

ptx_device = pytest.importorskip("ptx_device")
if ptx_device.compiler.compiler_reason():
    pytest.skip(ptx_device.compiler.compiler_reason(), allow_module_level=True)

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def machine():
    """The PTX machine for every test: a kernel is compiled for it in a third of the time of the emulator's."""
    return ptx_device.PtxLibrary()


@pytest.fixture(autouse=True)
def halves():
    with tensor_cores_only():
        yield


def of_every_form(n: int, quick: tuple[str, ...]):
    for form in forms_of(n):
        yield pytest.param(n, form, marks=[pytest.mark.slow] * (form not in quick), id=f"{n}{form}")


GRIDS = sampled(
    [
        *of_every_form(1024, ("", "_ragged", "_any")),
        *of_every_form(256, ()),
        *of_every_form(4096, ()),
        *of_every_form(16384, ("",)),
    ],
    6,
)


def with_blocks(blocks: int):
    """The planner, but for the number of blocks of a launch."""

    def planned(*arguments, **options):
        plan = make_plan(*arguments, **options)
        return replace(plan, blocks=blocks) if plan.engine == "half" else plan

    return planned


@pytest.mark.parametrize("n, form", GRIDS)
def test_results_do_not_depend_on_the_grid(machine, n, form):
    """Forward, du and dk have the same bits with one block, with as many as units and with a number between."""
    small = {"batch": 5, "channels": 3} if n < 16384 else {"batch": 2, "channels": 3}
    case, seen, grids = half_case(n, form, **small), None, set()
    for blocks in (1, 2, 1000):
        with patch.object(convolution, "make_plan", with_blocks(blocks)):
            forget_recipes()
            device = machine.device(H100)
            torch.manual_seed(0)
            _, y, grads, _ = run(device, case)
        now = [y, *grads.values()]
        grids.add(next(grid for kernel, grid, *_ in device.launches if kernel.startswith("half")))
        seen = seen or now
        assert all(torch.equal(a, b) for a, b in zip(seen, now, strict=True))
    assert len(grids) == 3 and {1, 2} < grids


@pytest.mark.parametrize("n, form", GRIDS)
def test_results_do_not_depend_on_order_or_copies(machine, n, form):
    """Nor on when asynchronous copies happen: at once, as late as they may, the last first."""
    case = half_case(n, form, batch=4 if n < 16384 else 2, channels=1)
    first = results(machine, case, FEW, 0)
    for order, copies in ((1, 1), (2, 2), (0, 2), (1, 0)):
        now = results(machine, case, FEW, order, copies=copies)
        assert all(torch.equal(a, b) for a, b in zip(first, now, strict=True)), (order, copies)


def strided(x: torch.Tensor, gap: int) -> torch.Tensor:
    """The same numbers, whose rows begin `gap` elements behind the ends of those before them."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + gap), math.nan, dtype=x.dtype)
    room[..., gap:] = x
    return room[..., gap:]


def odd_steps(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, of which every other sample is misaligned."""
    room = torch.full((len(x), x[0].numel() + 1), math.nan, dtype=x.dtype)
    laid = room[:, :-1].view(len(x), *x.shape[1:])
    return laid.copy_(x)


ROWS = {  # how u's rows lie, and the form that takes them
    "side by side": (lambda u: u, ""),
    "with gaps of 16 bytes": (lambda u: strided(u, 8), ""),
    "misaligned": (lambda u: strided(u, 3), "_any"),
    "odd steps": (odd_steps, "_any"),
    "every other number": (lambda u: u.repeat_interleave(2, -1)[..., ::2], "_any"),
    "time first": (lambda u: u.permute(2, 0, 1).contiguous().permute(1, 2, 0), "_any"),
}


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_any_kind(machine, rows):
    """What is right does not depend on how rows lie, and rows that can be taken 16 bytes at a time are."""
    lay, form = ROWS[rows]
    case = Case(3, 2, 1024, 1024, taps_rev=17, skip="h", dtype=BF16)
    tensors, found = case.tensors(), {}
    laid = lay(tensors["u"])
    assert torch.equal(laid, tensors["u"])
    dy = torch.randn_like(tensors["u"])
    for name, u in (("as they are", tensors["u"].clone()), ("laid", laid)):
        device = machine.device(FEW)
        grads = [torch.empty(t.shape, dtype=t.dtype) for t in (u, tensors["k"], tensors["k_rev"])]
        y = torch.empty(u.shape, dtype=BF16)
        rest = [tensors["k"], tensors["k_rev"], tensors["skip"], None, None, None]
        convolution.forward(device, y, u, *rest, "none")
        convolution.backward(device, (*grads, *[None] * 4), dy, u, *rest, "none")
        found[name] = [y, *grads], half_launches(device)
    assert found["laid"][1] == {f"half_forward_bf16_1024{form}", f"half_backward_bf16_1024{form}"}
    assert found["as they are"][1] == {"half_forward_bf16_1024", "half_backward_bf16_1024"}
    for a, b in zip(found["laid"][0], found["as they are"][0], strict=True):
        assert rel_l2(a, b.double()) <= 4 * STATED["fast"] + 2 * ROUNDING.get(a.dtype, 0)
    leaves = {n: None if t is None else t.requires_grad_() for n, t in double(tensors).items()}
    y64 = case.run(fftconv, leaves)
    exact = torch.autograd.grad(y64, [leaves[n] for n in ("u", "k", "k_rev")], dy.double())
    for name, value, wanted in zip(
        "y u k k_rev".split(), found["laid"][0], (y64, *exact), strict=True
    ):
        stated = STATED["fast"] * (1 if name == "y" else 2)
        assert rel_l2(value, wanted) <= stated + ROUNDING.get(value.dtype, 0), name


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "n", [1000, pytest.param(4096, marks=[pytest.mark.slow, pytest.mark.one_of(2)])]
)
def test_forms_agree(machine, n, dtype):
    """Rows in pieces and any rows give the same results up to what each may differ from the exact ones."""
    case = Case(5, 2, n, n, taps_rev=n // 3, skip="h", dtype=dtype)
    found = []
    for pieces in (True, False):

        def planned(problem, *rest, pieces=pieces, **options):
            return make_plan(replace(problem, pieces=pieces), *rest, **options)

        with patch.object(convolution, "make_plan", planned):
            forget_recipes()
            device = machine.device(FEW)
            torch.manual_seed(0)
            one = run(device, case)
        compare(case, *one, "fast", True)
        assert all("_any" in kernel for kernel in half_launches(device)) != pieces
        found.append([one[1], *one[2].values()])
    for a, b in zip(*found, strict=True):
        assert rel_l2(a, b.double()) <= 4 * STATED["fast"] + 2 * ROUNDING.get(a.dtype, 0)


OPTIONS = [
    Case(3, 2, 1024, 1024, heads=2, skip="ch", dtype=BF16),
    Case(3, 2, 1000, 1000, heads=3, per_sample=True, skip="ch", taps_rev=5, dtype=BF16),
    Case(3, 2, 1024, 1024, heads=2, skip="h", pre_gate=True, post_gate=True, dtype=BF16),
    Case(4, 2, 1024, 1024, heads=1, per_sample=True, skip="h", dtype=BF16),
    Case(
        4,
        2,
        1000,
        1000,
        heads=1,
        per_sample=True,
        skip="h",
        pre_gate=True,
        post_gate=True,
        dtype=BF16,
    ),
    Case(3, 2, 1024, 1024, mode="circular", skip="h", dtype=BF16),
    Case(3, 2, 1024, 1024, layout="blh", skip="h", taps_rev=1023, dtype=BF16),
    Case(3, 2, 1024, 1024, pre_gate=True, post_gate=True, activation="gelu", dtype=BF16),
    Case(3, 2, 1000, 1000, pre_gate=True, activation="silu", skip="h", dtype=BF16),
    Case(3, 2, 1024, 1024, post_gate=True, dtype=BF16),
    Case(2, 2, 5000, 70, skip="h", taps_rev=30, dtype=BF16),
    Case(2, 2, 5000, 70, skip="h", pre_gate=True, post_gate=True, dtype=BF16),
    Case(2, 2, 5003, 64, taps_rev=30, pre_gate=True, activation="silu", dtype=BF16),
    Case(2, 2, 4000, 40, heads=2, skip="ch", per_sample=True, dtype=BF16),
]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(machine, case):
    """Heads, taps per sample, circular and two-sided ones, both layouts, gates, activations and windows."""
    device = machine.device(FEW)
    check(device, case)
    ran = half_launches(device)
    assert {"forward", "backward"} == {kernel.split("_")[1] for kernel in ran}
    if case.taps < case.length:
        plan = convolution.make_plan(convolution.describe(*case_inputs(case)), FEW)
        assert plan.windows > 1 and plan.engine == "half"


LONGEST = [(16384, ""), (16384, "_any"), (32768, ""), (32768, "_any"), (20000, "_ragged")]


@pytest.mark.parametrize("length, form", LONGEST)
def test_longest_single_passes(machine, length, form):
    """One launch takes a whole row of 16-bit numbers, two-sided rows too, forward and backward."""
    n = max(16384, 1 << (length - 1).bit_length())
    case = Case(2, 1, length - (form == "_any"), length, taps_rev=length - 9, skip="h", dtype=BF16)
    device = machine.device(FEW)
    check(device, replace(case, taps=case.length))
    assert half_launches(device) == {
        f"half_{name}_bf16_{n}{form}" for name in ("forward", "backward")
    }
    assert ("long_taps_gradient" in [kernel for kernel, *_ in device.launches]) == (n == 32768)
    assert not any(kernel.startswith("long_gradient") for kernel, *_ in device.launches)


SOME = [(1024, ""), (1000, "_ragged"), (1001, "_any"), (16384, ""), (16001, "_any")]


@pytest.mark.parametrize("wanted", ["u", "skip", "u skip", "k"])
@pytest.mark.parametrize("length, form", SOME)
def test_gradients_of_some_arguments_are_those_of_all(machine, wanted, length, form):
    """This holds too where x's spectra wait in global memory."""
    torch.manual_seed(0)
    case = Case(3 if length < 2000 else 2, 1, length, length, taps_rev=5, skip="h", dtype=BF16)
    tensors, dy = case.tensors(), torch.randn(case.batch, 1, length).to(BF16)
    names = ("u", "k", "k_rev", "skip")
    inputs = [tensors[n] for n in names] + [None] * 3

    def gradients(some):
        grads = [torch.full_like(tensors[n], math.nan) if n in some else None for n in names]
        device = machine.device(FEW)
        convolution.backward(device, (*grads, *[None] * 3), dy, *inputs, "none")
        assert all(kernel.endswith(form) for kernel in half_launches(device))
        return dict(zip(names, grads, strict=True))

    every = gradients(names)
    assert not any(grad.isnan().any() for grad in every.values())
    for name, grad in gradients(wanted.split()).items():
        assert grad is None or torch.equal(grad, every[name]), name


def test_scratch_of_long_gradients_is_bounded():
    """768 channels go some at a time. A call forward needs scratch for spectra only."""
    for per_sample in (False, True):
        problem = Problem(64, 1, 768, 32768, 32768, 0, per_sample, 2)
        plans = [make_plan(problem, H100, backward=b) for b in (False, True)]
        assert plans[1].aside and plans[1].outer > 1
        slices = list(convolution._slices(problem, plans))
        assert sum(count for _, count in slices) == 768
        each = problem.sets * plans[1].n * (4 + 12 * plans[1].parts + 8)
        assert slices[0][1] == max(1, (1 << 28) // each) < 768
        assert list(convolution._slices(problem, plans[:1])) == [(0, 768)]


def test_rows_do_not_meet_in_what_waits_aside(machine):
    """A slot's spectra and sums in global memory are its own: NaN in one row of u is in dk and in no other du."""
    u, k = torch.randn(3, 2, 16384).to(BF16), torch.randn(2, 16384)
    with use_backend(OnDevice(machine.device(FEW))):
        grads = []
        for spoiled in (False, True):
            v = u.clone()
            if spoiled:
                v[1, 1, 5] = math.nan
            leaves = [v.requires_grad_(), k.clone().requires_grad_()]
            grads.append(torch.autograd.grad(fftconv(*leaves).float().sum(), leaves))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1][0], grads[1][1][0]) and grads[1][1][1].isnan().all()
