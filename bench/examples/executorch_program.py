"""Every layer as an ExecuTorch program, for telephones and small devices: no Python, no torch, no seqconv.

pip install executorch==1.4.* torchao==0.18.*    (for torch 2.13)
python -m bench.examples.executorch_program [LENGTH]

torch.export records the layer with a constant kernel, seqconv's operators are replaced by products of matrices, and
ExecuTorch lowers what is left to its own operators, or to those of XNNPACK where they take part. ExecuTorch's runtime
runs the program here for two sizes of the batch. The last column compares that with the layer's own output.
"""

import sys
import time

import torch
from torch import nn

import seqconv
from seqconv import export

CHANNELS, BATCHES, MOST = 16, (2, 5), 8
LAYERS = {
    "S4D": lambda length: seqconv.S4D(CHANNELS),
    "LongConv": lambda length: seqconv.LongConv(CHANNELS, l_max=length),
    "SGConv, two-sided": lambda length: seqconv.SGConv(CHANNELS, l_max=length, bidirectional=True),
    "Hyena": lambda length: seqconv.Hyena(CHANNELS, l_max=length),
    "ButterflyConv": lambda length: seqconv.ButterflyConv(CHANNELS, l_max=length),
}


def lowered(layer: nn.Module, length: int, partitioners: list) -> bytes:
    """The program of a layer for inputs (up to MOST, length, CHANNELS)."""
    from executorch.exir import to_edge_transform_and_lower

    x = torch.randn(BATCHES[0], length, CHANNELS)
    shapes = ({0: torch.export.Dim("batch", max=MOST)},)
    with torch.no_grad():
        frozen = seqconv.freeze(layer, length)
        program = torch.export.export(frozen, (x,), dynamic_shapes=shapes)
        program = program.run_decompositions(export.decompositions())
        return to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch().buffer


def main(length: int = 1000) -> float:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime

    worst = 0.0
    for name, make in LAYERS.items():
        layer = make(length).eval()
        for kind, partitioners in (("portable", []), ("XNNPACK", [XnnpackPartitioner()])):
            buffer = lowered(layer, length, partitioners)
            method = Runtime.get().load_program(buffer).load_method("forward")
            for batch in BATCHES:
                x = torch.randn(batch, length, CHANNELS)
                with torch.no_grad():
                    y = layer(x)
                start = time.perf_counter()
                (found,) = method.execute([x])
                took = 1e3 * (time.perf_counter() - start)
                error = ((found - y).norm() / y.norm()).item()
                worst = max(worst, error)
                shape = "x".join(map(str, x.shape))
                size = f"{len(buffer) / 1000:.0f} kB"
                print(f"{name:18} {kind:9} {shape:10} {size:7} {took:8.1f} ms, error {error:.1e}")
    if not worst <= 2e-6:
        raise SystemExit(f"the largest relative error is {worst:.1e}")
    return worst


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
