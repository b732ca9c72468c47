"""The one recipe that makes an operator of torch: seqconv::NAME_fwd and seqconv::NAME_bwd.

Each single way of attaching a gradient is silently wrong somewhere, so a call takes one of four
roads (`Operator.__call__` chooses):

1. torch.compile, export and jit.trace record the raw operator, which has an Autograd kernel of its own.
2. functorch transforms (grad, vmap, jacrev, jvp, ...) and forward mode go through the operator's
   plain definition, which torch differentiates.
3. Without gradients the implementation is called directly.
4. Otherwise `_Differentiable`, an autograd.Function of the old style, which has a fraction of the
   overhead of one that functorch understands.

A backward pass calls the implementation directly, too, with the backend that its forward pass has
used. With create_graph=True it records `_Gradient`, whose own derivative goes through the plain
definition.
"""

import typing
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from seqconv.backends import choose, recorded
from seqconv.backends.protocol import Backend
from seqconv.ops.sharding import constants_replicated, declare

library = torch.library.Library("seqconv", "DEF")

below_autograd = torch._C._AutoDispatchBelowAutograd
transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_tracing, _profiled = torch._C._is_tracing, torch.autograd._profiler_enabled
_included = torch._C._dispatch_tls_is_dispatch_key_included
# What torch.autograd.grad has for is_grads_batched, and make_fx for pre_dispatch.
_VMAP, _EARLY = map(torch._C._dispatch_key_parse, ("VmapMode", "PreDispatch"))
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def transformed(tensors) -> bool:
    """Whether a functorch transform or forward-mode differentiation watches the tensors."""
    if transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    found = [t for t in tensors if isinstance(t, Tensor)]
    return any(forward_ad.unpack_dual(t).tangent is not None for t in found)


def exporting() -> bool:
    """Whether torch.export is at work. torch.compiler.is_exporting says yes under every compiler of torch 2.10."""
    return torch.compiler._is_exporting_flag


def batched() -> bool:
    """Whether torch.vmap is at work, that of batched gradients included."""
    return _included(_VMAP)


def needs_gradient(tensors) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def unwatched(tensors) -> bool:
    """Plain tensors of a device with kernels, and no mode, profiler or trace that must see the operator.

    Torch's dispatcher takes longer than everything else around a kernel, twice so for operators in
    Python. Where nobody watches it, eager calls go past it. It gives lazily negated and lazily zero
    tensors real memory."""
    return _PLAIN.issuperset(map(type, tensors)) and unwatched_if_plain(tensors)


def unwatched_if_plain(tensors) -> bool:
    """The same of tensors that are known to be plain ones."""
    first = tensors[0] if tensors[0] is not None else next(t for t in tensors if t is not None)
    if not (first.is_cpu or first.is_cuda):  # device.type takes five times as long
        return False
    for t in tensors:
        if t is not None and (t.is_neg() or t._is_zerotensor()):
            return False
    return not (_modes() or _profiled() or _tracing() or _included(_EARLY))


def _resolving(*more: str) -> ExitStack:
    """A context in which torch resolves lazy tensors also inside an operator on DTensors or in a graph: there it has
    switched off what is above Python's dispatch, so that it would read a lazy conjugate as the tensor itself."""
    stack = ExitStack()
    for key in ("Conjugate", "Negative", "ZeroTensor", *more):
        key = torch._C._dispatch_key_parse(key)
        stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
    return stack


def _recording() -> ExitStack:
    """_resolving, where torch also records gradients below an operator's Autograd kernel."""
    return _resolving("AutogradFunctionality")


def as_node(t: Tensor | None) -> Tensor | None:
    """t as a node of its own: one tensor may be passed as two arguments, whose gradients differ."""
    if t is None or not t.is_floating_point():
        return t
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def given(tensors) -> int:
    """Which of the tensors are there, the first in the lowest bit."""
    return sum(1 << i for i, t in enumerate(tensors) if t is not None)


