"""python -m bench.device_model: the counts and the simulation in bench/model."""

import sys

from bench.model.estimate import Count, count
from bench.model.table import main

__all__ = ["Count", "count", "main"]

if __name__ == "__main__":
    sys.exit(main())
