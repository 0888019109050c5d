"""What this machine can do at most, measured in the same run as the rows that are read against it."""

from __future__ import annotations

import statistics
import time

import torch

from mudsc_fast import _core

COPY_BYTES = 256 << 20


def measure() -> dict[str, float]:
    """Ceilings of one thread: "flop" (float32 multiply-adds), "flop bf16", and "byte" (of a copy, both ways)."""
    return {"flop": _core.peak_flops(False), "flop bf16": _core.peak_flops(True), "byte": _copy_rate()}


def _copy_rate() -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * COPY_BYTES / statistics.median(times)
