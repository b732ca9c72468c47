"""Layers under torch.compile, torch.export and torch.jit.trace."""

import pytest
import torch
from layer_table import EVERY, LAYERS, D
from torch import nn

from seqconv import S4D, S4DKernel, SGConvKernel
from seqconv.layers import s4d_kernel, sgconv
from seqconv.streaming import S4DState

OPTIONS = {"plain": {}, "two-sided": {"bidirectional": True}, "heads": {"heads": 3}}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize(
    "name, options", [*((n, {}) for n in LAYERS), ("s4d", {"backend": "torch"})]
)
def test_compile_and_export(name, options):
    torch._dynamo.reset()
    layer = LAYERS[name](bidirectional=True, **options)
    x = torch.randn(2, 50, D)

    def gradients(function):
        layer.zero_grad()
        function(x).square().sum().backward()
        return [p.grad for p in layer.parameters()]

    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients(compiled), gradients(layer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    # A graph of LongConv holds up to l_max, one of S4D for every length.
    longest = 5000 if name == "s4d" else 79
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=longest)}
    shapes = {"x": sizes}
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=shapes)
    other = torch.randn(3, min(longest, 777) - 2, D)
    torch.testing.assert_close(program.module()(other), layer(other), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_jit_trace(name, padded, tmp_path):
    """Equal for the traced length, also from a file and in its gradients; refused for every other."""
    layer = EVERY[name]()
    mask = torch.zeros(2, 30).masked_fill(torch.arange(30) > 20, -torch.inf)
    options = (mask,) if padded else ()
    traced = torch.jit.trace(layer, (torch.randn(2, 30, D), *options))
    torch.jit.save(traced, tmp_path / "layer.pt")
    loaded = torch.jit.load(tmp_path / "layer.pt")
    x = torch.randn(2, 30, D, requires_grad=True)
    wanted = layer(x, *options)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    for made in (traced, loaded):
        y = made(x, *options)
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], gradient)
        for length in (1, 29, 31):
            wrong = (torch.zeros(2, length),) if padded else ()
            with pytest.raises(RuntimeError, match=r"unflatten: .* size of dim 1"):
                made(torch.randn(2, length, D), *wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_of_steps_follows_the_parameters():
    layer, x = S4D(D), torch.randn(2, D)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, modes):
            y, state = self.layer.step(x, S4DState(modes=modes, kernel=0))
            return y, state.modes

    with torch.no_grad():
        _, state = layer.step(x, layer.init_state(2))
        traced = torch.jit.trace(Step(), (x, state.modes))
        layer.kernel.C.mul_(2)
        wanted, _ = layer.step(x, S4DState(modes=state.modes.clone(), kernel=0))
        torch.testing.assert_close(traced(x, state.modes)[0], wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "options, call",
    [
        *(({"discretization": name}, {}) for name in ("bilinear", "dss", "dss_softmax")),
        ({}, {"rate": 2.0}),
        ({"bidirectional": True}, {"lengths": torch.tensor([50, 20])}),
    ],
    ids=str,
)
def test_compile_s4d_options(options, call):
    torch._dynamo.reset()
    layer, x = S4D(D, **options), torch.randn(2, 50, D)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, layer):
        y = function(x, **call)
        results.append([y, *torch.autograd.grad(y.square().sum(), layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


PARTS = [("s4d", {"bandlimit": 0.5, "heads": 2}), ("sgconv", {"decay": "power", "init_scale": 1})]
PARTS += [
    pytest.param(
        "s4d", {"is_real": True, "init": "real", "train_B": False}, marks=pytest.mark.slow
    ),
    pytest.param("sgconv", {"init_scale": 1}, marks=pytest.mark.slow),
]
PARTS += [("hyena", {"order": 3}), ("butterfly", {"heads": 2})]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name, options", PARTS, ids=str)
def test_what_the_compiler_does_not_look_into(name, options):
    """The parameters' operator: in a graph of few operations, right in values and gradients, with guards on
    every option that changes it, and not in exported programs."""
    torch._dynamo.reset()
    layer, x, sizes = EVERY[name](**options), torch.randn(2, 50, D), []
    kernel = layer.filter if name == "hyena" else layer.kernel

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for change in (("bandlimit", 0.1), ("upsample", "nearest"), ("l_max", 60), None):
        for rate in (1.0, 2.0) if name[:2] in ("s4", "sg") else (1.0,):
            results = []
            for function in (compiled, layer):
                y = function(x, rate=rate)
                results.append([y, *torch.autograd.grad(y.square().sum(), layer.parameters())])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        if change is not None:
            setattr(kernel, *change)
    torch.compile(layer, fullgraph=True, backend=count)(x)
    assert len(sizes) == 1 and sizes[0] < 60
    with torch.no_grad():
        program = torch.export.export(layer.eval(), (x,))
    names = [str(node.target) for node in program.graph.nodes]
    hidden = ("s4d_kernel", "sgconv_taps", "hyena_filter")
    assert not any(part in name for part in hidden for name in names)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opaque_operators_keep_torchs_contract():
    torch.use_deterministic_algorithms(
        False
    )  # opcheck's own machinery has some without such a form
    kernel = S4DKernel(D, d_state=8, bandlimit=0.5).double()
    tensors, *rest = kernel._arguments(kernel.read(), 2.0, 1)
    flat = s4d_kernel.s4d_kernel.flat(s4d_kernel.Parameters(*tensors))
    rest = 20, False, True, *rest
    torch.library.opcheck(s4d_kernel.s4d_kernel.fwd, (*flat, *rest), atol=1e-10, rtol=1e-10)
    kernel = SGConvKernel(D, l_max=40, decay="power").double()
    flat = sgconv._taps_op.flat(sgconv.Parts(kernel.pieces, kernel.decay, kernel.norm))
    rest = (["linear", "cat", "power"], 0, False, 2.0, 20)
    torch.library.opcheck(sgconv._taps_op.fwd, (*flat, *rest), atol=1e-10, rtol=1e-10)
    with pytest.raises(RuntimeError, match="in eager mode only"):
        torch.func.grad(lambda t: sgconv._taps_op.fwd(t, *flat[1:], *rest).sum())(flat[0])
