"""One step of a diagonal state space model: an operator without gradients, which changes the state in place.

It is no `Operator` of seqconv.ops.register, whose results are new tensors and have derivatives: a copy of the state
would cost more than the step.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from seqconv import reference
from seqconv.backends import choose, fallback
from seqconv.backends.pack import ACTIVATIONS
from seqconv.ops.checks import check_choice, check_shape, check_tensor
from seqconv.ops.register import (
    below_autograd,
    exporting,
    library,
    needs_gradient,
    transformed,
    unwatched_if_plain,
)

_NAME = "seqconv::ssm_step"
_WIDE = (torch.float64,)


class Step(NamedTuple):
    """state (batch, channels, modes, 2), in float64, as the tables are: real and imaginary part last; x (batch,
    channels) and skip (heads, channels); and the tables power and input (channels, modes, 2) and output (heads,
    channels, modes, 2)."""

    state: Tensor
    x: Tensor
    skip: Tensor
    power: Tensor
    input: Tensor
    output: Tensor


library.define(
    "ssm_step(Tensor(a!) state, Tensor x, Tensor skip, Tensor power, Tensor input, Tensor output, "
    "str activation) -> Tensor"
)
_raw = torch.ops.seqconv.ssm_step.default
_KINDS = frozenset((Tensor, Parameter))


def ssm_step(inputs: Step, activation: str) -> tuple[Tensor, Tensor]:
    """y (batch, heads channels) in x's dtype, and the state after the step:

    state <- power state + input x,  y = activation(Re sum_n output state + skip x).

    The activation is "none", "gelu", "silu" or "relu". The sums are in float64. A contiguous state is changed in place
    and returned, and nothing but y is allocated where the kernels of its device run. A state of other strides is
    copied first. Where derivatives, torch.func's transforms or a trace want to see the step, and for subclasses of
    Tensor, both results are new tensors, by the definition seqconv.reference.ssm_step.

    A caller knows that the arguments are as `Step` describes them and on one device, and that the tables are
    contiguous and no lazy tensors. torch.ops.seqconv.ssm_step checks its arguments, changes any state in place, and
    returns y alone.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and exporting():
        # Whoever runs the program may have no such operator, and onnxruntime has no gelu of float64.
        wide = torch.promote_types(inputs.x.dtype, torch.float32)
        y, state = reference.ssm_step(*inputs._replace(x=inputs.x.to(wide)), "none")
        return reference.activate(y, activation).to(inputs.x.dtype), state
    plain = compiling or (_KINDS.issuperset(map(type, inputs)) and not torch._C._is_tracing())
    if not plain or needs_gradient(inputs) or (not compiling and transformed(inputs)):
        return reference.ssm_step(*inputs, activation)
    state = inputs.state
    if not state.is_contiguous() or (not compiling and state.is_neg()):
        state = state.resolve_neg().contiguous()
        inputs = inputs._replace(state=state)
    if compiling or not unwatched_if_plain(inputs[:3]):
        return _raw(*inputs, activation), state
    return _run(inputs, activation), state


def _empty(inputs: Step) -> Tensor:
    return inputs.x.new_empty(inputs.x.shape[0], inputs.skip.numel())


def _run(inputs: Step, activation: str) -> Tensor:
    state, y = inputs.state, _empty(inputs)
    if not state.numel():
        if y.numel():
            fallback.ssm_step(y, inputs, activation)
        return y
    backend, _ = choose("ssm_step", inputs, (activation,))
    if state.is_contiguous():
        backend.ssm_step(y, inputs, activation)
    else:
        whole = state.contiguous()
        backend.ssm_step(y, inputs._replace(state=whole), activation)
        state.copy_(whole)  # refuses a state in which elements share their memory
    increment_version(state)  # so that autograd notices, if it has saved the state
    return y


def _check(inputs: Step, activation: str) -> None:
    state, x, skip, power, input, output = inputs
    name = "ssm_step"
    check_tensor(name, "x", x)
    check_shape(name, "x", x, (("batch", None), ("channels", None)))
    for field, t in (("state", state), ("power", power), ("input", input), ("output", output)):
        check_tensor(name, field, t, dtypes=_WIDE, device=x.device, owner="x")
    check_tensor(name, "skip", skip, device=x.device, owner="x")
    parts = ("modes", None), ("real and imaginary", 2)
    check_shape(name, "output", output, (("heads", None), ("channels", x.shape[1]), *parts))
    heads, *row = output.shape
    row = tuple(zip(("channels", "modes", "real and imaginary"), row, strict=True))
    check_shape(name, "state", state, (("batch", x.shape[0]), *row))
    check_shape(name, "power", power, row)
    check_shape(name, "input", input, row)
    check_shape(name, "skip", skip, (("heads", heads), ("channels", x.shape[1])))
    check_choice(name, "activation", activation, tuple(ACTIVATIONS))


def _checked(*args) -> Tensor:
    *tensors, activation = args
    inputs = Step(*tensors)
    _check(inputs, activation)
    tables = [t.contiguous() for t in inputs[3:]]
    return _run(Step(*inputs[:3], *tables), activation)


def _fake(*args) -> Tensor:
    *tensors, activation = args
    inputs = Step(*tensors)
    _check(inputs, activation)
    return _empty(inputs)


def _without_gradients(*args) -> Tensor:
    *tensors, _ = args
    if needs_gradient(tensors) or transformed(tensors):
        text = "S4D.step takes its definition where they are wanted, seqconv.reference.ssm_step"
        raise RuntimeError(f"{_NAME}: the operator has no derivatives and no transforms; {text}")
    with below_autograd():
        return _raw(*args)


library.impl("ssm_step", _checked, "CompositeExplicitAutograd")
library.impl("ssm_step", _without_gradients, "Autograd")
torch.library.register_fake(_NAME, _fake, lib=library)
