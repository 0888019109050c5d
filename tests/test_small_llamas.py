"""The merging of two small Llamas, on a few steps of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_llamas
import torch


def test_the_texts_are_those_of_every_python() -> None:
    for which in small_llamas.TEXTS:
        data = small_llamas.text(which)
        assert len(data) > 200_000
        assert 0 <= int(data.min()) <= int(data.max()) < small_llamas.BYTES
        known, held = (small_llamas.windows(data, 50, 3, held_out) for held_out in (False, True))
        assert known.shape == held.shape == (50, small_llamas.CONTEXT + 1)
        assert not torch.equal(known, held)


def test_it_runs_and_goes_on(tmp_path: Path) -> None:
    out, document = tmp_path / "llamas.json", tmp_path / "quality.md"
    document.write_text("<!-- small-llamas -->\nold\n<!-- /small-llamas -->\n")
    arguments = ["--seeds", "1", "--steps", "6", "--windows", "16", "--cache", str(tmp_path / "cache")]
    arguments += ["--out", str(out), "--document", str(document)]
    assert small_llamas.main(arguments) == 0
    found = json.loads(out.read_text())["results"]
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert len(trained) == 5
    for kind in small_llamas.KINDS:
        (rows,) = found[kind]
        assert set(small_llamas.ROWS) < set(rows)
        for row in rows.values():
            assert all(0 < value < 8 for value in row)
    assert "old" not in document.read_text()
    assert "| zip + refit, mean |" in document.read_text()
    assert small_llamas.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    again = json.loads(out.read_text())["results"]["base"][0]
    for row, values in found["base"][0].items():
        assert again[row] == pytest.approx(values, rel=1e-5)
