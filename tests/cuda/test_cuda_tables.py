"""Tables of constants in the memory of a device, on a recording driver."""

import pytest
import torch

from seqconv.backends.cuda import tables


def test_tables_lie_outside_of_torchs_pools(device):
    """They lie in the driver's own memory. It is tried twice, and freed when nothing uses it and no work is left."""
    memory = device.driver.memory
    device.driver.full = 1
    table = device.table(tables.build, 512, (2, 16, 16), 2, True)
    assert list(memory) == [int(table)] and device.driver.tried == 2
    words = tables.build(512, (2, 16, 16), 2, True)
    assert memory[int(table)].raw == words.numpy().tobytes()
    for n in range(64):
        device.table(torch.zeros, n + 1)
    assert len(memory) == 65  # `table` may be part of a call that is still to be launched
    device.driver.running = True
    del table
    assert len(memory) == 64
    device.driver.tried, device.driver.full = 0, 2
    with pytest.raises(RuntimeError, match="CUDA driver: 2"):
        device.table(torch.ones, 3)
    assert len(memory) == 64 and len(device.table.recent) == 64


def test_tables_in_a_graph_are_kept(device):
    """A captured graph knows addresses only, so that its tables outlive any number of others."""
    device.table(torch.zeros, 5)
    device.capturing = True
    kept = int(device.table(torch.zeros, 5))
    with pytest.raises(RuntimeError, match="once before the capture"):
        device.table(torch.zeros, 6)
    device.capturing = False
    for n in range(80):
        device.table(torch.ones, n + 1)
    assert len(device.driver.memory) == 65 and int(device.table(torch.zeros, 5)) == kept
