"""The documents of what was measured: they show the committed run, and its tables and pictures say what rows say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import marked, performance_document, pictures, report, suite
from benchmarks.harness import OURS, Contender, Result, Row, run_row
from mudsc_fast import _core

RUN: dict[str, Any] = json.loads(performance_document.RESULTS.read_text(encoding="utf-8"))


def made(op: str, size: int, seconds: float, **more: Any) -> dict[str, Any]:
    """A row as results files have it: ours took so long, a peer ten times that."""
    times = {OURS: seconds, "peer": 10 * seconds}
    return Result(op, "case", size, 1, seconds=times, against="peer", **more).to_json()


def test_the_documents_show_the_committed_run() -> None:
    how = "python -m benchmarks.performance_document"
    text = performance_document.DOCUMENT.read_text(encoding="utf-8")
    assert marked.renewed(text, performance_document.parts(RUN)) == text, how
    readme = performance_document.README.read_text(encoding="utf-8")
    assert marked.renewed(readme, {"speed": performance_document.headlines(RUN)}) == readme, how
    rows = performance_document.ROWS.read_text(encoding="utf-8")
    assert marked.renewed(rows, {"rows": report.others(RUN)}) == rows, how
    drawn = [op for op in RUN["seconds_by_op"] if pictures.panels(RUN["rows"], op)]
    assert {path.stem for path in performance_document.PICTURES.iterdir()} == {"targets", *drawn}
    assert set(RUN["seconds_by_op"]) == {"covariance", "similarity", "assign", "zip", "regroup", "pipeline"}
    assert RUN["failures"] == []
    assert not RUN["quick"]


def test_rows_below_their_target_have_a_reason() -> None:
    low = [row for row in RUN["rows"] if row["met"] is False]
    shown = report.below(RUN["rows"]).splitlines()[2:]
    assert len(shown) == len(low)
    assert all("**no**" in line and "not explained" not in line for line in shown)


def test_summary_has_a_line_for_rows_of_one_target() -> None:
    rows = [
        made("zip", 8, 1.0, target=2.0, measured=3.0),
        made("zip", 16, 1.0, target=2.0, measured=1.0),
        made("zip", 32, 1.0, target=2.0, measured=9.0),
        made("zip", 64, 2.0, at_most=10.0),
        made("zip", 64, 2.0, memory_at_most=8.0, extra_mib=4.0),
        made("zip", 64, 2.0),
    ]
    fits = [{"op": "zip", "case": "case", "exponent": 2.5, "sizes": [8, 64], "target": 2.2}]
    assert report.summary({"rows": rows, "exponents": fits}).splitlines()[2:] == [
        "| zip | peer | 3 rows | 2x | 1.00x to 9.00x, median 3.00x | 2 of 3 |",
        "| zip |  | case, 64 | <= 10 s | 2 s | 1 of 1 |",
        "| zip |  | case, 64 | memory | at most 50 % of what each may take | 1 of 1 |",
        "| zip |  | case, growth from 8 to 64 | <= 2.2 | 2.50 | 0 of 1 |",
    ]


def test_pictures_show_each_case_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = (8, 16, 32)
    rows = [made("zip", n, n * 1e-3, target=2.0, measured=3.0) for n in sizes]
    again = [{**row, "case": "case, against another"} for row in rows]
    itself = [{**row, "case": "refused", "against": "the same without looking"} for row in rows]
    few = [made("assign", n, n * 1e-3) for n in sizes[:2]]
    found = pictures.draw(tmp_path / "new", [*rows, *again, *itself, *few])
    assert [path.name for path in found] == ["zip.png", "targets.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
    assert list(pictures.panels([*rows, *again, *itself], "zip")) == ["case"]
    assert not pictures.panels(few, "assign")
    assert pictures.draw(tmp_path / "new", few) == []


def test_share_of_a_target() -> None:
    assert pictures.share(made("zip", 8, 2.0, target=2.0, measured=3.0)) == 1.5
    assert pictures.share(made("zip", 8, 2.0, at_most=10.0)) == 5.0
    assert pictures.share(made("zip", 8, 2.0)) is None


def test_rows_on_two_threads_note_how_far_the_cores_are_apart() -> None:
    trip = _core.round_trip()
    assert 1e-9 < trip < 1.0 or (trip == 0 and os.cpu_count() == 1)
    row = Row(
        "zip", "case", 8, lambda: [Contender(OURS, lambda: 1.0)], lambda *_: 0.0, 0.0, threads=2, remark=lambda: "far"
    )
    result = run_row(row, budget=0.01)
    assert result.note == "far"
    assert suite.line(result).endswith("far")
