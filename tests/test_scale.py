"""A tiny `make scale`: a planted permutation of a Llama comes back through the command line, under a limit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import scale, scale_document
from mudsc_fast.cli import main
from mudsc_fast.rematch import Matcher


def test_a_small_llama_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = scale.CASES["small"]
    permutation = scale._empty(case)[1].random_permutation(case.seed)
    scale.make_pair(case, tmp_path, permutation)
    ways: set[str] = set()
    rematch = Matcher.rematch

    def seen(self: Matcher, tie: tuple[object, ...], *args: object, **kwargs: object) -> object:
        ways.add("none" if self.work is None else self.work.step_of(tie[0].name).way)  # type: ignore[attr-defined]
        return rematch(self, tie, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Matcher, "rematch", seen)
    a, b, plan = str(tmp_path / "a"), str(tmp_path / "b"), tmp_path / "plan.safetensors"
    # Generous, because the process that runs the tests holds much already; bfloat16 is streamed all the same.
    common = ["--max-memory", "8GB", "--max-shard-size", case.shard, "-q"]
    assert main(["merge", a, b, "-o", str(tmp_path / "merged"), "--save-plan", str(plan), *common]) == 0
    assert ways == {"streamed"}
    assert main(["align", a, b, "-o", str(tmp_path / "b_aligned"), "--plan", str(plan), *common]) == 0
    assert main(["merge", a, b, "-o", str(tmp_path / "average"), "--method", "average", *common]) == 0
    labels = scale.check_labels(plan, permutation)
    assert labels["exact_spaces"] == labels["spaces"] == 9
    assert labels["right_units"] == labels["units"]
    tokens = torch.randint(0, case.vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    logits = scale.compare_logits(tmp_path, ["a", "b", "b_aligned", "merged", "average"], tokens)
    assert logits["b_aligned from b"] < 1e-4
    assert logits["merged"] < logits["b"] < 0.1
    assert logits["average"] > 10 * logits["merged"]


def test_the_document_shows_the_committed_results() -> None:
    text = scale_document.DOCUMENT.read_text()
    large, wide, both = scale_document.results()
    assert scale_document.renewed(text, large, wide, both) == text
    assert both["labels_equal"]
    assert all(both[step]["peak_rss_mib"] <= both[step]["limit_mib"] for step in ("calibrated", "matched"))
    assert large["planted"]["exact_spaces"] == large["planted"]["spaces"]
    assert all(run["peak_resident_mb"] < 4000 for run in large["runs"].values())
    changed = {**large, "planted": {**large["planted"], "sweeps": 9}}
    assert "in 9 sweeps" in scale_document.renewed(text, changed, wide, both)
    with pytest.raises(ValueError, match="expected one part"):
        scale_document.renewed(text.replace("steps: begin", "steps"), large, wide, both)
