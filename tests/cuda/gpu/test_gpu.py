"""The CUDA backend on a real GPU. Without one the file is skipped, in one line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's matrix products want it

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

import packed_cases
import ssm_cases
import step_cases
from accuracy import rel_l2
from cases import Case
from device_cases import LENGTHS, LONG, OPTIONS, compare
from operator_cases import CASES, PROPERTIES
from stream_problems import Stream, one_step

import seqconv
from seqconv import fftconv, reference
from seqconv.backends.cuda import butterfly, driver, gpu, kernels
from seqconv.ops import stream as streaming
from seqconv.ops.ssm_step import ssm_step

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def fused():
    reason = driver.reason(torch.cuda.current_device())
    if reason is not None:
        pytest.exit(f"the tests would only test torch.fft: {reason}", returncode=3)


def on(device, tensors: dict) -> dict:
    return {name: None if t is None else t.to(device) for name, t in tensors.items()}


def check(case: Case, mode: str = "fast") -> None:
    tensors = on("cuda", case.tensors())
    results = case.with_gradients(fftconv, tensors)
    compare(case, tensors, *results, mode, case.dtype in (torch.float16, torch.bfloat16))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_operators_cases(case, mode):
    check(case, mode)


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_operators_properties(name):
    function, given = PROPERTIES[name]
    with torch.device("cuda"):
        function(*given)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", (*LENGTHS, 16384, 32768))
def test_lengths(length, dtype, mode):
    for options in OPTIONS:
        options = dict(options)
        if "taps_rev" in options:
            options["taps_rev"] = length - 1
        check(Case(3, 2, length, length, dtype=dtype, **options), mode)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_windows(dtype, mode):
    """Short kernels in long rows, which are read and written where they lie well and where they do not."""
    for taps, length in ((64, 20000), (65, 20001), (1000, 50000)):
        for options in ({}, {"taps_rev": 30, "activation": "gelu", "post_gate": True}):
            check(Case(3, 5, length, taps, skip="h", dtype=dtype, **options), mode)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("length", [65537, 1 << 20, (1 << 22) - 5])
def test_long_rows(length, dtype):
    check(Case(2, 2, length, length, taps_rev=length - 1, skip="h", post_gate=True, dtype=dtype))


@pytest.mark.parametrize("case", LONG, ids=str)
def test_cases_of_the_long_kernels(case):
    check(case)


@pytest.mark.parametrize("case", packed_cases.CASES, ids=lambda case: str(case[0]))
def test_packed_rows(case):
    """Offsets on the host, on the GPU, and on the GPU where the kernels alone read them."""
    pack, _ = case
    tensors, there = on("cuda", pack.tensors()), pack.offsets.cuda()
    for offsets, most in ((pack.offsets, None), (there, None), (there.int(), max(pack.lengths))):
        call = lambda t, offsets=offsets, most=most: pack.packed(t, offsets, most)  # noqa: E731
        found, dy = packed_cases.with_gradients(call, tensors)
        assert not packed_cases.wrong(pack, tensors, found, dy)


@pytest.mark.parametrize("there", [False, True], ids=["host", "gpu"])
def test_packed_rows_cause_no_wait(there):
    """torch itself raises an error where a call would wait. Offsets on the GPU can also be captured and replaced."""
    pack = packed_cases.Pack((300, 0, 40, 1200), 1200, skip="h", activation="gelu", channels=8)
    tensors = {name: t.requires_grad_() for name, t in on("cuda", pack.tensors()).items()}
    offsets, most = (pack.offsets.cuda(), 1200) if there else (pack.offsets, None)
    dy = torch.randn(8, pack.total, device="cuda")

    def step():
        y = pack.packed(tensors, offsets, most)
        return y, *torch.autograd.grad(y, list(tensors.values()), dy)

    for _ in range(2):  # pinned memory is found at the first call
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not there:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    offsets.copy_(torch.tensor([0, 1100, 1100, 1500, 1540]))
    graph.replay()
    for a, b in zip(found, step(), strict=True):
        assert torch.equal(a, b)


def test_strides_beyond_32_bits():
    far = (1 << 31) + 24
    if torch.cuda.mem_get_info()[0] < 5 * far:
        pytest.skip("wants 10 GiB of free memory")
    memory = torch.empty(far + 3 * 1000, dtype=torch.bfloat16, device="cuda")
    u, k = memory.as_strided((2, 3, 1000), (far, 1000, 1)), torch.randn(3, 1000, device="cuda")
    u.copy_(torch.randn(2, 3, 1000))
    assert torch.equal(fftconv(u, k), fftconv(u.contiguous(), k))


def test_explain_names_the_backend():
    u, k = torch.zeros(2, 3, 500, device="cuda"), torch.zeros(3, 500, device="cuda")
    explanation = seqconv.explain(u, k)
    assert explanation.backend == "cuda" and explanation.fallback is None and explanation.plan
    assert "float64" in seqconv.explain(u.double(), k.double()).fallback


def test_repeatable():
    for dtype in FLOATS:
        case = Case(16, 5, 3000, 3000, taps_rev=100, skip="h", activation="gelu", dtype=dtype)
        tensors = on("cuda", case.tensors())
        y, grads, dy = case.with_gradients(fftconv, tensors)
        for _ in range(3):
            again, grads_again, _ = case.with_gradients(fftconv, tensors, dy)
            assert torch.equal(y, again)
            assert all(torch.equal(grads[n], grads_again[n]) for n in grads)


def test_graph_capture_and_replay():
    for dtype in FLOATS:
        u = torch.randn(4, 6, 1000, device="cuda", dtype=dtype)
        k = torch.randn(6, 1000, device="cuda")
        fftconv(u, k)  # compiles and makes the tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fftconv(u, k)
        u.copy_(torch.randn_like(u))
        graph.replay()
        assert torch.equal(y, fftconv(u, k))


@pytest.mark.parametrize("length", [1203, 70203])
def test_graphs_of_torch_compile(length):
    """The first call of its length comes while torch's pool of CUDA graphs serves: none of its memory may be kept."""

    def step(u, k):
        return fftconv(u, k).sin()

    for dtype in FLOATS:
        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
        k = torch.randn(3, length, device="cuda", requires_grad=True)
        for _ in range(4):  # as it is, recorded, and replayed
            u = torch.randn(2, 3, length, device="cuda", dtype=dtype, requires_grad=True)
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(u, k)
            found = y.detach().clone(), *torch.autograd.grad(y.square().sum(), (u, k))
            expected = step(u, k)
            grads = torch.autograd.grad(expected.square().sum(), (u, k))
            for a, b in zip(found, (expected, *grads), strict=True):
                assert rel_l2(a, b.double()) < (1e-5 if dtype == torch.float32 else 4e-2)
            # the eager call has made its tables now: every dtype starts with others
        length += 1024


