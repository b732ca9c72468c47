"""The learned butterfly's CPU kernels against the definition in float64, for every instruction set."""

import copy

import pytest
import torch
from accuracy import rel_l2

from seqconv import reference
from seqconv.backends import choose, cpu
from seqconv.backends.fallback import radix_sizes, split
from seqconv.layers.butterfly_conv import Butterfly, fourier, radices
from seqconv.ops.butterfly import Inputs, operator

SIZES = [(16, 16), (16, 1), (32, 20), (64, 33), (128, 128), (256, 129), (512, 500), (2048, 1025)]


def problem(n: int, length: int, *, batch=2, channels=4, heads=2, dtype=torch.float32, last=True):
    """x with channels last in memory if `last`; matrices near the Fourier ones, so that z keeps its size."""
    passes = radices(n)
    x = torch.randn(batch, length, channels).mT if last else torch.randn(batch, channels, length)
    parts = [fourier(s).expand(heads, s, s, 2) for s in radix_sizes(passes)]
    parts = [(p + 0.1 * torch.randn_like(p)).flatten(1, 2) for p in parts]
    wide = torch.promote_types(dtype, torch.float32)
    return x.to(dtype), torch.cat(parts, 1).to(wide), passes


def gradients(dz, x, matrices, passes):
    return operator.bwd(dz, x, matrices, 3, passes, [True, True])


def backend_of(passes) -> str:
    inputs = Inputs(torch.zeros(1, 1, 1), torch.zeros(1, 1, 2))
    return choose("butterfly", inputs, (passes,))[0].name


def check(x, matrices, passes):
    z = operator.fwd(x, matrices, 3, passes)
    dz = torch.randn_like(z)
    dx, grads = gradients(dz, x, matrices, passes)
    factors = split(matrices.double(), passes)
    wanted = reference.butterfly(x.double(), factors, passes)
    wanted_dx, wanted_grads = reference.butterfly_backward(dz.double(), x.double(), factors, passes)
    flat = [wanted_grads[s].flatten(1, 2) for s in radix_sizes(passes)]
    assert z.dtype == grads.dtype == matrices.dtype and dx.dtype == x.dtype
    bound = 1e-14 if z.dtype == torch.float64 else 1e-6
    assert rel_l2(z, wanted) < bound and rel_l2(grads, torch.cat(flat, 1)) < bound
    assert rel_l2(dx, wanted_dx) < max(bound, torch.finfo(x.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, length", SIZES)
def test_the_transform_is_its_definition(isa, n, length, dtype):
    assert backend_of(radices(n)) == "cpu"
    check(*problem(n, length, dtype=dtype))


def test_float16(isa):
    check(*problem(64, 50, dtype=torch.float16))


def test_any_strides_and_shapes():
    for batch, channels, heads in ((1, 1, 1), (3, 6, 3), (5, 2, 1), (40, 8, 4), (1, 200, 2)):
        for last in (True, False):
            check(*problem(64, 40, batch=batch, channels=channels, heads=heads, last=last))
    x, matrices, passes = problem(128, 100)
    check(x.expand(2, 4, 100)[:1].expand(3, 4, 100), matrices, passes)
    check(x[:, ::2, 1::3], matrices, passes)
    check(x.flip(0), matrices[:, :, :].transpose(0, 1).contiguous().transpose(0, 1), passes)


def test_long_rows():
    check(*problem(1 << 16, 40_000, batch=1, channels=2, heads=1))


def test_lazily_negated_tensors():
    """They share the memory of what they are the negative of; torch resolves them for the operator."""
    x, matrices, passes = problem(32, 30)
    lazy = torch.complex(x, x).conj().imag
    assert lazy.is_neg()
    assert torch.equal(
        operator.fwd(lazy, matrices, 3, passes), operator.fwd(-x, matrices, 3, passes)
    )
    z = torch.view_as_complex(operator.fwd(x, matrices, 3, passes))
    dz = z.conj().imag.unsqueeze(-1).expand(*z.shape, 2)
    assert dz.is_neg()
    theirs = gradients(-z.imag.unsqueeze(-1).expand(*z.shape, 2), x, matrices, passes)
    ours = gradients(dz, x, matrices, passes)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_threads_do_not_change_a_bit():
    before, results = torch.get_num_threads(), []
    x, matrices, passes = problem(256, 200, batch=7, channels=30, heads=3)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            z = operator.fwd(x, matrices, 3, passes)
            results.append([z, *gradients(z, x, matrices, passes)])
    finally:
        torch.set_num_threads(before)
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later, strict=True))


def test_which_calls_take_the_kernels(monkeypatch):
    for passes in ((16,), (16, 16), (16, 2), (16, 16, 8)):
        assert backend_of(passes) == "cpu"
    for passes in ((2,), (8,), (4, 2), (2, 16), (16, 2, 16), (16, 3), (16, 1), (16, 32), (16, 48)):
        assert backend_of(passes) == "reference"
    monkeypatch.setattr(cpu, "missing", "not compiled")
    assert backend_of((16,)) == "reference"


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func.jvp
def test_contract_of_the_transform(activation):
    """Also where the kernels do not run: they would overrun, torch would cut silently."""
    transform = Butterfly(32, heads=2, activation=activation)

    def mapped(x):
        return torch.func.vmap(transform)(x.unsqueeze(0))

    for call in (transform, mapped):
        for bad in (torch.zeros(1, 2, 33), torch.zeros(1, 3, 8), torch.zeros(2, 8)):
            with pytest.raises(
                ValueError, match=r"x must be \(batch, multiple of 2, length <= 32\)"
            ):
                call(bad)
        for dtype in (torch.int64, torch.complex64, torch.float8_e5m2):
            with pytest.raises(TypeError, match=r"x must be one of float32, .* got torch"):
                call(torch.zeros(1, 2, 8).to(dtype))
    with pytest.raises(ValueError, match="x must be on meta, got cpu"):
        copy.deepcopy(transform).to("meta")(torch.zeros(1, 2, 8))
    there = copy.deepcopy(transform).to("meta")(torch.zeros(1, 2, 8, device="meta"))
    assert there.shape == (1, 2, 32, 2)


def test_contract_of_the_operator():
    x, matrices, passes = problem(32, 30)
    for bad in (matrices[:, 1:], matrices[:0], matrices[0], matrices[..., 0]):
        with pytest.raises(ValueError, match=r"matrices must be \(heads >= 1, 260, 2\)"):
            operator.fwd(x, bad, 3, passes)
    with pytest.raises(TypeError, match="matrices must be one of"):
        operator.fwd(x, matrices.to(torch.complex64), 3, passes)
    with pytest.raises(ValueError, match="dz must be like the output"):
        gradients(torch.zeros(2, 4, 31, 2), x, matrices, passes)
    with pytest.raises(TypeError, match="integers wanted"):
        cpu._C.butterfly(1, 2, 3)
