"""S4D step by step and chunk by chunk: the convolution, whatever changes the parameters in between."""

import copy
import math
import pickle

import pytest
import torch
from accuracy import rel_l2
from torch.nn.utils import parametrize, prune

from seqconv import S4D, S4DKernel, reference

D = 6


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
    assert rel_l2(torch.stack(steps, 1), wanted[:, :50]) < 1e-12
    for chunk in (1, 7, 92):  # then chunks, then steps again
        y, state = layer.prefill(x[:, 50 : 50 + chunk], state)
        steps.extend(y.unbind(1))
        x = torch.cat([x[:, :50], x[:, 50 + chunk :]], 1)
    for t in range(50, 100):
        y, state = layer.step(x[:, t], state)
        steps.append(y)
    assert rel_l2(torch.stack(steps, 1), wanted) < 1e-12
    loss = wanted.square().sum()
    gradients = torch.autograd.grad(loss, layer.parameters())
    again = torch.autograd.grad(torch.stack(steps, 1).square().sum(), layer.parameters())
    for ours, theirs in zip(again, gradients, strict=True):
        assert rel_l2(ours, theirs) < 1e-9


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
    assert y.is_meta and y.shape == (2, D) and state.modes.shape == (2, D, 32, 2)


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
        state = state.select(rows)
        outputs = [y[rows]]
        for t in range(250, 300):
            y, state = layer.step(x[rows, t], state)
            outputs.append(y.unsqueeze(1))
    assert rel_l2(torch.cat(outputs, 1).float(), wanted.float()) < 2 * torch.finfo(dtype).eps


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
    assert rel_l2(torch.stack(outputs[:-1], 1), outputs[-1]) < 1e-5


def test_an_empty_batch_has_a_recurrence():
    layer = S4D(D, heads=2)
    y, state = layer.prefill(torch.randn(0, 4, D), layer.init_state(0))
    assert y.shape == (0, 4, D) and state.modes.shape == (0, D, 32, 2)


def test_steps_in_half_precision_and_their_contract():
    layer = S4D(D).bfloat16()
    state = layer.init_state(2)
    assert state.dtype == torch.float64 and state.modes.shape == (2, D, 32, 2)
    y, state = layer.step(torch.randn(2, D).bfloat16(), state)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float64
    y, _ = layer.prefill(torch.randn(2, 9, D).bfloat16(), state)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 9, D)
    with pytest.raises(ValueError, match=r"state must have batch=1 like x, got 2"):
        layer.step(torch.randn(1, D).bfloat16(), state)
    with pytest.raises(TypeError, match="x must be bfloat16"):
        layer.step(torch.randn(2, D), state)
    with pytest.raises(TypeError, match="state must be float64"):
        layer.step(torch.randn(2, D).bfloat16(), state.map(torch.Tensor.float))
    with pytest.raises(ValueError, match="batch must be an integer >= 0, got -1"):
        layer.init_state(-1)
    with pytest.raises(TypeError, match="two-sided"):
        S4D(D, bidirectional=True).init_state(1)
    with pytest.raises(TypeError, match="dss_softmax"):
        S4D(D, discretization="dss_softmax").init_state(1)
