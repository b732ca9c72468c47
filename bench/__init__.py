"""Benchmarks and training runs. Not part of the installed package."""

import os

# A waiting OpenMP thread that spins takes the core from the one that works. Read when torch is
# imported, not later.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
