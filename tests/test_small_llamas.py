"""The merging of two small Llamas, on a few steps of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_llamas
import torch
from regmean import regmean
from torch import nn


def test_the_texts_are_those_of_every_python() -> None:
    for which in small_llamas.TEXTS:
        data = small_llamas.text(which)
        assert len(data) > 200_000
        assert 0 <= int(data.min()) <= int(data.max()) < small_llamas.BYTES
        known, held = (small_llamas.windows(data, 50, 3, held_out) for held_out in (False, True))
        assert known.shape == held.shape == (50, small_llamas.CONTEXT + 1)
        assert not torch.equal(known, held)


@pytest.mark.slow
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
    assert small_llamas.main([*arguments, "--again"]) == 0
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    again = json.loads(out.read_text())["results"]["base"][0]
    for row, values in found["base"][0].items():
        assert again[row] == pytest.approx(values, rel=1e-5)


def test_regmean_is_its_formula() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.b(torch.tanh(self.a(x)))
            return y

    torch.manual_seed(0)
    models = [Net().eval(), Net().eval()]
    batches = [{"x": torch.randn(40, 5)}, {"x": torch.randn(30, 5)}]
    merged = regmean(models, batches, alpha=0.8)
    x = torch.cat([b["x"] for b in batches])
    read = [torch.tanh(m.a(x)).detach().double() for m in models]
    grams = [z.T @ z for z in read]
    grams = [0.8 * g + 0.2 * g.diagonal().diag() for g in grams]
    weights = [m.b.weight.detach().double() for m in models]
    wanted = (weights[0] @ grams[0] + weights[1] @ grams[1]) @ torch.linalg.inv(grams[0] + grams[1])
    torch.testing.assert_close(merged["b.weight"].double(), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(merged["b.bias"], (models[0].b.bias + models[1].b.bias) / 2)
    for name, tensor in regmean([models[0], models[0]], batches).items():
        torch.testing.assert_close(tensor, models[0].state_dict()[name], atol=1e-5, rtol=1e-4)
