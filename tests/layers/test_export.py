"""Models outside of this package: decompositions, frozen kernels, ONNX graphs in onnxruntime, exported steps."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils import _pytree

import seqconv
import seqconv.onnx
from seqconv import export

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch's exporter
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

L, D = 101, 4
LAYERS = {
    "s4d": lambda: seqconv.S4D(D),
    "s4d two-sided": lambda: seqconv.S4D(D, bidirectional=True, discretization="bilinear"),
    "long_conv": lambda: seqconv.LongConv(D, l_max=L, heads=2),
    "sgconv": lambda: seqconv.SGConv(D, l_max=L, decay="power"),
    "hyena": lambda: seqconv.Hyena(D, l_max=L, order=3),
    "butterfly_conv": lambda: seqconv.ButterflyConv(D, l_max=L, butterfly_heads=2),
    "butterfly_conv with activations": lambda: seqconv.ButterflyConv(
        D, l_max=L, dft_activation="silu"
    ),
}
CAUSAL = ("s4d", "long_conv", "sgconv", "hyena")


def relative(found, wanted) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def onnx(model: nn.Module, *args, **shapes):
    """The model in onnxruntime, as a function of tensors, and the kinds of its nodes."""
    import onnxruntime

    table = seqconv.onnx.translations()
    program = torch.onnx.export(
        model, args, dynamo=True, verbose=False, custom_translation_table=table, **shapes
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [value.name for value in session.get_inputs()]

    @torch.no_grad()
    def run(*tensors):
        given = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
        return [torch.from_numpy(t) for t in session.run(None, given)]

    return run, {node.op_type for node in program.model.graph}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.one_of(3)
def test_decompositions_leave_torchs_operators_on_real_tensors(name):
    layer = LAYERS[name]().eval()
    batch = torch.export.Dim("batch")
    for model in (layer, seqconv.freeze(layer, L)):
        program = torch.export.export(model, (torch.randn(2, L, D),), dynamic_shapes=({0: batch},))
        program = program.run_decompositions(export.decompositions())
        called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
        assert not [t for t in called if "seqconv" in t or "fft" in t or "complex" in t]
        x = torch.randn(3, L, D)
        assert relative(program.module()(x), layer(x)) < 2e-6


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_split_in_exported_layers(name):
    """ExecuTorch's lowering of a split makes a dynamic batch that of the example: programs refuse every other batch."""
    layer = export.freeze(LAYERS[name](), L)
    shapes = ({0: torch.export.Dim("batch", max=8)},)
    program = torch.export.export(layer, (torch.randn(2, L, D),), dynamic_shapes=shapes)
    called = [node for node in program.graph.nodes if node.op == "call_function"]
    dynamic = [
        str(node.target)
        for node in called
        if isinstance(node.args[0], torch.fx.Node)
        and isinstance(node.args[0].meta["val"], torch.Tensor)
        and not all(isinstance(size, int) for size in node.args[0].meta["val"].shape)
    ]
    assert any("seqconv" in target for target in dynamic)
    assert not [target for target in dynamic if "split" in target or "chunk" in target]
    x = torch.randn(5, L, D)
    assert relative(program.module()(x), layer(x)) < 1e-6


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.one_of(3)
def test_layers_in_onnxruntime(name):
    layer = LAYERS[name]().eval()
    model = seqconv.freeze(layer, L) if name != "s4d" else layer
    run, kinds = onnx(model, torch.randn(2, L, D), dynamic_shapes=({0: "batch"},))
    x = torch.randn(5, L, D)
    assert relative(run(x)[0], layer(x)) < 2e-6
    assert "MatMul" in kinds and not kinds & {"DFT", "Einsum", "Loop"}


