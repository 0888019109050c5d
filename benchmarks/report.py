"""A results file as a markdown table: ``python -m benchmarks.report benchmarks/results/FILE.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .suite import as_time


def table(results: Mapping[str, Any]) -> str:
    """The rows that have a target, then the rest, as markdown."""
    lines = ["| kernel | case | size | ours | against | ratio | target | met | share of ceiling | extra MiB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    rows = sorted(results["rows"], key=lambda row: row["met"] is None)
    for row in rows:
        ratio = row["measured"]
        target = f"<= {row['at_most']:g} s" if row["at_most"] is not None else _times(row["target"])
        met = {True: "yes", False: "**no**", None: ""}[row["met"]]
        share = "" if row["ceiling_share"] is None else f"{100 * row['ceiling_share']:.0f} %"
        extra = "" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
        threads = "" if row["threads"] == 1 else f", {row['threads']} threads"
        cells = [
            row["op"],
            row["case"] + threads,
            str(row["size"]),
            as_time(row["seconds"]["mudsc_fast"]),
            row["against"] if ratio is not None else "",
            _times(ratio),
            target,
            met,
            share,
            extra,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x" if ratio < 100 else f"{ratio:.0f}x"


def main(arguments: list[str]) -> int:
    """Print the table of one results file."""
    print(table(json.loads(Path(arguments[0]).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
