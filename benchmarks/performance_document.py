"""``python -m benchmarks.performance_document``: the committed run as tables and pictures in docs/.

README.md takes a table of a few lines, docs/performance.md the summary and the rows below their target,
docs/performance-rows.md every other row, and docs/images/performance/ the pictures (matplotlib is needed for these).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import marked, pictures, report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-zen4.json"
README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "performance.md"
ROWS = ROOT / "docs" / "performance-rows.md"
PICTURES = ROOT / "docs" / "images" / "performance"


def about(results: Mapping[str, Any]) -> str:
    """Where and when it ran, how long it took, and how many targets were met."""
    machine, limits = results["machine"], results["ceilings"]
    judged = [row for row in results["rows"] if row["met"] is not None]
    met = sum(row["met"] for row in judged)
    minutes, seconds = divmod(round(sum(results["seconds_by_op"].values())), 60)
    taken = ", ".join(f"{op} {took:.0f} s" for op, took in results["seconds_by_op"].items())
    return (
        f"**{met} of {len(judged)} rows reach their target.** {machine['cores']} cores ({machine['cpu']}, "
        f"{results['config']['isa']}), torch {results['torch'].split('+')[0]}, Python {results['python']}, "
        f"{results['started'][:10]}, one command in {minutes} min {seconds} s ({taken}). Ceilings of one core in the "
        f"same run: {limits['flop'] / 1e9:.0f} GFLOP/s in float32, {limits['flop bf16'] / 1e9:.0f} in bfloat16, and "
        f"{limits['byte'] / 1e9:.1f} GB/s for a copy, reads and writes together."
    )


# A step of a merge, what it is beside, and its rows: op, contender, and the beginning of the case.
_HEADLINES = (
    ("covariance of activations, bfloat16", "torch's product", ("covariance", "torch bf16 mm", "")),
    ("similarity by weights and activations", "the official algorithm", ("similarity", "official algorithm", "dual")),
    (
        "assignment, 4096 units and more",
        "the quickest of scipy, lapjv, lapx, lapcpp (geometric mean)",
        ("assign", "best", "geometric mean"),
    ),
    ("zip", "the official algorithm", ("zip", "official algorithm", "")),
    ("a whole merge, align", "the official algorithm", ("pipeline", "official algorithm", "")),
    ("a whole merge, zip", "the official algorithm", ("pipeline", "official algorithm", "")),
)


def headlines(results: Mapping[str, Any]) -> str:
    """How many times as fast each step of a merge is, for readers in a hurry."""
    lines = ["| step | beside | times as fast |", "|---|---|---|"]
    for step, beside, (op, against, begins) in _HEADLINES:
        way = step.split(", ")[1] if op == "pipeline" else ""
        rows = [
            row
            for row in results["rows"]
            if (row["op"], row["against"]) == (op, against)
            and row["case"].startswith(begins)
            and way in row["case"]
            and row["target"] is not None
        ]
        lines.append(f"| {step} | {beside} | {report.reached(rows)} |")
    return "\n".join(lines)


def parts(results: Mapping[str, Any]) -> dict[str, str]:
    """What docs/performance.md shows of a run."""
    return {
        "run": about(results),
        "summary": report.summary(results),
        "below": report.below(results["rows"]),
    }


def main() -> None:
    """Write the tables and the pictures of the committed run."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    marked.write(README, {"speed": headlines(results)})
    marked.write(DOCUMENT, parts(results))
    marked.write(ROWS, {"rows": report.others(results)})
    for path in pictures.draw(PICTURES, results["rows"]):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
