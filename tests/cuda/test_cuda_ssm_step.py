"""The kernel of a step of a state space model on the host, against the formula in float64."""

import pytest
import torch
from emulated import OnDevice
from fake_driver import Device, Driver
from step_cases import ACTIVATIONS, SIZES, check, copied, problem

from seqconv import S4D, use_backend
from seqconv.backends.cuda import driver, ssm_step
from seqconv.ops.ssm_step import ssm_step as operator

KINDS = (torch.float32, torch.bfloat16, torch.float16)


def runs_on(device):
    def run(step, activation):
        y = torch.full((len(step.x), step.skip.numel()), torch.nan, dtype=step.x.dtype)
        ssm_step.step(device, y, step, activation)
        return y

    return run


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_and_dtypes(machine, sizes):
    device = machine.device()
    for dtype in KINDS:
        for activation in ACTIVATIONS:
            check(runs_on(device), problem(*sizes, dtype), activation, 4e-7)


def test_every_number_of_modes(machine):
    """Teams of every size; a mode that is left out or counted twice is seen."""
    device = machine.device()
    for modes in (*range(1, 10), 15, 16, 17, 31, 33):
        check(runs_on(device), problem(3, 2, 5, modes), "silu", 4e-7)


def test_order_of_threads(machine):
    """Every element of the state belongs to one thread, and the order of the sums is fixed."""
    step, found = problem(6, 2, 21, 35), []
    for order in (0, 1, 7):
        own = copied(step)
        y = runs_on(machine.device(order=order))(own, "gelu")
        found.append((y, own.state))
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0]))


def test_rows_do_not_depend_on_others(machine):
    step = problem(6, 2, 5, 9)
    run, together = runs_on(machine.device()), copied(step)
    y = run(together, "gelu")
    for rows in (slice(0, 1), slice(3, 6)):
        few = step._replace(state=step.state[rows].clone(), x=step.x[rows])
        assert torch.equal(run(few, "gelu"), y[rows])
        assert torch.equal(few.state, together.state[rows])


def test_through_the_driver(emulator, monkeypatch):
    monkeypatch.setattr(driver, "find_prebuilt", lambda name, *_: b"\x7fELF " + name.encode())
    device = Device(0, Driver(emulator.device()))
    check(runs_on(device), problem(3, 2, 5, 4), "gelu", 4e-7)


def test_the_layer_on_cudas_road(emulator):
    """Steps are the convolution. A layer in float64 takes torch."""
    for dtype, launches in ((torch.float32, 20), (torch.float64, 0)):
        device, layer = emulator.device(), S4D(6, d_state=8, heads=2).to(dtype)
        x = torch.randn(2, 20, 6, dtype=dtype)
        with torch.no_grad():
            wanted = layer(x)
            with use_backend(OnDevice(device)):
                state, outputs = layer.init_state(2), []
                for x_t in x.unbind(1):
                    y, state = layer.step(x_t, state)
                    outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, 1), wanted)
        assert [name for name, *_ in device.launches] == ["ssm_step"] * launches


def test_other_dtypes_of_the_skip_and_nothing_to_do(emulator):
    device = emulator.device()
    with use_backend(OnDevice(device)):
        step = problem(2, 1, 3, 4)
        half = step._replace(skip=step.skip.bfloat16())
        check(lambda *args: operator(*args)[0], half, "gelu", 4e-7)
        assert len(device.launches) == 1
        double = step._replace(skip=step.skip.double())
        check(lambda *args: operator(*args)[0], double, "gelu", 4e-7)
        assert operator(problem(0, 2, 3, 4), "gelu")[0].shape == (0, 6)
    assert len(device.launches) == 1
