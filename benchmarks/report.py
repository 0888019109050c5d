"""Results files as markdown tables: ``python -m benchmarks.report benchmarks/results/FILE.json [LATER.json ...]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .reasons import reason
from .suite import as_time

HEAD = "| kernel | case | size | ours | against | ratio | target | met | share of ceiling | extra MiB |"


def together(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One run out of several: of every op the rows of the last one that measured it."""
    latest = {row["op"]: run for run in runs for row in run["rows"]}
    kept: dict[str, Any] = {"rows": [], "exponents": []}
    for op, run in latest.items():
        kept["rows"] += [row for row in run["rows"] if row["op"] == op]
        kept["exponents"] += [fit for fit in run.get("exponents", ()) if fit["op"] == op]
    return {**kept, "failures": [failure for run in runs for failure in run.get("failures", ())]}


def table(results: Mapping[str, Any]) -> str:
    """Rows below their target with the reason, then those that meet it, then the rest; growth; wrong results."""
    rows = results["rows"]
    parts = []
    low = [row for row in rows if row["met"] is False]
    if low:
        lines = [_cells(row) + f" {reason(row['op'], row['case'])} |" for row in low]
        parts += ["Below target:", "\n".join([HEAD + " reason |", "|---" * 11 + "|", *lines])]
    for title, met in (("Target met:", True), ("Measured without a target:", None)):
        kept = [_cells(row) for row in rows if row["met"] is met]
        if kept:
            parts += [title, "\n".join([HEAD, "|---" * 10 + "|", *kept])]
    fits = list(results.get("exponents", ()))
    if fits:
        lines = [
            f"| {fit['op']} | {fit['case']} | {' to '.join(map(str, fit.get('sizes', ())))} | {fit['exponent']:.2f} | "
            f"{'' if fit.get('target') is None else '<= ' + format(fit['target'], 'g')} |"
            for fit in fits
        ]
        parts += [
            "Time grows as size to the power of:",
            "\n".join(["| kernel | case | sizes | power | target |", "|---" * 5 + "|", *lines]),
        ]
    parts += [f"Failed: {failure}" for failure in results.get("failures", ())]
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any]) -> str:
    ratio = row["measured"]
    target = f"<= {row['at_most']:g} s" if row["at_most"] is not None else _times(row["target"])
    extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
    if row.get("memory_at_most") is not None:
        extra += f" (<= {row['memory_at_most']:.0f})"
    cells = [
        row["op"],
        row["case"] + ("" if row["threads"] == 1 else f", {row['threads']} threads"),
        str(row["size"]),
        as_time(row["seconds"]["mudsc_fast"]),
        row["against"] if ratio is not None else "",
        _times(ratio),
        target,
        {True: "yes", False: "**no**", None: ""}[row["met"]],
        "" if row["ceiling_share"] is None else f"{100 * row['ceiling_share']:.0f} %",
        extra,
    ]
    return "| " + " | ".join(cells) + " |"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def main(arguments: list[str]) -> int:
    """Print the tables of the results files."""
    print(table(together([json.loads(Path(name).read_text()) for name in arguments])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
