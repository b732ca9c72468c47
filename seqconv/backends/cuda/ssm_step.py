"""One step of a diagonal state space model on a device, by the kernel of csrc/device/ssm_step.cuh.

The order of the sums is fixed by the number of modes. So a row does not depend on the rows beside it.
"""

from torch import Tensor

from seqconv.backends.cuda.arguments import arguments
from seqconv.backends.pack import ACTIVATIONS

THREADS = 128
SAMPLES = 4  # that one reading of the tables serves


def step(device, y: Tensor, inputs, activation: str) -> None:
    """Changes inputs.state and writes y (batch, heads channels). No size is zero."""
    heads, channels, modes, _ = inputs.output.shape
    lanes = min(32, 1 << (modes - 1).bit_length())
    teams = THREADS // lanes
    fields = inputs._asdict() | {
        "batch": len(y),
        "heads": heads,
        "channels": channels,
        "modes": modes,
        "lanes": lanes,
        "activation": ACTIVATIONS[activation],
        "y": y.unflatten(1, (heads, channels)),
    }
    grid = -(-channels // teams) * -(-len(y) // SAMPLES)
    device.launch("ssm_step", grid, THREADS, 0, arguments("ssm_step", **fields))
