"""S4D as a recurrence: state <- exp(a) state + b u, v = Re(c state) + skip u, in steps and in chunks.

The state is float64 for every dtype of the layer. The state of a mode that decays by 1e-6 a step is a million times
larger than what one step adds to it. In float32 each sum would be rounded by up to a tenth of that addition.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from seqconv.layers.base import ConvLayer, check_input, sized
from seqconv.ops.checks import check_length, check_shape, check_tensor
from seqconv.ops.fftconv import fftconv
from seqconv.ops.register import transformed
from seqconv.ops.ssm import discretize, mode_sum, moments, multiply
from seqconv.reference import activate


class Recurrent(ConvLayer):
    """A layer whose kernel has system(), with init_state, step and prefill; `generator` is the kernel's class."""

    generator: type
    kernel: Any
    _kept: tuple | None = None  # everything that the kernel read, and the system made of it

    def init_state(self, batch: int) -> Tensor:
        """The state before any input: zeros (batch, d_model, modes, 2), with real and imaginary part last, in
        float64. The rows of states may be selected and joined."""
        self._check_recurrent()
        check_length(f"{type(self).__name__}.init_state", batch, name="batch")
        shape = (batch, self.d_model, self.kernel.modes, 2)
        return self.kernel.C.new_zeros(shape, dtype=torch.float64)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Maps x (batch, d_model) of one time to y of that time, and returns the state after it, too.

        y is the convolution's up to round-off, however slow the modes are, and its cost does not grow with
        time. It is differentiable. Without gradients the discrete system is kept for as long as everything
        that the kernel reads has the same value: buffers, options, and parameters as parametrisations and forward
        pre-hooks (pruning, weight_norm) give them. They are compared by value, so that every change of
        them is seen, also one through `.data`. A forward hook that replaces the kernel's output is not
        seen, because a recurrence makes no kernel that the hook could be given.
        """
        name = f"{type(self).__name__}.step"
        check_input(name, x, self.skip, self.d_model, ("batch",))
        self._check_state(name, x, state)
        if self._forward_pre_hooks:
            x = _run_pre_hooks(self, x.unsqueeze(1)).squeeze(1)
        re, im, b, c = self._system()
        u = x.double()
        state = _advance(re, im, b, u, state)
        v = torch.bmm(c, state.flatten(2).permute(1, 2, 0))  # (h c b)
        v = v.permute(2, 1, 0) + self.skip * u.unsqueeze(1)  # (b c h)
        return self._mix(activate(v, self.activation).flatten(1).to(x.dtype)), state

    def prefill(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Maps x (batch, length, d_model), which follows the inputs that led to `state`, to y and the state
        after it. They are those that length calls of step() give, in one convolution."""
        name = f"{type(self).__name__}.prefill"
        check_input(name, x, self.skip, self.d_model)
        self._check_state(name, x, state)
        if self._forward_pre_hooks:
            x = _run_pre_hooks(self, x)
        if self.kernel._forward_pre_hooks:
            _run_pre_hooks(self.kernel, x.shape[1])
        x, length = sized(x)
        batch = x.shape[0]
        a, b, c = discrete(self.kernel)
        single = x.dtype != torch.float64
        u = x.movedim(1, 2).to(torch.float32 if single else torch.float64)  # (b h l)
        c = c * c.new_tensor([1.0, -1.0])
        k = mode_sum(a, multiply(c, b), length, single)
        # The response to the state alone is a kernel per sample and head: Re c exp(a (l + 1)) state.
        left = multiply(exponential(a), state)
        rest = mode_sum(a, multiply(c, left.unsqueeze(1)).flatten(0, 1), length, single)
        rest = rest.unflatten(0, (batch, self.heads))
        v = fftconv(u, k, self.skip.to(u.dtype)) + rest
        state = multiply(exponential(length * a), state) + multiply(b, moments(a, u.flip(-1)))
        y = activate(v, self.activation).to(x.dtype)
        return self._mix(rearrange(y, "b c h l -> b l (c h)")), state

    def _system(self) -> tuple[Tensor, ...]:
        """The real part of exp(a), repeated as (d_model, modes, 2), and its imaginary part (d_model, modes);
        b (d_model, modes, 2); and c (d_model, heads, 2 modes)."""

        def make():
            a, b, c = discrete(self.kernel)
            re, im = exponential(a).unbind(-1)
            return torch.stack([re, re], -1), im, b, c.flatten(2).transpose(0, 1)

        kernel = self.kernel
        if kernel._forward_pre_hooks:
            _run_pre_hooks(kernel, 1)
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return make()
        if type(kernel).system is not self.generator.system or "system" in vars(kernel):
            return make()  # The system of a subclass may read anything.
        found = _read(kernel)
        tensors = [t for t in found.values() if isinstance(t, Tensor)]
        if transformed(tensors) or not all(map(_comparable, tensors)):
            return make()
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return make()
        if self.skip.is_cuda and torch.cuda.is_current_stream_capturing():
            return make()  # The comparison would wait for the device.
        kept = self._kept
        if kept is None or not _same(kept[0], found):
            with torch.inference_mode(False), torch.no_grad():
                copies = {n: t.clone() if isinstance(t, Tensor) else t for n, t in found.items()}
                kept = self._kept = copies, make()
        return kept[1]

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_kept": None}

    def _check_recurrent(self) -> None:
        name, kernel = type(self).__name__, self.kernel
        if self.bidirectional:
            raise TypeError(f"{name}: a two-sided layer has no recurrence; a causal one has")
        if self._context is not None:
            text = "has no step() and no prefill(); a copy without it has"
            raise TypeError(f"{name}: a layer under context parallelism {text}")
        if kernel.discretization == "dss_softmax":
            text = "dss_softmax depends on the length and has no recurrence; the others have"
            raise TypeError(f"{name}: {text}")
        way = self.other_kernel()
        if way:
            own, known = type(kernel).__name__, self.generator.__name__
            text = f"because {own}.{way} may be another kernel than {known}'s"
            raise TypeError(f"{name}: a kernel of class {own} has no recurrence, {text}")

    def other_kernel(self) -> str | None:
        """The method by which the generator may make another kernel than that of its system, or None."""
        for way in ("forward", "generate"):
            if getattr(type(self.kernel), way, None) is not getattr(self.generator, way):
                return way
        return None

    def _check_state(self, function: str, x: Tensor, state: Tensor) -> None:
        self._check_recurrent()
        check_tensor(function, "state", state, dtypes=(torch.float64,), device=x.device, owner="x")
        parts = (("d_model", self.d_model), ("modes", self.kernel.modes), ("real and imaginary", 2))
        check_shape(function, "state", state, (("batch", x.shape[0]), *parts))


