"""What the PTX machine takes for the memory that a kernel may touch."""

import gc

import numpy as np
import ptx_device
import pytest
import torch


def test_living_memory_is_of_living_tensors():
    x = torch.zeros(1000)
    kept = x.data_ptr(), x.untyped_storage().nbytes()
    held = lambda: any(a <= kept[0] and sum(kept) <= a + n for a, n in ptx_device.living_memory())  # noqa: E731
    assert held()
    meta = torch.zeros(1000, device="meta")
    assert held() and meta.device.type == "meta"


class Apart(torch.Tensor):
    """The class of the tensor that the collector takes apart."""


def test_a_tensor_that_the_collector_took_apart():
    """It is a Python object without a tensor behind it, has no device, and stays for as long as something holds it."""
    caught = []

    class Late:
        """An array keeps it. The collector does not look into arrays, so that it dies while its cycle is torn down."""

        def __init__(self):
            self.__array_interface__ = np.zeros(1).__array_interface__

        def __del__(self):
            caught.extend(x for x in gc.get_objects() if type(x) is Apart)

    gc.collect()
    gc.disable()
    try:
        x = torch.ones(3).as_subclass(Apart)
        cycle = [x, np.asarray(Late())]
        cycle.append(cycle)
        x.cycle = cycle
        del x, cycle
        gc.collect()
    finally:
        gc.enable()
    (apart,) = caught
    with pytest.raises(RuntimeError, match="does not have a device"):
        print(apart.device)
    x = torch.ones(3)
    assert any(begin <= x.data_ptr() < begin + size for begin, size in ptx_device.living_memory())
