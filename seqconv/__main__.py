"""python -m seqconv: what is installed, which backends work on this machine, and how to get the others.

Exit code 0 if the fused kernels of this machine's best device work, 1 if a fallback would be used
there.
"""

import platform
import sys

import einops
import torch

import seqconv
from seqconv import _cpu, _ops, reference


def check(device: str) -> str | None:
    """Runs fftconv and its gradient on the device; what is wrong, or None."""
    reason = _ops.fallback_reason(torch.device(device))
    if reason is not None:
        return reason
    generator = torch.Generator().manual_seed(0)
    u, k = (torch.randn(shape, generator=generator) for shape in ((2, 9, 500), (9, 500)))
    results = []
    for function in (seqconv.fftconv, reference.fftconv_fft):
        leaves = [t.to(device).requires_grad_() for t in (u, k)]
        y = function(*leaves, activation="gelu")
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error < 1e-5:
            return f"WRONG RESULT: relative error {error:.1e} against torch.fft; please report it with this page"
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
                "g++ python3-dev), then pip install --force-reinstall --no-deps --no-cache-dir seqconv",
            )
    gpu = torch.cuda.is_available()
    if gpu:
        line(
            "cuda",
            f"{torch.cuda.get_device_name()}: torch.fft, slower with the same answers: {check('cuda')}",
        )
    else:
        line("cuda", "torch sees no CUDA device; tensors on one would take torch.fft")
    line("", "this version has no fused CUDA kernels: there is nothing to install for them")
    return (check("cuda") if gpu else cpu) is None


if __name__ == "__main__":
    sys.exit(0 if report() else 1)
