"""One command for a machine with a GPU that is there for a few minutes: see bench/on_gpu/__main__.py."""
