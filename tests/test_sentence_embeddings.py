"""The example with real weights: its parts, and, where the package is installed, a short run to its end."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import sentence_embeddings as example
import torch

ROOT = Path(__file__).resolve().parent.parent


def test_texts_are_many_and_held_out() -> None:
    pairs = example.docstrings()
    assert len(pairs) > 2000
    assert len({text for _, text in pairs}) == len(pairs)
    assert [words for words, _ in pairs] != sorted(words for words, _ in pairs)  # dealt out, not by module
    assert all(30 <= len(text) <= 300 and words == words.lower() for words, text in pairs)


def test_the_documented_table_is_the_recorded_one() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "minilm.json").read_text(encoding="utf-8"))
    document = (ROOT / "docs" / "minilm.md").read_text(encoding="utf-8")
    for row in record["rows"]:
        shown = f"| {row['cosine_a']:.3f} | {row['cosine_b']:.3f} | {row['found']:.1%} |"
        assert any(line.startswith(f"| {row['name']} ") and shown in line for line in document.splitlines()), shown
    assert set(record["recovered"].values()) == {1.0}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(example.PACKAGE) is None, reason="the package with the weights is missing")
def test_a_short_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    small = ["--steps", "2", "--batch", "4", "--tests", "16", "--lines", "24", "--length", "12"]
    example.MERGES.pop("zip, both")
    example.main([*small, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "figures.json")])
    found = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["recovered"] == {"align, weights": 1.0, "align, both": 1.0}
    assert rows["align, both"]["cosine_a"] > 0.99 > 0.9 > rows["plain average"]["cosine_a"]
