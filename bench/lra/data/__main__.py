"""python -m bench.lra.data make|check TASK: another name of python -m bench.lra data."""

import sys

from bench.lra.__main__ import main

if __name__ == "__main__":
    main(["data", *sys.argv[1:]])
