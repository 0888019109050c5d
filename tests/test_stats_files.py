"""Statistics that do not fit in memory: recorded in groups of spaces, joined on disk, read one space at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipeline_cases import ARCHITECTURES
from safetensors.torch import load_file, save_file

import mudsc_fast as mf
from mudsc_fast import stats_files
from mudsc_fast.cli import main
from mudsc_fast.stats_files import StatsFile, calibrate_to_file, groups_of, join_stats
from mudsc_fast.workplan import MARGIN, accumulator_bytes


@pytest.mark.parametrize("scope", ["full", "cross"])
@pytest.mark.parametrize("kind", ["mlp", "resnet", "vit", "rope"])
def test_groups_give_what_one_pass_gives(
    kind: str, scope: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = ARCHITECTURES[kind]
    models, batches, spec = architecture.models(2), architecture.batches(3), architecture.spec
    whole = mf.calibrate(models, batches, spec, scope=scope)
    monkeypatch.setattr(stats_files, "resident_bytes", lambda: 0)
    largest = max(accumulator_bytes(spec[name].width, 2, scope == "full") for name in whole)
    path = tmp_path / "stats.safetensors"
    spaces, passes = calibrate_to_file(models, batches, spec, path, MARGIN + largest, scope)
    assert spaces == len(whole)
    assert passes == len(groups_of(spec, 2, scope, largest)) > 1
    assert [file.name for file in tmp_path.iterdir()] == ["stats.safetensors"]
    lazy, loaded = StatsFile(path), mf.ActivationStats.load(path)
    assert list(lazy) == list(loaded) == [space.name for space in spec.spaces if space.taps]
    for name in whole:
        assert lazy.info(name) == (spec[name].width, 2, scope)
        assert torch.equal(lazy[name].correlation(), whole[name].correlation())
        assert torch.equal(loaded[name].correlation(), whole[name].correlation())
    with pytest.raises(ValueError, match=r"max_memory: the statistics of space .* need"):
        calibrate_to_file(models, batches, spec, tmp_path / "no", MARGIN + largest - 1, scope)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("balance", [0, 0.5, 1.0])
def test_a_match_reads_them_space_by_space(balance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES["resnet"]
    models, spec = architecture.models(2), architecture.spec
    stats = mf.calibrate(models, architecture.batches(), spec)
    stats.save(tmp_path / "s.safetensors")
    states = [model.state_dict() for model in models]
    expected = mf.match(states, spec, stats, balance=balance)
    lazy = StatsFile(tmp_path / "s.safetensors")
    read: list[str] = []
    true = StatsFile.__getitem__
    monkeypatch.setattr(StatsFile, "__getitem__", lambda self, name: read.append(name) or true(self, name))
    found = mf.match(states, spec, lazy, balance=balance, max_memory=10**11)
    assert all(torch.equal(found.labels[name], expected.labels[name]) for name in expected.labels)
    # Each visit reads its own space, and nothing looks through all of them beforehand.
    assert len(read) == len(stats) if balance in (0, 1.0) else len(read) > len(stats)


def test_files_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        StatsFile(tmp_path / "none")
    mf.match([m.state_dict() for m in ARCHITECTURES["mlp"].models(2)], ARCHITECTURES["mlp"].spec).save(tmp_path / "p")
    with pytest.raises(ValueError, match="damaged, or no statistics: not a file of activation statistics"):
        StatsFile(tmp_path / "p")
    (tmp_path / "q").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        StatsFile(tmp_path / "q")
    with pytest.raises(ValueError, match="layout: expected at least one tensor"):
        join_stats([], tmp_path / "r.safetensors", ["a"])


def test_the_command_line_calibrates_in_groups_and_reads_lazily(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    architecture = ARCHITECTURES["resnet"]
    for m, model in enumerate(architecture.models(2)):
        save_file(model.state_dict(), f"{m}.safetensors")
    Path("groupednet.py").write_text(
        "from networks import ResNet\n\n\ndef build():\n    return ResNet((1, 1), 5, channels=2, num_outputs=4)\n"
    )
    save_file({"x": torch.cat(architecture.batches())}, "x.safetensors")
    call = ["calibrate", "0.safetensors", "1.safetensors", "--model", "groupednet:build", "--inputs", "x.safetensors"]
    assert main([*call, "-o", "whole.safetensors"]) == 0
    assert main([*call, "-o", "grouped.safetensors", "--max-memory", "100GB"]) == 0
    assert "in 1 passes" in capsys.readouterr().err
    assert main([*call, "-o", "no.safetensors", "--max-memory", "1MB"]) == 2
    assert "max_memory: the statistics of space" in capsys.readouterr().err
    merge = ["merge", "0.safetensors", "1.safetensors", "-q", "--stats"]
    assert main([*merge, "whole.safetensors", "-o", "a.safetensors"]) == 0
    assert main([*merge, "grouped.safetensors", "-o", "b.safetensors", "--max-memory", "100GB"]) == 0
    first, second = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
