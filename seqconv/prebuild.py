"""python -m seqconv.prebuild --arch sm_90: compiles every CUDA kernel now, with NVRTC and without a GPU.

By default into the cache that the first calls would fill; with --out into a folder, whose files are found through
SEQCONV_CUBINS (a cluster's compute nodes then need no compiler and no cache).
"""

import argparse
import concurrent.futures
import os
import re
import sys
from pathlib import Path

from seqconv.backends.cuda import compiler, kernels


def _one(arch: str, name: str, out: Path | None) -> None:
    code = compiler.compile_kernel(name, arch, cached=out is None)
    if out is not None:
        path = out / kernels.cubin_name(name, arch)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(code)
        part.replace(path)


def _arch(text: str) -> str:
    if not re.fullmatch(r"sm_\d{2,3}", text):
        raise argparse.ArgumentTypeError(f"wanted sm_XY, such as sm_90, got {text!r}")
    if int(text.removeprefix("sm_")) < 75:
        raise argparse.ArgumentTypeError(f"wanted compute capability 7.5 or later, got {text!r}")
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {error}") from None
    return text


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqconv.prebuild", description=__doc__)
    parser.add_argument(
        "--arch", action="append", type=_arch, required=True, help="may be given several times"
    )
    parser.add_argument("--out", type=Path, help="a folder for the cubins instead of the cache")
    parser.add_argument(
        "--kernels",
        type=_pattern,
        default="",
        help="a regular expression: only kernels whose names match",
    )
    options = parser.parse_args(arguments)
    missing = compiler.compiler_reason()
    if missing:
        print(f"seqconv: {missing}", file=sys.stderr)
        return 1
    work = [
        (arch, name, options.out)
        for arch in options.arch
        for name in kernels.names(arch)
        if re.search(options.kernels, name)
    ]
    if not work:
        parser.error(f"--kernels: none of {', '.join(kernels.KERNELS)} matches {options.kernels!r}")
    try:
        folder = options.out or compiler.cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"seqconv: {error}", file=sys.stderr)
        return 1
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [(arch, name, pool.submit(_one, arch, name, out)) for arch, name, out in work]
        for arch, name, job in running:
            try:
                job.result()
            except Exception as error:  # NVRTC's own, for an architecture it does not know
                pool.shutdown(cancel_futures=True)
                print(
                    f"seqconv: {arch} {name}: {' '.join(str(error).split())[:300]}", file=sys.stderr
                )
                return 1
            print(f"{arch} {name}")
    print(f"{len(work)} kernels in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
