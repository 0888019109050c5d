"""The suite as a whole: which ops there are, running them, and what is printed, saved and drawn."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import mudsc_fast as mf

from . import ceilings, pictures
from .harness import OURS, Result, WrongResult, as_time, further, growth, run_row
from .reasons import reason

# What the growth of our time with size may be, and up to which size; the largest zip has a limit in seconds instead.
GROWTH_TARGETS = {("zip", "one block"): (2.2, 8192), ("zip", "32 blocks"): (2.2, 8192)}
OPS = ("covariance", "similarity", "assign", "zip", "regroup", "pipeline")
# Seconds that each op takes on two cores (AMD Zen 4) that do nothing else: what a whole run is planned to need.
PREDICTED = {"covariance": 165, "similarity": 65, "assign": 350, "zip": 135, "regroup": 65, "pipeline": 180}


def run(
    ops: Sequence[str] = OPS,
    quick: bool = False,
    say: Callable[[str], None] | None = None,
    keep: Path | None = None,
    cases: Sequence[str] = (),
) -> tuple[list[Result], dict[str, Any], list[str]]:
    """Run the rows of some ops; returns the results, a description of the run, and what went wrong.

    keep: a file for what there is after each row.
    cases: texts; only rows whose case begins with one of them are run. None given: all.
    """
    say = say or (lambda text: None)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when scipy is first imported: its rows count one thread
    limits = ceilings.measure()
    results: list[Result] = []
    failures: list[str] = []
    start = time.time()
    taken: dict[str, float] = {}
    if not quick and not cases:
        say(f"planned: {_minutes({op: PREDICTED[op] for op in ops})}, as measured on two cores of Zen 4")
    # What an op finds in memory that others before it used, and gave back, costs regroup up to a fifth: in a whole run
    # each has a process of its own. A quick one has no time for them.
    rows_of = _rows_apart if len(ops) > 1 and not quick and not cases else _rows
    for op in ops:
        began = time.time()
        for made in rows_of(op, quick, cases, limits):
            if isinstance(made, str):
                failures.append(made)
                say(f"FAILED {made}")
                continue
            results += made
            for result in made:
                say(line(result))
            taken[op] = time.time() - began
            if keep is not None:  # a run that is cut off leaves the rows that it has finished
                save(keep, results, _about(results, limits, start, quick, taken), failures)
        taken[op] = time.time() - began
        if keep is not None:
            save(keep, results, _about(results, limits, start, quick, taken), failures)
    say(f"took: {_minutes(taken)}")
    return results, _about(results, limits, start, quick, taken), failures


def _rows(op: str, quick: bool, cases: Sequence[str], limits: dict[str, float]) -> Iterator[list[Result] | str]:
    """What each row of an op gave, and what those that belong to several gave; a text where a row went wrong."""
    module = importlib.import_module(f".bench_{op}", __package__)
    results: list[Result] = []
    for row in module.rows(quick):
        if cases and not row.case.startswith(tuple(cases)):
            continue
        try:
            found = run_row(row, limits, budget=2.0 if quick else 6.0)
            made = [found, *further(row, found)]
        except WrongResult as error:
            yield f"wrong: {error}"
            continue
        except (RuntimeError, OSError, MemoryError, EOFError) as error:
            yield f"{row.op} {row.case} {row.size}: {type(error).__name__}: {error}"
            continue
        results += made
        yield made
    if hasattr(module, "summaries") and not cases:
        yield list(module.summaries(results))


def _rows_apart(op: str, quick: bool, cases: Sequence[str], limits: dict[str, float]) -> Iterator[list[Result] | str]:
    """The same, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(theirs, op, quick, tuple(cases), limits))
    process.start()
    theirs.close()
    try:
        while True:
            try:
                yield ours.recv()
            except EOFError:
                break
        process.join()
        if process.exitcode != 0:
            yield f"{op}: its process ended with exit status {process.exitcode}"
    finally:
        process.terminate()
        process.join()


def _send_rows(to: Connection, op: str, quick: bool, cases: Sequence[str], limits: dict[str, float]) -> None:
    for made in _rows(op, quick, cases, limits):
        to.send(made)
    to.close()


def _minutes(seconds: dict[str, float]) -> str:
    """Time of each op, and of all."""
    whole = round(sum(seconds.values()))
    return f"{whole // 60} min {whole % 60} s (" + ", ".join(f"{op} {s:.0f} s" for op, s in seconds.items()) + ")"


def _about(
    results: Sequence[Result], limits: dict[str, float], start: float, quick: bool, taken: dict[str, float]
) -> dict[str, Any]:
    return {
        "config": mf.build_config(),
        "machine": _machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        # Paths by their last part: the folders of the machine say nothing to a reader.
        "command": shlex.join(["mudsc-fast", *(Path(a).name if os.sep in a else a for a in sys.argv[1:])]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "seconds": time.time() - start,
        "seconds_by_op": taken,
        "seconds_planned": None if quick else {op: PREDICTED[op] for op in taken},
        "quick": quick,
        "ceilings": limits,
        "exponents": [
            {
                "op": op,
                "case": case,
                "threads": threads,
                "exponent": exponent,
                "sizes": [least, most],
                "target": GROWTH_TARGETS.get((op, case), (None,))[0],
            }
            for (op, case, threads), (exponent, least, most) in growth(
                results, {key: most for key, (_, most) in GROWTH_TARGETS.items()}
            ).items()
        ],
    }


def _machine() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            text.split(":", 1)[1].strip() for text in info.read_text().splitlines() if text.startswith("model name")
        ]
        model = names[0] if names else model
    return {"cpu": model, "cores": torch.get_num_threads(), "system": platform.platform()}


def line(result: Result) -> str:
    """One row as text: time, ratio to each contender, target, share of the ceiling, extra memory."""
    verdict = {True: "ok  ", False: "LOW ", None: "    "}[result.met]
    parts = [f"{verdict} {result.op:10s} {result.case:44s} {result.size:>6d} x{result.threads}"]
    parts.append(f"{as_time(result.seconds[OURS]):>9s} ±{100 * result.spread[OURS]:.0f}%")
    if result.at_most is not None:
        parts.append(f"target <= {result.at_most:g} s")
    elif result.target is not None and result.measured is not None:
        parts.append(f"{result.measured:.2f}x {result.against} (target {result.target:g}x)")
    for name, ratio in result.ratios.items():
        share = f" (at {100 * result.shares[name]:.0f}% of ceiling)" if name in result.shares else ""
        parts.append(f"{name} {ratio:.2f}x{share}")
    if result.ceiling_share is not None:
        parts.append(f"{100 * result.ceiling_share:.0f}% of ceiling")
    if result.extra_mib is not None:
        most = "" if result.memory_at_most is None else f" (at most {result.memory_at_most:.0f})"
        parts.append(f"+{result.extra_mib:.0f} MiB{most}")
    if result.threads > 1:
        parts.append(result.note)
    parts += [
        f"{name}: {why}" if why.startswith("left out") else f"{name}: missing ({why})"
        for name, why in result.missing.items()
    ]
    return "  ".join(parts)


def save(path: Path, results: Iterable[Result], about: dict[str, Any], failures: Sequence[str]) -> None:
    """Write one JSON file with everything a reader needs to judge the numbers."""
    rows = [{**r.to_json(), "reason": reason(r.op, r.case) if r.met is False else None} for r in results]
    content = {**about, "failures": list(failures), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def plot(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Draw the results into a folder, which needs matplotlib; returns the files."""
    return pictures.draw(folder, [result.to_json() for result in results])
