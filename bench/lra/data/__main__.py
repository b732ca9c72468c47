"""python -m bench.lra data make|check TASK: generates a data set, or looks at one."""

import sys
from collections.abc import Callable
from pathlib import Path

from bench.lra.data import GENERATED, TASKS, DataError, check, known, make
from bench.lra.recipes import suggest

COMMANDS = {
    "make": "Generates a set; goes on where it was stopped.",
    "check": "Statistics of a set, and what is suspicious about it.",
}


def main(argv: list[str], make_parser: Callable) -> None:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(__doc__, "", *(f"  {name:7}{text}" for name, text in COMMANDS.items()), sep="\n")
        print("\npython -m bench.lra data COMMAND --help lists a command's options.")
        return
    if command not in COMMANDS:
        make_parser("data", "").error(f"unknown command {command!r}{suggest(command, COMMANDS)}")
    parser = make_parser(f"data {command}", COMMANDS[command])
    parser.add_argument(
        "task", metavar="TASK", help=", ".join(GENERATED if command == "make" else TASKS)
    )
    parser.add_argument("--root", default="data", help="folder of the data sets")
    if command == "make":
        parser.add_argument(
            "--n", type=int | None, default=None, help="samples of all splits; null: as published"
        )
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument(
            "--workers", type=int | None, default=None, help="processes; null: one for each core"
        )
    else:
        parser.add_argument(
            "--seconds", type=float, default=60.0, help="of training a CNN on Pathfinder images"
        )
    chosen = parser.parse_args(argv[1:])
    try:
        known(chosen.task)
    except DataError as error:
        parser.error(str(error))
    if command == "check" and chosen.seconds <= 0:
        parser.error(f"--seconds must be positive, got {chosen.seconds}")
    root = Path(chosen.root)
    try:
        if command == "make":
            sizes = {name: chosen[name] for name in ("n", "seed", "workers")}
            print(f"{chosen.task} is in {make(chosen.task, root, **sizes)}")
        elif not check(chosen.task, root, seconds=chosen.seconds):
            sys.exit(1)
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    from bench.lra.__main__ import main

    main(["data", *sys.argv[1:]])
