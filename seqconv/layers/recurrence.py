"""S4D as a recurrence: state <- exp(a) state + b u, v = Re(c state) + skip u, in steps and in chunks.

The state is float64 for every dtype of the layer. The state of a mode that decays by 1e-6 a step is a million times
larger than what one step adds to it. In float32 each sum would be rounded by up to a tenth of that addition.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad

from seqconv.layers.base import ConvLayer, check_input, sized
from seqconv.layers.packing import pack_of, prefilled
from seqconv.layers.padding import extents, padding_of, shifted
from seqconv.layers.state import OTHER_KERNEL, State, check_kind, mark_of
from seqconv.layers.watch import Snapshot, everything_read
from seqconv.ops.checks import (
    check_flag,
    check_length,
    check_sampling,
    check_shape,
    check_tensor,
)
from seqconv.ops.fftconv import fftconv
from seqconv.ops.register import needs_gradient, transformed, transforms_active
from seqconv.ops.ssm import discretize, mode_sum, moments, multiply
from seqconv.ops.ssm_step import Step, ssm_step
from seqconv.reference import activate

_WIDE = (torch.float64,)


class Recurrent(ConvLayer):
    """A layer whose kernel has system(), with init_state, step and prefill; `generator` is the kernel's class."""

    generator: type
    kernel: Any
    _kept: "_Kept | None" = None

    def init_state(
        self, batch: int, *, length: int | None = None, spread: bool = False
    ) -> "S4DState":
        """The state before any input, for so many samples. It is as large at any length, and all steps cost the same:
        length and spread, which other layers' states have, change nothing."""
        name, kernel = f"{type(self).__name__}.init_state", self.kernel
        self._check_recurrent(kernel)
        check_length(name, batch, name="batch")
        check_flag(name, spread=spread)
        if length is not None:
            check_length(name, length, name="length")
        own = self._own_skip()
        modes = own.new_zeros((batch, own.shape[1], kernel.modes, 2), dtype=torch.float64)
        # FSDP's hooks may run only after those of the whole model, at the first step.
        kept = None if gathered_by_hooks(kernel) else self._keep(kernel, own.is_cuda)
        return S4DState(modes=modes, kernel=0 if kept is None else kept.mark)

    def step(self, x: Tensor, state: "S4DState", *, rate: float = 1.0) -> tuple[Tensor, "S4DState"]:
        """Maps x (batch, d_model) of one time to y of that time, and returns the state after it, too.

        y is the convolution's up to round-off, however slow the modes are, and its cost does not grow with
        time. rate is as in forward; steps may have different rates. The state that is passed in is used up: without
        gradients it is changed in place and returned, if it is contiguous. Copy it first where it is needed again.
        Where gradients or torch.func's transforms are wanted, the returned state is a new one, and both results are
        differentiable.

        Without gradients the discrete system is kept for as long as everything that the kernel reads has the
        same value: buffers, options, and parameters as parametrisations and forward pre-hooks (pruning,
        weight_norm) give them. They are compared by value, so that every change of them is seen, also one
        through `.data`. With other ones a state from before raises ValueError, but not inside torch.compile, whose
        graphs make the system anew at every step. A forward hook that replaces the kernel's output is not seen,
        because a recurrence makes no kernel that the hook could be given.
        """
        # Past torch's lookup of attributes, which takes half a microsecond for each.
        name, kernel = f"{type(self).__name__}.step", self._modules["kernel"]
        skip = self._parameters.get("skip")
        if skip is None:
            skip = self.skip
        check_input(name, x, skip, self.d_model, ("batch",))
        if type(rate) is not float or rate != 1.0:
            check_sampling(name, rate)
        if self._forward_pre_hooks:
            x = run_pre_hooks(self, x.unsqueeze(1)).squeeze(1)
            skip = self.skip  # which the hooks may have set
            check_input(name, x, skip, self.d_model, ("batch",))
        system = self._check_state(name, kernel, x, state, rate)
        inputs = self._step_inputs(state.modes, x, skip, system)
        y, modes = ssm_step(inputs, self.activation or "none")
        if modes is not state.modes:
            state = S4DState(modes=modes, kernel=state.kernel)
        return self._mixed(y), state

    def prefill(
        self,
        x: Tensor,
        state: "S4DState",
        mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        rate: float = 1.0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, "S4DState"]:
        """Maps x (batch, length, d_model), which follows the inputs that led to `state`, to y and the state after it,
        a new one. They are those that length calls of step() give, in one convolution, and they have gradients.

        mask, lengths and rate are as in forward. Padding at the left or right end of a row is no step of it: y is
        not defined there, and the state is the one after the row's own inputs. Between these, masked inputs are zeros.

        cu_seqlens (rows + 1,) packs the rows' steps: x and y are (total, d_model), and the state is that of all rows
        after their own inputs. max_seqlen says that none has more.
        """
        name = f"{type(self).__name__}.prefill"
        if cu_seqlens is not None or max_seqlen is not None:
            self._check_recurrent(self.kernel)
            check_input(name, x, self.skip, self.d_model, ("total",))
            pack = pack_of(name, x, cu_seqlens, max_seqlen, mask, lengths)
            call = lambda x, s, n: self.prefill(x, s, lengths=n, rate=rate)  # noqa: E731
            return prefilled(call, x, state, pack)
        check_input(name, x, self.skip, self.d_model)
        check_sampling(name, rate)
        if self._forward_pre_hooks:
            x = run_pre_hooks(self, x)
        self._check_state(name, self.kernel, x, state, rate)
        x, length = sized(x)
        padding = None
        if mask is not None or lengths is not None:
            padding = padding_of(name, x, mask, lengths)
        a, b, c = self._discrete(self.kernel, rate)
        single = x.dtype != torch.float64
        u = self._mine(x).movedim(1, 2).to(torch.float32 if single else torch.float64)  # (b h l)
        first, passed, late = None, a.new_tensor(length), u
        if padding is not None:
            first, passed = extents(padding)
            u = u.masked_fill(padding.unsqueeze(1), 0.0)
            along = lambda by: by.view(-1, 1, 1).expand(-1, u.shape[1], 1)  # noqa: E731
            late, u = shifted(u, along(first + passed - length)), shifted(u, along(first))
        k = mode_sum(a, multiply(c, b), length, single)
        # The response to the state alone is a kernel per sample and head: Re c exp(a (l + 1)) state.
        left = multiply(exponential(a), state.modes)
        rest = mode_sum(a, multiply(c, left.unsqueeze(1)).flatten(0, 1), length, single)
        rest = rest.unflatten(0, (x.shape[0], self.heads))
        v = fftconv(u, k, self._own_skip().to(u.dtype)) + rest
        if first is not None:
            v = shifted(v, (-first).view(-1, 1, 1, 1).expand(-1, *v.shape[1:3], 1))
        ages = passed.view(-1, 1, 1, 1) * a
        modes = multiply(exponential(ages), state.modes) + multiply(b, moments(a, late.flip(-1)))
        y = activate(v, self.activation).to(x.dtype)
        y = self._mixed(rearrange(y, "b c h l -> b l (c h)"))
        return y, S4DState(modes=modes, kernel=state.kernel)

    # ---- what a process has of a layer whose channels are divided: here all of it ----

    def _mine(self, x: Tensor) -> Tensor:
        return x

    def _mixed(self, y: Tensor) -> Tensor:
        return self._mix(y)

    def _own_skip(self) -> Tensor:
        skip = self._parameters.get("skip")  # Past torch's lookup of attributes.
        return self.skip if skip is None else skip

    def _discrete(self, kernel, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        return discrete(kernel, rate)

    def _step_inputs(self, modes: Tensor, x: Tensor, skip: Tensor, system) -> Step:
        inputs = Step(modes, x, skip, *system)
        if inputs.power.device != x.device or skip.shape != (self.heads, self.d_model):
            # A kernel on the device would read memory that is not there.
            name = f"{type(self).__name__}.step"
            check_tensor(name, "the kernel", inputs.power, dtypes=_WIDE, device=x.device, owner="x")
            check_shape(name, "skip", skip, (("heads", self.heads), ("d_model", self.d_model)))
        return inputs

    def _make(self, kernel, rate: float) -> tuple[Tensor, ...]:
        """exp(a) and b (d_model, modes, 2), and c (heads, d_model, modes, 2)."""
        a, b, c = self._discrete(kernel, rate)
        system = exponential(a), b, c.double()
        parts = (
            ("d_model", self._own_skip().shape[1]),
            ("modes", kernel.modes),
            ("real and imaginary", 2),
        )
        name = type(kernel).__name__
        for what, t in zip(("exp(dt A)", "B"), system, strict=False):
            check_shape(name, what, t, parts)
        check_shape(name, "C", c, (("heads", self.heads), *parts))
        return tuple(t.resolve_neg().contiguous() for t in system)

    def _keep(self, kernel, on_gpu: bool) -> "_Kept | None":
        """The systems that the kernel's values make, kept for as long as it has them; None where nobody can tell."""
        if kernel._forward_pre_hooks:
            run_pre_hooks(kernel, 1)
        if torch.compiler.is_compiling() or torch._C._is_tracing() or transforms_active():
            return None
        if type(kernel).system is not self.generator.system or "system" in vars(kernel):
            return None  # The system of a subclass may read anything.
        if forward_ad._current_level >= 0:
            tensors = [t for t in everything_read(kernel).values() if isinstance(t, Tensor)]
            if transformed(tensors):
                return None
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return None  # The comparison would wait for the device.
        kept = self._kept
        if kept is None or not kept.snapshot.fits(kernel):
            with torch.inference_mode(False), torch.no_grad():
                snapshot = Snapshot(kernel)
                if not snapshot.whole:
                    self._kept = None
                    return None
                system = self._make(kernel, 1.0)
                kept = self._kept = _Kept(snapshot, {1.0: system}, mark_of(*system))
        return kept

    def _system(self, kernel, kept: "_Kept | None", rate: float) -> tuple[Tensor, ...]:
        if kept is None:
            return self._make(kernel, rate)
        if torch.is_grad_enabled() and needs_gradient(
            [t for t in everything_read(kernel).values() if isinstance(t, Tensor)]
        ):
            return self._make(kernel, rate)
        if rate not in kept.systems:
            with torch.inference_mode(False), torch.no_grad():
                kept.systems[rate] = self._make(kernel, rate)
        return kept.systems[rate]

    def __getstate__(self) -> dict:
        return vars(self) | {"_kept": None}

    def _check_recurrent(self, kernel) -> None:
        name = type(self).__name__
        if self.bidirectional:
            raise TypeError(
                f"{name}: a two-sided layer has no recurrence; one with bidirectional=False has"
            )
        if self._context is not None:
            text = "has no step() and no prefill(); a copy without it has"
            raise TypeError(f"{name}: a layer under context parallelism {text}")
        way = self.other_kernel()
        if way:
            own, known = type(kernel).__name__, self.generator.__name__
            text = f"because {own}.{way} may be another kernel than {known}'s"
            raise TypeError(f"{name}: a kernel of class {own} has no recurrence, {text}")
        if kernel.discretization == "dss_softmax":
            text = "dss_softmax depends on the length and has no recurrence; the others have"
            raise TypeError(f"{name}: {text}")

    def other_kernel(self) -> str | None:
        """The method by which the generator may make another kernel than that of its system, or None."""
        kernel = type(self._modules["kernel"])
        for way in ("forward", "generate"):
            if getattr(kernel, way, None) is not getattr(self.generator, way):
                return way
        return None

    def _check_state(self, function: str, kernel, x: Tensor, state, rate: float):
        """Checks that the state fits x and the kernel, and returns the kernel's system."""
        self._check_recurrent(kernel)
        check_kind(function, state, S4DState)
        modes = state.modes
        wanted = (x.shape[0], self._own_skip().shape[1], kernel.modes, 2)
        usual = type(modes) is Tensor and modes.dtype is torch.float64 and modes.shape == wanted
        if not (usual and modes.device == x.device and modes.layout is torch.strided):
            if state.batch != x.shape[0]:
                text = f"must have batch={x.shape[0]} like x, got {state.batch}"
                raise ValueError(f"{function}: state {text}")
            check_tensor(function, "state", modes, dtypes=_WIDE, device=x.device, owner="x")
            parts = ("d_model", wanted[1]), ("modes", kernel.modes), ("real and imaginary", 2)
            check_shape(function, "state", modes, (("batch", x.shape[0]), *parts))
        kept = self._keep(kernel, x.is_cuda)
        if kept is not None and state.kernel not in (0, kept.mark):
            raise ValueError(f"{function}: {OTHER_KERNEL}")
        return self._system(kernel, kept, rate)


class S4DState(State):
    """The state of a diagonal system: modes (batch, d_model, modes, 2) in float64, real and imaginary part last."""

    tensors: ClassVar = ("modes",)
    options: ClassVar = ("kernel",)
    modes: Tensor
    kernel: int  # by which it is known, 0 if it is not


class _Kept(NamedTuple):
    snapshot: Snapshot
    systems: dict[float, tuple[Tensor, ...]]  # by rate
    mark: int


def discrete(kernel, rate: float = 1.0, **which) -> tuple[Tensor, Tensor, Tensor]:
    """a, b (d_model, modes, 2), and c (heads, d_model, modes, 2) such that v = Re sum c state."""
    discretization = kernel.discretization
    log_dt, A, B, C = kernel.system(rate, **which)
    a, b = discretize(log_dt, A, discretization)
    return a, multiply(b, B), C if discretization == "dss" else 2 * C


def gathered_by_hooks(module: nn.Module) -> bool:
    """Whether hooks of torch.distributed gather the module's parameters when it is called."""
    hooks = module._forward_pre_hooks.values()
    return any(getattr(h, "__module__", "").startswith("torch.distributed") for h in hooks)


def run_pre_hooks(module: nn.Module, argument):
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


def exponential(a: Tensor) -> Tensor:
    """The exponential of complex numbers (..., 2)."""
    re, im = a.unbind(-1)
    return re.exp().unsqueeze(-1) * torch.stack([im.cos(), im.sin()], -1)
