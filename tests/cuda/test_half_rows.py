"""Hard rows for the kernels on tensor cores, on the PTX machine.

Their energy is in one place, their sizes are at the ends of the dtype's range, or they hold what is no number.
"""

import math

import pytest
import torch
from cases import Case
from device_cases import FEW
from emulated import OnDevice
from half_cases import half_launches, sampled, tensor_cores_only
from judge import ROUNDING, STATED

from seqconv import fftconv, reference, use_backend
from seqconv.backends.cuda.kernels import HALF_POINTS

ptx_device = pytest.importorskip("ptx_device")
if ptx_device.compiler.compiler_reason():
    pytest.skip(ptx_device.compiler.compiler_reason(), allow_module_level=True)

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def halves():
    with tensor_cores_only():
        yield


def rows(n: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, n) of finite numbers. The last row is zeros."""
    t = torch.arange(n)
    large, small = (6e4, 1e-7) if dtype == FP16 else (1e30, 1e-30)
    ends = [(t == 0).float(), (t == n - 1).float()]
    noise = torch.randn(3, n)
    return torch.stack(
        [
            torch.ones(n),
            (-1.0) ** t,
            *ends,
            torch.sin(2.1 * t),
            noise[0].clamp(-1, 1) * large,
            noise[1] * small,
            noise[2] * torch.logspace(0, -3, n),
            torch.full((n,), large),
            torch.zeros(n),
        ]
    ).to(dtype)


def taps(n: int) -> torch.Tensor:
    """Of one channel that adds up, and of one that is white. Sums of the largest rows stay in fp16's range."""
    return torch.stack([torch.ones(n) / n, torch.randn(n) / (4 * n**0.5)])


