"""Steps of state space models, and what is right: the formula with complex numbers in float64."""

import torch
from accuracy import rel_l2

from seqconv.ops.ssm_step import Step
from seqconv.reference import activate

ACTIVATIONS = ("none", "gelu", "silu", "relu")
SIZES = [  # batch, heads, channels, modes
    (1, 1, 1, 1),
    (5, 3, 19, 7),
    (4, 2, 33, 32),
    (9, 1, 64, 5),
    (2, 2, 70, 40),
]


def problem(batch, heads, channels, modes, dtype=torch.float32) -> Step:
    """Modes of any damping, and x that is a column of something larger."""
    normal = lambda *shape: torch.randn(*shape, 2, dtype=torch.float64)  # noqa: E731
    size = torch.rand(channels, modes, dtype=torch.float64) ** 0.1
    turn = 3 * torch.randn(channels, modes, dtype=torch.float64)
    return Step(
        state=normal(batch, channels, modes),
        x=torch.randn(batch, channels, 3).to(dtype)[..., 1],
        skip=torch.randn(heads, channels).to(dtype),
        power=torch.stack([size * turn.cos(), size * turn.sin()], -1),
        input=normal(channels, modes),
        output=normal(heads, channels, modes),
    )


def copied(step: Step) -> Step:
    """The same with a state of its own."""
    return step._replace(state=step.state.clone())


def expected(step: Step, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """y (batch, heads channels) and the new state, by the formula."""
    state, power, input, output = (
        torch.view_as_complex(t.contiguous()) for t in (step.state, *step[3:])
    )
    x, skip = step.x.double(), step.skip.double()
    new = power * state + input * x.unsqueeze(-1)
    v = (output * new.unsqueeze(1)).real.sum(-1) + skip * x.unsqueeze(1)
    return activate(v, activation).flatten(1), torch.view_as_real(new)


def check(run, step: Step, activation: str, bound: float) -> None:
    """run(step, activation) -> y, which changes the state, is right to round-off."""
    y64, state64 = expected(step, activation)
    before, step = step.state, copied(step)
    y = run(step, activation)
    assert y.dtype == step.x.dtype and y.shape == y64.shape
    assert rel_l2(step.state, state64) < 1e-15
    eps = max(torch.finfo(y.dtype).eps, bound)
    sums, _ = expected(step._replace(state=before), "none")  # of whose size the error is
    assert (y - y64).abs().max() <= eps * sums.abs().max(), (step.output.shape, activation)
    assert (y - y64).norm() <= eps * sums.norm()
