"""ONNX: what torch.onnx.export needs to know of seqconv's operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seqconv.export import decompositions


def translations() -> dict[Callable, Callable]:
    """A custom_translation_table for torch.onnx.export: every operator of seqconv as MatMul, Mul, Reshape and the like.

        model = seqconv.freeze(model, length)
        torch.onnx.export(model, (x,), "model.onnx", dynamo=True, dynamic_shapes=({0: "batch"},),
                          custom_translation_table=seqconv.onnx.translations())

    The batch may be dynamic, lengths and channels are constants. The graph has no operator beyond the standard
    ones, and no Fourier transform: onnxruntime's DFT is far slower than the products. Needs the packages onnx and
    onnxscript.

    Raises what seqconv.export.decompositions does, for what has no such form.
    """
    return {op: _translation(op, plain) for op, plain in decompositions().items()}


class _Call(nn.Module):
    """plain(*args), with tensors in the places of args that are tensors."""

    def __init__(self, plain: Callable, args: list, places: list[int]):
        super().__init__()
        self.plain, self.args, self.places = plain, args, places

    def forward(self, *tensors: Tensor) -> Tensor:
        args = list(self.args)
        for place, tensor in zip(self.places, tensors, strict=True):
            args[place] = tensor
        return self.plain(*args)


def _translation(op, plain: Callable) -> Callable:
    """The function that the exporter calls with values of the graph: it has torch export the decomposition for tensors
    like them, and takes the nodes of that."""

    def translate(*args: Any):
        from onnxscript import evaluator

        recorder: Any = evaluator.default()
        if len(args) != len(op._schema.arguments):
            args = (
                *args,
                *[argument.default_value for argument in op._schema.arguments[len(args) :]],
            )
        places = [i for i, arg in enumerate(args) if hasattr(arg, "shape")]
        for arg, argument in zip(args, op._schema.arguments, strict=True):
            if hasattr(arg, "shape") and "Tensor" not in str(argument.type):
                text = "must be a constant in an ONNX graph, only the batch may be dynamic"
                raise ValueError(f"{op.name()}: {argument.name} {text}")
        sizes: dict[str, Any] = {}
        tensors, dynamic = [], []
        for i in places:
            shape, own = [], {}
            for axis, size in enumerate(args[i].shape):
                if not isinstance(size, int):
                    name = str(size.value)
                    # Numbers that no other axis has, so that torch takes no two of them for one.
                    if name not in sizes:
                        sizes[name] = 3 + 2 * len(sizes), torch.export.Dim(f"size_{len(sizes)}")
                    size, own[axis] = sizes[name]
                shape.append(size)
            tensors.append(torch.zeros(shape, dtype=_torch_dtype(args[i].dtype.name)))
            dynamic.append(own)
        call = _Call(plain, list(args), places).eval()
        program = torch.export.export(call, tuple(tensors), dynamic_shapes=(tuple(dynamic),))
        options = {"opset_version": recorder.opset.version, "verbose": False}
        exported: Any = torch.onnx.export(program, dynamo=True, **options)
        return _moved(exported.model.graph, [args[i] for i in places], recorder)

    return translate


def _torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower()))


def _moved(graph, inputs: list, recorder) -> Any:
    """The graph's output, once its nodes are moved to those that the exporter records, with inputs for its own."""
    from onnx_ir import convenience

    for own, given in zip(graph.inputs, inputs, strict=True):
        convenience.replace_all_uses_with(own, given)
    for value in graph.initializers.values():
        constant = recorder.opset.Constant(value=value.const_value)
        convenience.replace_all_uses_with(value, constant)
    (output,) = graph.outputs
    graph.outputs.clear()
    nodes = list(graph)
    graph.remove(nodes)
    for node in nodes:  # The exporter gives names that are not taken.
        node.name = None
        for value in node.outputs:
            value.name = value.shape = None  # In a shape are names of sizes, which are others here.
    recorder.nodes.extend(nodes)
    known = dict(zip(graph.inputs, inputs, strict=True))
    return recorder.opset.Identity(known.get(output, output))