def test_two_streams():
    k = torch.randn(8, 4096, device="cuda")
    inputs = [torch.randn(8, 8, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    expected = [fftconv(u, k) for u in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for u, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(fftconv(u, k))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compile_export_vmap_and_autocast():
    u = torch.randn(2, 3, 500, device="cuda", requires_grad=True)
    k = torch.randn(3, 500, device="cuda", requires_grad=True)
    y = fftconv(u, k)
    compiled = torch.compile(fftconv, fullgraph=True)(u, k)
    torch.testing.assert_close(compiled, y)
    grads = torch.autograd.grad(compiled.square().sum(), (u, k))
    expected = torch.autograd.grad(y.square().sum(), (u, k))
    torch.testing.assert_close(grads, expected)
    mapped = torch.vmap(fftconv, in_dims=(0, None))(u[:, None], k)[:, 0]
    torch.testing.assert_close(mapped, y, rtol=1e-4, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(fftconv(u, k), y)


def test_layers():
    limited = (seqconv.LongConv, seqconv.SGConv, seqconv.Hyena, seqconv.ButterflyConv)
    for layer in (seqconv.S4D(8), *[cls(8, l_max=700) for cls in limited]):
        layer = layer.cuda().eval()
        x = torch.randn(2, 700, 8, device="cuda", requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        assert torch.isfinite(x.grad).all()
        on_cpu = layer.cpu()(x.detach().cpu())
        torch.testing.assert_close(y.detach().cpu(), on_cpu, rtol=1e-4, atol=1e-4)


def test_learned_butterfly():
    device, radices = driver.device(torch.cuda.current_device()), (16, 16, 8)
    x = torch.randn(9, 4, 1500, device="cuda")
    factors = {r: torch.randn(2, r, r, 2, device="cuda") / r for r in radices}
    z = butterfly.transform(device, x, factors, radices)
    found = butterfly.gradients(device, torch.ones_like(z), x, factors, radices)
    leaves = [x.double().requires_grad_(), *[f.double().requires_grad_() for f in factors.values()]]
    z64 = reference.butterfly(leaves[0], dict(zip(factors, leaves[1:], strict=True)), radices)
    assert rel_l2(z, z64.detach()) < 1e-6
    expected = torch.autograd.grad(z64, leaves, torch.ones_like(z64))
    for a, b in zip((found[0], *found[1].values()), expected, strict=True):
        assert rel_l2(a, b) < 2e-6


@pytest.mark.parametrize("c, h, n, length", [*ssm_cases.SIZES, (1, 40, 32, 16384)])
def test_sums_of_exponentials(c, h, n, length):
    a, w = ssm_cases.problem(c, h, n, decay=(1e-6, 0.3), turn=130.0)
    device = driver.device(torch.cuda.current_device())
    ssm_cases.check(device, a.cuda(), w.cuda(), torch.randn(c, h, length, device="cuda"))


@pytest.mark.parametrize("sizes", [*step_cases.SIZES, (64, 1, 256, 32)], ids=str)
def test_steps_of_state_space_models(sizes):
    """Also captured in a graph, whose every replay is one step."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = step_cases.problem(*sizes, dtype)
        case = case._replace(**{name: t.cuda() for name, t in case._asdict().items()})
        run = lambda step, activation: ssm_step(step, activation)[0]  # noqa: E731
        step_cases.check(run, case, "gelu", 4e-7)
        graph, own = torch.cuda.CUDAGraph(), step_cases.copied(case)
        with torch.cuda.graph(graph):
            y = run(own, "gelu")
        own.state.copy_(case.state)
        wanted = step_cases.copied(case)
        for _ in range(3):
            graph.replay()
            assert torch.equal(y, run(wanted, "gelu")) and torch.equal(own.state, wanted.state)


@pytest.mark.parametrize("spread", [False, True], ids=["plain", "spread"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_streams(dtype, spread):
    """A plain step waits for nothing, and launches of a spread one are the same at every step: a graph replays them."""
    for taps, steps in ((1, 40), (97, 500), (4097, 6000)):
        case = Stream(3, 2, 37, taps, steps, spread, "gelu", "pre post", dtype)
        given = case.tensors("cuda")
        assert case.error(case.run(given), given) < 1
        if not spread:
            continue
        rings, kernel = case.start(given)
        held, found = [t.clone() for t in case.signals(given, 0)], []
        streaming.step(*held, rings, kernel, "gelu", True)  # compiles
        rings.inputs.zero_(), rings.sums.zero_(), rings.clock.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = streaming.step(*held, rings, kernel, "gelu", True)
        for t in range(steps):
            for into, new in zip(held, case.signals(given, t), strict=True):
                into.copy_(new)
            graph.replay()
            found.append(y.clone())
        assert case.error(torch.stack(found, -1), given) < 1


@pytest.mark.parametrize("points", [*kernels.TILES, 65536, 1 << 18])
def test_tiles_of_streams(points):
    for spread in (False, True):
        clock = torch.tensor([points - 1])
        assert one_step(gpu, 1, 2, 3, points, clock, spread, "cuda") < 1e-6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_second_device():
    u, k = torch.randn(2, 3, 500, device="cuda:1"), torch.randn(3, 500, device="cuda:1")
    torch.testing.assert_close(fftconv(u, k), reference.fftconv_fft(u, k), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    script = (
        "import torch; from seqconv import fftconv\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for length in (100, 1000, 5000):\n"
        "        u = torch.randn(3, 2, length, device='cuda', dtype=dtype, requires_grad=True)\n"
        "        k = torch.randn(2, length, device='cuda', requires_grad=True)\n"
        "        fftconv(u, k, activation='gelu').float().sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        # torch and the bindings ask for functions that a driver may not have
        *(["--report-api-errors", "no"] if tool == "memcheck" else []),
        "--error-exitcode",
        "9",
        sys.executable,
        "-c",
        script,
    ]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:]
