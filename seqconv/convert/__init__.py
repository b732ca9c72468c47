"""Checkpoints of the reference implementations, and nn.Conv1d's weights, as layers, models and taps of this package."""

from seqconv.convert.hyena import load_hyena as load_hyena
from seqconv.convert.hyenadna import load_hyenadna as load_hyenadna
from seqconv.convert.layers import load_longconv as load_longconv
from seqconv.convert.layers import load_s4d as load_s4d
from seqconv.convert.layers import load_sgconv as load_sgconv
from seqconv.layers.conv1d import conv1d_taps as conv1d_taps
