"""S4D: initial modes, parametrisations, kernel options, resampling, and S4 as its limit."""

import copy
import math

import pytest
import torch

from bench.gallery.hippo import apart, hippo, response
from seqconv import S4D, S4DKernel, fftconv, param_groups, reference
from seqconv.layers import s4d_init
from seqconv.layers.s4d import POSITIVE

D = 6
INITS = ("lin", "inv", "inv2", "quad", "real", "rand", "legs", "fout", "foud", "diag", "hippo")


def relative(ours, wanted) -> float:
    return ((ours - wanted).norm() / wanted.norm()).item()


def test_legs_test_values():
    known = {4: [4.60329, 0.55650], 8: [19.85741, 5.35421, 1.95779, 0.42749]}
    for size, wanted in known.items():
        imag, _ = s4d_init.legs(size // 2)
        torch.testing.assert_close(imag, torch.tensor(wanted).double(), atol=6e-6, rtol=0)
    imag, b = s4d_init.legs(32)
    ends = [1303.274, 433.031, 258.152, 182.620, 2.62565, 1.70297, 0.90586, 0.26386]
    found = torch.cat([imag[:4], imag[-4:]])
    torch.testing.assert_close(found, torch.tensor(ends).double(), rtol=0, atol=6e-4)
    found = torch.cat([b[:4], b[-1:]])
    wanted = torch.tensor([40.75, 13.61, 8.189, 5.876, 0.5945]).double()
    torch.testing.assert_close(found, wanted, rtol=5e-4, atol=0)
    assert abs(2 * (b**2).sum() - 64**2) < 1e-6


def test_legs_diagonalises_hippo():
    """V diag(A) V^* and V B give back the normal part of HiPPO-LegS and its B, from the formulas."""
    modes, size = 4, 8
    n = torch.arange(size).double()
    A = -torch.tril(((2 * n + 1)[:, None] * (2 * n + 1)).sqrt(), -1) - torch.diag(n + 1)
    P = (n + 0.5).sqrt()
    normal = A + P[:, None] * P
    (pair, b) = s4d_init.modes("legs", 1, modes)
    values = torch.view_as_complex(pair[0])
    eigenvalues = torch.linalg.eigvals(normal)
    for value in torch.cat([values, values.conj()]):
        assert (eigenvalues - value).abs().min() < 1e-10
    # The response to B, whatever the basis: B^T exp(t A) B.
    wanted = (2 * n + 1).sqrt() @ torch.linalg.matrix_exp(0.3 * normal) @ (2 * n + 1).sqrt()
    ours = 2 * (b[0, :, 0] ** 2 * torch.exp(0.3 * values)).sum().real
    assert abs(ours - wanted) < 1e-10


@pytest.mark.parametrize(
    "init, turn", [("fout", math.pi), ("foud", 2 * math.pi), ("hippo", math.pi)]
)
def test_fourier_modes_diagonalise_hippo(init, turn):
    """B^T exp(t M) B of the Fourier basis (1, 0, cos, sin, cos 2, ...), turned by M; "fout" is what the
    normal part of HiPPO-FouT's A = M - B B^T is, "foud" decays instead."""
    sets, modes, size = 2, 5, 10
    b = torch.zeros(size).double()
    b[0::2], b[0] = math.sqrt(2), 1
    above = torch.zeros(size - 1).double()
    above[0::2] = turn * torch.arange(modes).double()
    M = torch.diag(above, -1) - torch.diag(above, 1)
    M = M - torch.eye(size) / 2 if init == "foud" else M
    A, B = (torch.view_as_complex(t) for t in s4d_init.modes(init, sets, modes))
    for t in (0.0, 0.3, 1.7):
        wanted = b @ torch.linalg.matrix_exp(t * M) @ b
        assert abs(2 * (B[-1] ** 2 * torch.exp(t * A[-1])).sum().real - wanted) < 1e-12
    first = s4d_init.modes("legs" if init == "hippo" else init, 1, modes)
    for ours, theirs in zip((A, B), first, strict=True):
        assert torch.equal(torch.view_as_real(ours[0]), theirs[0])


def test_named_modes():
    n, modes = torch.arange(32).double(), 32
    formulas = {
        "lin": math.pi * n,
        "inv": 64 / math.pi * (64 / (2 * n + 1) - 1),
        "inv2": 64 / math.pi * (64 / (n + 1) - 1),
        "quad": (1 + 2 * n) ** 2 / math.pi,
        "foud": 2 * math.pi * n,
    }
    for name, imag in formulas.items():
        A, B = s4d_init.modes(name, 2, modes)
        assert A.shape == B.shape == (2, modes, 2) and (A[..., 0] == -0.5).all()
        torch.testing.assert_close(A[1, :, 1], imag)
        assert (B[:, 1:] == torch.tensor([1.0, 0.0]).double()).all()
    inv = s4d_init.modes("inv", 1, modes)[0][0, :, 1]
    known = torch.tensor([1283.43, 414.23, 240.39, 165.88]).double()
    torch.testing.assert_close(inv[:4], known, atol=6e-3, rtol=0)
    assert abs(inv[-1] - 0.3234) < 1e-4
    A, _ = s4d_init.modes("real", 1, modes)
    assert torch.equal(A[0, :, 0], -(n + 1)) and not A[..., 1].any()
    A, _ = s4d_init.modes("rand", 100, modes)
    assert abs(A[..., 1].log().mean()) < 0.1 and abs(A[..., 1].log().std() - 1) < 0.1
    A, _ = s4d_init.modes("diag", 4, modes)
    assert torch.equal(A[:2], s4d_init.modes("inv", 2, modes)[0])
    assert torch.equal(A[2:], s4d_init.modes("lin", 2, modes)[0])
    with pytest.raises(ValueError, match="n_ssm must be even for init='hippo', got 3"):
        s4d_init.modes("hippo", 3, modes)


def test_variants_of_the_modes():
    A, B = s4d_init.modes("lin", 50, 8, real_random=True, imag_random=True, B_init="normal")
    assert (A[..., 0] <= 0).all() and (A[..., 0] > -1).all() and abs(A[..., 0].mean() + 0.5) < 0.1
    assert (A[..., 1] >= 0).all() and (A[..., 1] < 8).all() and abs(A[..., 1].mean() - 4) < 0.7
    assert abs(B.var() - 0.5) < 0.1
    A, B = s4d_init.modes("lin", 1, 8, real_scale=2, imag_scale=3, B_scale=4)
    assert A[0, 1].tolist() == [-1.0, 3 * math.pi] and B[0, 5].tolist() == [4.0, 0.0]
    A, B = s4d_init.modes("lin", 1, 8, normalize_B=True)
    assert abs(2 * (B.square().sum(-1) / A.square().sum(-1)).sum() - 1) < 1e-12
    for name, wanted in (("one", torch.ones(4).double()), ("legs", s4d_init.legs(4)[1])):
        _, B = s4d_init.modes("foud", 2, 4, B_init=name)
        assert torch.equal(B, torch.stack([wanted, 0 * wanted], -1).expand(2, 4, 2))
    _, B = s4d_init.modes("lin", 1, 4, B_init="alternating")
    assert B[0, :, 0].tolist() == [1, -1, 1, -1]
    z = torch.exp(torch.tensor(-2j * math.pi / 8, dtype=torch.complex128))
    for name, power in (("unit_cw", 3), ("unit_ccw", -3)):
        _, B = s4d_init.modes("lin", 1, 4, B_init=name)
        torch.testing.assert_close(torch.view_as_complex(B[0])[3], z**power)


@pytest.mark.parametrize("init", INITS)
def test_the_kernel_is_its_formula_for_every_init(init):
    kernel = S4DKernel(D, d_state=8, heads=2, init=init).double()
    log_dt, A, B, C = kernel.system()
    wanted = reference.ssm_kernel(log_dt, A, C, 90, B=B)
    assert relative(kernel(90), wanted) < 1e-12
    names, _ = s4d_init.modes(init, D, 4)
    if init != "rand":
        floor = names[..., 0].clamp(max=-1e-4)  # of the exponential
        torch.testing.assert_close(A[..., 0], floor, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(A[..., 1], names[..., 1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("real", POSITIVE)
@pytest.mark.parametrize("imag", ["none", "exp", "softplus"])
def test_transforms_start_from_the_same_modes(real, imag):
    A = S4DKernel(D, d_state=8, real_transform=real, imag_transform=imag).system()[1]
    plain, _ = s4d_init.modes("lin", D, 4)
    wanted = plain[..., 1] if imag == "none" else plain[..., 1].clamp(min=1e-4)
    torch.testing.assert_close(A[..., 0], plain[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(A[..., 1], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"dt_tie": False}, {"dt_transform": "softplus"}, {"dt_sinh": True}]
)
def test_steps(options):
    kernel = S4DKernel(2000, d_state=8, n_ssm=1, dt_min=1e-3, dt_max=1e-1, **options)
    log_dt, *_ = kernel.system()
    assert log_dt.shape == ((2000, 4) if "dt_tie" in options else (2000,))
    low, high = math.log(1e-3), math.log(1e-1)
    assert low - 1e-4 < log_dt.min() and log_dt.max() < high + 1e-4
    assert abs(log_dt.mean() - (low + high) / 2) < 0.15
    assert abs(log_dt.std() - (high - low) / 12**0.5) < 0.06
    if options.get("dt_sinh"):
        torch.testing.assert_close(log_dt, torch.sinh(kernel.inv_dt.double()))
    torch.testing.assert_close(kernel.system(rate=2.0)[0], log_dt + math.log(2))
    kernel(20).sum().backward()
    assert torch.isfinite(kernel.inv_dt.grad).all() and kernel.inv_dt.grad.any()


def test_sets_are_shared_in_turn():
    kernel = S4DKernel(D, d_state=8, n_ssm=3, init="rand")
    _, A, B, _ = kernel.system()
    assert kernel.inv_A_real.shape == (3, 4) and kernel.B.shape == (3, 4, 2)
    for h in range(D):
        assert torch.equal(A[h], A[h % 3]) and torch.equal(B[h], B[h % 3])
    assert not torch.equal(A[0], A[1])
    with pytest.raises(ValueError, match="n_ssm must divide d_model=6, got 4"):
        S4DKernel(D, n_ssm=4)


def test_other_kernel_options():
    C = S4DKernel(4000, d_state=8, heads=2).C
    assert C.shape == (2, 4000, 4, 2) and abs(C.var() - 0.5) < 0.02 and abs(C.mean()) < 0.02
    real = S4DKernel(D, d_state=7, init="real", is_real=True)
    assert real.C.shape == (1, D, 7) and real.B.shape == (D, 7) and not hasattr(real, "inv_A_imag")
    dt = real.system()[0].exp()[:, None, None]
    decay = torch.arange(1.0, 8).double()[:, None]
    taps = 2 * (1 - torch.exp(-dt * decay)) / decay * torch.exp(-dt * decay * torch.arange(50))
    wanted = torch.einsum("chn,hnl->chl", real.C.double(), taps)
    assert relative(real(50).double(), wanted) < 1e-6
    with pytest.raises(ValueError, match="init must be 'real' with is_real=True, got 'lin'"):
        S4DKernel(D, is_real=True)
    one, two = (S4DKernel(D, deterministic=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.C[0, 3].sum() == one.C[0, 3, 0, 0] == 1
    fixed = S4DKernel(D, train_B=False)
    assert "B" in fixed.state_dict() and "B" not in dict(fixed.named_parameters())
    # dt = 0.5: modes of frequency dt n / 2 = 0, .25, .5, .75 per step, kept below 0.3
    limited = S4DKernel(D, d_state=8, dt_min=0.5, dt_max=0.5, bandlimit=0.6)
    full = copy.deepcopy(limited)
    full.bandlimit = None
    with torch.no_grad():
        full.C[:, :, 2:] = 0
    for rate in (1.0, 2.0, 0.5):  # the limit is that of training
        assert torch.equal(limited(30, rate=rate), full(30, rate=rate))
    dropped = S4DKernel(D, kernel_dropout=0.25)
    share = (dropped(2000) == 0).float().mean()
    assert abs(share - 0.25) < 0.05 and not (dropped.eval()(2000) == 0).any()
    for options, text in (
        ({"d_state": 7}, "d_state must be even"),
        ({"dt_min": 0.1, "dt_max": 0.01}, "dt_min"),
        ({"init": "hippo-legs"}, "init must be one of 'lin'"),
        ({"real_transform": "abs"}, "real_transform must be one of"),
        ({"dt_transform": "relu"}, "dt_transform must be one of"),
        ({"B_init": "zero"}, "B_init must be one of"),
        ({"bandlimit": 0.0}, "bandlimit must be positive"),
        ({"dt_max": math.inf}, "dt_max < inf wanted"),
        (
            {"imag_scale": -1.0, "imag_transform": "exp"},
            "gives positive values, got modes down to -9",
        ),
        ({"real_scale": -1.0}, "real_transform='exp' gives positive values"),
        ({"dt_tie": 1}, "dt_tie must be True or False"),
    ):
        with pytest.raises(ValueError, match=text):
            S4D(D, **options)
    with pytest.raises(ValueError, match="rate must be positive and finite, got -1"):
        S4DKernel(D)(10, rate=-1)


def test_small_steps_and_modes_are_what_was_asked_for():
    for transform in ("exp", "softplus"):
        for sinh in (False, True):
            options = {"dt_transform": transform, "dt_sinh": sinh, "dt_min": 1e-7, "dt_max": 1e-6}
            log_dt, *_ = S4DKernel(500, **options).system()
            assert math.log(1e-7) - 1e-4 < log_dt.min() < log_dt.max() < math.log(1e-6) + 1e-4
    for transform in ("exp", "softplus", "sigmoid"):
        _, A, *_ = S4DKernel(D, real_scale=1e-5, real_transform=transform).system()
        torch.testing.assert_close(A[..., 0], torch.full_like(A[..., 0], -5e-6), rtol=1e-5, atol=0)
    for name in ("dt_min", "dt_max", "bandlimit"):
        for value, got in (("1e-3", "'1e-3'"), (torch.tensor(0.1), "Tensor"), (True, "True")):
            with pytest.raises(TypeError, match=f"{name} must be a number, got {got}"):
                S4D(D, **{name: value})


def test_modes_out_of_reach_of_their_parameters():
    for options in ({"imag_transform": "sigmoid"}, {"init": "real", "real_transform": "sigmoid"}):
        with pytest.raises(ValueError, match="transform='sigmoid' gives values below 1, got modes"):
            S4DKernel(D, **options)
    with pytest.raises(
        ValueError, match="normalize_B wants no mode at 0, got one from init='fout'"
    ):
        S4DKernel(D, init="fout", normalize_B=True)
    for init in ("inv", "quad", "legs"):  # Im A over 1000
        A = S4DKernel(D, init=init, imag_transform="softplus").system()[1]
        wanted = s4d_init.modes(init, D, 32)[0]
        torch.testing.assert_close(A[..., 1], wanted[..., 1], rtol=1e-5, atol=1e-4)


def band_limited(length: int) -> torch.Tensor:
    """Sines far below the sampling rate, over one unit of time."""
    t = torch.arange(length, dtype=torch.float64) / length
    frequencies = torch.arange(1, 1 + D).double()
    return torch.sin(2 * math.pi * 2 * frequencies * t.unsqueeze(-1) + frequencies).unsqueeze(0)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_zero_shot_resolution(discretization):
    """At half the sampling rate, rate=2 gives the subsampled output; without it something else."""
    layer = S4D(D, d_state=8, dt_max=0.01, discretization=discretization).double()
    fine = layer(band_limited(4000))[:, ::2]
    coarse = band_limited(4000)[:, ::2]
    assert relative(layer(coarse, rate=2.0), fine) < 0.01
    assert relative(layer(coarse), fine) > 0.1


def test_a_checkpoint_runs_at_other_lengths():
    layer, other = S4D(D), S4D(D)
    x = torch.randn(1, 4096, D)
    before = copy.deepcopy(dict(layer.named_parameters()))
    optimizer = torch.optim.AdamW(param_groups(layer, lr=1e-2))
    layer(x[:, :1024]).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(t, before[name]) for name, t in layer.named_parameters())
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x)[:, :1024], layer(x[:, :1024]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dt", [1e-5, 1.0])
def test_gradients_are_finite_at_extremes(dt):
    for discretization in ("zoh", "bilinear", "dss", "dss_softmax"):
        layer = S4D(D, dt_min=dt, dt_max=dt, discretization=discretization)
        for length, size in ((300, 1e3), (1, 1e15)):
            layer.zero_grad()
            layer(size * torch.randn(1, length, D)).sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_s4_is_the_limit_of_s4d_for_smooth_inputs():
    """S4D-LegS with half of B follows S4-LegS (NPLR, dense here) ever closer as the state grows, while the
    kernels stay 1 / sqrt(2) apart in the mean; with all of B the response is twice too large."""
    u = torch.sin(0.01 * torch.arange(1000).double())
    for size, error, distance in (
        (16, 0.0370, 0.7043),
        (64, 0.00552, 0.7069),
        (256, 2.91e-4, None),
    ):
        A, b, normal = hippo(size)
        _, vectors = torch.linalg.eigh(-1j * (normal + torch.eye(size) / 2))
        V = vectors[:, : size // 2]
        V = V * torch.sgn(V.mH @ b.to(V.dtype))  # V^* b > 0, as the layer has it
        options = {"d_state": size, "init": "legs", "dt_min": 0.01, "dt_max": 0.01}
        half, whole = (S4DKernel(1, **options, B_scale=scale).double() for scale in (0.5, 1.0))
        answers = []
        for kernel in (half, whole):
            with torch.no_grad():  # C x is the first state
                kernel.C.copy_(torch.view_as_real(V[0].conj().resolve_conj()))
                answers.append(fftconv(u[None, None], kernel(1000)[0])[0, 0])
        s4 = response(A, b, u, 0.01)
        assert relative(answers[0], response(normal, b / 2, u, 0.01)) < 1e-7  # float32 modes
        assert abs(relative(answers[0], s4) / error - 1) < 2e-3
        assert abs(relative(answers[1], s4) - 1) < 0.1
        if distance:
            assert abs(apart(A, normal, b) - distance) < 1e-4


@pytest.mark.parametrize("transform", ["exp", "softplus"])
def test_steps_of_any_size_are_kept(transform):
    """dt_min = 1e-5 is what is asked for and what there is: nothing is clamped."""
    kernel = S4DKernel(500, dt_min=1e-6, dt_max=1e-5, dt_transform=transform)
    dt = kernel.system()[0].exp()
    assert 0.99e-6 < dt.min() < 1.5e-6 and 0.7e-5 < dt.max() < 1.01e-5


def test_options_are_checked_without_storage_too():
    with torch.device("meta"):
        assert S4DKernel(4, init="legs", normalize_B=True, deterministic=True).C.is_meta
        with pytest.raises(ValueError, match="real_transform='sigmoid' gives values below 1"):
            S4DKernel(4, init="real", real_transform="sigmoid")
        with pytest.raises(ValueError, match="init must be one of"):
            S4DKernel(4, init="hipo")


@pytest.mark.parametrize("name", ["C", "B", "inv_dt"])
def test_parameters_of_another_shape_are_refused_not_broadcast(name):
    layer = S4D(D, heads=2)
    whole = getattr(layer.kernel, name)
    part = whole[:, :1] if name == "C" else whole[:1]
    setattr(layer.kernel, name, torch.nn.Parameter(part.detach()))
    with pytest.raises(ValueError, match=r"ssm_kernel: \w+ must be \(.*channels=6.*got"):
        layer(torch.randn(2, 9, D))