class Operator:
    """A function of a few tensors, by name, and of options: operator(inputs, *options) -> Tensor.

    Args:
        name: of the operator; it becomes seqconv::NAME_fwd and seqconv::NAME_bwd.
        inputs: a NamedTuple class whose fields are Tensor or Tensor | None; or list, for any number.
        options: the schema of what follows the tensors, e.g. "str activation, int length".
        plain: plain(inputs, *options) -> Tensor, the definition in torch, differentiable to any order.
        forward: forward(backend, inputs, *options) -> Tensor, not differentiable; without it the
            plain definition runs, and the next three are left out, too.
        gradients: gradients(backend, dy, inputs, *options, wanted) -> one tensor or None per input.
        empty, empty_gradients: the same shapes, dtypes and strides without values, from (inputs, *options)
            and (inputs, *options, wanted).
        vmap, gradients_vmap: torch's batching rules of the raw operators; where there is none,
            vmap works through the plain definition only.
        shardings: shardings(inputs, *options, ranks) -> the ways in which processes can share the work, see
            seqconv.ops.sharding; without it DTensors are gathered first.

    The raw operators take an int between the tensors and the options: which tensors there are, as `given` has it, or
    of a list how many. DTensor keeps one decision for all calls that look alike, and of the arguments that are no
    tensors it looks at those from the first int of the schema on.
    """

    def __init__(
        self,
        name: str,
        inputs: type,
        options: str,
        plain,
        *,
        forward=None,
        gradients=None,
        empty=None,
        empty_gradients=None,
        vmap=None,
        gradients_vmap=None,
        shardings=None,
    ):
        self.name, self.plain, self.chooses = name, plain, forward is not None
        self.forward = forward or self._plain_forward
        self.gradients = gradients or self._plain_gradients
        self.empty, self.empty_gradients = empty or plain, empty_gradients or empty_like
        self.takes_list = inputs is list
        self._named = None if inputs is list else inputs
        self._count = None if inputs is list else len(inputs._fields)
        tensors, wanted, found = "Tensor?[] tensors", "bool[] wanted", "Tensor[]"
        if self._named:
            kinds = typing.get_type_hints(inputs).items()
            tensors = ", ".join(f"Tensor{'?' * (k is not Tensor)} {n}" for n, k in kinds)
            wanted = f"bool[{self._count}] wanted"
            found = f"({', '.join(['Tensor'] * self._count)})"
        both = f"{tensors}, int given" + (f", {options}" if options else "")
        library.define(f"{name}_fwd({both}) -> Tensor")
        library.define(f"{name}_bwd(Tensor dy, {both}, {wanted}) -> {found}")
        self.fwd = getattr(torch.ops.seqconv, f"{name}_fwd").default
        self.bwd = getattr(torch.ops.seqconv, f"{name}_bwd").default
        for kind, own, recorded_as in (
            ("fwd", (self._raw_forward, self._fake_forward), self._record_forward),
            ("bwd", (self._raw_gradients, self._fake_gradients), self._record_gradients),
        ):
            library.impl(f"{name}_{kind}", own[0], "CompositeExplicitAutograd")
            library.impl(f"{name}_{kind}", recorded_as, "Autograd")
            torch.library.register_fake(f"seqconv::{name}_{kind}", own[1], lib=library)
        for kind, rule in (("fwd", vmap), ("bwd", gradients_vmap)):
            if rule:
                torch.library.register_vmap(f"seqconv::{name}_{kind}", rule, lib=library)
        self.shardings = shardings
        declare(self)

    # ---- the roads ----

    def __call__(self, inputs, *options) -> Tensor:
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                text = "forward-mode differentiation does not work inside torch.compile"
                raise RuntimeError(f"{self.name}: {text}")
            return self.fwd(*self.flat(inputs), *options)
        if _tracing() or _included(_VMAP):
            return self.fwd(*self.flat(inputs), *options)
        if transforms_active() or forward_ad._current_level >= 0:
            return self.plain(inputs, *options)
        if needs_gradient(inputs):
            return _Differentiable.apply((self, options), *inputs)
        return self._run(inputs, options)[0]

    def _choose(self, inputs, options) -> tuple[Backend | None, Backend | None]:
        return choose(self.name, inputs, options) if self.chooses else (None, None)

    def _run(self, inputs, options) -> tuple[Tensor, Backend | None, Backend | None]:
        """The result, whose derivative nobody asks the raw operator for, and the backend, chosen and asked for."""
        direct = unwatched(inputs)
        chosen = choose(self.name, inputs, options) if self.chooses else (None, None)
        if direct:
            return self.forward(chosen[0], inputs, *options), *chosen
        with below_autograd():
            return self.fwd(*self.flat(inputs), *options), *chosen

    def raw_gradients(self, dy, inputs, options, wanted) -> list:
        """By the raw operator, whatever watches it."""
        grads = self.bwd(dy, *self.flat(inputs), *options, wanted)
        grads = (grads,) if isinstance(grads, Tensor) else grads
        return [g if want else None for g, want in zip(grads, wanted, strict=True)]

    # ---- between names and positions ----

    def name_inputs(self, tensors):
        return list(tensors) if self._named is None else self._named(*tensors)

    def flat(self, inputs) -> tuple:
        """What the raw operators take before the options."""
        if self._named is None:
            return list(inputs), len(inputs)
        return *inputs, given(inputs)

    def split(self, args: tuple) -> tuple:
        """(inputs, options) of the raw operator's arguments."""
        if self._named is None:
            inputs, found, *options = args
        else:
            inputs = self._named(*args[: self._count])
            found, *options = args[self._count :]
        wanted = len(inputs) if self._named is None else given(inputs)
        if found != wanted:
            text = f"must be {wanted} for these tensors, got {found}"
            raise ValueError(f"{self.name}: given {text}")
        return inputs, tuple(options)

    def _outputs(self, grads, like: Tensor):
        """As the schema has it: an empty tensor for a gradient that nobody wants."""
        whole = [like.new_empty(0) if grad is None else grad for grad in grads]
        if self._named is None:
            return whole
        return tuple(whole) if self._count > 1 else whole[0]

    # ---- what the raw operators do ----

    def _raw_forward(self, *args):
        inputs, options = self.split(args)
        return self.forward(self._choose(inputs, options)[0], inputs, *options)

    def _raw_gradients(self, dy, *args):
        inputs, options = self.split(args[:-1])
        backend, _ = self._choose(inputs, options)
        return self._outputs(self.gradients(backend, dy, inputs, *options, args[-1]), dy)

    def _fake_forward(self, *args):
        inputs, options = self.split(args)
        return self.empty(inputs, *options)

    def _fake_gradients(self, dy, *args):
        inputs, options = self.split(args[:-1])
        return self._outputs(self.empty_gradients(inputs, *options, args[-1]), dy)

    def _refuse_transforms(self, op, tensors) -> None:
        if transformed(tensors):
            raise RuntimeError(
                f"{op.name()}: torch.func transforms and forward-mode differentiation work "
                "through seqconv.fftconv and the layers in eager mode only, not inside torch.compile and not on the "
                "raw operator"
            )

    def _record_forward(self, *args):
        inputs, options = self.split(args)
        self._refuse_transforms(self.fwd, inputs)
        if needs_gradient(inputs):
            return _Differentiable.apply((self, options), *inputs)
        with below_autograd():
            return self.fwd(*args)

    def _record_gradients(self, dy, *args):
        inputs, options = self.split(args[:-1])
        self._refuse_transforms(self.bwd, (dy, *inputs))
        if needs_gradient((dy, *inputs)):
            call = self, *self._choose(inputs, options), options, args[-1]
            return self._outputs(_Gradient.apply(call, dy, *inputs), dy)
        with below_autograd():
            return self.bwd(dy, *args)

    # ---- by the plain definition alone ----

    def _plain_forward(self, backend, inputs, *options) -> Tensor:
        return plain_result(self.plain, inputs, options)

    def _plain_gradients(self, backend, dy, inputs, *options):
        *options, wanted = options
        return plain_gradients(self.plain, dy, inputs, options, wanted)


