"""Rows of a GPU run: how they are printed, judged and timed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any


def row(**values: Any) -> None:
    """One result, printed at once so that a later hang does not lose it."""
    print("ROW " + json.dumps(values), flush=True)


def judged(measured: float, target: float, at_most: bool = False) -> dict[str, Any]:
    """A figure beside its target; ratios must reach it, seconds must not pass it."""
    return {"measured": measured, "target": target, "met": measured <= target if at_most else measured >= target}


def timed(run: Callable[[], Any], rounds: int = 9, warm: int = 2) -> tuple[float, float]:
    """Median seconds of a call, its work on the GPU included, and the interquartile range over the median."""
    import torch

    for _ in range(warm):
        run()
    seconds = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return median, (high - low) / median


def compared(runs: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, Any]:
    """Median seconds and spreads of several ways, taken in turn."""
    seconds: dict[str, float] = {}
    spreads: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, run in runs.items():
        try:
            seconds[name], spreads[name] = timed(run, rounds)
        except Exception as error:  # noqa: BLE001 (one contender must not cost the others their row)
            missing[name] = f"{type(error).__name__}: {error}"[:300]
    return {"seconds": seconds, "spread": spreads, "missing": missing}


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that a call holds at most, beyond what there is before it."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before
