"""The version of the package, which the build reads without importing the package."""

__version__ = "0.1.0"
"""The version of the installed package, as a string."""
