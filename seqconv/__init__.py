"""Convolutions as long as their sequence: one fused operator and the layers that generate its kernel."""

from seqconv import convert as convert
from seqconv import nn as nn
from seqconv._explanation import Explanation
from seqconv._version import __version__
from seqconv.butterfly_conv import ButterflyConv
from seqconv.functional import explain, fftconv
from seqconv.hyena import Hyena, HyenaFilter
from seqconv.long_conv import LongConv, LongConvKernel
from seqconv.optim import param_groups
from seqconv.s4d import S4D, S4DKernel
from seqconv.sgconv import SGConv, SGConvKernel
from seqconv.ssm import explain_ssm_kernel, ssm_kernel

__all__ = [
    "S4D",
    "ButterflyConv",
    "Explanation",
    "Hyena",
    "HyenaFilter",
    "LongConv",
    "LongConvKernel",
    "S4DKernel",
    "SGConv",
    "SGConvKernel",
    "__version__",
    "explain",
    "explain_ssm_kernel",
    "fftconv",
    "param_groups",
    "ssm_kernel",
]
