"""Proof A of the CUDA C++ kernels with fresh inputs: their sources on the emulator of tests/simt, under every schedule.

python -m benchmarks.proof.cuda_cases SEED prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# How many cases of each kernel a run draws, and their largest size: for the plain build and the two sanitizers.
COUNTS = {"plain": 120, "asan": 60, "tsan": 12}
LARGEST = {"plain": {"regroup": 60, "zip": 100, "assign": 64}, "asan": {"regroup": 50, "zip": 70, "assign": 40}}
LARGEST["tsan"] = {"regroup": 20, "zip": 24, "assign": 24}


def why_not() -> str | None:
    """Why the emulator cannot be built here, or None."""
    return str(reason) if (reason := _simt("driver").why_not()) else None


def run(seed: int, share: float = 1.0) -> dict[str, dict[str, Any]]:
    """{source: {"cases", "failures", "messages"}} of all cases, or of a share of them, drawn from a seed."""
    return {kernel: _run(kernel, seed, share) for kernel in _simt("driver").KERNELS}


def _run(kernel: str, seed: int, share: float) -> dict[str, Any]:
    import torch

    cases, driver = _simt("cases"), _simt("driver")
    count, messages = 0, []
    for mode, whole in COUNTS.items():
        generator = torch.Generator().manual_seed(seed * 3 + list(COUNTS).index(mode))
        options = {"multiprocessors": 1} if mode == "tsan" else {}
        drawn = [
            cases.RANDOM[kernel](
                generator, LARGEST[mode][kernel], seed=seed * 1000 + k, policy=k % len(driver.POLICIES), **options
            )
            for k in range(max(len(driver.POLICIES), round(whole * share)))
        ]
        count += len(drawn)
        ended = driver.run(driver.build(mode), [c.case for c in drawn])
        if not ended.ok:  # which case it was is in the report; the others of this run are not known
            messages.append(f"{mode}: exit {ended.code}: {ended.output[:1000]}")
            continue
        for c in drawn:
            if verdict := c.verdict():
                messages.append(f"{mode}: {c.note}, seed {c.case.seed}, policy {c.case.policy}: {verdict}")
    return {"cases": count, "failures": len(messages), "messages": messages}


def _simt(name: str) -> Any:
    """A module of the emulator, which belongs to the tests of a source tree."""
    import importlib

    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    return importlib.import_module(f"simt.{name}")


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0), indent=1))
