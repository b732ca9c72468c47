"""Proves and measures the CUDA kernels on a machine that has a GPU for a few minutes, and perhaps nothing else.

make gpu ARCH=sm_90                                  runs before, where there is a compiler: says what to carry
python -m bench.on_gpu prove --out FOLDER            runs there, in the tree's root: right or wrong, times; 3.5 minutes
python -m bench.on_gpu measure --out FOLDER          runs there: counters, races, graphs, the benchmark; 4.5 minutes
python -m bench.on_gpu report FOLDER [--readme]      runs after: measured beside predicted beside wanted

The machine needs torch, einops, cuda-bindings and, for the tests, pytest. It needs no installation, no compiler and no
network. FOLDER gets log.txt and results.jsonl line by line, so that a kill loses nothing. A step that has passed is
not run again unless that is asked for.
With --dry everything runs without a GPU, in the tests' emulator and with tiny sizes.
"""

import argparse
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from bench.on_gpu import runner
from bench.on_gpu.steps import BY_NAME, PARTS

EMULATOR = "emulated:device"


def step(options) -> NoReturn:
    """Runs one step, in the process that the runner has started for it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive the runner
    from bench.on_gpu.log import Log
    from bench.on_gpu.machine import connect

    machine = connect(options.dry)
    code = BY_NAME[options.step].run(machine, Log(options.out, options.step, options.seconds))
    sys.stdout.flush()
    # After an error on a GPU the libraries can still hang while they are taken down.
    os._exit(code)


def workload(options) -> int:
    """Makes the calls that a profiler or a sanitizer examines."""
    from bench.on_gpu import profile
    from bench.on_gpu.machine import connect

    profile.work(connect(options.dry), options.name)
    return 0


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.on_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function, help: str, out: bool = True):
        made = commands.add_parser(name, help=help)
        made.set_defaults(function=function)
        if out:
            made.add_argument("--out", type=Path, required=True, help="folder of the results")
        made.add_argument(
            "--dry", nargs="?", const=EMULATOR, metavar="MODULE:FUNCTION",
            help="use no GPU but the device that FUNCTION() makes, by default the tests' emulator",
        )  # fmt: skip
        return made

    for part, (steps, seconds) in PARTS.items():
        names = ", ".join(s.name for s in steps)
        made = command(part, part_of, f"at most {seconds / 60:.1f} minutes: {names}")
        made.add_argument("--only", nargs="+", default=[], choices=[s.name for s in steps])
        made.add_argument("--all", action="store_true", help="run the long steps as well")
        made.add_argument("--again", action="store_true", help="also run steps that have passed")
        made.add_argument("--seconds", type=float, help="time for all steps")
    made = command("step", step, "(internal)")
    made.add_argument("step", choices=list(BY_NAME))
    made.add_argument("--seconds", type=float, required=True)
    command("workload", workload, "(internal)", out=False).add_argument("name")
    made = commands.add_parser("pack", help="says what to carry to the machine; `make gpu`")
    made.set_defaults(function=pack)
    made.add_argument("--arch", default="sm_90")
    made.add_argument("--out", type=Path, default=runner.CARRIED)
    made = commands.add_parser("report", help="shows measured beside predicted beside wanted")
    made.set_defaults(function=report)
    made.add_argument("folder", type=Path)
    made.add_argument("--readme", action="store_true", help="write the README's section too")
    made.add_argument("--to", type=Path, default=runner.ROOT / "README.md", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def part_of(options) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the current step ends as well
    return runner.run(
        options.command,
        options.out.absolute(),
        only=options.only,
        everything=options.all,
        again=options.again,
        dry=options.dry,
        seconds=options.seconds,
    )


def pack(options) -> int:
    from bench.on_gpu.pack import pack

    return pack(options.arch, options.out)


def report(options) -> int:
    from bench.on_gpu.report import report

    return report(options.folder, options.to if options.readme else None)


def main(argv=None) -> int:
    options = parse(argv)
    return options.function(options)


if __name__ == "__main__":
    sys.exit(main())
