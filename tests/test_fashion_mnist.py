"""The study's code, on a few random images and networks of a few units."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import documents
import pytest
import torch
from click.testing import CliRunner
from fashion_mnist import (
    cost,
    data,
    elastic,
    evaluate,
    heterogeneous,
    heterogeneous_evaluation,
    landscapes,
    methods,
    parents,
    plots,
    table,
    train,
)
from fashion_mnist.__main__ import main
from networks import MLP

NETWORK = parents.Network(lambda: MLP(784, (12, 10), data.FEATURES), 1.0, 0.05)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """2,300 training and 60 test images of noise whose brightest spot tells the class, as the four files."""
    folder = tmp_path / "files"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for kind, count in (("train", 2300), ("t10k", 60)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 60, (count, 28, 28), generator=generator)
        for k in range(10):
            images[labels == k, 2 * k : 2 * k + 4, 2 * k : 2 * k + 4] += 190
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (folder / f"{kind}-images-idx3-ubyte").write_bytes(header + bytes(images.flatten().tolist()))
        header = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big")
        packed = gzip.compress(header + bytes(labels.tolist()))
        (folder / f"{kind}-labels-idx1-ubyte.gz").write_bytes(packed)
    return folder


def test_missing_and_damaged_files_are_named(files: Path) -> None:
    loaded = data.load(files)
    assert len(loaded.held_out.labels) == data.HELD_OUT
    assert len(loaded.training.labels) == 300
    assert loaded.test.images.shape == (60, 1, 28, 28)
    calibration = torch.cat(loaded.calibration(100, seed=1))
    assert len(calibration) == 100
    assert set(loaded.training.of((3, 4)).labels.tolist()) == {3, 4}
    path = files / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut off"):
        data.load(files)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        data.load(files)


@pytest.mark.slow
def test_the_study_runs_and_goes_on(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parents, cost, elastic, evaluate, landscapes, plots, train, table):
        monkeypatch.setattr(module, "NETWORKS", {"mlp": NETWORK})
    monkeypatch.setattr(heterogeneous, "EPOCHS", 1)
    cache, document, results = tmp_path / "cache", tmp_path / "quality.md", tmp_path / "quality.json"
    where = ["--data", str(files), "--cache", str(cache)]
    runner = CliRunner()

    def run(*arguments: str) -> str:
        result = runner.invoke(main, [*arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "left out" in run("evaluate", *where, "--split", "halves", "--seed", "0", "--network", "mlp", "--no-base")
    first = run("train", *where, "--split", "halves", "--seeds", "1", "--network", "mlp")
    assert "mlp-halves-0-1" in first
    before = {p: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")}
    run("train", *where, "--split", "halves", "--seeds", "1", "--network", "mlp")
    assert {p: p.stat().st_mtime_ns for p in cache.glob("*.safetensors")} == before
    common = ["--split", "halves", "--seed", "0", "--images", "200", "--every", "1"]
    run("evaluate", *where, *common, "--network", "mlp", "--method", "MuDSC zip", "--no-base")
    path = cache / "results" / "mlp-halves-0.json"
    assert set(json.loads(path.read_text())["rows"]) == {"parents", "ensemble", "MuDSC zip"}
    run("evaluate", *where, *common, "--network", "mlp")
    rows = json.loads(path.read_text())["rows"]
    assert set(rows) == {"parents", "ensemble", *methods.METHODS} - set(methods.ROTATED)
    assert rows["zip at 0.5, fast path"] == pytest.approx(rows["zip at 0.5, float64 reference"], abs=5)
    assert rows["best, heads known"]["mean"] > rows["average"]["mean"]
    found = heterogeneous_evaluation.evaluate(0, data.load(files), cache, 200, 1)
    assert json.loads(found.read_text())["rows"]["parents"]["share"] == pytest.approx(1.0)
    figures = tmp_path / "figures"
    drawn = ["landscape", *where, "--network", "mlp", "--images", "200", "--every", "1", "--resolution", "3"]
    run(*drawn, "--figures", str(figures))
    summary = json.loads((cache / "landscapes/mlp.summary.json").read_text())
    assert set(summary["landscapes"]) == set(landscapes.MERGES.values())
    for found in summary["landscapes"].values():
        assert found["inside"] == (found["share"] <= 0.1)
    # The parents stand in another unit order in each landscape, and are the same functions.
    first, second = ([found["losses"][n] for n in "AB"] for found in summary["landscapes"].values())
    assert first[0] == pytest.approx(second[0], rel=1e-4)
    assert first[1] == pytest.approx(second[1], rel=1e-4)
    document.write_text("before <!-- halves -->\nold\n<!-- /halves --> after\n<!-- targets --><!-- /targets -->\n")
    output = run("table", "--cache", str(cache), "--results", str(results), "--document", str(document))
    written = document.read_text()
    assert "old" not in written
    assert written.startswith("before <!-- halves -->\n**Classes 0-4")
    assert "| MuDSC zip |" in written
    assert "reached" in written
    assert "heterogeneous" in output
    assert "| mlp | MuDSC zip |" in output
    run("plots", "--results", str(results), "--figures", str(figures))
    for name in ("methods-halves", "summary-halves", "landscape-mlp-zip", "landscape-mlp-best", "paths-mlp"):
        assert (figures / f"{name}.png").stat().st_size > 5000
        assert (figures / f"{name}.svg").stat().st_size > 5000
    assert json.loads(results.read_text())["results"]["halves"]["mlp"]["0"]["rows"]["parents"] == rows["parents"]

    # Every line that the document shows, on what is there: rows that were measured are not measured again.
    small = {
        "train": [*where, "--split", "halves", "--seeds", "1"],
        "evaluate": [*where, *common],
        "elastic": [*where, *common],
        "cost": [*where, "--images", "200"],
        "landscape": [*drawn[1:], "--figures", str(figures)],
        "table": ["--cache", str(cache), "--results", str(results), "--document", str(document)],
        "plots": ["--results", str(results), "--figures", str(figures)],
    }
    lines = documents.commands(documents.ROOT / "examples/fashion_mnist/README.md")
    assert [words[:-1] for words in lines] == [["export"], *[["python", "-m", "fashion_mnist"]] * len(small)]
    shown = [words[-1] for words in lines[1:]]
    assert set(shown) == set(small)
    for subcommand in shown:
        run(subcommand, *small[subcommand])
    found = json.loads((cache / "elastic" / "mlp-halves-0.json").read_text())
    assert len(found) == len(elastic.BUDGETS) * len(elastic.WIDTHS) * len(elastic.METHODS)
    assert all(row["size"] <= float(name.rpartition(" ")[2]) for name, row in found.items())
    halves = {"mlp": {"0": {"rows": rows}}}
    shown = table.elastic_table({"mlp": {"0": found}}, halves).splitlines()
    assert shown[0] == "| | parameters | widths | mlp (1) |"
    assert len(shown) == 2 + len(found) + len(table.ELASTIC_CONTROLS)
    random = rows["control: random halves + refit, heads"]["mean"]
    assert shown[-1] == f"| control: random halves + refit, heads | 1.0 | uniform | {random:.1f} |"
    wanted = f"{found['zip + decoder + rescaling, elastic widths, 1.0']['mean']:.1f}"
    assert f"| zip + decoder + rescaling | 1.0 | elastic | {wanted} |" in shown
    assert json.loads((cache / "cost.json").read_text())["mlp"]["refit"]["clock"] > 0


def test_the_better_body_is_the_control() -> None:
    rows = {"control: first body, last layer solved, heads": {"mean": 3.0},
            "control: second body, last layer solved, heads": {"mean": 5.0}}  # fmt: skip
    assert table.values({"0": {"rows": rows}}, table.BETTER_BODY, "mean") == [5.0]
    assert table.cell([]) == ""
    assert table.cell([1.0, 3.0]) == "2.0 ± 1.4"
    assert table.cell([1.0], seeds=3) == "1.0 (1)"
