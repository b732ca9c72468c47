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


def packed_prompts_equal_one_process(name):
    """Prompts of 15, 0 and 9 steps in a pack, with their gradients, and the steps after them."""
    warnings.filterwarnings("ignore", message=".*is not seen")
    layer = made(name).eval()
    own = divided(copy.deepcopy(layer))
    torch.manual_seed(5)
    prompts, pack = torch.randn(24, layer.d_model).double(), torch.tensor([0, 15, 15, 24])
    x, found = torch.randn(3, layer.d_model).double(), []
    for one in (layer, own):
        with torch.no_grad():
            y, state = one.prefill(prompts, one.init_state(3), cu_seqlens=pack)
            now, _ = one.step(x, state)
        u = prompts.clone().requires_grad_()
        z, _ = one.prefill(u, one.init_state(3), cu_seqlens=pack, max_seqlen=20)
        z.sin().sum().backward()
        found.append((y, now, z, u.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    for p, q in zip(layer.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, **close)
    with pytest.raises(ValueError, match=r"prefill: lengths must be None with cu_seqlens"):
        own.prefill(prompts, own.init_state(3), lengths=pack[:3], cu_seqlens=pack)
    with pytest.raises(ValueError, match=r"prefill: max_seqlen must be None without cu_seqlens"):
        own.prefill(prompts, own.init_state(3), max_seqlen=20)


@pytest.mark.parametrize("name", ["long_conv", "sgconv", "hyena", "s4d", "s4d, shared"])
def test_packed_prompts_of_divided_layers(name):
    run(3, packed_prompts_equal_one_process, name)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    "name", ["long_conv", "sgconv", "hyena", "s4d", "s4d, shared", "s4d, real"]
)
def test_steps_of_divided_layers(world, name):
    assert D == 7  # which three processes share unevenly
    run(world, steps_equal_one_process, name)
