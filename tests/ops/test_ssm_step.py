"""A step of a state space model as an operator, against the formula with complex numbers in float64."""

import platform

import pytest
import torch
from step_cases import ACTIVATIONS, SIZES, check, copied, expected, problem

from seqconv import reference, use_backend
from seqconv.backends import cpu
from seqconv.ops.ssm_step import Step, ssm_step

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
raw = torch.ops.seqconv.ssm_step.default


def bound(dtype) -> float:
    """Of the activation, which is computed in float32 but for float64; rounding to a half precision comes after."""
    return 1e-15 if dtype == torch.float64 else 3e-7


def run(step: Step, activation: str) -> torch.Tensor:
    state = step.state
    y, after = ssm_step(step, activation)
    assert after is state
    return y


def check_all() -> None:
    for dtype in DTYPES:
        for i, sizes in enumerate(SIZES):
            check(run, problem(*sizes, dtype), ACTIVATIONS[i % 4], bound(dtype))


def test_the_twin_is_the_formula():
    for activation in ACTIVATIONS:
        step = problem(3, 2, 5, 4, torch.float64)
        found = reference.ssm_step(*step, None if activation == "none" else activation)
        for ours, theirs in zip(found, expected(step, activation), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_sizes_and_dtypes(isa):
    check_all()


def test_every_number_of_modes_and_activation(isa):
    for modes in range(1, 41):
        for activation in ACTIVATIONS:
            check(run, problem(2, 2, 3, modes), activation, 3e-7)


def test_torch_does_the_same_elsewhere():
    with use_backend("reference"):
        check_all()


def test_rows_depend_neither_on_others_nor_on_threads(isa):
    threads = torch.get_num_threads()
    step = problem(9, 2, 130, 33)
    together = copied(step)
    try:
        torch.set_num_threads(2)  # as many modes as are worth a thread
        y = run(together, "gelu")
        torch.set_num_threads(1)
        for rows in (slice(0, 3), slice(2, 8), slice(8, 9)):
            few = step._replace(state=step.state[rows].clone(), x=step.x[rows])
            assert torch.equal(run(few, "gelu"), y[rows])
            assert torch.equal(few.state, together.state[rows])
    finally:
        torch.set_num_threads(threads)


def test_nothing_to_do():
    step = problem(0, 2, 3, 4)
    assert run(step, "gelu").shape == (0, 6)
    step = problem(2, 2, 3, 0)
    assert torch.equal(raw(*step, "none"), (step.skip * step.x.unsqueeze(1)).flatten(1))


def test_infinite_inputs_stay_in_their_rows():
    step = problem(5, 2, 6, 3)
    wanted = run(copied(step), "gelu").unflatten(1, (2, 6))
    step.x[2, 4] = torch.inf
    y = run(step, "gelu").unflatten(1, (2, 6))
    assert not torch.isfinite(y[2, :, 4]).any()
    y[2, :, 4] = wanted[2, :, 4]
    assert torch.equal(y, wanted)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="this processor's mode")
def test_states_that_decay_end_at_zero(isa):
    """Arithmetic on numbers below the smallest normal one may take a hundred times as long."""
    step = problem(1, 1, 3, 5)._replace(x=torch.zeros(1, 3))
    step.power[:] = torch.tensor([0.9, 0.0])
    step.state.fill_(1e-305)
    for _ in range(100):
        run(step, "none")
    assert not step.state.any()


def without_skip(step, activation):
    return step._replace(skip=torch.zeros_like(step.skip)), activation


def conjugate_output(step, activation):
    return step._replace(output=step.output * torch.tensor([1.0, -1.0]).double()), activation


def conjugate_power(step, activation):
    return step._replace(power=step.power * torch.tensor([1.0, -1.0]).double()), activation


def other_head(step, activation):
    return step._replace(output=step.output.flip(0)), activation


def no_activation(step, activation):
    return step, "none"


def last_mode_left_out(step, activation):
    output = step.output.clone()
    output[:, :, -1] = 0
    return step._replace(output=output), activation


MUTATIONS = [
    without_skip,
    conjugate_output,
    conjugate_power,
    other_head,
    no_activation,
    last_mode_left_out,
]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(mutation, monkeypatch):
    right = cpu.ssm_step
    monkeypatch.setattr(cpu, "ssm_step", lambda y, *args: right(y, *mutation(*args)))
    with pytest.raises(AssertionError):
        check_all()


def test_a_late_state_and_a_state_that_stays_are_caught(monkeypatch):
    right = cpu.ssm_step

    def late(y, step, activation):
        """y is made of the state before the step."""
        before = copied(step)
        right(torch.empty_like(y), step, activation)
        still = before._replace(
            power=torch.zeros_like(step.power), input=torch.zeros_like(step.input)
        )
        still.power[..., 0] = 1
        right(y, still, activation)

    def staying(y, step, activation):
        right(y, copied(step), activation)

    for mutant in (late, staying):
        monkeypatch.setattr(cpu, "ssm_step", mutant)
        with pytest.raises(AssertionError):
            check_all()


