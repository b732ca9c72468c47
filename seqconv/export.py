"""Models that run elsewhere: seqconv's operators as plain torch for exporters, and layers with constant kernels.

torch.export keeps an operator of this package as one node, which only a process with torch and seqconv can run.
`decompositions` replaces those nodes by matrix products, additions and reshapes, for ONNX (see seqconv.onnx)
and a compiled library of AOTInductor. `freeze` makes the kernels constants first.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from seqconv.backends import products
from seqconv.backends.fallback import split
from seqconv.layers import butterfly_conv, hyena_filter, s4d_kernel, sgconv
from seqconv.layers.base import KernelGenerator
from seqconv.ops import butterfly, fftconv, packed, ssm
from seqconv.ops.checks import check_positive

_CONSTANT = "length must be a constant, only the batch may be dynamic"
_OPERATORS = (ssm.operator, s4d_kernel.s4d_kernel, sgconv._taps_op, hyena_filter._filter_op)


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """What every operator of seqconv is made of, for ExportedProgram.run_decompositions: operators of torch on real
    tensors, none of them a Fourier transform.

        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        program = program.run_decompositions(seqconv.export.decompositions())

    A convolution becomes products with matrices of at most 128 points, O(length) memory for their tables, and
    about 600 to 1,300 floating point operations an element for 1,000 to 65,536 steps. Results agree with the
    operator's to round-off. The batch may be dynamic; lengths and channels must be constants. Only inference is
    replaced: the operators of gradients stay as they are.

    Raises ValueError, when it is applied, for what has no such form: packed rows (cu_seqlens), exact_causal=True, a
    dynamic length, and step() of layers with taps (give forward a history, see docs/export.md).
    """
    table: dict = {op.fwd: _plain(op) for op in _OPERATORS}
    table[fftconv.operator.fwd] = _fftconv
    table[butterfly.operator.fwd] = _butterfly
    table[butterfly.product.fwd] = _product
    table[packed.operator.fwd] = _refused("packed rows (cu_seqlens) have", "pad the rows")
    table[torch.ops.seqconv.stream_step.default] = _refused(
        "step() of a layer with taps has", "give forward its history"
    )
    return table


def _plain(operator) -> Callable:
    def plain(*args):
        inputs, options = operator.split(args)
        if any(isinstance(option, torch.SymInt) for option in options):
            raise ValueError(f"{operator.name}: {_CONSTANT}; freeze makes it one")
        return operator.plain(inputs, *options)

    return plain


def _fftconv(*args) -> Tensor:
    inputs, (activation, _, exact_causal) = fftconv.operator.split(args)
    if exact_causal:
        text = "has no form as matrix products, which mix past and future in the last digits"
        raise ValueError(f"fftconv: exact_causal=True {text}; export with exact_causal=False")
    return products.fftconv(inputs, activation)


def _butterfly(*args) -> Tensor:
    (x, matrices), (sizes,) = butterfly.operator.split(args)
    return products.butterfly(x, split(matrices, sizes), sizes, None)


def _product(*args) -> Tensor:
    (u, k), (length,) = butterfly.product.split(args)
    if isinstance(length, torch.SymInt):
        raise ValueError(f"{butterfly.product.name}: {_CONSTANT}")
    return products.inverse(ssm.multiply(u.unsqueeze(1), k), length)


def _refused(what: str, instead: str) -> Callable:
    def refuse(*args):
        raise ValueError(f"seqconv.export: {what} no form as matrix products: {instead}")

    return refuse


class FrozenKernel(KernelGenerator):
    """A generator whose kernel is a constant, for inputs of one length and rate 1."""

    reads = ("k",)

    def __init__(self, k: Tensor, length: int):
        super().__init__()
        self.length = self.l_max = length
        self.heads, self.d_model = k.shape[:2]
        self.register_buffer("k", k)

    def generate(self, tensors: list[Tensor], length: int, rate: float) -> Tensor:
        if length != self.length:
            text = f"was frozen for inputs of {self.length} steps, got {length}"
            raise ValueError(f"FrozenKernel: the layer {text}")
        return tensors[0]


def freeze(model: nn.Module, length: int) -> nn.Module:
    """A copy of the model, in evaluation mode, whose layers have constant kernels for inputs of `length` steps.

    Every kernel generator of this package in it, and every one derived from KernelGenerator, makes its kernel once
    and is replaced by a buffer. The copy takes inputs of that length only, has no gradient with respect to the
    kernels' parameters, and for S4D no step(). Outputs have the same bits as the model's in evaluation mode. Runtimes
    that fold constants then transform the kernels once as well, when they load the model.

    Raises ValueError where the model has no kernel generator.

    Example:
        >>> import seqconv
        >>> layer = seqconv.LongConv(4, l_max=100)
        >>> x = torch.randn(2, 100, 4)
        >>> torch.equal(freeze(layer, 100)(x), layer.eval()(x))
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a torch.nn.Module, got {type(model).__name__}")
    check_positive("freeze", length=length)
    frozen = copy.deepcopy(model).eval()
    found: list = [
        (parent, name, child)
        for parent in frozen.modules()
        for name, child in parent._modules.items()
        if _makes_kernels(child)
    ]
    if not found:
        again = any(isinstance(module, FrozenKernel) for module in model.modules())
        what = "frozen already" if again else f"{type(model).__name__} without one"
        raise ValueError(
            f"freeze: model must hold a layer of seqconv that is not frozen, got {what}"
        )
    with torch.inference_mode(False), torch.no_grad():
        for parent, name, child in found:
            # Its transforms have one length, whatever that of the input.
            own = parent.l_max if isinstance(parent, butterfly_conv.ButterflyConv) else length
            if own < length:
                raise ValueError(f"freeze: length must be at most l_max={own}, got {length}")
            parent._modules[name] = FrozenKernel(child(own).clone(), own).eval()
    return frozen


def _makes_kernels(module: nn.Module | None) -> bool:
    if not isinstance(module, KernelGenerator) or isinstance(module, FrozenKernel):
        return False
    return type(module).generate is not KernelGenerator.generate