def discrete(kernel, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """a, b (d_model, modes, 2), and c (heads, d_model, modes, 2) such that v = sum c * state."""
    discretization = kernel.discretization
    log_dt, A, B, C = kernel.system(rate)
    a, b = discretize(log_dt, A, discretization)
    factor = 1.0 if discretization == "dss" else 2.0
    c = C * C.new_tensor([factor, -factor])
    return a, multiply(b, B), c


def _advance(re: Tensor, im: Tensor, b: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """exp(a) state + b u, complex numbers (batch, channels, modes, 2) for u (batch, channels)."""
    new = b * u[..., None, None]
    x, y = state.unbind(-1)
    tensors = (re, b, u, state)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if wanted or torch.compiler.is_compiling() or transformed(tensors):
        return re * state + torch.stack([-im * y, im * x], -1) + new
    # This works in place, because fresh memory would cost more than the few passes over the state.
    new.addcmul_(re, state)
    new[..., 0].addcmul_(im, y, value=-1)
    new[..., 1].addcmul_(im, x)
    return new


def _run_pre_hooks(module: nn.Module, argument):
    """Runs the forward pre-hooks as a call of the module does, and returns the argument that they make. Pruning
    and weight_norm set in them the parameters that the module reads."""
    for number, hook in module._forward_pre_hooks.items():
        if number in module._forward_pre_hooks_with_kwargs:
            result = hook(module, (argument,), {})
            result = result if result is None else result[0]
        else:
            result = hook(module, (argument,))
        if result is not None:
            argument = result[0] if isinstance(result, tuple) else result
    return argument


def _read(kernel: nn.Module) -> dict:
    """Everything that a kernel can read, by name: options, parameters and buffers."""
    found = {name: value for name, value in vars(kernel).items() if name[0] != "_"}
    found |= kernel._parameters
    found |= kernel._buffers
    for name in getattr(kernel, "parametrizations", ()):
        found[name] = getattr(kernel, name)
    return found


def _comparable(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and not t.is_meta


def _same(kept: dict, found: dict) -> bool:
    if kept.keys() != found.keys():
        return False
    for name, x in kept.items():
        y = found[name]
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.dtype != y.dtype or x.device != y.device or not torch.equal(x, y):
                return False
        elif x is not y and (type(x) is not type(y) or x != y):
            return False
    return True


def exponential(a: Tensor) -> Tensor:
    """The exponential of complex numbers (..., 2)."""
    re, im = a.unbind(-1)
    return re.exp().unsqueeze(-1) * torch.stack([im.cos(), im.sin()], -1)
