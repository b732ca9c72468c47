"""The learned transform's operators, on the CPU and through CUDA's road in the emulator."""

import math

import pytest
import torch
from accuracy import rel_l2
from emulated import OnDevice

from seqconv import reference, use_backend
from seqconv.backends.fallback import radix_sizes, split
from seqconv.layers.butterfly_conv import Butterfly
from seqconv.ops.butterfly import operator


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def on_cuda(emulator):
    """CPU tensors on CUDA's road from the operator down, with the emulator in the driver's place."""
    device = emulator.device()
    with use_backend(OnDevice(device)):
        yield device


def problem(passes: tuple[int, ...], *, length: int, heads: int = 2, batch: int = 2, **options):
    x = torch.randn(batch, 2 * heads, length, **options)
    count = sum(m * m for m in radix_sizes(passes))
    return x, torch.randn(heads, count, 2, **options), list(passes)


SLOW = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float64)]


@pytest.mark.parametrize("dtype", [torch.float32, *SLOW], ids=str)
def test_opcheck(dtype):
    x, matrices, passes = problem((16, 2), length=20)
    x = x.to(dtype).requires_grad_()
    matrices = matrices.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    # opcheck's own machinery has operations without a deterministic form
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(operator.fwd, (x, matrices, 3, passes), **tolerance)
    z = operator.fwd(x, matrices, 3, passes)
    assert z.shape == (2, 4, 32, 2) and z.dtype == matrices.dtype
    dz = torch.randn_like(z).requires_grad_()
    torch.library.opcheck(operator.bwd, (dz, x, matrices, 3, passes, [True, True]), **tolerance)


@pytest.mark.parametrize("passes", [(2,), (4, 2), (2, 2, 2), (2, 4, 4)], ids=str)
def test_gradients_of_both_orders(passes):
    options = {"dtype": torch.float64, "requires_grad": True}
    x, matrices, passes = problem(passes, length=math.prod(passes) - 1, batch=1, **options)
    call = lambda *t: operator.fwd(*t, 3, passes)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, matrices))
    assert torch.autograd.gradgradcheck(call, (x, matrices))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func.jvp
def test_the_raw_operator_refuses_to_be_differentiated_so():
    x, matrices, passes = problem((4, 2), length=8)
    call = lambda x: operator.fwd(x, matrices, 3, passes)  # noqa: E731
    with pytest.raises(RuntimeError, match="not on the raw operator"):
        torch.func.jvp(call, (x,), (x,))
    with pytest.raises(RuntimeError, match="not on the raw operator"):
        torch.func.grad(lambda x: call(x).sum())(x)


def test_which_calls_take_cudas_kernels(on_cuda):
    def launched(n=32, dtype=torch.float32, batch=2):
        on_cuda.launches.clear()
        x = torch.randn(batch, 1, 20).to(dtype)
        wanted = torch.promote_types(dtype, torch.float32)
        z = Butterfly(n)(x)
        assert z.dtype == wanted and z.shape == (batch, 1, n, 2)
        return len(on_cuda.launches)

    assert launched() == launched(dtype=torch.bfloat16) == launched(1 << 14) == 1
    assert launched(1 << 15) == 0  # more than a block holds
    assert launched(batch=0) == 0
    assert launched(dtype=torch.float64) == 0


def test_empty_gradients_on_cudas_road(on_cuda):
    part = Butterfly(32)
    part(torch.zeros(0, 3, 20)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


def test_work_in_float32_whatever_the_default_dtype(on_cuda, float64):
    x, matrices, passes = problem((16, 2), length=20, dtype=torch.float32)
    z = operator.fwd(x, matrices, 3, passes)
    dx, dmatrices = operator.bwd(z, x, matrices, 3, passes, [True, True])
    assert {t.dtype for t in (z, dx, dmatrices)} == {torch.float32}
    wanted = reference.butterfly_backward(
        z.double(), x.double(), split(matrices.double(), passes), passes
    )
    assert rel_l2(z, reference.butterfly(x.double(), split(matrices, passes), passes)) < 1e-6
    assert rel_l2(dx, wanted[0]) < 1e-6
