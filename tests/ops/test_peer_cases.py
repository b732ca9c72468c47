"""The problems of other packages' test suites, solved by fftconv and compared with float64, forward and backward.

A row names the package and keeps its shapes, dtypes, distributions and tolerances. Only channels are fewer where
there were hundreds: no channel sees another. The peer's tolerance alone would often pass zeros, because it is larger
than the results. Therefore each row must also be as accurate as plain torch (helpers/accuracy.py), and it must reject
zeros, taps in the wrong place and a missing skip.
"""

import zlib
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from accuracy import assert_accurate
from cases import Case, double, oracle

from seqconv import fftconv, reference

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Row:
    peer: str
    case: Case
    close: tuple[float, float] | None = None  # atol and rtol of y, where the peer has them
    close_grads: tuple[float, float] | None = None
    size: float = 1.0  # standard deviation of u and of the gates
    k_size: float | None = None  # None: 1 / sqrt(taps)
    dy_size: float | None = 1.0  # None: dy is 1, the gradient of a sum
    fade: float = 0.0  # tap j is multiplied by exp(-fade j)
    half: bool = False  # signals and kernel are 0 from half of the length on
    group: int = 1  # so many neighbouring channels share their taps

    def __str__(self) -> str:
        return f"{self.peer}-{self.case}" + "-half" * self.half

    def tensors(self) -> dict:
        found = self.case.tensors(self.size)
        k = found["k"]
        if self.k_size is not None:
            k = k * (self.k_size * max(1, self.case.taps) ** 0.5)
        if self.group > 1:
            k = k[:: self.group].repeat_interleave(self.group, 0)
        k = k * torch.exp(-self.fade * torch.arange(self.case.taps))
        found["k"] = k.to(found["k"].dtype)
        if self.half:
            for name in ("u", "k", "pre_gate", "post_gate"):
                if found[name] is not None:
                    found[name][..., self.case.length // 2 :] = 0
        return found

    def dy(self, y: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(y) if self.dy_size is None else self.dy_size * torch.randn_like(y)


def case(batch, channels, length, taps, **options) -> Case:
    return Case(batch=batch, channels=channels, length=length, taps=taps, **options)


# nvSubquadratic: its causal tests on torch.fft and those of the CUDA operators, and its chunked form
SHARED = (
    (2, 64, 256, 7),
    (4, 128, 512, 7),
    (1, 256, 1024, 15),
    (2, 32, 128, 3),
    (1, 96, 2048, 65),
    (2, 64, 64, 64),
)
NV = {"peer": "nvSubquadratic", "k_size": 1.0}
NV_OPS = NV | {"close": (1e-3, 1e-4), "close_grads": (1e-2, 1e-3)}
NV_FFT = NV | {"close": (1e-4, 1e-4), "close_grads": (1e-3, 1e-3)}
NV_ROWS = [
    *(Row(case=case(*s, layout=layout), **NV_OPS) for s in SHARED for layout in ("bhl", "blh")),
    *(Row(case=case(*s, skip="h"), **NV_OPS) for s in SHARED[:3]),
    *(
        Row(case=case(*s), **(NV_OPS | {"dy_size": None}))
        for s in ((2, 64, 256, 7), (4, 32, 128, 5))
    ),
    *(Row(case=case(1, 32, max(taps, 256), taps), **NV_OPS) for taps in (128, 512, 2048)),
    *(Row(case=case(2, 32, 128, 5, dtype=d, kernel_dtype=d), **NV) for d in (BF16, F16, F32)),
    *(
        Row(case=case(*s), **NV_FFT)
        for s in (
            (2, 16, 64, 7),
            (2, 32, 128, 32),
            (1, 8, 256, 64),
            (2, 8, 64, 15),
            (1, 16, 128, 7),
        )
    ),
    Row(case=case(2, 16, 64, 7, skip="h"), **NV_FFT),
    Row(case=case(2, 16, 64, 7, skip="h", layout="blh"), **NV_FFT),
    Row(case=case(2, 16, 64, 7, heads=1, per_sample=True), **NV_FFT),
    Row(
        case=case(2, 128, 512, 64, skip="h"),
        **(NV | {"close": (2e-5, 0.0), "close_grads": (5e-4, 0.0)}),
    ),
    # What it refuses: a kernel of more than twice the length, and skip in another dtype than the input's.
    Row(case=case(2, 8, 30, 200, skip="h"), **NV_FFT),
    Row(case=case(2, 16, 64, 7, skip="h", dtype=BF16), **NV),
]

# cuDNN's fft_causal_conv1d: both algorithms, the four dtypes, the sizes of its C++ samples
CUDNN = {"peer": "cuDNN", "size": 0.1, "dy_size": 0.1}
CUDNN_CLOSE = {F64: 5e-12, F32: 2e-6, F16: 5e-3, BF16: 1e-2}


def cudnn(*shape, dtype=F32, close=None) -> Row:
    close = (close or CUDNN_CLOSE[dtype],) * 2
    problem = case(*shape, dtype=dtype, kernel_dtype=dtype)
    return Row(case=problem, close=close, close_grads=close, **CUDNN)


CUDNN_ROWS = [
    cudnn(2, 4, 750, 192),
    cudnn(1, 1, 8192, 8192, dtype=F64, close=5e-11),
    *(cudnn(1, 2, 256, 128, dtype=dtype) for dtype in CUDNN_CLOSE),
    cudnn(2, 4, 256, 128, dtype=F16),
    cudnn(1, 1, 4096, 4096),
    cudnn(2, 3, 4096, 4096),
    cudnn(2, 16, 4096, 256),
]

# flash-fft-conv: a transform of `size` points round half-empty rows, or rows of half the size; with both gates or none
SIZES = [256, 512, *(1 << n for n in (10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22))]


def flash(batch, channels, size, dtype, half, gated) -> Row:
    length, mode = (size, "circular") if half else (size // 2, "causal")
    gates = {"pre_gate": gated, "post_gate": gated}
    return Row(
        peer="flash-fft-conv",
        case=case(batch, channels, length, length, dtype=dtype, mode=mode, **gates),
        close=(1e-2, 1e-5),
        close_grads=(1e-2, 1e-5),  # for dk it allows 0.1 to 2
        size=0.02,
        k_size=0.02,
        dy_size=0.02,
        fade=0.1,
        half=half,
    )


FLASH_ROWS = [
    flash(2 if size < 1 << 16 else 1, 3 if size < 1 << 13 else 1, size, dtype, half, gated)
    for size, dtype, half, gated in product(SIZES, (F16, BF16), (True, False), (False, True))
]
FLASH_ROWS += [
    flash(batch, channels, 256, F16, False, True)
    for batch, channels in product((1, 2, 4, 8, 64), (111, 768))
    if batch * channels < 10000
]

# vortex (Evo 2): parallel_fir and parallel_iir have both gates and a skip of what the first gate leaves; the tests of
# its operator; the chunked two-pass kernels, with time before the channels and filters shared by groups
EVO = {"pre_gate": True, "post_gate": True, "skip": "h"}


def two_pass(batch, length, channels, groups, taps, dtype) -> Row:
    gates = {"pre_gate": True, "post_gate": True, "layout": "blh"}
    problem = case(batch, channels, length, taps, dtype=dtype, kernel_dtype=dtype, **gates)
    close = (1e-4, 1e-4) if dtype == F32 else (1e-2, 1e-2)
    return Row("vortex", problem, close, close, k_size=1.0, group=channels // groups)


VORTEX_ROWS = [
    Row("vortex", case(1, 1, 4096, 4096, dtype=F16), (1e-1, 1e-5), k_size=1.0),
    Row("vortex", case(1, 64, 128, 128, dtype=F16, pre_gate=True), k_size=0.1),
    *(
        Row("vortex", case(1, 16, length, taps, dtype=dtype, **EVO))
        for length, taps in ((128, 128), (2000, 128), (2000, 2000), (100, 128), (2000, 7))
        for dtype in (BF16, F32)
    ),
    *(two_pass(1, 32, 32, 1, 4, dtype) for dtype in (F32, F16)),
    *(two_pass(2, 32, 64, 2, 4, dtype) for dtype in (F32, F16)),
    *(
        two_pass(2, length, 16, 1, taps, dtype)
        for length, taps, dtype in product((1024, 8192), (4, 32, 128), (F16, F32))
    ),
]

ROWS = [*NV_ROWS, *CUDNN_ROWS, *FLASH_ROWS, *VORTEX_ROWS]


def as_parameter(row: Row):
    long = row.case.batch * row.case.channels * row.case.length > 1 << 16
    marks = (pytest.mark.slow, pytest.mark.one_of(8)) if long else ()
    return pytest.param(row, id=str(row), marks=marks)


def check(what, value, baseline, wanted, close, factor) -> None:
    assert_accurate(value, baseline, wanted, factor, what=what)
    if close is not None:
        atol, rtol = close
        torch.testing.assert_close(value.double(), wanted, atol=atol, rtol=rtol)


def refuses(what, wrong, baseline, wanted, close, factor) -> None:
    with pytest.raises(AssertionError):
        check(what, wrong.to(baseline.dtype), baseline, wanted, close, factor)


@pytest.mark.parametrize("row", [as_parameter(row) for row in ROWS])
def test_a_peers_case(row):
    torch.manual_seed(zlib.crc32(str(row).encode()))
    tensors = row.tensors()
    dy = row.dy(row.case.run(reference.fftconv_fft, tensors))
    y, grads, _ = row.case.with_gradients(fftconv, tensors, dy)
    exact, definition = oracle(row.case)
    y64, grads64, _ = exact.with_gradients(definition, double(tensors), dy.double())
    y_fft, grads_fft, _ = row.case.with_gradients(reference.fftconv_fft, tensors, dy)
    check("y", y, y_fft, y64, row.close, 2.0)
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype
        check(f"d{name}", grad, grads_fft[name], grads64[name], row.close_grads, 3.0)

    mistakes = [torch.zeros_like(y64)]
    moved = tensors | {"k": tensors["k"].roll(1, -1)}
    mistakes.append(exact.run(definition, double(moved)))
    if row.case.skip:
        mistakes.append(exact.run(definition, double(tensors | {"skip": None})))
    for wrong in mistakes:
        refuses("y", wrong, y_fft, y64, row.close, 2.0)
    for name, wanted in grads64.items():
        wrong = wanted.roll(1, -1) if name == "k" else torch.zeros_like(wanted)
        refuses(f"d{name}", wrong, grads_fft[name], wanted, row.close_grads, 3.0)
