"""``python -m benchmarks.scale_document``: what docs/scale.md shows of ``make scale``, and its picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks import marked, scale, wide_activations, wide_assignment

DOCUMENT = scale.ROOT / "docs" / "scale.md"
_BUSY = 1.5  # wall time to CPU time of one thread, from which on the machine counts as busy


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The run at Llama-3-8B's width, in words."""
    runs, planted, logits = result["runs"], result["planted"], result["logits"]
    memory = ", ".join(
        f"{name} {runs[key]['peak_resident_mb'] / 1000:.2f} GB"
        for name, key in (("merge", "merge"), ("align", "align"), ("plain averaging", "average"))
    )
    found = "All" if planted["right_units"] == planted["units"] else f"{planted['right_units']:,} of"
    return [
        f"{found} {planted['units']:,} units of all {planted['spaces']} spaces came back to their planted places, in "
        f"{planted['sweeps']} sweeps.",
        f"Largest resident memory (VmHWM) under `--max-memory {result['case']['limit']}`: {memory}.",
        "Loaded by transformers and compared with the first model's logits, relative to the largest of them: the "
        f"second model {logits['b']}, the merge {logits['merged']}, plain averaging {logits['average']};",
        f"the aligned second model differs from the second model by {logits['b_aligned from b']}.",
    ]


def machine(result: Mapping[str, Any]) -> list[str]:
    """Where it ran, and what its times are worth."""
    about, run = result["about"], result["runs"]["merge"]
    where = f"{about['cpu']}, {about['threads']} thread{'s' if about['threads'] > 1 else ''}, {about['date']}"
    times = f"the merge took {run['seconds']:.0f} s for {run['cpu_seconds']:.0f} s of CPU time"
    if run["seconds"] > _BUSY * run["cpu_seconds"]:
        return [f"The machine was busy with other work ({where}): {times}, so the table has CPU seconds."]
    return [f"{where}: {times}. The table has CPU seconds."]


def renewed(text: str, large: Mapping[str, Any], wide: Mapping[str, Any], both: Mapping[str, Any]) -> str:
    """The document with its measured parts as these results have them; ValueError for a part that it lacks."""
    steps, models = scale.tables(large)
    rows = wide_assignment.tables(dict(wide))
    dense = next(k for k, line in enumerate(rows) if line.startswith("| width ") and "value" in line)
    parts = {
        "llama": sentences(large),
        "machine": machine(large),
        "steps": steps,
        "models": models,
        "wide": [*rows[:dense], "", *rows[dense:]],
        "activations": wide_activations.table(dict(both)),
    }
    return marked.renewed(text, {name: "\n".join(lines) for name, lines in parts.items()})


def results() -> tuple[Any, Any, Any]:
    """The committed results files."""
    names = ("scale-llama-8b-width.json", "wide-assignment.json", "wide-activations.json")
    large, wide, both = (json.loads((scale.RESULTS / name).read_text(encoding="utf-8")) for name in names)
    return large, wide, both


if __name__ == "__main__":
    found = results()
    DOCUMENT.write_text(renewed(DOCUMENT.read_text(encoding="utf-8"), *found), encoding="utf-8")
    scale.draw(found[0], scale.PLOT)
