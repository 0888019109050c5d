"""The real CUDA sources on the CPU: an emulator of threads, warps, blocks and grids. See driver.py."""
