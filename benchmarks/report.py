"""Results files as markdown tables: ``python -m benchmarks.report benchmarks/results/FILE.json [LATER.json ...]``."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import OURS, as_time
from .reasons import reason

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
    parts = []
    if any(row["met"] is False for row in results["rows"]):
        parts += ["Below target:", below(results["rows"])]
    return "\n\n".join([*parts, others(results)])


def below(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows below their target, with the reason."""
    lines = [_cells(row) + f" {reason(row['op'], row['case'])} |" for row in rows if row["met"] is False]
    return "\n".join([HEAD + " reason |", "|---" * 11 + "|", *lines])


def others(results: Mapping[str, Any]) -> str:
    """Rows that meet their target and rows without one; growth; wrong results."""
    parts = []
    for title, met in (("Target met:", True), ("Measured without a target:", None)):
        kept = [_cells(row) for row in results["rows"] if row["met"] is met]
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


def summary(results: Mapping[str, Any]) -> str:
    """A line for all rows of a kernel that are held against the same contender with the same target."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        if row["met"] is not None:
            against = row["against"] if row["at_most"] is None and row["target"] is not None else ""
            against = "quickest peer" if against == "best" else against
            groups.setdefault((row["op"], against, _asked(row) or "memory"), []).append(row)
    lines: dict[str, list[str]] = {}
    for (op, against, asked), rows in groups.items():
        only = f"{rows[0]['case']}, {rows[0]['size']}" if len(rows) == 1 else f"{len(rows)} rows"
        met = sum(row["met"] for row in rows)
        lines.setdefault(op, []).append(
            f"| {op} | {against} | {only} | {asked} | {reached(rows)} | {met} of {len(rows)} |"
        )
    for fit in results.get("exponents", ()):
        if fit["target"] is not None:
            case = f"{fit['case']}, growth from {fit['sizes'][0]} to {fit['sizes'][1]}"
            met = int(fit["exponent"] <= fit["target"])
            lines[fit["op"]].append(
                f"| {fit['op']} |  | {case} | <= {fit['target']:g} | {fit['exponent']:.2f} | {met} of 1 |"
            )
    every = [line for found in lines.values() for line in found]
    return "\n".join(["| kernel | against | rows | target | measured | met |", "|---" * 6 + "|", *every])


def reached(rows: Sequence[Mapping[str, Any]]) -> str:
    """What rows of one target reached: the only value, or the least, the greatest and, of three or more, the median."""
    if rows[0]["at_most"] is not None:
        found, show = [row["seconds"][OURS] for row in rows], as_time
    elif rows[0]["target"] is not None:
        found, show = [row["measured"] for row in rows], _times
    else:
        used = max(row["extra_mib"] / row["memory_at_most"] for row in rows)
        return f"at most {100 * used:.0f} % of what each may take"
    if len(found) == 1:
        return show(found[0])
    middle = f", median {show(statistics.median(found))}" if len(found) > 2 else ""
    return f"{show(min(found))} to {show(max(found))}{middle}"


def _asked(row: Mapping[str, Any]) -> str:
    if row["at_most"] is not None:
        return f"<= {as_time(row['at_most'])}"
    return "" if row["target"] is None else f"{row['target']:g}x"


def _cells(row: Mapping[str, Any]) -> str:
    ratio = row["measured"]
    extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
    if row.get("memory_at_most") is not None:
        extra += f" (<= {row['memory_at_most']:.0f})"
    cells = [
        row["op"],
        row["case"] + ("" if row["threads"] == 1 else f", {row['threads']} threads"),
        str(row["size"]),
        as_time(row["seconds"][OURS]),
        row["against"] if ratio is not None else "",
        _times(ratio),
        _asked(row),
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
