"""Proof A of the Triton kernels with fresh inputs: every case of tests/interpreted in Triton's interpreter, in a
process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(seed: int, share: float = 1.0) -> dict[str, dict[str, Any]]:
    """{kernel: {"cases", "failures", "messages"}} of all cases, or of a share of them, with inputs drawn from a seed.

    Raises:
        RuntimeError: the process ended without a result.
    """
    folder = ROOT / "tests" / "interpreted"
    paths = [str(ROOT), str(folder), str(folder.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, str(folder / "prove.py"), str(seed), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return {
        kernel: {"cases": cases, "failures": failures, "messages": found["failures"] if failures else []}
        for kernel, (cases, failures) in found["kernels"].items()
    }


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0), indent=1))