class Operator(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.eval()

    def forward(self, *tensors):
        names = ("u", "k", "skip", "k_rev", "pre_gate", "post_gate", "bias")
        found = {n: t for n, t in zip(names, tensors, strict=True) if t is not None}
        return seqconv.fftconv(**found, **self.options)


def case(length, taps, taps_rev=0, heads=0, gates=False, layout="bhl", **options):
    lead = (heads, D) if heads else (D,)
    shape = (2, D, length) if layout == "bhl" else (2, length, D)
    outer = (2, heads, D, length) if heads else shape
    u, k, skip = torch.randn(shape), torch.randn(*lead, taps) / taps**0.5, torch.randn(lead)
    k_rev = torch.randn(*lead, taps_rev) / taps_rev**0.5 if taps_rev else None
    pre, post = (torch.randn(shape), torch.randn(outer)) if gates else (None, None)
    return (u, k, skip, k_rev, pre, post, torch.randn(lead)), {"layout": layout, **options}


@pytest.mark.parametrize(
    "case",
    [
        case(1001, 1001),
        case(300, 200, 77, heads=3, gates=True, activation="gelu"),
        case(301, 301, layout="blh", gates=True, activation="silu"),
        case(129, 90, mode="circular"),
        case(500, 3, 2, heads=2),
        case(65536, 65536),
    ],
    ids=["odd", "two-sided gated heads", "blh", "circular", "short", "65,536"],
)
@pytest.mark.one_of(3)
def test_the_operator_in_onnxruntime(case):
    tensors, options = case
    run, _ = onnx(Operator(**options), *tensors)
    found = run(*[t for t in tensors if t is not None])[0]
    wide = [None if t is None else t.double() for t in tensors]
    assert relative(found, Operator(**options)(*wide)) < 2e-6


class OneStep(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.eval()

    def forward(self, x, state):
        return self.layer.step(x, state)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.one_of(2)
def test_steps_in_onnxruntime(name, tmp_path):
    layer, x = LAYERS[name]().eval(), torch.randn(3, L, D)
    with torch.no_grad():
        wanted, state = layer(x), layer.init_state(3)
        _, state = layer.prefill(x[:, :30], state)  # the prompt
        now, leaves = x[:, 30].clone(), _pytree.tree_leaves(state)
        shapes, batch = torch.export.ShapesCollection(), torch.export.Dim("batch")
        for t in (now, *leaves):
            shapes[t] = {0: batch}
        program = torch.export.export(OneStep(layer), (now, copy.deepcopy(state)), strict=False)
        assert not [n for n in program.graph.nodes if "stream" in str(n.target)]
        torch.export.save(program, tmp_path / "step.pt2")
        saved = torch.export.load(tmp_path / "step.pt2").module()
        assert relative(saved(now, copy.deepcopy(state))[0], wanted[:, 30]) < 1e-5
        program = torch.export.export(
            OneStep(layer), (now, state), dynamic_shapes=shapes, strict=False
        )
    run, _ = onnx(program)
    for step in range(30, L):
        y, *leaves = run(x[:, step], *leaves)
        assert relative(y, wanted[:, step]) < 1e-5


@pytest.mark.parametrize("name", CAUSAL[1:])
def test_inputs_that_wait_are_not_forgotten(name):
    """After torch's step a state holds inputs that an exported step does not know: its outputs are NaN until prefill
    has taken them into account."""
    layer, x = LAYERS[name]().eval(), torch.randn(2, L, D)
    with torch.no_grad():
        wanted, state = layer(x), layer.init_state(2)
        start = copy.deepcopy(state)
        exported = torch.export.export(OneStep(layer), (x[:, 0], start), strict=False).module()
        for t in range(7):
            _, state = layer.step(x[:, t], state)
        y, _ = exported(x[:, 7], copy.deepcopy(state))
        assert y.isnan().all()
        _, state = layer.prefill(x[:, 7:8], state)
        for t in range(8, 20):  # by both, in turn
            y, state = exported(x[:, t], state) if t < 14 else layer.step(x[:, t], state)
            assert relative(y, wanted[:, t]) < 1e-5


def test_exported_steps_of_a_bounded_state_are_refused():
    layer = seqconv.LongConv(D, l_max=L).eval()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="cannot refuse the steps after length=40"),
    ):
        torch.export.export(OneStep(layer), (torch.randn(2, D), layer.init_state(2, length=40)))


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_layers_are_the_same(name):
    layer, x = LAYERS[name](), torch.randn(2, L, D)
    layer.train()
    frozen = seqconv.freeze(layer, L)
    assert layer.training and not frozen.training
    assert torch.equal(frozen(x), layer.eval()(x))
    made = [n for n, _ in layer.named_parameters() if n.startswith(("kernel.", "filter."))]
    assert made and not [n for n, _ in frozen.named_parameters() if n in made]
    with pytest.raises(ValueError, match=r"frozen for inputs of|length <= l_max"):
        frozen(torch.randn(2, L + 1, D))


def test_a_frozen_model_and_what_is_refused():
    model = nn.Sequential(
        nn.Linear(D, D), seqconv.S4D(D), seqconv.nn.AsAttention(seqconv.S4D(D), batch_first=True)
    )
    frozen = seqconv.freeze(model, L)
    assert isinstance(frozen[1].kernel, export.FrozenKernel)
    assert isinstance(model[1].kernel, seqconv.S4DKernel)
    with pytest.raises(ValueError, match=r"must hold a layer of seqconv.*Linear without one"):
        seqconv.freeze(nn.Linear(2, 2), L)
    with pytest.raises(ValueError, match="frozen already"):
        seqconv.freeze(frozen, L)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        seqconv.freeze("model", L)
    for length in (-1, 0, 1.5):
        with pytest.raises((ValueError, TypeError), match="length"):
            seqconv.freeze(model, length)
    with pytest.raises(ValueError, match="length must be at most l_max=50, got 51"):
        seqconv.freeze(seqconv.ButterflyConv(D, l_max=50), 51)
    with pytest.raises(TypeError, match="no recurrence"):
        frozen[1].step(torch.randn(2, D), model[1].init_state(2))


def test_what_does_not_export_says_so():
    u, k = torch.randn(2, D, L), torch.randn(D, L)
    table = export.decompositions()
    program = torch.export.export(Operator(exact_causal=True), (u, k, *[None] * 5))
    with pytest.raises(ValueError, match="exact_causal=True has no form"):
        program.run_decompositions(table)
    layer, offsets = seqconv.LongConv(D, l_max=L).eval(), torch.tensor([0, 30, L])

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, cu_seqlens):
            return self.layer(x, cu_seqlens=cu_seqlens, max_seqlen=80)

    program = torch.export.export(Packed(), (torch.randn(L, D), offsets))
    with pytest.raises(ValueError, match=r"packed rows \(cu_seqlens\) have no form"):
        program.run_decompositions(table)
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=L - 1)}}
    program = torch.export.export(
        seqconv.S4D(D).eval(), (torch.randn(2, 50, D),), dynamic_shapes=shapes
    )
    with pytest.raises(ValueError, match="must be a constant"):
        program.run_decompositions(table)
