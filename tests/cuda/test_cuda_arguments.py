"""The structures of csrc/device that hold the arguments of kernels, against the lists by which Python packs them."""

import os
import re
import subprocess

import pytest
import torch
from emulated import FLAGS
from emulated import HERE as EMULATOR

from seqconv.backends.cuda import (
    arguments,
    convolution,
    half_tables,
    kernels,
    layout,
    recipe,
    ssm,
    ssm_step,
    stream,
)
from seqconv.backends.cuda.arguments import STRUCTURES, Structure
from seqconv.backends.pack import ACTIVATIONS, DTYPES
from seqconv.backends.protocol import BLOCK
from seqconv.backends.tiles import GOLDEN, GROUP, TOGETHER

# What fields of more than one word consist of, in the order that pack and transform give.
PARTS = {
    "Tensor": "void* data; i64 dtype; i64 batch, head, channel, time;",
    "Transform": "i64 n, passes; i64 radices; const c32* tables;",
}


def fields_of(declarations: str) -> list[tuple[str, str]]:
    """(type, name) of every field that is declared."""
    found = []
    for line in filter(str.strip, declarations.split(";")):
        kind, rest = re.fullmatch(r"\s*((?:const )?\w+)(.*)", line, re.DOTALL).groups()
        for name in rest.split(","):
            found.append((kind + "*" * name.count("*"), name.replace("*", "").strip()))
    return found


def structures_in(text: str) -> dict[str, list[tuple[str, str]]]:
    """Structure -> its fields, read from the text of the headers."""
    text = re.sub(r"//.*", "", text)
    pattern = r"^struct (\w+Args|Tensor|Transform)(?: : (\w+))? \{(.*?)^\};"
    found: dict[str, list[tuple[str, str]]] = {}
    for name, base, body in re.findall(pattern, text, re.M | re.S):
        found[name] = found.get(base, []) + fields_of(body.split("template")[0])
    return found


def listed(structures: dict[str, Structure]) -> dict[str, list[tuple[str, str]]]:
    """The same table as Python has it."""
    found = {name: fields_of(declarations) for name, declarations in PARTS.items()}
    return found | {
        name: [(field.type, key) for key, field in one.fields.items()]
        for name, one in structures.items()
    }


def test_the_headers_have_the_fields_that_python_lists():
    assert structures_in(kernels.headers()) == listed(STRUCTURES)


def printed_by(body: str, tmp_path) -> list[str]:
    """What a program prints that includes the kernels and the header which stands for CUDA on the host."""
    headers = [
        f'#include "{name}.cuh"'
        for name in ("butterfly", "ssm", "ssm_step", "stream", "half_gradients")
    ]
    text = ["#include <cstddef>", '#include "emulator.h"', *headers, "int main() {", body, "}"]
    unit, program = tmp_path / "printed.cpp", tmp_path / "printed"
    unit.write_text("\n".join(text))
    includes = [f"-I{EMULATOR}", f"-I{kernels.folder()}"]
    flags = [*(flag for flag in FLAGS if flag != "-O1"), "-Wno-invalid-offsetof", *includes]
    half = ["-mf16c"] if os.uname().machine == "x86_64" else []
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, *half, str(unit), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return found.splitlines()


def test_the_compiler_puts_the_fields_where_python_does(tmp_path):
    """offsetof says so, in a program that includes the header which stands for CUDA on the host."""
    lines, expected = [], []
    for name, one in STRUCTURES.items():
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {8 * one.size}")
        for key, field in one.fields.items():
            same = f"std::is_same_v<decltype({name}::{key}), {field.type}>"
            place = f"offsetof({name}, {key}), sizeof({name}::{key}), {same}"
            lines.append(f'std::printf("{name}.{key} %zu %zu %d\\n", {place});')
            expected.append(f"{name}.{key} {8 * one.places[key]} {8 * field.size} 1")
    assert printed_by("\n".join(lines), tmp_path) == expected


def test_shapes_have_the_sizes_of_the_kernels(tmp_path):
    """Threads and shared memory, and the table that a kernel copies there."""
    lines, expected = [], []
    for shape in sorted(set(kernels.HALF_SHAPES.values())):
        numbers = ", ".join(map(str, (*shape[:4], shape.flags)))
        lines.append(
            f'{{ typedef Shape<{numbers}> S; std::printf("%d %d %d %d\\n", S::threads * S::slots, S::shared, '
            "S::keeps, S::padded ? S::padding + 12 * 512 : S::tables); }"
        )
        table = half_tables.build(shape.points, shape.whole_twiddles)
        expected.append((shape.threads, shape.shared, shape.whole_twiddles, 4 * table.numel()))
    found = [tuple(map(int, line.split())) for line in printed_by("\n".join(lines), tmp_path)]
    assert len(found) == len(expected) > 50
    for one, wanted in zip(found, expected, strict=True):
        # A table may hold matrices behind those that a kernel copies.
        assert one[:3] == wanted[:3] and one[3] <= wanted[3] <= one[3] + 12 * 512


