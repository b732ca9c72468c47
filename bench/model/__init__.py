"""A model of the CUDA kernels on paper: their machine code is counted and simulated. No part of it runs on a GPU."""
