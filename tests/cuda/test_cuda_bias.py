"""The bias on the CUDA kernels: added where results are written, by every plan, and its gradient."""

import contextlib
from dataclasses import replace

import pytest
import torch
from cases import Case, double
from device_cases import FEW, SMALL, check, compare, run
from emulated import OnDevice, forget_recipes
from half_cases import half_launches, tensor_cores_only
from packed_cases import Pack, results, wrong

from seqconv import fftconv, reference, use_backend
from seqconv.backends.cuda import convolution
from seqconv.backends.cuda.problem import H100

BF16, F16 = torch.bfloat16, torch.float16
PASSES = replace(SMALL, tensor_cores=False)
BOTH = {"pre_gate": True, "post_gate": True}

FLOAT32 = {
    "any length": (Case(5, 3, 300, 300, bias="h"), FEW),
    "many samples": (Case(19, 2, 100, 100, bias="h"), FEW),
    "a known length": (Case(3, 2, 4096, 4096, bias="h", skip="h", activation="silu"), FEW),
    "a known length, gated": (Case(3, 2, 512, 512, bias="h", **BOTH), FEW),
    "two heads": (Case(3, 2, 300, 300, heads=2, bias="ch", activation="relu"), FEW),
    "one bias for two heads": (Case(3, 2, 300, 300, heads=2, bias="h", post_gate=True), FEW),
    "a kernel per sample": (Case(3, 2, 300, 300, heads=1, per_sample=True, bias="ch"), FEW),
    "channels innermost": (Case(3, 2, 301, 40, layout="blh", bias="h", mode="circular"), FEW),
    "windows": (Case(2, 1, 20001, 65, taps_rev=30, bias="h", activation="gelu"), H100),
    "three passes": (Case(3, 2, 2500, 2500, heads=2, bias="ch", activation="gelu"), PASSES),
}
HALF = {  # and the kernels of rows that a call launches on tensor cores, of 1,024 points
    "nothing beside": (Case(5, 2, 1024, 1024, bias="h", skip="h"), {"forward_any", "backward"}),
    "gelu": (
        Case(5, 4, 1024, 1024, bias="h", activation="gelu"),
        {"forward_gelu", "forward_slope", "backward"},
    ),
    "gelu, ragged": (
        Case(5, 4, 1016, 1016, bias="h", skip="h", activation="gelu", taps_rev=9),
        {"forward_ragged_gelu", "forward_ragged_slope", "backward_ragged"},
    ),
    "gated": (Case(5, 2, 1024, 1024, bias="h", **BOTH), {"forward_gated", "backward_gated"}),
    "any rows": (
        Case(5, 2, 1001, 1001, bias="h", activation="silu", post_gate=True),
        {"forward_any", "backward_any"},
    ),
    "two heads": (
        Case(3, 2, 1024, 1024, heads=2, bias="ch", activation="gelu"),
        {"forward_gelu", "forward_slope", "backward_any"},
    ),
}


@pytest.mark.parametrize("name", FLOAT32)
def test_in_float32(machine, name):
    case, limits = FLOAT32[name]
    device = machine.device(limits)
    check(device, case)
    assert "bias_sums_f32" in {kernel for kernel, *_ in device.launches}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", HALF)
def test_on_tensor_cores(machine, name, dtype):
    case, kernels = HALF[name]
    suffix = {BF16: "bf16", F16: "f16"}[dtype]
    if dtype == F16:  # fp16 has not the range for a gradient that is rounded on its way
        kernels = {name.replace("slope", "gelu") for name in kernels}
    with tensor_cores_only():
        device = machine.device(FEW)
        check(device, replace(case, dtype=dtype))
    ran = {name.replace(f"_{suffix}_1024", "") for name in half_launches(device)}
    if dtype == BF16:
        assert ran == {f"half_{kernel}" for kernel in kernels}
    assert any("forward" in kernel for kernel in ran)


