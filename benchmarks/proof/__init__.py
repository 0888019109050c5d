"""Proof of the GPU kernels on a machine without a GPU: their source run on the CPU, and their machine code read."""
