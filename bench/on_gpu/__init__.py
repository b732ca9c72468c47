"""One command for a machine with a GPU, where little time is to be had: see bench/on_gpu/__main__.py."""
