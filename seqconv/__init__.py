"""Convolutions as long as their sequence: one fused operator and the layers that generate its kernel."""

from seqconv._version import __version__
from seqconv.functional import Explanation, explain, fftconv

__all__ = ["Explanation", "__version__", "explain", "fftconv"]