CHANGES = {  # of the headers
    "a field added": ("i64 taps, taps_rev;", "i64 taps, taps_rev, taps_later;"),
    "a field added at the end": ("Tensor x, dx;", "Tensor x, dx, ddx;"),
    "a field left out": ("i64 row_threads, slots;", "i64 row_threads;"),
    "two fields swapped": ("i64 taps, taps_rev;", "i64 taps_rev, taps;"),
    "two lines swapped": ("i64 n, passes;\n  i64 radices;", "i64 radices;\n  i64 n, passes;"),
    "two tensors swapped": ("Tensor k, dk;", "Tensor dk, k;"),
    "another type": ("double spectrum_scale;", "float spectrum_scale;"),
    "a pointer to another type": ("const double* exponents;", "const c32* exponents;"),
    "a clock of another type": ("i64* clock;", "float* clock;"),
    "a field added behind those of the base": ("const i64* rows;", "const i64* rows, more;"),
    "another base": ("struct PackedArgs : ConvolutionArgs", "struct PackedArgs : ButterflyArgs"),
    "a pointer that may be written to": ("const float* dskip_parts;", "float* dskip_parts;"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_headers_alone_is_noticed(change):
    before, after = CHANGES[change]
    text = kernels.headers()
    assert text.count(before) == 1
    assert structures_in(text.replace(before, after)) != listed(STRUCTURES)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_change_of_the_lists_alone_is_noticed(name):
    there, fields = structures_in(kernels.headers()), list(STRUCTURES[name].fields.items())
    first, second, *rest = fields
    for changed in (
        [second, first, *rest],
        fields[:-1],
        [*fields, ("later", arguments.INTEGER)],
        [(first[0], arguments.DOUBLE), second, *rest],
    ):
        assert listed(STRUCTURES | {name: Structure(**dict(changed))}) != there


def test_every_kernel_takes_one_of_the_structures():
    assert {kernel.arguments for kernel in kernels.KERNELS.values()} == set(STRUCTURES)
    for name, kernel in kernels.KERNELS.items():
        body = kernel.body.split("<")[0]
        told = re.findall(rf"void {body}\(const (\w+)&", kernels.headers())
        packs = ["Args"] if kernel.arguments in ("ConvolutionArgs", "PackedArgs") else []
        assert told in ([kernel.arguments], packs), name  # Args are of dense rows or of packs


def numbers(pattern: str) -> dict[str, int]:
    text = re.search(pattern, kernels.headers())[1]
    return {name: int(value) for name, value in re.findall(r"k(\w+) = (\d+)", text)}


def test_codes_and_sizes():
    """Both sides know the same codes of dtypes, activations and orders of spectra, and the same sizes of tiles."""
    known = {str(dtype).removeprefix("torch."): code for dtype, code in DTYPES.items()}
    known = known | {"complex": convolution.COMPLEX}
    of_dtypes = numbers(r"enum Dtype \{(.*?)\}")
    assert of_dtypes and all(known[name.lower()] == n for name, n in of_dtypes.items())
    of_activations = numbers(r"enum Activation \{(.*?)\}")
    assert {name.lower(): n for name, n in of_activations.items()} == ACTIVATIONS
    orders = numbers(r"enum Order \{(.*?)\}")
    assert orders == {"Columns": layout.ORDERS["radix"], "Tiles": layout.ORDERS["half"]}
    tiles = numbers(r"constexpr int (kRowLength = \d+, kTileRows = \d+)")
    assert tiles == {"RowLength": ssm.ROW, "TileRows": ssm.ROWS}
    assert numbers(r"constexpr int (kModes = \d+)") == {"Modes": ssm.MODES}
    assert numbers(r"constexpr int (kSamples = \d+)") == {"Samples": ssm_step.SAMPLES}
    assert numbers(r"constexpr int (kBlock = \d+)") == {"Block": BLOCK}
    assert numbers(r"constexpr int (kRowLanes = \d+)") == {"RowLanes": stream.ROW_LANES}
    assert numbers(r"constexpr int (kTogether = \d+)") == {"Together": TOGETHER}
    assert GROUP == TOGETHER * BLOCK // 2  # as kGroup is
    assert f"kGolden = {GOLDEN:#X};".replace("X", "x") in kernels.headers()


def test_values_that_do_not_fit_are_refused():
    sizes = {"parts": 1, "heads": 1, "channels": 2, "threads": 32}
    pack = lambda **changed: arguments.arguments("skip_gradient", **sizes | changed)  # noqa: E731
    parts = torch.zeros(1, 1, 2, 32)
    told = pack(dskip_parts=parts, dskip=torch.zeros(2))
    assert list(told[:6]) == [1, 1, 2, 32, parts.data_ptr(), told[5]] and len(told) == 11
    assert list(pack()[4:]) == [0] * 7  # what is not there
    with pytest.raises(TypeError, match="missing or unknown: row_threads"):
        pack(row_threads=32)
    with pytest.raises(TypeError, match="missing or unknown: threads"):
        arguments.arguments("skip_gradient", parts=1, heads=1, channels=2)
    with pytest.raises(TypeError, match="threads: an i64 must be an int, got float"):
        pack(threads=32.0)
    with pytest.raises(TypeError, match=r"dskip_parts: .* torch.float32, got torch.float64"):
        pack(dskip_parts=parts.double())
    one = Structure(scale=arguments.DOUBLE)
    with pytest.raises(TypeError, match="scale: a double must be a float, got int"):
        one.words({"scale": 1})
    assert torch.tensor(one.words({"scale": -0.3})).view(torch.float64).tolist() == [-0.3]
    address = recipe.Address(3, 64)
    assert Structure(at=arguments.FLOATS).words({"at": address}) == [address]
