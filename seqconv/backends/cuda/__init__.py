"""The CUDA backend: plans, launches and the compiled kernels of csrc/device."""

import torch
from torch import Tensor

from seqconv.backends import exact, fallback
from seqconv.backends.cuda import butterfly, convolution, driver, packed, ssm, ssm_step, stream
from seqconv.backends.cuda.plan import longest, make_plan, radix_bytes
from seqconv.backends.fallback import join, split
from seqconv.backends.offsets import offsets_of, on_one
from seqconv.backends.protocol import Explanation, Request

_ALWAYS = ("ssm", "s4d_kernel", "ssm_step", "stream")  # whatever the shapes
_OPERATORS = ("fftconv", "fftconv_packed", "butterfly", *_ALWAYS)


def _has_too_long_a_row(request: Request, most: int) -> bool:
    """Whether a row of a pack may have more than `most` steps, as far as that is known without a wait."""
    total, max_seqlen = request.inputs[0].shape[-1], request.options[-1]
    if total <= most or 0 <= max_seqlen <= most:
        return False
    offsets = on_one(request.inputs[-1])
    if not offsets.is_cpu or type(offsets) is not Tensor:  # nor may a compiler's tensor be read
        return True
    return int(offsets.diff().max()) > most


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class Cuda:
    """The operators on GPUs; a subclass may have devices of another kind (`device`, `on`)."""

    name = "cuda"
    always: frozenset[str] = frozenset()

    def device(self, place: torch.device):
        """What launches kernels for tensors there; raises where nothing does."""
        return driver.device(_index(place))

    def missing(self, place: torch.device) -> str | None:
        """Why nothing launches kernels there, or None."""
        try:
            index = _index(place)
        except (AssertionError, RuntimeError) as error:  # a torch without CUDA, or no device
            return str(error)
        return driver.reason(index)

    def on(self, place: torch.device, function, *arguments) -> None:
        """function(device, ...) where torch allocates and launches on that device."""
        index = _index(place)
        if index == torch.cuda.current_device():  # entering the context costs more than a launch
            function(driver.device(index), *arguments)
            return
        with torch.cuda.device(index):
            function(driver.device(index), *arguments)

    def why_not(self, request: Request) -> str | None:
        first = request.inputs[0]
        if request.operator not in _OPERATORS:
            return f"there is no CUDA kernel for {request.operator}"
        if self._is_double(request):
            return "float64 has no CUDA kernels"
        missing = self.missing(first.device)
        if missing is not None or request.operator in _ALWAYS:
            return missing
        limits = self.device(first.device).limits
        if request.operator == "butterfly":
            n = torch.Size(request.options[0]).numel()
            fits = radix_bytes(n) <= limits.shared
            return None if fits else f"a block's memory does not hold {n} complex numbers"
        steps, most = first.shape[-1], longest(limits)
        if request.operator != "fftconv_packed":
            too_long = steps > most
        elif steps > packed.MOST_STEPS:
            return f"packs of more than {packed.MOST_STEPS} steps have no CUDA kernels"
        else:
            too_long = _has_too_long_a_row(request, most)
        if too_long:
            return f"rows of more than {most} steps have no CUDA plan"
        return None

    def _is_double(self, request: Request) -> bool:
        """Whether the results are float64; states and exponents always are."""
        if request.operator in ("ssm", "s4d_kernel"):
            return not request.options[1]
        if request.operator == "ssm_step":
            return torch.float64 in (request.inputs.x.dtype, request.inputs.skip.dtype)
        return request.inputs[0].dtype == torch.float64

    def explain(self, request: Request) -> Explanation:
        device = self.device(request.inputs[0].device)
        if request.operator == "stream":
            arch, threads = device.arch, stream.MOST_THREADS
            return Explanation("cuda", "right-angle fft", None, 1, arch, threads, None)
        if request.operator == "fftconv_packed":
            return self._explain_packed(request, device)
        if request.operator != "fftconv":
            return Explanation("cuda", "matrix product", None, 1, device.arch, ssm.THREADS, None)
        if request.options[2:] == (True,):
            return exact.explain(self, request)
        u, k, k_rev, _, *gates, bias = request.inputs
        problem = convolution.describe(u, k, k_rev, *gates, request.options[0], bias)
        plan = make_plan(problem, device.limits, False)
        size = plan.n, plan.windows
        return Explanation(
            "cuda", "right-angle fft", *size, device.arch, plan.threads, None, str(plan)
        )

    def _explain_packed(self, request: Request, device) -> Explanation:
        """Describes the plan of the longest row."""
        u, k, k_rev, *_, cu_seqlens = request.inputs
        offsets, total, max_seqlen = on_one(cu_seqlens), u.shape[-1], request.options[-1]
        if max_seqlen >= 0 and self.reads_offsets(offsets):
            steps = min(max_seqlen, total)
        else:
            lengths = offsets_of(offsets, total, None if max_seqlen < 0 else max_seqlen).diff()
            steps = int(lengths.max()) if len(lengths) else 0
        plan = packed.plan_of_longest(device.limits, u, k, k_rev, len(offsets) - 1, steps)
        found = plan.n, plan.windows, device.arch, plan.threads
        return Explanation("cuda", "right-angle fft", *found, None, str(plan))

    def fftconv(self, y: Tensor, inputs, activation: str) -> None:
        self.on(y.device, convolution.forward, y, *inputs, activation)

    def fftconv_gradients(self, grads, dy: Tensor, inputs, activation: str) -> None:
        self.on(dy.device, convolution.backward, grads, dy, *inputs, activation)

    def fftconv_exact(self, y: Tensor, inputs, activation: str) -> None:
        exact.forward(self, y, inputs, activation)

    def fftconv_exact_gradients(self, grads, dy: Tensor, inputs, activation: str) -> None:
        exact.gradients(self, grads, dy, inputs, activation)

    def ssm(self, k: Tensor, inputs) -> None:
        self.on(k.device, ssm.forward, k, *[t.contiguous() for t in inputs])

    def ssm_gradients(self, grads, dk: Tensor, inputs) -> None:
        self.on(dk.device, ssm.backward, *grads, dk, *[t.contiguous() for t in inputs])

    def s4d_modes(self, a: Tensor, w: Tensor, inputs, options) -> bool:
        return False

    s4d_modes_gradients = staticmethod(fallback.s4d_modes_gradients)

    def reads_offsets(self, offsets: Tensor) -> bool:
        return offsets.is_cuda

    def fftconv_packed(
        self, y: Tensor, inputs, offsets: Tensor, activation: str, longest: int | None = None
    ) -> None:
        self.on(y.device, packed.forward, y, inputs, offsets, activation, longest)

    def fftconv_packed_gradients(
        self, grads, dy: Tensor, inputs, offsets: Tensor, activation, longest: int | None = None
    ) -> None:
        self.on(dy.device, packed.backward, grads, dy, inputs, offsets, activation, longest)

    def ssm_step(self, y: Tensor, inputs, activation: str) -> None:
        self.on(y.device, ssm_step.step, y, inputs, activation)

    def butterfly(self, z: Tensor, inputs, radices: tuple[int, ...]) -> None:
        def run(device):
            z.copy_(butterfly.transform(device, inputs.x, split(inputs.matrices, radices), radices))

        self.on(z.device, run)

    def butterfly_gradients(self, grads, dz: Tensor, inputs, radices: tuple[int, ...]) -> None:
        def run(device):
            factors = split(inputs.matrices, radices)
            dx, found = butterfly.gradients(device, dz, inputs.x, factors, radices)
            grads.x.copy_(dx)
            grads.matrices.copy_(join(found, radices))

        self.on(dz.device, run)

    def stream_name(self) -> str:
        return self.name  # how spectra are laid out can be told from their number

    def stream_spectra(self, k: Tensor, period: int) -> Tensor:
        made = []
        self.on(k.device, lambda device: made.append(stream.spectra(device, k, period)))
        return made[0]

    def stream_step(self, y, *given) -> None:
        self.on(y.device, stream.step, y, *given)


gpu = Cuda()