def test_it_passes_opcheck_and_compiles():
    torch.use_deterministic_algorithms(False)  # opcheck has operations without a deterministic form
    step = problem(3, 2, 5, 4)
    torch.library.opcheck(raw, (*copied(step), "gelu"))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: ssm_step(Step(*tensors), "silu"), backend="aot_eager", fullgraph=True
    )
    ours, theirs = copied(step), copied(step)
    for _ in range(2):
        y, state = compiled(*ours)
        assert torch.equal(y, run(theirs, "silu"))
        assert torch.equal(state, theirs.state) and torch.equal(ours.state, theirs.state)


def test_modes_of_torch_see_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    step = problem(3, 2, 5, 4)
    wanted = copied(step)
    y = run(wanted, "gelu")
    with Watch(), FlopCounterMode(display=False):
        assert torch.equal(run(step, "gelu"), y)
    assert raw in seen and torch.equal(step.state, wanted.state)


def test_autograd_notices_a_change_of_what_it_saved():
    for function in (lambda step: ssm_step(step, "none"), lambda step: raw(*step, "none")):
        step = problem(2, 1, 3, 4)
        leaf = torch.ones_like(step.state).requires_grad_()
        product = (leaf * step.state).sum()
        function(step)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_derivatives_take_the_definition():
    step = problem(2, 2, 3, 4, torch.float64)
    leaves = [t.contiguous().requires_grad_() for t in step]
    before = step.state.clone()
    y, state = ssm_step(Step(*leaves), "gelu")
    assert torch.equal(step.state, before) and state is not step.state
    found = torch.autograd.grad(y.sum() + state.square().sum(), leaves)
    y64, state64 = expected(Step(*leaves), "gelu")
    wanted = torch.autograd.grad(y64.sum() + state64.square().sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="no derivatives"):
        raw(*leaves, "gelu")
    y, _ = torch.func.vmap(lambda x: ssm_step(step._replace(x=x), "gelu"))(
        torch.stack([step.x] * 2)
    )
    torch.testing.assert_close(y[1], y64.detach())
    assert torch.equal(step.state, before)


def test_states_of_other_strides():
    step = problem(4, 1, 3, 5)
    wanted = copied(step)
    y = run(wanted, "gelu")
    turned = step.state.movedim(0, 2).contiguous().movedim(2, 0)
    assert not turned.is_contiguous()
    assert torch.equal(raw(*step._replace(state=turned), "gelu"), y)
    assert torch.equal(turned, wanted.state)
    turned = step.state.movedim(0, 2).contiguous().movedim(2, 0)
    found, after = ssm_step(step._replace(state=turned), "gelu")
    assert torch.equal(found, y) and torch.equal(after, wanted.state)
    same = step.state[:1].expand(4, -1, -1, -1)
    with pytest.raises(RuntimeError, match="single memory location"):
        raw(*step._replace(state=same), "gelu")
    _, after = ssm_step(step._replace(state=same), "gelu")
    assert after.is_contiguous() and not torch.equal(after[0], after[1])


def test_lazy_tensors_are_resolved():
    step = problem(2, 1, 3, 4)
    y = run(copied(step), "gelu")
    lazy = copied(step)._replace(x=torch._neg_view(-step.x))
    assert lazy.x.is_neg() and torch.equal(run(lazy, "gelu"), y)
    lazy = step._replace(state=torch._neg_view(-step.state))
    assert lazy.state.is_neg() and torch.equal(ssm_step(lazy, "gelu")[0], y)


WRONG = {
    "x must be \\(batch, channels\\), got": {"x": torch.zeros(2, 3, 1)},
    "state must be \\(batch=2, channels=3, modes=4": {"state": torch.zeros(1, 3, 4, 2).double()},
    "state must be float64": {"state": torch.zeros(2, 3, 4, 2)},
    "power must be \\(channels=3, modes=4": {"power": torch.zeros(3, 5, 2).double()},
    "input must be \\(channels=3, modes=4": {"input": torch.zeros(1, 4, 2).double()},
    "output must be \\(heads, channels=3": {"output": torch.zeros(1, 4, 4, 2).double()},
    "skip must be \\(heads=1, channels=3": {"skip": torch.zeros(2, 3)},
}


@pytest.mark.parametrize("message", WRONG)
def test_the_raw_operator_checks_its_arguments(message):
    step = problem(2, 1, 3, 4)
    with pytest.raises((ValueError, TypeError), match=message):
        raw(*step._replace(**WRONG[message]), "gelu")
    with pytest.raises(ValueError, match="activation must be one of 'none', 'gelu'"):
        raw(*step, "tanh")
