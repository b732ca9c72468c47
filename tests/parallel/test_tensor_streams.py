"""Layers whose channels are divided among processes, step by step: equal to one process."""

import copy
import warnings

import pytest
import torch
from processes import run
from test_tensor_parallel import D, divided, made

close = {"rtol": 1e-12, "atol": 1e-12}
LENGTH = 50


def steps_equal_one_process(name):
    warnings.filterwarnings("ignore", message=".*is not seen")  # inputs longer than the kernel
    layer = made(name).eval()
    own = divided(copy.deepcopy(layer))
    width = layer.d_model
    torch.manual_seed(5)
    x = torch.randn(2, LENGTH, width, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x)
        state, found = own.init_state(2, spread=True), []
        y, state = own.prefill(x[:, :15], state, lengths=torch.tensor([15, 9]))
        torch.testing.assert_close(y[0], wanted[0, :15], **close)
        state.reset([1])
        chunk, state = own.prefill(x[:1, 15:20], state.select([0]))
        found.append(chunk)
        for t in range(20, LENGTH):
            y, state = own.step(x[:1, t], state)
            found.append(y.unsqueeze(1))
        torch.testing.assert_close(torch.cat(found, 1), wanted[:1, 15:], **close)
        if not name.startswith("s4d"):  # which makes its system anew at every step
            own.skip.mul_(2)
            with pytest.raises(ValueError, match="parameters have changed"):
                own.step(x[:1, 0], state)
    # Gradients of a chunk and of the state after it.
    x, z = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, state = own.prefill(x[:, :15], own.init_state(2))
    (y.sum() + own.prefill(x[:, 15:], state)[0].sum()).backward()
    layer.load_state_dict(
        {
            n: t.full_tensor() if hasattr(t, "full_tensor") else t
            for n, t in own.state_dict().items()
        }
    )
    layer(z).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, **close)
    for (n, p), q in zip(layer.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(
            q.grad.full_tensor(), p.grad, msg=lambda m, n=n: f"{n}: {m}", **close
        )


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    "name", ["long_conv", "sgconv", "hyena", "s4d", "s4d, shared", "s4d, real"]
)
def test_steps_of_divided_layers(world, name):
    assert D == 7  # which three processes share unevenly
    run(world, steps_equal_one_process, name)
