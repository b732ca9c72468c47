"""Benchmarks and training runs. They are not part of the installed package."""

import os

# A waiting OpenMP thread that spins takes the core from the thread that works. OpenMP reads this when
# torch is imported, and not later.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