def plain_result(plain, inputs, options):
    """plain(inputs, *options) inside of an operator."""
    with torch.no_grad(), _resolving():
        return plain(inputs, *options)


def plain_gradients(plain, dy, inputs, options, wanted) -> list[Tensor | None]:
    """The gradients of plain(inputs, *options), which torch differentiates, inside of an operator."""
    with torch.enable_grad(), _recording():
        pairs = zip(inputs, wanted, strict=True)
        own = [t if t is None else t.detach().requires_grad_(want) for t, want in pairs]
        asked = [t for t, want in zip(own, wanted, strict=True) if want]
        y = plain(type(inputs)(*own) if isinstance(inputs, tuple) else own, *options)
        found = iter(torch.autograd.grad(y, asked, dy, materialize_grads=True))
    whole = {"memory_format": torch.contiguous_format}
    return [next(found).clone(**whole) if want else None for want in wanted]


def empty_like(inputs, *options) -> list[Tensor | None]:
    """Memory for the gradients that are wanted, the last one of the options, each as its input is."""
    *_, wanted = options
    pairs, whole = zip(inputs, wanted, strict=True), {"memory_format": torch.contiguous_format}
    return [None if t is None or not want else torch.empty_like(t, **whole) for t, want in pairs]


class _Differentiable(Function):
    @staticmethod
    def forward(ctx, call, *tensors):
        operator, options = call
        ctx.save_for_backward(*tensors)
        ctx.operator, ctx.options = operator, options
        inputs = tensors if operator._named is None else operator._named(*tensors)
        y, ctx.backend, ctx.asked = operator._run(inputs, options)
        return y

    @staticmethod
    def backward(ctx, dy):
        operator, options, wanted = ctx.operator, ctx.options, ctx.needs_input_grad[1:]
        tensors = ctx.saved_tensors
        inputs = tensors if operator._named is None else operator._named(*tensors)
        if torch.compiler.is_compiling():
            return (None, *operator.raw_gradients(dy, inputs, options, wanted))
        if transforms_active() or forward_ad._current_level >= 0 or batched():
            with recorded(ctx.asked):
                grads = operator.raw_gradients(dy, inputs, options, wanted)
        elif torch.is_grad_enabled():
            call = operator, ctx.backend, ctx.asked, options, wanted
            grads = _Gradient.apply(call, dy, *inputs)
        elif unwatched((dy, *inputs)):
            grads = operator.gradients(ctx.backend, dy, inputs, *options, wanted)
        else:
            with below_autograd(), recorded(ctx.asked):
                grads = operator.raw_gradients(dy, inputs, options, wanted)
        return (None, *grads)


