"""Several processes on gloo give the labels of one, write together, and end together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import Net

import mudsc_fast as mf
from mudsc_fast.distributed import levels, owners

WORKER = Path(__file__).parent / "distributed_worker.py"
MERGES = ("merge:1", "merge:2", "merge:4")
COMMANDS = ("cli:1", "cli:2")
WIDTHS = ("widths:1", "widths:2")
RESUMED = ("cut-matching:2", "cut-writing:2")
BROKEN = ("die-matching:3", "die-writing:2", "fail-match:2", "fail-write:3")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or not hasattr(os, "fork"),
    reason="needs gloo and fork",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, by one process that imports once: their folders, what each rank said, and the exit codes."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    spec = mf.PermutationSpec.trace(Net(), (torch.randn(2, 7, 6),))
    (root / "spec.json").write_text(spec.to_json())
    paths = [str(WORKER.parent.parent), str(WORKER.parent.parent / "examples")]
    command = [sys.executable, str(WORKER), str(root), *MERGES, *COMMANDS, *WIDTHS, "whole:2", *RESUMED, *BROKEN]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return root


def codes(runs: Path, run: str) -> list[int]:
    found: dict[str, dict[str, list[int]]] = json.loads((runs / "codes.json").read_text())
    return found[run]["codes"]


def said(runs: Path, run: str) -> list[str]:
    return [(runs / f"{run}-{rank}.txt").read_text() for rank in range(int(run[-1]))]


@pytest.mark.parametrize("run", [*MERGES, *COMMANDS, *WIDTHS])
def test_every_run_ends_well(run: str, runs: Path) -> None:
    assert codes(runs, run) == [0] * int(run[-1]), "\n".join(said(runs, run))


@pytest.mark.parametrize("run", MERGES[1:])
def test_the_labels_of_one_process(run: str, runs: Path) -> None:
    alone, folder = runs / MERGES[0], runs / run
    for name in ("align", "zip", "weights", "split", "split-zip", "mlp"):
        one, many = (mf.MergePlan.load(f / f"{name}.safetensors") for f in (alone, folder))
        assert one.labels.keys() == many.labels.keys()
        assert all(torch.equal(one.labels[space], many.labels[space]) for space in one.labels), name
        assert any(not torch.equal(x[0], x[1]) for x in many.labels.values())
        assert one.history == pytest.approx(many.history, abs=1e-6)
        assert all(one.values[space] == pytest.approx(many.values[space], abs=1e-6) for space in one.values)
    assert (folder / "ranks.txt").read_text() == run[-1]
    written = sorted(p.name for p in (folder / "out").iterdir())
    assert len(written) > 4
    assert written == sorted(p.name for p in (alone / "out").iterdir())
    for name in written:
        assert (folder / "out" / name).read_bytes() == (alone / "out" / name).read_bytes(), name
    assert not [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_the_command_writes_once_and_the_same(runs: Path) -> None:
    alone, folder = (runs / run for run in COMMANDS)
    one, many = (mf.MergePlan.load(f / "plan.safetensors") for f in (alone, folder))
    assert all(torch.equal(one.labels[space], many.labels[space]) for space in one.labels)
    written = sorted(p.name for p in (folder / "out").iterdir())
    assert written == sorted(p.name for p in (alone / "out").iterdir())
    assert sorted(p.name for p in folder.iterdir()) == ["out", "plan.safetensors", "stats.safetensors"]
    for name in written:
        assert (folder / "out" / name).read_bytes() == (alone / "out" / name).read_bytes(), name
    assert "merged 2 checkpoints" in said(runs, "cli:2")[0]
    assert said(runs, "cli:2")[1] == ""


def test_one_process_chooses_the_widths_of_all(runs: Path) -> None:
    one, many = (mf.MergePlan.load(runs / run / "plan.safetensors") for run in WIDTHS)
    assert one.widths == many.widths
    assert one.widths != {space.name: space.width for space in one.spec}
    written = sorted(p.name for p in (runs / WIDTHS[1] / "out").iterdir())
    assert written == sorted(p.name for p in (runs / WIDTHS[0] / "out").iterdir())
    for name in written:
        assert (runs / WIDTHS[1] / "out" / name).read_bytes() == (runs / WIDTHS[0] / "out" / name).read_bytes(), name


@pytest.mark.parametrize("run", RESUMED)
def test_a_killed_run_goes_on_to_the_same_files(run: str, runs: Path) -> None:
    first, second = codes(runs, run)[:2], codes(runs, run)[2:]
    assert first == [1, 9], "\n".join(said(runs, run))
    assert second == [0, 0], "\n".join(said(runs, run))
    whole, folder = runs / "whole:2", runs / run
    written = sorted(p.name for p in (folder / "out").iterdir())
    assert written == sorted(p.name for p in (whole / "out").iterdir())
    assert len(written) > 4
    for name in written:
        assert (folder / "out" / name).read_bytes() == (whole / "out" / name).read_bytes(), name
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())
    # Work that was finished is not done again: what each rank computed, in a whole run and in the second part.
    visits, tensors = (
        [[int(n) for n in re.findall(rf"{what} (\d+)", text)][-1] for text in said(runs, run)]
        for what in ("visits", "tensors")
    )
    in_whole = [int(re.findall(r"visits (\d+)", text)[-1]) for text in said(runs, "whole:2")]
    assert all(now < before for now, before in zip(visits, in_whole, strict=True))
    if run == "cut-writing:2":
        assert visits == [0, 0]
        assert sum(tensors) < sum(int(re.findall(r"tensors (\d+)", t)[-1]) for t in said(runs, "whole:2"))


def test_calibrating_in_groups_gives_the_statistics_of_one_pass(runs: Path) -> None:
    alone, grouped = (mf.ActivationStats.load(runs / name / "stats.safetensors") for name in ("cli:1", "whole:2"))
    assert alone.keys() == grouped.keys()
    assert "in 2 passes" in said(runs, "whole:2")[0]
    for space in alone:
        assert torch.allclose(alone[space].correlation(), grouped[space].correlation(), atol=1e-6), space


@pytest.mark.parametrize("run", BROKEN[:2])
def test_a_process_that_dies_ends_all(run: str, runs: Path) -> None:
    ranks = int(run[-1])
    assert codes(runs, run) == [9 if rank == 1 else 1 for rank in range(ranks)], "\n".join(said(runs, run))
    assert all("a process of the group is gone" in said(runs, run)[rank] for rank in range(ranks) if rank != 1)
    assert json.loads((runs / "codes.json").read_text())[run]["seconds"] < 60
    assert list((runs / run).iterdir()) == []


@pytest.mark.parametrize("run", BROKEN[2:])
def test_an_error_of_one_is_raised_on_all(run: str, runs: Path) -> None:
    assert codes(runs, run) == [1] * int(run[-1]), "\n".join(said(runs, run))
    assert all("ValueError: " in text and "NaN or inf" in text for text in said(runs, run))
    assert "rank 1: " in said(runs, run)[0]
    assert list((runs / run).iterdir()) == []


def test_levels_keep_the_order_of_what_reads_each_other() -> None:
    near = {"r": {"a", "b", "c"}, "a": {"r"}, "b": {"r", "b"}, "c": {"r"}}
    assert levels(["a", "b", "r", "c", "a"], near) == [[0, 1], [2], [3, 4]]
    assert levels(["a", "a", "b"], near) == [[0, 2], [1]]
    assert levels([], near) == []


def test_owners_spread_the_costs() -> None:
    near = {"r": {"a", "b", "c", "d"}, **{x: {"r"} for x in "abcd"}}
    found = owners({"r": 9.0, "a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}, near, 2)
    loads = [sum({"a": 4, "b": 3, "c": 2, "d": 1}[x] for x in "abcd" if found[x] == rank) for rank in (0, 1)]
    assert loads == [5, 5]
    assert set(found) == set("rabcd")


def test_a_group_that_is_not_there_is_refused() -> None:
    torch.manual_seed(0)
    state = {"fc1.weight": torch.randn(4, 3), "fc2.weight": torch.randn(2, 4)}
    spec = mf.PermutationSpec((mf.Space("h", 4, (mf.Axis("fc1.weight", 0, "out"), mf.Axis("fc2.weight", 1, "in"))),))
    with pytest.raises(RuntimeError, match="not initialised"):
        mf.match([state, state], spec, balance=1.0, group=True)


def test_a_command_leaves_only_what_it_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from mudsc_fast.cli import processes

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        processes.leave()
        assert dist.is_initialized()
        monkeypatch.setattr(processes, "_connected", True)
        processes.leave()
        assert not dist.is_initialized()
        assert not processes._connected
        processes.leave()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