def test_a_bias_that_is_not_a_number_stays_with_its_channel(machine):
    for dtype in (torch.float32, BF16):
        u, k, bias = torch.randn(3, 3, 300).to(dtype), torch.randn(3, 300), torch.randn(3)
        with use_backend(OnDevice(machine.device(FEW))):
            clean = fftconv(u, k, bias=bias, activation="gelu")
            bias[1] = torch.nan
            found = fftconv(u, k, bias=bias, activation="gelu")
        assert found[:, 1].isnan().all()
        assert torch.equal(found[:, ::2], clean[:, ::2])


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("alone", [True, False])
def test_the_gradient_lies_anywhere_and_has_any_dtype(machine, alone, activation, monkeypatch):
    """It is the same to the bit in every order of the threads, and whether all channels go at once or one by one."""
    case = Case(11, 3, 9000, 9000, heads=2, bias="ch", activation=activation, post_gate=True)
    if machine.name == "ptx":
        case = replace(case, length=700, taps=700)
    tensors = case.tensors()
    dy = torch.randn_like(tensors["post_gate"])
    leaf = tensors["bias"].double().requires_grad_()
    y64 = case.run(reference.fftconv_fft, double(tensors) | {"bias": leaf})
    (exact,) = torch.autograd.grad(y64, leaf, dy.double())
    names = ("u", "k", "k_rev", "skip", "pre_gate", "post_gate", "bias")
    seen: dict = {}
    for order, dtype, most in ((0, torch.float32, 1 << 28), (7, torch.float32, 1), (1, BF16, 1)):
        monkeypatch.setattr(convolution, "SCRATCH_BYTES", most)
        forget_recipes()
        memory = torch.full((2, 3, 6), 7.0, dtype=dtype)
        dbias = memory[:, 1, ::2]
        others = [None] * 6 if alone else [torch.empty_like(tensors["u"]), *[None] * 5]
        inputs = [tensors[name] for name in names]
        device = machine.device(PASSES, order)
        convolution.backward(device, (*others, dbias), dy, *inputs, activation or "none")
        ran = {kernel for kernel, *_ in device.launches}
        assert {"bias_sums_f32", "skip_gradient"} <= ran
        assert (memory[:, ::2] == 7).all() and (memory[:, 1, 1::2] == 7).all()
        assert torch.equal(seen.setdefault(dtype, dbias), dbias)
        allowed = 4e-6 if dtype == torch.float32 else 4e-3
        assert (dbias - exact).abs().max() <= allowed * exact.abs().max() + 1e-5
    assert torch.equal(seen[BF16], seen[torch.float32].bfloat16())
    if alone and activation is None:
        assert ran == {"bias_sums_f32", "skip_gradient"}  # nothing is convolved


def test_without_a_bias_nothing_is_added_up(emulator):
    device = emulator.device(FEW)
    run(device, Case(2, 2, 300, 300, activation="gelu", skip="h"))
    assert not any("bias" in kernel for kernel, *_ in device.launches)


def ptx(change):
    ptx_device = pytest.importorskip("ptx_device")
    if ptx_device.compiler.compiler_reason():
        pytest.skip(ptx_device.compiler.compiler_reason())
    return ptx_device.PtxDevice(FEW, change=change)


MISTAKES = {
    "not added": ("const float v = z.re + bias;", "const float v = z.re;", "any rows"),
    "the first channel's": ("channel * a.bias.channel", "0 * a.bias.channel", "any rows"),
    "the first head's": ("head * a.bias.head", "0 * a.bias.head", "two heads"),
    "not added to pieces": ("fused(v[i], up[r], bias)", "v[i] * up[r]", "gelu"),
    "twice to pieces": ("fused(v[i], up[r], bias)", "fused(v[i], up[r], 2 * bias)", "gated"),
    "plain rows": ("a.activation == kNone && a.bias.data == nullptr &&", "a.activation == kNone &&", "any length"),
    "every other sample": ("b += (int)a.groups", "b += 2 * (int)a.groups", "many samples"),
    "not the last step": ("t < s.count; t +=", "t < s.count - 1; t +=", "any length"),
    "another head's dv": ("gradient<T>(a, p, row / channels)", "gradient<T>(a, p, 0)", "two heads"),
}  # fmt: skip


def changed(before: str, after: str):
    def change(kernel: str, source: str) -> str:
        assert source.count(before) == 1, source.count(before)
        return source.replace(before, after)

    return change


def verdict(change, which: str) -> bool:
    """Whether all results are right."""
    torch.manual_seed(4)
    half = which in HALF
    case = replace(HALF[which][0], dtype=BF16) if half else FLOAT32[which][0]
    with tensor_cores_only() if half else contextlib.nullcontext():
        found = run(ptx(change), case)
        try:
            compare(case, *found, "fast", half)
        except AssertionError:
            return False
    return True


@pytest.mark.one_of(3)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_kernels(name):
    before, after, which = MISTAKES[name]
    assert verdict(None, which) and not verdict(changed(before, after), which)


def test_a_mistake_in_a_pack():
    pack = Pack((90, 300, 0, 33), 60, bias="h", activation="gelu")

    def right(change) -> bool:
        torch.manual_seed(4)
        tensors, found, dy = results(ptx(change), pack)
        return not wrong(pack, tensors, found, dy)

    assert right(None)
    assert not right(changed("return {0, row.begin, row.steps};", "return {0, 0, row.steps};"))
