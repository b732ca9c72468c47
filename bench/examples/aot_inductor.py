"""A layer as a compiled library, which a C++ program runs: no Python, no seqconv.

python -m bench.examples.aot_inductor

torch.export records the layer with a constant kernel, seqconv's operators are replaced by products of matrices, and
AOTInductor compiles what is left. The C++ program below needs torch's libraries only. It reads the package and an input
of raw float32, and writes its output. The last line compares that with the layer's own.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

import seqconv
from seqconv import export

LENGTH, CHANNELS, BATCH = 1000, 16, 3

PROGRAM = r"""
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

// PACKAGE INPUT OUTPUT LENGTH CHANNELS
int main(int, char** argv) {
  std::ifstream file(argv[2], std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const int64_t length = std::stoll(argv[4]), channels = std::stoll(argv[5]);
  const int64_t batch = static_cast<int64_t>(bytes.size()) / 4 / length / channels;
  at::Tensor x = at::from_blob(bytes.data(), {batch, length, channels});

  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  at::Tensor y = model.run({x})[0].contiguous();

  std::ofstream out(argv[3], std::ios::binary);
  out.write(static_cast<const char*>(y.const_data_ptr()), static_cast<std::streamsize>(y.nbytes()));
}
"""


def compiled(folder: Path) -> Path:
    """Compiles the C++ program, in about a minute, and returns its file."""
    source, program = folder / "main.cpp", folder / "main"
    source.write_text(PROGRAM)
    libraries = cpp_extension.library_paths()
    subprocess.run(
        [
            *("g++", "-std=c++20", "-O1", str(source), "-o", str(program)),
            *[f"-I{path}" for path in cpp_extension.include_paths()],
            *[part for path in libraries for part in (f"-L{path}", f"-Wl,-rpath,{path}")],
            *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ],
        check=True,
    )
    return program


def packaged(layer: torch.nn.Module, x: torch.Tensor, file: Path) -> None:
    """Writes the layer for inputs of x's length and any batch."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
        program = program.run_decompositions(export.decompositions())
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))


def main() -> None:
    torch.manual_seed(0)
    layer = seqconv.freeze(seqconv.LongConv(CHANNELS, l_max=LENGTH), LENGTH)
    x = torch.randn(BATCH, LENGTH, CHANNELS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package, given, found = folder / "model.pt2", folder / "x", folder / "y"
        packaged(layer, x[:2], package)
        given.write_bytes(x.numpy().tobytes())
        program = compiled(folder)
        sizes = str(LENGTH), str(CHANNELS)
        subprocess.run([str(program), str(package), str(given), str(found), *sizes], check=True)
        y = torch.frombuffer(bytearray(found.read_bytes()), dtype=torch.float32).view_as(x)
    with torch.no_grad():
        wanted = layer(x)
    error = ((y - wanted).norm() / wanted.norm()).item()
    print(f"outputs of the C++ program {tuple(y.shape)}, relative error {error:.1e}")
    if not error < 1e-5:
        sys.exit("the outputs differ")


if __name__ == "__main__":
    main()
