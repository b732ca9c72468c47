"""python -m seqconv: what is installed, which backends work on this machine, and how to get the others.

Exit code 0 if the fused kernels of this machine's best device work, 1 if a fallback would be used
there.
"""

import platform
import sys

import einops
import torch

import seqconv
from seqconv import reference
from seqconv.backends import cpu, cuda


def check(device: str) -> str | None:
    """Runs the operators and their gradients on the device; what is wrong, or None."""
    u = torch.zeros(1, 1, 64, device=device)
    reason = seqconv.explain(u, u[0]).fallback
    if reason is not None:
        return reason
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)):
        values = [random(2, 9, 500).to(device, dtype), random(9, 500).to(device)]
        options = {"activation": "gelu"}
        wrong = compare(seqconv.fftconv, reference.fftconv_fft, values, allowed, options)
        if wrong is not None:
            return f"WRONG RESULT: fftconv, {str(dtype).removeprefix('torch.')}, {wrong}"
    A, C = -random(9, 4, 2).abs(), random(1, 9, 4, 2)
    values = [t.to(device) for t in (random(9) - 3, A, C)]
    options = {"length": 500}
    wrong = compare(seqconv.ssm_kernel, reference.ssm_kernel, values, 1e-5, options)
    return wrong if wrong is None else f"WRONG RESULT: ssm_kernel, {wrong}"


def compare(ours, theirs, values, allowed: float, options: dict) -> str | None:
    """What differs between two functions of `values` or their gradients by more than `allowed`, or None."""
    results = []
    for function in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in values]
        y = function(*leaves, **options)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for mine, other in zip(*results, strict=True):
        error = ((mine - other).float().norm() / other.float().norm()).item()
        if not error < allowed:
            return (
                f"relative error {error:.1e} against plain torch; please report it with this page"
            )
    return None


def report() -> bool:
    """Prints the report; whether the best device's fused kernels work."""

    def line(name: str, text: str) -> None:
        print(f"{name:<14}{text}")

    line("seqconv", seqconv.__version__)
    line("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    line("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    line("einops", einops.__version__)

    print()
    on_cpu = check("cpu")
    if on_cpu is None:
        line(
            "cpu",
            f"fused kernels work: {cpu.isa()}, {cpu.threads()} threads, built by {cpu.compiler()}",
        )
    else:
        line("cpu", f"torch.fft, slower with the same answers: {on_cpu}")
        if cpu.missing:
            line(
                "",
                "to get the fused kernels: install a C++17 compiler and this Python's headers (Debian: apt install",
            )
            line(
                "",
                "g++ python3-dev; Windows: clang-cl), then pip install --no-deps --editable . in the source folder",
            )
    gpu = torch.cuda.is_available()
    on_cuda = check("cuda") if gpu else None
    missing = cuda.driver.packages_reason()
    if gpu and on_cuda is None:
        device = cuda.driver.device(torch.cuda.current_device())
        line("cuda", f"{torch.cuda.get_device_name()}: fused kernels work, those of {device.arch}")
    elif gpu:
        line(
            "cuda",
            f"{torch.cuda.get_device_name()}: torch.fft, slower with the same answers: {on_cuda}",
        )
    elif missing is None:
        line("cuda", "torch sees no CUDA device; what launches the kernels is installed")
    else:
        line("cuda", f"torch sees no CUDA device; for one, the kernels would need: {missing}")
    if missing is None:
        compiler_lines(line)
    return (on_cuda if gpu else on_cpu) is None


def compiler_lines(line) -> None:
    """Where the CUDA kernels come from: the packages, the cache, the prebuilt ones."""
    compiler = cuda.compiler
    missing = compiler.compiler_reason()
    packages = f"cuda.bindings {compiler.bindings_version()}, cuda.core not needed"
    if missing is None:
        line("", f"{packages}, NVRTC {compiler.version()}: the kernels can be compiled")
        try:
            line("", f"compiled kernels are kept in {compiler.cache_folder()}")
        except OSError as error:
            line("", f"compiled kernels are not kept: {error}: set SEQCONV_CACHE to a folder")
    else:
        line("", f"{packages}; {missing}")
    for folder in compiler.prebuilt_folders():
        count = sum(1 for _ in folder.glob("*.cubin"))
        if count:
            line("", f"{count} prebuilt kernels in {folder}")
        elif folder != compiler.PACKAGED:
            line("", f"no prebuilt kernels in SEQCONV_CUBINS={folder}")


if __name__ == "__main__":
    sys.exit(0 if report() else 1)
