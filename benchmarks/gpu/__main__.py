"""`make gpu`: what only a GPU can show, in one unattended run of at most nine minutes, into one results file.

python -m benchmarks.gpu [--dry-run] [--only PART ...] [--seconds 540] [--out FILE]

Each part is a process of its own under a limit of its own; one that hangs or crashes loses its own rows, the rows that
it had printed before are kept, and the others go on. The file is written after each part. Failures come last, and the
exit status is 1 when there are any. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import PARTS, Part

ROOT = Path(__file__).resolve().parents[2]
ROW = "ROW "  # a line of a part's output that holds one JSON object
TUNED = ROOT / "build" / "gpu" / "tuned.json"
KEPT = 3000  # characters of output kept of a part that failed


@dataclass
class Outcome:
    """How a part ended."""

    name: str
    status: str  # "ok", "failed", "out of time", "not run"
    seconds: float
    rows: list[dict[str, Any]]
    output: str = ""

    @property
    def failures(self) -> list[str]:
        """One line for the part, and one for each row that says that it failed or missed its target."""
        said = [] if self.status == "ok" else [f"{self.name}: {self.status}: {self.output.strip().splitlines()[-1:]}"]
        for row in self.rows:
            if row.get("wrong"):
                said.append(f"{self.name}: {row.get('case', '')}: wrong: {row['wrong']}")
            elif row.get("met") is False:
                said.append(
                    f"{self.name}: {row.get('case', '')}: {row.get('measured')} against a target of {row['target']}"
                )
        return said


def run_part(part: Part, seconds: float, extra: Mapping[str, str] | None = None) -> Outcome:
    """Run one part in a process group of its own, which is ended as a whole when its time is over.

    extra: environment variables beside the part's own.
    """
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # Where the toolkit's compute-sanitizer and nvcc are, if nobody put them on the path.
    environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    environment.update({**part.environment, **(extra or {})})
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                part.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        except OSError as error:
            return Outcome(part.name, "failed", 0.0, [], str(error))
        try:
            code = process.wait(timeout=seconds)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status, code = "out of time", None
        output.seek(0)
        text = output.read()
    rows, rest = [], []
    for line in text.splitlines():
        if line.startswith(ROW):
            try:
                rows.append(json.loads(line.removeprefix(ROW)))
                continue
            except json.JSONDecodeError:  # cut in the middle
                pass
        rest.append(line)
    said = "\n".join(rest)[-KEPT:]
    if status == "failed":
        said = f"{said}\nexit {code}"
    return Outcome(part.name, status, time.monotonic() - start, rows, "" if status == "ok" else said)


def found_best(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The configurations that won, as ``configs.update`` takes them."""
    tuned: dict[str, Any] = {}
    for outcome in outcomes:
        for row in outcome.rows:
            tuned.update(row.get("tuned") or {})
    return tuned


def report(about: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The results file."""
    return {
        **about,
        "parts": [
            {"part": o.name, "status": o.status, "seconds": round(o.seconds, 2), "rows": o.rows, "output": o.output}
            for o in outcomes
        ],
        "tuned": found_best(outcomes),
        "failures": [line for o in outcomes for line in o.failures],
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def about() -> dict[str, Any]:
    """The machine, the versions and the command; asked in a process of its own, since a broken driver can hang."""
    code = "from benchmarks.gpu import tasks; tasks.describe()"
    outcome = run_part(Part("about", [sys.executable, "-c", code], 60.0), 60.0)
    described = outcome.rows[0] if outcome.rows else {"device": "unknown", "error": outcome.output[-KEPT:]}
    command = "python -m benchmarks.gpu " + " ".join(sys.argv[1:])
    return {"command": command.strip(), "when": time.strftime("%Y-%m-%d %H:%M:%S %z"), **described}


def run_all(parts: Sequence[Part], seconds: float, out: Path | None, described: dict[str, Any]) -> list[Outcome]:
    """All parts in order, none beyond the whole time; the file is written after each.

    Parts behind one that found the best configurations run with those.
    """
    start, outcomes = time.monotonic(), []
    failed: set[str] = set()
    extra: dict[str, str] = {}
    for part in parts:
        left = seconds - (time.monotonic() - start)
        missing = sorted(set(part.needs) & failed)
        if missing:
            outcome = Outcome(part.name, "not run", 0.0, [], f"it needs {', '.join(missing)}, which failed")
        elif left < 1:
            outcome = Outcome(part.name, "not run", 0.0, [], f"the {seconds:g} s of the whole run were over")
        else:
            print(f"{part.name} (at most {min(part.limit, left):.0f} s): {part.what}", flush=True)
            outcome = run_part(part, min(part.limit, left), extra)
        if outcome.status != "ok":
            failed.add(part.name)
        outcomes.append(outcome)
        if tuned := found_best(outcomes):
            write(TUNED, tuned)
            extra = {"MUDSC_FAST_TUNED": str(TUNED)}
        for row in outcome.rows:
            print("  " + json.dumps(row), flush=True)
        print(f"  {outcome.status}, {outcome.seconds:.1f} s", flush=True)
        if out is not None:
            write(out, report(described, outcomes))
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and say what failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="list the parts and end")
    parser.add_argument("--only", nargs="*", default=None, metavar="PART")
    parser.add_argument("--seconds", type=float, default=525.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    known = [part.name for part in PARTS]
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [part for part in PARTS if options.only is None or part.name in options.only]
    if options.dry_run:
        for part in chosen:
            print(f"{part.name:<16} at most {part.limit:>3.0f} s  {part.what}")
            print(f"{'':<16} {' '.join(part.command)}")
        return 0
    described = about()
    name = str(described["device"]).lower().replace(" ", "-")
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    outcomes = run_all(chosen, options.seconds, out, described)
    failures = [line for outcome in outcomes for line in outcome.failures]
    print(f"{out}: {sum(len(o.rows) for o in outcomes)} rows")
    print(f"{len(failures)} failures" + "".join(f"\n  {line}" for line in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
