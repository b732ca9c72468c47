"""Trains classifiers of the package's layers on the Long Range Arena and on smaller tasks: python -m bench.lra."""
