"""Problems for the CUDA kernels on the host, and the limits of several kinds of devices."""

from dataclasses import replace

import torch
from cases import Case
from emulated import OnDevice
from judge import judge

from seqconv import fftconv, use_backend
from seqconv.backends.cuda.problem import H100, Limits

A100 = Limits(shared=166912, shared_total=167936, processors=108, clock=1.41e9, bandwidth=1.55e12)
TURING = Limits(65536, 65536, 40, 1.59e9, 3.2e11, tensor_cores=False)
# With these limits rows that an emulator can afford are long, and every block has several rows.
SMALL = Limits(shared=20000, shared_total=20000, processors=1)
FEW = replace(H100, processors=1)


def run(device, case: Case):
    tensors = case.tensors()
    with use_backend(OnDevice(device)):
        return tensors, *case.with_gradients(fftconv, tensors)


def check(device, case: Case, mode: str = "fast"):
    results = run(device, case)
    compare(case, *results, mode, any(kernel.startswith("half") for kernel, *_ in device.launches))


def compare(case: Case, *results):
    """Asserts that all verdicts of `judge` are right. It takes the results as they are here."""
    for verdict in judge(case, *results):
        assert verdict.right, verdict


def case_inputs(case: Case):
    tensors = case.tensors()
    return tensors["u"], tensors["k"], tensors["k_rev"]


# Lengths about the edges of plans, and options to go with each.
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 127, 255, 256, 257, 513, 1000, 2049, 5000, 14113)
OPTIONS = (
    {"skip": "h"},
    {"taps_rev": -1, "skip": "h", "pre_gate": True},
    {"mode": "circular", "post_gate": True},
    {"skip": "h", "activation": "gelu", "post_gate": True, "pre_gate": True},
    {"layout": "blh", "activation": "silu", "taps_rev": -1},
    {"heads": 2, "skip": "ch", "activation": "silu"},
)

LONG = [
    Case(
        2,
        2,
        20000,
        20000,
        taps_rev=19999,
        skip="h",
        activation="gelu",
        pre_gate=True,
        post_gate=True,
    ),
    Case(2, 2, 9000, 9000, heads=2, skip="ch", activation="gelu"),
    Case(2, 2, 9000, 9000, heads=2, per_sample=True, skip="ch"),
    Case(2, 2, 9001, 9001, mode="circular", skip="h", layout="blh"),
    Case(3, 2, 12288, 12288, skip="h", dtype=torch.bfloat16, post_gate=True),
    Case(1, 1, 65537, 65537, dtype=torch.float16),
]

ORDERS = [
    (Case(5, 3, 1000, 1000, heads=2, skip="h", activation="gelu"), FEW),
    (Case(5, 1, 4096, 4096, skip="h", taps_rev=5), FEW),
    (Case(3, 1, 20000, 20000, skip="h"), SMALL),
    (Case(2, 1, 2500, 2500), SMALL),  # 10 x 256, whose outer passes meet elements of other threads
    (Case(9, 1, 700, 700), FEW),  # several rounds of rows
    (Case(19, 1, 256, 256, skip="h", dtype=torch.bfloat16), FEW),  # on tensor cores from here on
    (Case(9, 3, 1024, 1024, pre_gate=True, post_gate=True, skip="h", dtype=torch.bfloat16), FEW),
    (Case(9, 3, 1024, 1024, heads=2, dtype=torch.bfloat16), FEW),
    (Case(5, 5, 1000, 1000, dtype=torch.bfloat16), FEW),  # several channels to a block
    (Case(19, 2, 2047, 2047, skip="h", dtype=torch.bfloat16), FEW),  # any rows
    (Case(3, 1, 16384, 16384, dtype=torch.bfloat16), FEW),  # no spectrum follows the tables
    (Case(2, 1, 8192, 8192, skip="h", dtype=torch.float16), FEW),
    (Case(2, 1, 20000, 20000, skip="h", dtype=torch.bfloat16), FEW),  # one row after the other
]


def results(machine, case: Case, limits: Limits, order: int, **options):
    """y and the gradients on a device of the emulator or of the PTX machine, which takes the options."""
    torch.manual_seed(0)
    _, y, grads, _ = run(machine.device(limits, order, **options), case)
    return [y, *grads.values()]
