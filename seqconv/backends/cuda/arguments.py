"""The arguments of every kernel, Args of csrc/device/problem.cuh, as one flat array of 64-bit integers."""

from array import array

from seqconv.backends.pack import KERNEL, SIGNAL, SKIP, pack

# Args, field by field; tensors are six integers each.
_NUMBERS = (
    "batch heads channels length taps taps_rev per_sample activation n count radices tables row_threads slots groups "
    "blocks step lead outer lower columns order scale scales spectrum partial partial_skip parts work wide "
    "matrices partial_matrices matrix_channels "
    "modes digits exponents weights powers sums dexponents dweights"
).split()
_TENSORS = "u k k_rev skip pre_gate post_gate y dy du dk dk_rev dskip dpre_gate dpost_gate".split()
_TABLES = {
    "k": KERNEL,
    "k_rev": KERNEL,
    "dk": KERNEL,
    "dk_rev": KERNEL,
    "skip": SKIP,
    "dskip": SKIP,
}


_PLACES = {name: i for i, name in enumerate(_NUMBERS)}
_PLACES |= {name: len(_NUMBERS) + 6 * i for i, name in enumerate(_TENSORS)}
_COUNT = len(_NUMBERS) + 6 * len(_TENSORS)


def address(memory):
    """Of a tensor, of a stand-in for one (recipe.py), or of what a device keeps a table in."""
    return memory.data_ptr() if hasattr(memory, "data_ptr") else int(memory)


def fill(fields: dict, values: list | None = None) -> list:
    """Writes fields to their places in `values`, or in zeros: tensors packed, or their address for a number.
    Tuples are packed already, or the address of a stand-in."""
    values = [0] * _COUNT if values is None else values
    for name, value in fields.items():
        if value is None:
            continue
        at = _PLACES[name]
        if at < len(_NUMBERS):
            values[at] = value if isinstance(value, (int, tuple)) else address(value)
        else:
            packed = type(value) is tuple
            values[at : at + 6] = value if packed else pack(value, _TABLES.get(name, SIGNAL))
    return values


def arguments(**fields) -> array:
    """One flat array of 64-bit integers, zeros but for the fields."""
    return array("q", fill(fields))
