"""python -m seqconv: what is installed, which backends work on this machine, and how to get the others.

Exit code 0 if the fused kernels of this machine's best device work, 1 if a fallback would be used
there.
"""

import platform
import sys

import einops
import torch

import seqconv
from seqconv import _cpu, _cuda, _ops, reference


def check(device: str) -> str | None:
    """Runs fftconv and its gradient on the device; what is wrong, or None."""
    reason = _ops.fallback_reason(torch.device(device))
    if reason is not None:
        return reason
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)):
        generator = torch.Generator().manual_seed(0)
        u, k = (torch.randn(shape, generator=generator) for shape in ((2, 9, 500), (9, 500)))
        results = []
        for function in (seqconv.fftconv, reference.fftconv_fft):
            leaves = [u.to(device, dtype).requires_grad_(), k.to(device).requires_grad_()]
            y = function(*leaves, activation="gelu")
            results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
        for ours, theirs in zip(*results, strict=True):
            error = ((ours - theirs).float().norm() / theirs.float().norm()).item()
            if not error < allowed:
                what = f"relative error {error:.1e} in {str(dtype).removeprefix('torch.')}"
                return f"WRONG RESULT: {what} against torch.fft; please report it with this page"
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
    cpu = check("cpu")
    if cpu is None:
        line(
            "cpu",
            f"fused kernels work: {_cpu.isa()}, {_cpu.threads()} threads, built by {_cpu.compiler()}",
        )
    else:
        line("cpu", f"torch.fft, slower with the same answers: {cpu}")
        if _cpu.missing:
            line(
                "",
                "to get the fused kernels: install a C++17 compiler and this Python's headers (Debian: apt install",
            )
            line(
                "",
                "g++ python3-dev), then pip install --force-reinstall --no-deps --no-cache-dir . in the source folder",
            )
    gpu = torch.cuda.is_available()
    cuda = check("cuda") if gpu else None
    packages = _cuda.driver.packages_reason()
    if gpu and cuda is None:
        device = _cuda.driver.device(torch.cuda.current_device())
        line(
            "cuda",
            f"{torch.cuda.get_device_name()}: fused kernels work, compiled for {device.arch}",
        )
    elif gpu:
        line(
            "cuda",
            f"{torch.cuda.get_device_name()}: torch.fft, slower with the same answers: {cuda}",
        )
    elif packages is None:
        line("cuda", "torch sees no CUDA device; what the kernels need is installed")
    else:
        line("cuda", f"torch sees no CUDA device; for one, the kernels would need: {packages}")
    if packages is None:
        line("", f"compiled kernels are kept in {_cuda.driver.cache_folder()}")
    return (cuda if gpu else cpu) is None


if __name__ == "__main__":
    sys.exit(0 if report() else 1)