class _Gradient(Function):
    """The gradient as a function of its own, for derivatives of the second order and higher."""

    @staticmethod
    def forward(ctx, call, dy, *tensors):
        operator, backend, ctx.asked, options, wanted = call
        ctx.save_for_backward(dy, *tensors)
        ctx.operator, ctx.options = operator, options
        ctx.wanted = [want and t is not None for want, t in zip(wanted, tensors, strict=True)]
        inputs = operator.name_inputs(tensors)
        if unwatched((dy, *inputs)):
            return tuple(operator.gradients(backend, dy, inputs, *options, wanted))
        with below_autograd(), recorded(ctx.asked):
            return tuple(operator.raw_gradients(dy, inputs, options, wanted))

    @staticmethod
    def backward(ctx, *grads):
        needed, create = ctx.needs_input_grad[1:], torch.is_grad_enabled()
        replicated = constants_replicated(ctx.saved_tensors)
        with torch.enable_grad(), recorded(ctx.asked), replicated:
            own = [as_node(t) for t in ctx.saved_tensors]
            dy, *tensors = own
            y = ctx.operator.plain(ctx.operator.name_inputs(tensors), *ctx.options)
            inputs = [t for t, want in zip(tensors, ctx.wanted, strict=True) if want]
            zeros = {"allow_unused": True, "materialize_grads": True}
            first = torch.autograd.grad(y, inputs, dy, create_graph=True, **zeros)
            grads = [g for g, want in zip(grads, ctx.wanted, strict=True) if want]
            pairs = [pair for pair in zip(first, grads, strict=True) if pair[0].requires_grad]
            asked_for = [t for t, need in zip(own, needed, strict=True) if need]
            outputs, weights = zip(*pairs, strict=True) if pairs else ((0 * dy.sum(),), None)
            found = iter(
                torch.autograd.grad(outputs, asked_for, weights, create_graph=create, **zeros)
            )
        return (None, *[next(found) if need else None for need in needed])
