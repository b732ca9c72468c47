"""S4D.step as one operator: what it does with the state, the parameters' sizes, and the modules around it."""

import pytest
import torch

from seqconv import S4D, S4DKernel

D = 6


def test_a_step_uses_up_the_state_that_it_gets():
    """Without gradients it is changed in place, unless its elements share their memory."""
    layer, x = S4D(D, heads=2).eval(), torch.randn(3, D)
    with torch.no_grad():
        _, state = layer.prefill(torch.randn(3, 9, D), layer.init_state(3))
        before = state.modes.clone()
        y, after = layer.step(x, state)
        assert after is state and not torch.equal(state.modes, before)
        shared = state.map(lambda _: before[:1].expand(3, -1, -1, -1))
        y_shared, after_shared = layer.step(x[:1].expand(3, -1), shared)
        assert torch.equal(shared.modes[2], before[0])
        assert torch.equal(after_shared.modes[2], after.modes[0])
        assert torch.equal(y_shared[2], y[0])
    leaf = state.map(lambda _: before.clone().requires_grad_())
    y_again, after_again = layer.step(x, leaf)
    assert torch.equal(leaf.modes, before)
    torch.testing.assert_close(y_again, y)
    torch.testing.assert_close(after_again.modes, after.modes, rtol=1e-14, atol=1e-14)
    assert torch.autograd.grad(y_again.sum() + after_again.modes.sum(), leaf.modes)[0].any()


def test_parameters_of_other_sizes_are_refused():
    """A compiled step would read memory that is not there."""
    x, changes = (
        torch.randn(2, D),
        [
            (
                lambda layer: setattr(layer, "kernel", S4DKernel(2 * D)),
                r"d_model=6.*got \(12, 32, 2\)",
            ),
            (lambda layer: setattr(layer, "kernel", S4DKernel(D, heads=2)), r"heads=1.*got \(2, 6"),
            (
                lambda layer: setattr(layer, "skip", torch.nn.Parameter(torch.ones(2, D))),
                "skip must be",
            ),
            (lambda layer: setattr(layer.kernel, "modes", 3), "state must be .*modes=3"),
            (
                lambda layer: layer.register_forward_pre_hook(
                    lambda module, args: (args[0][..., 1:],)
                ),
                r"x must be \(batch, d_model=6\), got \(2, 5\)",
            ),
        ],
    )
    for change, message in changes:
        layer = S4D(D).eval()
        with torch.no_grad():
            _, state = layer.step(x, layer.init_state(2))
            change(layer)
            with pytest.raises(ValueError, match=message):
                layer.step(x, state)


def test_a_kernel_whose_system_is_in_single_precision():
    class Single(S4DKernel):
        def system(self, rate=1.0, channels=None):
            return tuple(t.float() for t in super().system(rate, channels))

    layer, x = S4D(D, heads=2, discretization="dss").eval(), torch.randn(2, D)
    layer.kernel = Single(D, heads=2, discretization="dss")
    with torch.no_grad():
        y, _ = layer.step(x, layer.init_state(2))
        torch.testing.assert_close(y, layer(x.unsqueeze(1)).squeeze(1))


def test_compiled_steps():
    torch._dynamo.reset()
    layer, x = S4D(D, heads=2).eval(), torch.randn(3, 8, D)
    compiled = torch.compile(layer.step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        state, again = layer.init_state(3), layer.init_state(3)
        for x_t in x.unbind(1):
            y, after = compiled(x_t, state)
            wanted, again = layer.step(x_t, again)
            torch.testing.assert_close(y, wanted)
            torch.testing.assert_close(state.modes, again.modes, rtol=1e-14, atol=1e-14)
            assert torch.equal(after.modes, state.modes)
    y, after = compiled(x[:, 0], state)
    assert y.requires_grad and after.modes.requires_grad
    assert torch.equal(state.modes, again.modes)


def test_hooks_and_other_modules_in_the_block_are_called():
    """Around a step torch's calls of dropout and of the linear map are left out only where nobody sees it."""
    layer, x, seen = S4D(D, dropout=0.5).eval(), torch.randn(2, D), []
    with torch.no_grad():
        wanted, _ = layer.step(x, layer.init_state(2))
        handles = [
            part.register_forward_hook(lambda module, *_: seen.append(module))
            for part in (layer.dropout, layer.linear)
        ]
        assert torch.equal(layer.step(x, layer.init_state(2))[0], wanted)
        assert seen == [layer.dropout, layer.linear]
        for handle in handles:
            handle.remove()
        layer.dropout.train()
        assert not torch.equal(layer.step(x, layer.init_state(2))[0], wanted)
        layer.dropout.eval()
        torch.nn.utils.parametrize.register_parametrization(
            layer.linear, "weight", torch.nn.Softplus()
        )
        y, _ = layer.step(x, layer.init_state(2))
        assert not torch.equal(y, wanted)
        torch.testing.assert_close(y, layer(x.unsqueeze(1)).squeeze(1))
        layer.linear = torch.nn.Linear(D, 3)
        with pytest.raises(ValueError, match=r"linear \(Linear\) must map \(2, 6\) to \(2, 12\)"):
            layer.step(x, layer.init_state(2))
