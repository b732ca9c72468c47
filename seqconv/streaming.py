"""Convolutions and layers that take their input step by step.

Every causal layer of this package has init_state, step and prefill. StreamingConv has the same for taps of your
own, and State describes what they keep between steps.
"""

from seqconv.layers.hyena import HyenaState
from seqconv.layers.recurrence import S4DState
from seqconv.layers.state import State, States
from seqconv.layers.streaming import StreamingLayer
from seqconv.layers.streaming_conv import ConvState, StreamingConv

__all__ = [
    "ConvState",
    "HyenaState",
    "S4DState",
    "State",
    "States",
    "StreamingConv",
    "StreamingLayer",
]
