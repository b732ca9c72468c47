"""The product of two learned transforms, as half of a spectrum, against Re ifft(u k) in float64."""

import pytest
import torch
from accuracy import rel_l2

from seqconv import reference
from seqconv.backends import choose, cpu, cpu_models
from seqconv.ops.butterfly import Spectra, product

SIZES = [  # batch, heads, channels, n, length
    (1, 1, 1, 2, 2),
    (2, 3, 4, 6, 5),
    (2, 1, 3, 16, 9),
    (1, 2, 5, 34, 34),
    (3, 2, 2, 66, 1),
    (2, 2, 9, 130, 100),
    (4, 1, 20, 512, 256),
]
BOUND = {torch.float32: 3e-7, torch.float64: 1e-15}


def problem(batch, heads, channels, n, dtype):
    return Spectra(
        torch.randn(batch, channels, n, 2, dtype=dtype),
        torch.randn(heads, channels, n, 2, dtype=dtype),
    )


def check(inputs: Spectra, length: int, dv: torch.Tensor | None = None) -> None:
    v = product.fwd(*inputs, 3, length)
    dv = torch.randn_like(v) if dv is None else dv
    grads = product.bwd(dv, *inputs, 3, length, [True, True])
    own = [t.double().requires_grad_() for t in inputs]
    u, k = (torch.view_as_complex(t.contiguous()) for t in own)
    wanted = torch.fft.ifft(u.unsqueeze(1) * k).real[..., :length]
    wanted_grads = torch.autograd.grad(wanted, own, dv.double())
    bound = BOUND[v.dtype]
    assert v.dtype == inputs.u.dtype and rel_l2(v, wanted) < bound
    for found, right in zip(grads, wanted_grads, strict=True):
        assert found.dtype == v.dtype and found.is_contiguous() and rel_l2(found, right) < bound


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("batch, heads, channels, n, length", SIZES)
def test_it_is_its_definition(isa, batch, heads, channels, n, length, dtype):
    check(problem(batch, heads, channels, n, dtype), length)


def test_tiles_of_channels(monkeypatch):
    """Of which the last is narrower."""
    monkeypatch.setattr(cpu_models, "_TILE", 1)
    monkeypatch.setattr(cpu_models, "_NARROWEST", 3)
    check(problem(2, 2, 7, 32, torch.float32), 20)


def test_any_strides():
    u, k = problem(3, 2, 6, 32, torch.float32)
    check(Spectra(u[:, ::2], k.flip(0)[:, 3:]), 32)
    check(Spectra(u.mT.contiguous().mT, k.transpose(0, 1).contiguous().transpose(0, 1)), 20)
    check(Spectra(u[:1].expand(4, 6, 32, 2), k), 20)
    dv = torch.randn(3, 20, 2, 6).permute(0, 2, 3, 1)
    check(Spectra(u, k), 20, dv)
    check(Spectra(u, k), 20, torch.ones(1).expand(3, 2, 6, 20))


def test_each_gradient_alone():
    inputs = problem(2, 3, 4, 32, torch.float32)
    dv = torch.randn(2, 3, 4, 20)
    both = product.bwd(dv, *inputs, 3, 20, [True, True])
    for i in range(2):
        alone = product.bwd(dv, *inputs, 3, 20, [i == 0, i == 1])
        assert torch.equal(alone[i], both[i]) and not alone[1 - i].numel()


def test_threads_do_not_change_a_bit():
    before, results = torch.get_num_threads(), []
    inputs = problem(3, 2, 30, 512, torch.float32)
    dv = torch.randn(3, 2, 30, 256)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            v = product.fwd(*inputs, 3, 256)
            results.append([v, *product.bwd(dv, *inputs, 3, 256, [True, True])])
    finally:
        torch.set_num_threads(before)
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later, strict=True))


def test_nothing():
    for batch, heads, channels, length in ((0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)):
        inputs = problem(batch, heads, channels, 8, torch.float32)
        v = product.fwd(*inputs, 3, length)
        assert v.shape == (batch, heads, channels, length)
        grads = product.bwd(v, *inputs, 3, length, [True, True])
        for grad, t in zip(grads, inputs, strict=True):
            assert grad.shape == t.shape and not grad.any()


def test_the_twin_s_gradients(monkeypatch):
    assert choose("butterfly_product", problem(1, 1, 1, 2, torch.float32), (1,))[0] is cpu
    monkeypatch.setattr(cpu, "always", frozenset())
    monkeypatch.setattr(cpu, "missing", "not compiled")
    inputs = problem(2, 3, 4, 16, torch.float64)
    assert choose("butterfly_product", inputs, (1,))[0].name == "reference"
    check(inputs, 9)
    own = [t.requires_grad_() for t in inputs]
    torch.autograd.gradcheck(lambda *t: reference.butterfly_product(*t, 9), own)


def test_contract():
    u, k = problem(2, 3, 4, 16, torch.float32)
    for bad in (u[0], u[..., :1], u[:, :, :15], u[:, :, :8]):
        with pytest.raises(ValueError, match=r"u must be \(batch, channels, n, 2\) with an even n"):
            product.fwd(bad, k, 3, 9)
    for bad in (k[0], k[:, :3], k[:, :, :8]):
        with pytest.raises(ValueError, match=r"k must be \(heads, 4, 16, 2\), got"):
            product.fwd(u, bad, 3, 9)
    for bad in (u.half(), u.double()):
        with pytest.raises(TypeError, match=r"both torch.float32 or both torch.float64, got"):
            product.fwd(bad, k, 3, 9)
    with pytest.raises(ValueError, match=r"dv must be like the output, got \(2, 3, 4, 8\) on cpu"):
        product.bwd(torch.zeros(2, 3, 4, 8), u, k, 3, 9, [True, True])
