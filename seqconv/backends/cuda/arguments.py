"""What kernels are told: one structure of csrc/device for each operator, as a flat array of 64-bit words.

The lists of fields below repeat those of the headers, in their order and with their types. A field's type says how
many words it has and which values may stand there. tests/cuda/test_cuda_arguments.py compares both sides.
"""

import struct
from array import array
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch

from seqconv.backends.cuda.kernels import KERNELS
from seqconv.backends.pack import KERNEL, SIGNAL, SKIP, STEP, pack


class Field(NamedTuple):
    """A field of a structure: its type as C++ spells it, its words, and what makes them from a value."""

    type: str
    size: int
    words: Callable[[object], tuple]
    required: bool = True  # else a field that is not given is all zeros: nothing is there


def address(memory):
    """The address of a tensor, of a stand-in for one (recipe.py), or of what a device keeps a table in."""
    if isinstance(memory, tuple):
        return memory
    return memory.data_ptr() if hasattr(memory, "data_ptr") else int(memory)


def _integer(value) -> tuple:
    if not isinstance(value, int):
        raise TypeError(f"an i64 must be an int, got {type(value).__name__}")
    return (int(value),)


def _double(value) -> tuple:
    if not isinstance(value, float):
        raise TypeError(f"a double must be a float, got {type(value).__name__}")
    return struct.unpack("<q", struct.pack("<d", value))


def _pointer(type: str, *dtypes: torch.dtype) -> Field:
    def words(memory) -> tuple:
        if getattr(memory, "dtype", dtypes[0]) not in dtypes:
            raise TypeError(f"a {type} must point to {dtypes[0]}, got {memory.dtype}")
        return (address(memory),)

    return Field(type, 1, words, required=False)


def _tensor(axes: dict) -> Field:
    """Tensors are packed by the table of their axes. What is a tuple is packed already."""
    words = lambda t: t if isinstance(t, tuple) else pack(t, axes)  # noqa: E731
    return Field("Tensor", 6, words, required=False)


def transform(n: int, radices: tuple[int, ...], tables) -> tuple:
    """The words of a Transform of n points."""
    return n, len(radices), sum(r << (8 * i) for i, r in enumerate(radices)), address(tables)


INTEGER = Field("i64", 1, _integer)
DOUBLE = Field("double", 1, _double)
TRANSFORM = Field("Transform", 4, tuple)
COMPLEX = _pointer("c32*", torch.float32, torch.complex64)
COMPLEX_INPUT = _pointer("const c32*", torch.float32, torch.complex64)
FLOATS = _pointer("float*", torch.float32)
FLOATS_INPUT = _pointer("const float*", torch.float32)
WORDS = _pointer("u32*", torch.float32)
DOUBLES = _pointer("double*", torch.float64)
DOUBLES_INPUT = _pointer("const double*", torch.float64)
CLOCKS = _pointer("i64*", torch.int64)
NUMBERS_INPUT = _pointer("const i64*", torch.int64)
OFFSETS_INPUT = _pointer("const void*", torch.int64, torch.int32)
SIGNALS, TAPS, SKIPS, STEPS = map(_tensor, (SIGNAL, KERNEL, SKIP, STEP))


class Structure:
    """The arguments of an operator's kernels; fields are given in the order of the C++ structure."""

    def __init__(self, **fields: Field):
        self.fields = fields
        *places, self.size = accumulate((f.size for f in fields.values()), initial=0)
        self.places = dict(zip(fields, places, strict=True))  # in words
        self.required = {name for name, field in fields.items() if field.required}

    def words(self, given: dict) -> list:
        """The words of the given fields, zeros for those that are None or absent. Stand-ins keep their addresses."""
        if unfit := (self.required - given.keys()) | (given.keys() - self.fields.keys()):
            raise TypeError(f"fields missing or unknown: {', '.join(sorted(unfit))}")
        words = [0] * self.size
        for name, value in given.items():
            if value is not None:
                at, field = self.places[name], self.fields[name]
                try:
                    words[at : at + field.size] = field.words(value)
                except TypeError as error:
                    raise TypeError(f"{name}: {error}") from None
        assert len(words) == self.size
        return words


