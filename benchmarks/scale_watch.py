"""One command of ``make scale`` in a process of its own: its time, its resident memory as it goes, and its steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def watched(arguments: list[str], log: Path) -> dict[str, Any]:
    """Run `mudsc-fast` with these arguments in a process of its own; its time, memory curve and steps."""
    command = [sys.executable, "-m", "benchmarks.scale", "--run", str(log), *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    curve: list[tuple[float, float]] = []
    peak = 0.0
    while process.poll() is None:
        seen = _memory(process.pid)
        if seen is not None:
            curve.append((time.perf_counter() - start, seen[0] / 1e6))
            peak = max(peak, seen[1])
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "command": ["mudsc-fast", *[Path(a).name if "/" in a else a for a in arguments]],
        "seconds": round(seconds, 2),
        "cpu_seconds": steps[-1]["cpu"],
        "peak_resident_mb": round(peak / 1e6, 1),
        "curve": _thin(curve),
        "steps": steps,
    }


def _memory(pid: int) -> tuple[float, float] | None:
    """Resident bytes now, and the most so far (VmHWM)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return (found["VmRSS"], found["VmHWM"]) if len(found) == 2 else None


def _thin(curve: list[tuple[float, float]], points: int = 400) -> list[tuple[float, float]]:
    """At most this many points, each the largest of its stretch."""
    step = max(1, -(-len(curve) // points))
    parts = [curve[k : k + step] for k in range(0, len(curve), step)]
    return [(round(part[0][0], 2), round(max(m for _, m in part), 1)) for part in parts]


def run_logged(log: Path, arguments: list[str]) -> int:
    """The command line in this process, with one JSON line in `log` for each visit and each written tensor."""
    from mudsc_fast.checkpoints import CheckpointWriter
    from mudsc_fast.cli import main
    from mudsc_fast.rematch import Matcher

    start = time.perf_counter()
    with log.open("w") as file:

        def note(**what: Any) -> None:
            now = {"at": round(time.perf_counter() - start, 3), "cpu": round(time.process_time(), 3)}
            file.write(json.dumps({**now, **what}) + "\n")
            file.flush()

        rematch = Matcher.rematch

        def timed(self: Matcher, tie: Any, *args: Any, **kwargs: Any) -> Any:
            before, cpu = time.perf_counter(), time.process_time()
            found = rematch(self, tie, *args, **kwargs)
            seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
            way = "joint" if self.work is None else self.work.step_of(tie[0].name).way
            note(visit=[space.name for space in tie], way=way, seconds=round(seconds, 3), cpu_seconds=round(cpu, 3))
            return found

        Matcher.rematch = timed  # type: ignore[method-assign]
        enter, leave = CheckpointWriter.__enter__, CheckpointWriter.__exit__

        def begun(self: CheckpointWriter) -> CheckpointWriter:
            note(write="begin")
            return enter(self)

        def ended(self: CheckpointWriter, *args: Any) -> None:
            leave(self, *args)
            note(write="end")

        CheckpointWriter.__enter__ = begun  # type: ignore[method-assign]
        CheckpointWriter.__exit__ = ended  # type: ignore[method-assign]
        code = main(arguments)
        note(end=code)
    return code
