"""What happens around the operator: forks, threads, forced backends, the report."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from seqconv import fftconv, reference


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


# Row by row: anything of torch's own that runs in parallel would hang in the child.
FORK = """
import os, torch, seqconv
def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1)))
u, k, dy = torch.randn(8, 32, 500).requires_grad_(), torch.randn(32, 500), torch.randn(8, 32, 500)
wanted = seqconv.fftconv(u, k)
(grad,) = torch.autograd.grad(wanted, u, dy)
child = os.fork()
if child == 0:
    y = seqconv.fftconv(u, k)
    (again,) = torch.autograd.grad(y, u, dy)
    plan = seqconv.explain(u, k)
    os._exit(0 if equal(y, wanted) and equal(grad, again) and plan.threads == 1 else 1)
_, status = os.waitpid(child, 0)
raise SystemExit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_of_a_threaded_process_works():
    result = python(FORK)
    assert result.returncode == 0, result.stderr


def test_calls_from_many_threads():
    problems = [
        (torch.randn(3, 9, n), torch.randn(9, n)) for n in (100, 101, 777, 1000, 2048, 3001)
    ]
    wanted = [fftconv(u, k) for u, k in problems]
    wrong = []

    def work():
        for _ in range(5):
            for (u, k), y in zip(problems, wanted, strict=True):
                if not torch.equal(fftconv(u, k), y):
                    wrong.append(u.shape)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_data_loader_workers():
    from torch.utils.data import DataLoader, Dataset

    class Rows(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return fftconv(torch.full((1, 9, 100), float(i)), torch.ones(9, 100))[0]

    rows = torch.cat(list(DataLoader(Rows(), batch_size=2, num_workers=2)))
    assert torch.equal(rows, torch.stack([Rows()[i] for i in range(4)]))


def test_report():
    result = subprocess.run([sys.executable, "-m", "seqconv"], capture_output=True, text=True)
    assert result.returncode == (1 if torch.cuda.is_available() else 0), result.stdout
    for word in ("seqconv", "python", "torch", "fused kernels work", "built by", "cuda"):
        assert word in result.stdout


def test_report_with_a_forced_fallback():
    environment = os.environ | {"SEQCONV_BACKEND": "reference"}
    result = subprocess.run(
        [sys.executable, "-m", "seqconv"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 1 and "SEQCONV_BACKEND=reference asks for it" in result.stdout


def test_forced_fallback_has_the_same_answer():
    code = """
import torch, seqconv
torch.manual_seed(0)
u, k = torch.randn(2, 3, 99, dtype=torch.float64, requires_grad=True), torch.randn(3, 99)
assert seqconv.explain(u, k).backend == "reference"
y = seqconv.fftconv(u, k, activation="gelu")
print(repr(y.sum().item()), repr(torch.autograd.grad(y.square().sum(), u)[0].sum().item()))
"""
    result = python(code, SEQCONV_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    torch.manual_seed(0)
    u, k = torch.randn(2, 3, 99, dtype=torch.float64, requires_grad=True), torch.randn(3, 99)
    y = fftconv(u, k, activation="gelu")
    wanted = [y.sum().item(), torch.autograd.grad(y.square().sum(), u)[0].sum().item()]
    assert [float(x) for x in result.stdout.split()] == pytest.approx(wanted, rel=1e-9)


def test_unknown_isa_is_refused_and_portable_works():
    result = python("import seqconv", SEQCONV_CPU_ISA="sse9")
    assert result.returncode != 0 and "SEQCONV_CPU_ISA=sse9" in result.stderr
    code = (
        "import torch, seqconv; print(seqconv.explain(torch.zeros(1, 1, 50), torch.zeros(1, 50)))"
    )
    assert "cpu (portable" in python(code, SEQCONV_CPU_ISA="portable").stdout


def test_the_suite_refuses_to_test_the_fallback():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        os.path.dirname(__file__) + "/../ops/test_fftconv.py",
    ]
    environment = os.environ | {"SEQCONV_BACKEND": "reference"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 3 and "only test torch.fft" in result.stdout + result.stderr


def test_out_of_memory_is_an_exception():
    """A kernel spectrum no machine can hold, asked for without allocating its output."""
    from seqconv.backends import cpu
    from seqconv.backends.inputs import Inputs

    huge = 1 << 46
    u, k, y = (
        torch.zeros(1).expand(1, 1, huge),
        torch.zeros(1).expand(1, huge),
        torch.zeros(1).expand(1, 1, huge),
    )
    with pytest.raises(MemoryError):
        cpu.fftconv(y, Inputs(u, k, None, None, None, None), "none")
    assert torch.equal(
        reference.fftconv(torch.ones(1, 1, 1), torch.ones(1, 1)), torch.ones(1, 1, 1)
    )


def flags_at(address: int) -> list[str]:
    """Of the mapping that holds the address."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first, *rest = line.split()
            if first == "VmFlags:" and inside:
                return rest
            if not first.endswith(":"):
                begin, end = (int(part, 16) for part in first.split("-"))
                inside = begin <= address < end
    return []


@pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"),
    reason="a system without large pages",
)
@pytest.mark.parametrize("layout", ["bhl", "blh"])
def test_large_results_ask_for_large_pages(layout):
    """From the first to the last whole page of theirs."""
    u = torch.randn(2, 1 << 10, 1 << 10).requires_grad_()
    k = torch.randn(1 << 10, 1 << 10)
    (grad,) = torch.autograd.grad((y := fftconv(u, k, layout=layout)).sum(), u)
    page = 2 << 20
    for result in (y, grad):
        begin = -(-result.data_ptr() // page) * page
        end = (result.data_ptr() + 4 * result.numel()) // page * page
        assert begin < end
        assert "hg" in flags_at(begin) and "hg" in flags_at(end - 1)
