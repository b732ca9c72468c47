"""The problems of other packages' tests of kernels that are sums of exponentials, solved by ssm_kernel.

S4's fast Vandermonde product is k[l] = 2 Re sum_n v_n exp(x_n l), with 4 channels and a grid of modes and lengths.
The modal filter of vortex (Evo 2) is h[l] = sum_n R_n exp(p_n l) with real numbers, and its prefill runs the
recurrence. Both are compared with sums in float64 that are written out here.
"""

import pytest
import torch

from seqconv import fftconv, ssm_kernel

LENGTHS = (3, 17, 489, 1024, 1047, 2048, 4096)
MODES = (4, 8, 16, 32, 64, 128, 256)  # conjugate pairs count twice


def sum_of_exponentials(v, x, length):
    """2 Re sum_n v_n exp(x_n l) in complex128, (channels, length)."""
    steps = torch.arange(length, dtype=torch.float64)
    return 2 * torch.einsum("hn,hnl->hl", v, torch.exp(x.unsqueeze(-1) * steps)).real


def by_ssm_kernel(v, x, length, dtype):
    """The same: steps of 1, A = x, and a C from which Bbar = (exp(x) - 1) / x goes away again."""
    C = v * x / torch.expm1(x)
    C, A = (torch.view_as_real(t) for t in (C, x))
    return ssm_kernel(torch.zeros(len(x)), A, C.unsqueeze(0).to(dtype), length)[0]


def distance(ours, wanted) -> float:
    return ((ours - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("modes", MODES)
def test_vandermonde_products_of_s4(modes, length):
    """Modes that grow a little, up to 256 radians a step. S4 allows 1e-4 to 1e-3 in each element, in float32."""
    torch.manual_seed(2357)
    shape = (4, modes // 2)
    v = torch.randn(shape, dtype=torch.complex128).requires_grad_()
    x = torch.complex(
        0.001 * torch.rand(shape, dtype=torch.float64),
        modes * torch.rand(shape, dtype=torch.float64),
    ).requires_grad_()
    wanted = sum_of_exponentials(v, x, length)
    dk = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, (v, x), dk)
    roundoff = (
        2.0**-52 * modes * length
    )  # of the largest phase, in float64: the sum here has it too
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-12 + roundoff)):
        ours = by_ssm_kernel(v, x, length, dtype)
        assert ours.dtype == dtype
        found = [ours.double(), *torch.autograd.grad(ours, (v, x), dk.to(dtype))]
        for mine, exact in zip(found, (wanted, *gradients), strict=True):
            assert distance(mine, exact) < bound
            close = 1e-4 if modes <= 64 and length <= 1024 else 1e-3
            torch.testing.assert_close(mine, exact, rtol=close, atol=close)
    # the bounds refuse the kernel one tap later, one without its smallest mode, and zeros
    assert distance(wanted.roll(1, -1), wanted) > 1e-2
    smallest = v.detach().abs().argmin(-1, keepdim=True)
    fewer = v.detach().scatter(1, smallest, 0)
    assert distance(sum_of_exponentials(fewer, x, length), wanted) > 1e-5


def recurrence(u, poles, residues):
    """y_t = sum_n R_n s_t with s_t = p s_{t-1} + u_t, in float64: what vortex's recurrent prefill computes."""
    state = u.new_zeros(*u.shape[:2], poles.shape[-1])
    outputs = []
    for step in u.unbind(-1):
        state = poles * state + step.unsqueeze(-1)
        outputs.append((residues * state).sum(-1))
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("length", [128, 2000])
def test_modal_filters_of_vortex(length):
    """parallel_iir: two gates, a skip of the gated input, bfloat16 signals, and a filter of 16 real modes."""
    batch, channels, modes = 2, 8, 16
    log_poles = -torch.exp(torch.empty(channels, modes).uniform_(-6, 1)).double()
    residues = torch.randn(channels, modes).double() / modes
    x1, x2, v = (torch.randn(batch, channels, length).bfloat16() for _ in range(3))
    skip = torch.randn(channels)

    # ssm_kernel's modes are halves of pairs: a real one counts twice
    pairs = torch.complex(residues / 2, torch.zeros_like(residues))
    k = by_ssm_kernel(
        pairs, torch.complex(log_poles, torch.zeros_like(log_poles)), length, torch.float32
    )
    y = fftconv(v, k, skip, pre_gate=x1, post_gate=x2)

    u, gate = x1.double() * v.double(), x2.double()
    through = recurrence(u, log_poles.exp(), residues)
    wanted = gate * (through + skip.double().unsqueeze(-1) * u)
    assert y.dtype == torch.bfloat16
    assert distance(y.double(), wanted) < 4e-3  # y is rounded to 8 bits
    exact = fftconv(v.float(), k, skip, pre_gate=x1.float(), post_gate=x2.float())
    assert distance(exact.double(), wanted) < 1e-6
    assert distance(gate * through, wanted) > 0.1
    assert distance(wanted.roll(1, -1), wanted) > 0.1