CONVOLUTION = Structure(
    batch=INTEGER,
    heads=INTEGER,
    channels=INTEGER,
    length=INTEGER,
    taps=INTEGER,
    taps_rev=INTEGER,
    per_sample=INTEGER,
    activation=INTEGER,
    windows=INTEGER,
    step=INTEGER,
    lead=INTEGER,
    row_threads=INTEGER,
    slots=INTEGER,
    groups=INTEGER,
    parts=INTEGER,
    outer=INTEGER,
    lower=INTEGER,
    columns=INTEGER,
    order=INTEGER,
    head=INTEGER,
    spectrum_scale=DOUBLE,
    gradient_scale=DOUBLE,
    transform=TRANSFORM,
    spectrum=COMPLEX,
    divisors=FLOATS,
    dk_parts=COMPLEX,
    dskip_parts=FLOATS,
    x_spectra=WORDS,
    dx=FLOATS,
    long_rows=COMPLEX,
    dv=FLOATS,
    u=SIGNALS,
    k=TAPS,
    k_rev=TAPS,
    skip=SKIPS,
    pre_gate=SIGNALS,
    post_gate=SIGNALS,
    bias=SKIPS,
    y=SIGNALS,
    dy=SIGNALS,
    du=SIGNALS,
    dk=TAPS,
    dk_rev=TAPS,
    dskip=SKIPS,
    dpre_gate=SIGNALS,
    dpost_gate=SIGNALS,
)
# Packed signals, (channels, total) or (heads, channels, total), have the axes of a kernel.
PACKED = Structure(
    **{name: TAPS if field is SIGNALS else field for name, field in CONVOLUTION.fields.items()},
    longest=INTEGER,
    narrow=INTEGER,
    offsets=OFFSETS_INPUT,
    rows=NUMBERS_INPUT,
)
SKIP_GRADIENT = Structure(
    parts=INTEGER,
    heads=INTEGER,
    channels=INTEGER,
    threads=INTEGER,
    dskip_parts=FLOATS_INPUT,
    dskip=SKIPS,
)
BUTTERFLY = Structure(
    batch=INTEGER,
    channels=INTEGER,
    length=INTEGER,
    groups=INTEGER,
    head_channels=INTEGER,
    transform=TRANSFORM,
    matrices=COMPLEX_INPUT,
    spectrum=COMPLEX,
    dspectrum=COMPLEX_INPUT,
    pass_inputs=COMPLEX,
    dmatrices_parts=COMPLEX,
    x=SIGNALS,
    dx=SIGNALS,
)
SSM = Structure(
    heads=INTEGER,
    channels=INTEGER,
    length=INTEGER,
    groups=INTEGER,
    modes=INTEGER,
    digits=INTEGER,
    exponents=DOUBLES_INPUT,
    powers=COMPLEX,
    rounded_weights=COMPLEX_INPUT,
    weights=DOUBLES_INPUT,
    sums=DOUBLES,
    dexponents=DOUBLES,
    dweights=DOUBLES,
    k=TAPS,
    dk=TAPS,
)
SSM_STEP = Structure(
    batch=INTEGER,
    heads=INTEGER,
    channels=INTEGER,
    modes=INTEGER,
    lanes=INTEGER,
    activation=INTEGER,
    state=DOUBLES,
    power=DOUBLES_INPUT,
    input=DOUBLES_INPUT,
    output=DOUBLES_INPUT,
    x=STEPS,
    skip=SKIPS,
    y=STEPS,
)
STREAM = Structure(
    batch=INTEGER,
    heads=INTEGER,
    channels=INTEGER,
    period=INTEGER,
    activation=INTEGER,
    largest=INTEGER,
    now=INTEGER,
    points=INTEGER,
    count=INTEGER,
    clock=CLOCKS,
    inputs=FLOATS,
    sums=FLOATS,
    taps=FLOATS_INPUT,
    k=FLOATS_INPUT,
    spectra=COMPLEX,
    tables=COMPLEX_INPUT,
    u=STEPS,
    pre_gate=STEPS,
    post_gate=STEPS,
    y=STEPS,
)
STRUCTURES = {
    "ConvolutionArgs": CONVOLUTION,
    "PackedArgs": PACKED,
    "SkipArgs": SKIP_GRADIENT,
    "ButterflyArgs": BUTTERFLY,
    "SsmArgs": SSM,
    "SsmStepArgs": SSM_STEP,
    "StreamArgs": STREAM,
}


def structure_of(kernel: str) -> Structure:
    """The structure that the kernel of this name takes."""
    return STRUCTURES[KERNELS[kernel].arguments]


def arguments(kernel: str, **fields) -> array:
    """The arguments of a launch of this kernel."""
    return array("q", structure_of(kernel).words(fields))
