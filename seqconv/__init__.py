"""Convolutions as long as their sequence: one fused operator and the layers that generate its kernel."""

import sys as _sys

from seqconv import convert as convert
from seqconv import nested as nested
from seqconv import nn as nn
from seqconv import streaming as streaming
from seqconv._version import __version__
from seqconv.backends import use_backend
from seqconv.backends.protocol import Explanation
from seqconv.export import freeze
from seqconv.layers.butterfly_conv import ButterflyConv
from seqconv.layers.hyena import Hyena
from seqconv.layers.hyena_filter import HyenaFilter
from seqconv.layers.long_conv import LongConv, LongConvKernel
from seqconv.layers.s4d import S4D, S4DKernel
from seqconv.layers.sgconv import SGConv, SGConvKernel
from seqconv.ops.explain import explain
from seqconv.ops.fftconv import fftconv
from seqconv.ops.ssm import explain_ssm_kernel, ssm_kernel
from seqconv.optim import param_groups
from seqconv.patching import patch

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
    "freeze",
    "param_groups",
    "patch",
    "ssm_kernel",
    "use_backend",
]

# Pickled models and earlier programs name these modules by the places they had.
for _old, _new in {
    "_conv1d": "layers.conv1d",
    "_explanation": "backends.protocol",
    "_layer": "layers.base",
    "functional": "ops.fftconv",
    "ssm": "ops.ssm",
    "s4d": "layers.s4d",
    "s4d_init": "layers.s4d_init",
    "sgconv": "layers.sgconv",
    "long_conv": "layers.long_conv",
    "hyena": "layers.hyena",
    "butterfly_conv": "layers.butterfly_conv",
}.items():
    globals()[_old] = _sys.modules[f"seqconv.{_old}"] = _sys.modules[f"seqconv.{_new}"]
