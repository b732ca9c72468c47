"""python -m bench.lra.data make|check TASK: generates a data set, or looks at one."""

import argparse
import sys
from pathlib import Path

from bench.lra.data import TASKS, DataError, check, make


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lra data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="generate a set; goes on where it was stopped")
    making.add_argument("--n", type=int, help="samples of all splits (default: as published)")
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--workers", type=int, help="processes (default: one for each core)")
    checking = commands.add_parser("check", help="statistics, and what is suspicious")
    checking.add_argument(
        "--seconds", type=float, default=60, help="of training a CNN on Pathfinder images"
    )
    for command in (making, checking):
        command.add_argument("task", metavar="TASK", help=", ".join(TASKS))
        command.add_argument("--root", type=Path, default=Path("data"), help="default: data")
    args = parser.parse_args(argv)
    try:
        if args.command == "make":
            folder = make(args.task, args.root, n=args.n, seed=args.seed, workers=args.workers)
            print(f"{args.task} is in {folder}")
        elif not check(args.task, args.root, seconds=args.seconds):
            sys.exit(1)
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