def small_number(dtype: torch.dtype, n: int) -> float:
    """What the smallest numbers of a dtype may add to the norm of a row's error."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * n**0.5


# The form, by the length of rows.
KINDS = sampled(
    [
        pytest.param(n, less, dtype, marks=[pytest.mark.slow] * (n not in (1024, 8192) or slow))
        for n in HALF_POINTS
        for less, dtype, slow in (
            (0, BF16, False),
            (0, FP16, n > 1024),
            (16, BF16, True),
            (1, FP16, True),
            (1, BF16, n > 1024),
        )
    ],
    6,
)


def convolved(u, k, dy, device):
    with use_backend(OnDevice(device)):
        u, k = u.clone().requires_grad_(), k.clone().requires_grad_()
        y = fftconv(u, k)
        du, dk = torch.autograd.grad(y, (u, k), dy)
    return y.detach(), du, dk


@pytest.mark.one_of(2)
@pytest.mark.parametrize("n, less, dtype", KINDS, ids=str)
def test_hard_rows(n, less, dtype):
    """Each row is as exact as any other one, whatever the rows beside it are, forward and backward."""
    length = n - less
    u, k = rows(length, dtype), taps(length)
    u = u[:, None].expand(-1, 2, -1).contiguous()
    # Results that are all one number may all be rounded by half a unit in the last place.
    k64, worst = k.double(), STATED["fast"] + torch.finfo(dtype).eps / 2
    for order, copies in ((0, 1), (1, 2)):
        device = ptx_device.PtxDevice(FEW, order=order, copies=copies)
        y, du, dk = convolved(u, k, u, device)
        assert all(f"_{n}" in kernel for kernel in half_launches(device))
        # Round-off is relative to the whole convolution, of which a causal output may keep little.
        whole = u.double().norm(dim=-1) * k64.norm(dim=-1)
        wanted = reference.fftconv_fft(u.double(), k64)
        back = reference.fftconv_fft(u.double().flip(-1), k64).flip(-1)
        for value, exact, stated in ((y, wanted, 1), (du, back, 2)):
            size = torch.maximum(exact.norm(dim=-1), whole)
            error = (value.double() - exact).norm(dim=-1)
            allowed = (worst + (stated - 1) * STATED["fast"]) * size + small_number(dtype, length)
            # Alternating signs have their peak where a kernel that adds up has none, and the other way round: what
            # fp16 operands lose of each peak meets the other one.
            allowed[1, 0] *= 3
            assert (error <= allowed).all(), (error / size, error)
            assert value[:6].any(-1).all() and not value[-1].any()
    # dk adds up rows whose sizes may differ by 60 orders of magnitude.
    dy, leaf = torch.randn_like(u), k64.clone().requires_grad_()
    *_, dk = convolved(u, k, dy, ptx_device.PtxDevice(FEW))
    (exact,) = torch.autograd.grad(reference.fftconv_fft(u.double(), leaf), leaf, dy.double())
    whole = (u.double().norm(dim=-1) * dy.double().norm(dim=-1)).square().sum(0).sqrt()
    size = torch.maximum(exact.norm(dim=-1), whole)
    assert ((dk - exact).norm(dim=-1) <= 2 * STATED["fast"] * size).all()
    assert (dk.norm(dim=-1) > 0.1 * exact.norm(dim=-1)).all()


@pytest.mark.one_of(2)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n, less, dtype", KINDS, ids=str)
def test_what_is_no_number_stays_in_its_row(n, less, dtype, bad):
    """A row of NaN, or with an infinite number in it, spoils no other y and no other du, forward and backward."""
    torch.manual_seed(0)
    batch, length = 9 if n < 8192 else 3, n - less
    u, dy = (torch.randn(batch, 2, length).to(dtype) for _ in range(2))
    k = taps(length)
    spoiled_u, spoiled_dy = u.clone(), dy.clone()
    spoiled_u[1, 0, length // 2 :] = bad
    spoiled_dy[2, 1, :] = bad
    clean = convolved(u, k, dy, ptx_device.PtxDevice(FEW))
    found = convolved(spoiled_u, k, spoiled_dy, ptx_device.PtxDevice(FEW, copies=1))
    for value, same, row in zip(found[:2], clean[:2], ((1, 0), (2, 1)), strict=True):
        assert not torch.isfinite(value[row]).all()
        value[row] = same[row]
        assert torch.equal(value, same)


def gated(scales: tuple[float, float, float], dtype: torch.dtype, length: int) -> dict:
    """u, pre_gate and post_gate of these sizes, and taps that bring y to 1."""
    case = Case(3, 2, length, length, pre_gate=True, post_gate=True, dtype=dtype)
    tensors = case.tensors()
    for name, scale in zip(("u", "pre_gate", "post_gate"), scales, strict=True):
        size = tensors[name].float().clamp(-2, 2) / 2  # not beyond the largest number
        tensors[name] = (size * scale).to(dtype)
    tensors["k"] = (tensors["k"].double() / math.prod(scales)).float()
    return tensors


@pytest.mark.parametrize("length", [1024, 1000, pytest.param(4096, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype, scales",
    [
        (BF16, (1e20, 1e-20, 1.0)),
        (BF16, (1e15, 1e15, 1e-20)),
        (BF16, (1e-15, 1e-15, 1e20)),
        (FP16, (6e4, 6e4, 1.0)),
        (FP16, (6e4, 1e-3, 10.0)),
        (FP16, (1e-3, 1e-3, 10.0)),
        (FP16, (300.0, 300.0, 1e-2)),
    ],
    ids=str,
)
def test_gates_of_any_size(dtype, scales, length):
    """The product of u and its gate may leave the dtype's range: it is a float32 number before it is scaled."""
    tensors = gated(scales, dtype, length)
    device = ptx_device.PtxDevice(FEW)
    with use_backend(OnDevice(device)):
        y = fftconv(**tensors)
    assert all("_gated" in kernel for kernel in half_launches(device))
    y64 = reference.fftconv_fft(
        **{n: None if t is None else t.double() for n, t in tensors.items()}
    )
    error = (y.double() - y64).norm(dim=-1) / y64.norm(dim=-1)
    assert (error <= STATED["fast"] + ROUNDING[dtype] + (1e-3 if dtype == FP16 else 0)).all(), error
