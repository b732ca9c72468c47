"""S4D: initial modes, parametrisations, kernel options, recurrence, resampling, and S4 as its limit."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn.utils import parametrize, prune

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


RECURRENT = [
    {},
    {"discretization": "bilinear", "heads": 2},
    {"discretization": "dss"},
    {"dt_tie": False, "n_ssm": 2, "init": "legs", "activation": None, "postact": None},
    {"is_real": True, "init": "real", "activation": "silu"},
]


@pytest.mark.parametrize("options", RECURRENT)
def test_the_recurrence_is_the_convolution(options):
    layer = S4D(D, d_state=8, **options).double()
    x = torch.randn(3, 200, D, dtype=torch.float64)
    wanted = layer(x)
    state, steps = layer.init_state(3), []
    for t in range(50):
        y, state = layer.step(x[:, t], state)
        steps.append(y)
    assert relative(torch.stack(steps, 1), wanted[:, :50]) < 1e-12
    for chunk in (1, 7, 92):  # then chunks, then steps again
        y, state = layer.prefill(x[:, 50 : 50 + chunk], state)
        steps.extend(y.unbind(1))
        x = torch.cat([x[:, :50], x[:, 50 + chunk :]], 1)
    for t in range(50, 100):
        y, state = layer.step(x[:, t], state)
        steps.append(y)
    assert relative(torch.stack(steps, 1), wanted) < 1e-12
    loss = wanted.square().sum()
    gradients = torch.autograd.grad(loss, layer.parameters())
    again = torch.autograd.grad(torch.stack(steps, 1).square().sum(), layer.parameters())
    for ours, theirs in zip(again, gradients, strict=True):
        assert relative(ours, theirs) < 1e-9


def test_steps_follow_the_parameters():
    layer, x = S4D(D).eval(), torch.randn(1, D)
    with torch.no_grad():
        before, _ = layer.step(x, layer.init_state(1))
        assert torch.equal(layer.step(x, layer.init_state(1))[0], before)
        layer.kernel.C.mul_(3)
        after, _ = layer.step(x, layer.init_state(1))
        wanted = layer(x.unsqueeze(1)).squeeze(1)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, wanted)


def _change_by_fused_optimiser(layer):
    layer.kernel.C.grad = torch.ones_like(layer.kernel.C)
    torch.optim.AdamW([layer.kernel.C], lr=0.5, fused=True).step()


CHANGES = {
    "fused optimiser": _change_by_fused_optimiser,
    "in place through data": lambda layer: layer.kernel.C.data.mul_(3),
    "new data": lambda layer: setattr(layer.kernel.C, "data", layer.kernel.C.data * 3),
    "load": lambda layer: layer.load_state_dict(S4D(D).state_dict()),
    "load, assigning": lambda layer: layer.load_state_dict(S4D(D).state_dict(), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_steps_follow_every_way_to_change_parameters(change):
    layer, x = S4D(D).eval(), torch.randn(2, D)
    with torch.no_grad():
        layer.step(x, layer.init_state(2))
        for changed in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            CHANGES[change](changed)
            y, _ = changed.step(x, changed.init_state(2))
            torch.testing.assert_close(y, changed(x.unsqueeze(1)).squeeze(1))


class LowRank(torch.nn.Module):
    """An adapter: adds scale * left right to a parameter."""

    def __init__(self, like):
        super().__init__()
        self.left = torch.nn.Parameter(torch.zeros(*like.shape[:-1], 1))
        self.right = torch.nn.Parameter(torch.ones(1, like.shape[-1]))
        self.scale = 1.0

    def forward(self, x):
        return x + self.scale * self.left @ self.right


def register(layer):
    parametrize.register_parametrization(layer.kernel, "C", LowRank(layer.kernel.C))


def fill(name, value):
    def change(layer):
        with torch.no_grad():
            layer.get_parameter(name).fill_(value)

    return change


def assign(name, value):
    def change(layer):
        module, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(module), attribute, value)

    return change


def remove_adapter(layer):
    parametrize.remove_parametrizations(layer.kernel, "C")


def swap_modes(layer):
    kernel = layer.kernel
    kernel.inv_A_real, kernel.inv_A_imag = kernel.inv_A_imag, kernel.inv_A_real


ADAPTER = "kernel.parametrizations.C.0"
LATER = {  # what changes a layer, one after the other
    "bandlimit": [assign("kernel.bandlimit", 0.1), assign("kernel.bandlimit", None)],
    "bandlimit, a tensor": [
        assign("kernel.bandlimit", torch.tensor(0.1)),
        lambda layer: layer.kernel.bandlimit.fill_(0.9),
    ],
    "options": [
        assign("kernel.discretization", "bilinear"),
        assign("kernel.discretization", "dss"),
        assign("kernel.real_transform", "softplus"),
        assign("kernel.imag_transform", "exp"),
        assign("kernel.dt_sinh", True),
        assign("kernel.dt_transform", "softplus"),
    ],
    "adapter": [
        register,
        fill(f"{ADAPTER}.left", 0.5),
        assign(f"{ADAPTER}.scale", 3.0),
        fill("kernel.parametrizations.C.original", 0.1),
        remove_adapter,
        fill("kernel.C", 0.3),
    ],
    "pruning": [
        lambda layer: prune.random_unstructured(layer.kernel, "C", amount=0.5),
        fill("kernel.C_orig", 0.1),
        lambda layer: layer.kernel.C_mask.zero_(),
        lambda layer: prune.remove(layer.kernel, "C"),
        fill("kernel.C", 0.3),
        lambda layer: prune.random_unstructured(layer, "skip", amount=0.5),
        fill("skip_orig", 0.3),
    ],
    "weight_norm by hooks": [
        lambda layer: torch.nn.utils.weight_norm(layer.kernel, "B"),
        fill("kernel.B_g", 0.3),
        lambda layer: torch.nn.utils.remove_weight_norm(layer.kernel, "B"),
        fill("kernel.B", 0.3),
        lambda layer: torch.nn.utils.weight_norm(layer, "skip"),
        fill("skip_g", 0.3),
    ],
    "swapped": [swap_modes],
    "replaced": [assign("kernel", S4DKernel(D)), lambda layer: layer.kernel.C.data.zero_()],
    "inputs through a hook": [
        lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda layer: layer.register_forward_pre_hook(
            lambda module, args, options: ((3 * args[0],), options), with_kwargs=True
        ),
    ],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", LATER)
def test_steps_follow_what_changes_later(name):
    layer, x = S4D(D).eval(), torch.randn(2, D)
    with torch.no_grad():
        before, _ = layer.step(x, layer.init_state(2))
        moved = 0
        for change in LATER[name]:
            change(layer)
            y, _ = layer.step(x, layer.init_state(2))
            chunk, _ = layer.prefill(x.unsqueeze(1), layer.init_state(2))
            wanted = layer(x.unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(y, wanted)
            torch.testing.assert_close(chunk.squeeze(1), wanted)
            moved += not torch.allclose(wanted, before, rtol=1e-3)
            before = wanted
    assert moved >= len(LATER[name]) // 2


def test_the_system_is_kept_while_nothing_changes_and_never_what_a_subclass_reads():
    layer, x, made = S4D(D).eval(), torch.randn(2, D), []

    factors = [1.0]

    class Louder(S4DKernel):
        def system(self, rate=1.0):
            log_dt, A, B, C = super().system(rate)
            return log_dt, A, B, factors[0] * C

    class Doubled(S4DKernel):
        def forward(self, length, rate=1.0):
            return 2 * super().forward(length, rate)

    with torch.no_grad():
        _, state = layer.step(x, layer.init_state(2))
        layer._discrete = lambda: made.append(1)
        for _ in range(3):
            _, state = layer.step(x, state)
        assert not made
        del layer._discrete
        layer.kernel = Louder(D)
        for factor in (1.0, 5.0):
            factors[0] = factor
            y, _ = layer.step(x, layer.init_state(2))
            torch.testing.assert_close(y, layer(x.unsqueeze(1)).squeeze(1))
    layer.kernel = Doubled(D)
    with pytest.raises(TypeError, match=r"class Doubled has no recurrence, .* than S4DKernel's"):
        layer.step(x, state)


def test_steps_with_other_parameters_for_one_call():
    class Step(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer.step(x, self.layer.init_state(2))[0]

    layer, other, x = S4D(D), S4D(D), torch.randn(2, D)
    others = {f"layer.{n}": t for n, t in other.state_dict().items()}
    with torch.no_grad():
        for _ in range(2):
            for made, y in (
                (layer, layer.step(x, layer.init_state(2))[0]),
                (other, torch.func.functional_call(Step(layer), others, (x,))),
            ):
                torch.testing.assert_close(y, made(x.unsqueeze(1)).squeeze(1))


def test_steps_of_a_meta_layer():
    with torch.device("meta"):
        layer, x = S4D(D), torch.randn(2, D)
        state = layer.init_state(2)
        with torch.no_grad():
            for _ in range(2):
                y, state = layer.step(x, state)
    assert y.is_meta and y.shape == (2, D) and state.shape == (2, D, 32, 2)


SLOW = [  # the last is the number of steps; the rest goes through chunks
    ("zoh", 1e-6, False, 40_000),
    ("zoh", 1e-4, True, 500),
    ("bilinear", 1e-6, False, 500),
    ("bilinear", 1e-4, True, 500),
    ("dss", 1e-6, True, 500),
]


@pytest.mark.parametrize("discretization, decay, random, steps", SLOW)
def test_slow_modes_to_round_off(discretization, decay, random, steps):
    """A state in float32 is off by 5e-5 to 5e-4 after 40,000 steps: each sum is rounded."""
    length, options = 40_000, {"discretization": discretization, "activation": None}
    layer = S4D(2, d_state=4, dt_min=1e-3, dt_max=1e-3, postact=None, **options)
    with torch.no_grad():
        layer.kernel.inv_A_real.fill_(math.log(decay / 1e-3))
        layer.kernel.inv_A_imag.copy_(torch.tensor([[0.0, 3.0], [0.0, 1.0]]))
        layer.linear.weight.copy_(torch.eye(2))
        layer.linear.bias.zero_()
        x = torch.randn(1, length, 2) if random else torch.ones(1, length, 2)
        log_dt, A, B, C = layer.kernel.system()
        k = reference.ssm_kernel(log_dt, A, C, length, B=B, discretization=discretization)[0]
        wanted = reference.fftconv_fft(x.double(), k, layer.skip[0].double(), layout="blh")
        state, outputs = layer.init_state(1), []
        single = steps // 2 if steps < length else steps
        for x_t in x[:, :single].unbind(1):
            y, state = layer.step(x_t, state)
            outputs.append(y)
        for chunk in x[:, single : length - (steps - single)].split(1300, 1):
            y, state = layer.prefill(chunk, state)
            outputs.extend(y.unbind(1))
        for x_t in x[:, length - (steps - single) :].unbind(1):
            y, state = layer.step(x_t, state)
            outputs.append(y)
    error = (torch.stack(outputs, 1) - wanted).abs().max() / wanted.abs().max()
    assert error < 5e-7, error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_steps_are_the_convolution_and_rows_of_states_can_be_chosen(dtype):
    layer, x = S4D(D).to(dtype), torch.randn(4, 300, D).to(dtype)
    rows = torch.tensor([3, 1, 1])
    with torch.no_grad():
        wanted = layer(x)[rows]
        y, state = layer.prefill(x[:, :250], layer.init_state(4))
        state = state.index_select(0, rows)
        outputs = [y[rows]]
        for t in range(250, 300):
            y, state = layer.step(x[rows, t], state)
            outputs.append(y.unsqueeze(1))
    assert relative(torch.cat(outputs, 1).float(), wanted.float()) < 2 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_steps_under_transforms_and_inference_mode():
    layer, x = S4D(D).eval().requires_grad_(False), torch.randn(2, D, requires_grad=True)
    with torch.inference_mode():
        inside = S4D(D)
        inside.step(x, inside.init_state(2))
        layer.step(x, layer.init_state(2))  # what it keeps is of use outside
    layer.step(x, layer.init_state(2))[0].sum().backward()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer.step(x, self.layer.init_state(2))[0]

    def step(C):
        return torch.func.functional_call(Step(), {"layer.kernel.C": C}, (x.detach(),))

    def convolution(C):
        y = torch.func.functional_call(layer, {"kernel.C": C}, (x.detach().unsqueeze(1),))
        return y.squeeze(1)

    C = layer.kernel.C.detach()
    with torch.no_grad():
        ours, wanted = (torch.func.jvp(f, (C,), (C,))[1] for f in (step, convolution))
        torch.testing.assert_close(ours, wanted)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(C, C)
            tangent = torch.autograd.forward_ad.unpack_dual(step(dual)).tangent
        torch.testing.assert_close(tangent, wanted)
        ours = torch.func.vmap(step)(torch.stack([C, 2 * C]))[1]
        torch.testing.assert_close(ours, convolution(2 * C))


def test_steps_keep_their_precision_under_autocast():
    layer, x = S4D(D, activation=None).eval(), torch.randn(2, 20, D)
    outputs = []
    layer._mix = lambda y: outputs.append(y) or y
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = layer.init_state(2)
        for t in range(20):
            _, state = layer.step(x[:, t], state)
        layer(x)
    assert relative(torch.stack(outputs[:-1], 1), outputs[-1]) < 1e-5


def test_an_empty_batch_has_a_recurrence():
    layer = S4D(D, heads=2)
    y, state = layer.prefill(torch.randn(0, 4, D), layer.init_state(0))
    assert y.shape == (0, 4, D) and state.shape == (0, D, 32, 2)


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


def test_steps_in_half_precision_and_their_contract():
    layer = S4D(D).bfloat16()
    state = layer.init_state(2)
    assert state.dtype == torch.float64 and state.shape == (2, D, 32, 2)
    y, state = layer.step(torch.randn(2, D).bfloat16(), state)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float64
    y, _ = layer.prefill(torch.randn(2, 9, D).bfloat16(), state)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 9, D)
    with pytest.raises(ValueError, match=r"state must be \(batch=1, d_model=6, modes=32"):
        layer.step(torch.randn(1, D).bfloat16(), state)
    with pytest.raises(TypeError, match="x must be bfloat16"):
        layer.step(torch.randn(2, D), state)
    with pytest.raises(TypeError, match="state must be float64"):
        layer.step(torch.randn(2, D).bfloat16(), state.float())
    with pytest.raises(ValueError, match="batch must be an integer >= 0, got -1"):
        layer.init_state(-1)
    with pytest.raises(TypeError, match="two-sided"):
        S4D(D, bidirectional=True).init_state(1)
    with pytest.raises(TypeError, match="dss_softmax"):
        S4D(D, discretization="dss_softmax").init_state(1)


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
