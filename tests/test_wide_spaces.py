"""Spaces whose similarity does not fit: aligned some rows at a time, as the whole similarity would have it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_cases import ARCHITECTURES
from torch import Tensor
from torch.nn import Linear, ReLU, Sequential

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mudsc_fast as mf
from mudsc_fast import rematch, stats_files
from mudsc_fast.checkpoints import save_checkpoint
from mudsc_fast.cli import main
from mudsc_fast.stats_files import StatsFile, calibrate_to_file
from mudsc_fast.workplan import MARGIN, TensorShape, WorkPlan, accumulator_bytes, plan_work, resident_bytes

GB = 10**9


def mlp(width: int, inputs: int = 24, outputs: int = 8) -> tuple[mf.PermutationSpec, dict[str, tuple[int, ...]]]:
    shapes = {"fc1.weight": (width, inputs), "fc1.bias": (width,), "fc2.weight": (outputs, width)}
    axes = (mf.Axis("fc1.weight", 0, "out"), mf.Axis("fc1.bias", 0, "out"), mf.Axis("fc2.weight", 1, "in"))
    return mf.PermutationSpec((mf.Space("hidden", width, axes),)), shapes


def related(spec: mf.PermutationSpec, shapes: dict[str, tuple[int, ...]], models: int = 2) -> list[dict[str, Tensor]]:
    """Models that are the first one in other unit orders, with noise."""
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    states = [first]
    for m in range(1, models):
        other = spec.permute(first, spec.random_permutation(m))
        states.append({k: x + 0.3 * torch.randn(x.shape, generator=generator) for k, x in other.items()})
    return states


def by_rows(work: WorkPlan, piece: int) -> WorkPlan:
    return replace(work, steps=tuple(replace(step, way="rows", piece=piece) for step in work.steps))


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_a_match_by_rows_is_the_match(kind: str, models: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ARCHITECTURES[kind].spec
    shapes = {name: tuple(x.shape) for name, x in ARCHITECTURES[kind].models(1)[0].state_dict().items()}
    states = related(spec, {name: shapes[name] for name in spec.entries}, models)
    expected = mf.match(states, spec, balance=1.0)
    layout = {name: TensorShape(tuple(x.shape), x.dtype) for name, x in states[0].items()}
    work = by_rows(plan_work(spec, layout, models), 64)
    monkeypatch.setattr("mudsc_fast.matching.plan_work", lambda *a, **k: work)
    found = mf.match(states, spec, max_memory=GB)
    assert all(torch.equal(found.labels[name], expected.labels[name]) for name in expected.labels)
    assert found.values == pytest.approx(expected.values, abs=1e-6)
    assert found.history == pytest.approx(expected.history, abs=1e-6)


@pytest.mark.parametrize("balance", [0, 0.5])
@pytest.mark.parametrize(("kind", "models"), [("mlp", 2), ("mlp", 3), ("resnet", 3)])
@pytest.mark.parametrize("kept", ["memory, cross", "memory, full", "file, cross", "file, full", "bands"])
def test_a_match_by_rows_with_activations_is_the_match(
    kind: str, models: int, balance: float, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = ARCHITECTURES[kind]
    spec, nets, batches = architecture.spec, architecture.models(models), architecture.batches(3)
    whole = mf.calibrate(nets, batches, spec, scope="full" if kept.endswith("full") else "cross")
    stats: Mapping[str, mf.Covariance] = whole
    if kept.startswith("file"):
        whole.save(tmp_path / "stats")
        stats = StatsFile(tmp_path / "stats")
    elif kept == "bands":
        monkeypatch.setattr(stats_files, "rows_that_fit", lambda width, *_: max(1, (2 * width) // 5))
        spaces, passes = calibrate_to_file(nets, batches, spec, tmp_path / "stats", 100 * GB, "cross")
        assert passes == 3 * spaces
        stats = StatsFile(tmp_path / "stats")
        loaded = mf.ActivationStats.load(tmp_path / "stats")
        for name in whole:
            assert torch.allclose(loaded[name].correlation(), whole[name].correlation(), atol=1e-6)
    states = [net.state_dict() for net in nets]
    expected = mf.match(states, spec, whole, balance=balance)
    layout = {name: TensorShape(tuple(x.shape), x.dtype) for name, x in states[0].items()}
    work = by_rows(plan_work(spec, layout, models), 64)
    monkeypatch.setattr("mudsc_fast.matching.plan_work", lambda *a, **k: work)
    monkeypatch.setattr(rematch, "assign", lambda *a, **k: pytest.fail("the whole similarity was made"))
    found = mf.match(states, spec, stats, balance=balance, max_memory=GB)
    assert all(torch.equal(found.labels[name], expected.labels[name]) for name in expected.labels)
    assert found.values == pytest.approx(expected.values, abs=1e-6)
    assert found.history == pytest.approx(expected.history, abs=1e-6)


@pytest.mark.parametrize("balance", [0, 0.5, 1.0])
@pytest.mark.parametrize(("kind", "models"), [("groupnorm", 2), ("vit", 3), ("attention", 2), ("rope", 3)])
def test_a_match_by_rows_of_blocks_is_the_match(
    kind: str, models: int, balance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = ARCHITECTURES[kind]
    spec, nets = architecture.spec, architecture.models(models)
    stats = mf.calibrate(nets, architecture.batches(3), spec, scope="cross") if balance < 1 else None
    states = [net.state_dict() for net in nets]
    expected = mf.match(states, spec, stats, balance=balance)
    layout = {name: TensorShape(tuple(x.shape), x.dtype) for name, x in states[0].items()}
    work = plan_work(spec, layout, models)
    ways = {step.spaces[0]: "rows" if spec[step.spaces[0]].blocks == 1 else "blocks" for step in work.steps}
    assert "blocks" in ways.values()
    work = replace(by_rows(work, 64), steps=by_rows(work, 64).with_ways(ways).steps)
    monkeypatch.setattr("mudsc_fast.matching.plan_work", lambda *a, **k: work)
    monkeypatch.setattr(rematch, "assign_blocks", lambda *a, **k: pytest.fail("the whole similarity was made"))
    found = mf.match(states, spec, stats, balance=balance, max_memory=GB)
    assert all(torch.equal(found.labels[name], expected.labels[name]) for name in expected.labels)
    assert found.values == pytest.approx(expected.values, abs=1e-6)
    assert found.history == pytest.approx(expected.history, abs=1e-6)


def test_a_small_limit_takes_the_blocks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shapes = mlp(6144)
    spec = mf.PermutationSpec((replace(spec["hidden"], blocks=8),))
    states = related(spec, shapes)
    expected = mf.match(states, spec, balance=1.0)
    monkeypatch.setattr(rematch, "assign_blocks", lambda *a, **k: pytest.fail("the whole similarity was made"))
    found = mf.match(states, spec, max_memory=resident_bytes() + MARGIN + 120 * 10**6)
    assert torch.equal(found.labels["hidden"], expected.labels["hidden"])
    assert found.values["hidden"] == pytest.approx(expected.values["hidden"], abs=1e-6)


def test_the_plan_of_experts_whose_similarity_does_not_fit() -> None:
    """Mixtral's: 8 blocks of 14,336 units in one layer, 52 GB in float32."""
    experts, inner, hidden = 8, 14336, 4096
    up = mf.Axis("up", (0, 1), "out", (experts, inner), (0, 1))
    down = mf.Axis("down", (0, 2), "in", (experts, inner), (0, 1))
    spec = mf.PermutationSpec((mf.Space("experts", experts * inner, (up, down), blocks=experts),))
    shapes = {"up": (experts, inner, hidden), "down": (experts, hidden, inner)}
    layout = {name: TensorShape(shape, torch.bfloat16) for name, shape in shapes.items()}
    for balance in (0.5, 1.0):
        work = plan_work(spec, layout, 2, max_memory=48 * GB, base=GB // 2, balance=balance, merging=False)
        assert work.step_of("experts").way == "blocks"
        assert work.peak < 48 * GB < 4 * (experts * inner) ** 2
        with pytest.raises(ValueError, match="which matching space 'experts'"):
            plan_work(spec, layout, 2, max_memory=8 * GB, base=GB // 2, balance=balance, merging=False)


def test_statistics_and_similarity_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded, matched and interrupted within limits that the whole exceeds, and the same as without limits."""
    width = 4608
    torch.manual_seed(0)
    nets = [Sequential(Linear(24, width), ReLU(), Linear(width, 8)) for _ in range(2)]
    names = {"fc1.weight": "0.weight", "fc1.bias": "0.bias", "fc2.weight": "2.weight"}
    axes = tuple(replace(axis, tensor=names[axis.tensor]) for axis in mlp(width)[0]["hidden"].axes)
    spec = mf.PermutationSpec((mf.Space("hidden", width, axes, (mf.Tap("2", "input", 1),)),))
    states = [{name: nets[0].state_dict()[name] for name in names.values()}]
    moved = spec.permute(states[0], spec.random_permutation(1))
    states.append({name: x + 0.02 * torch.randn(x.shape) for name, x in moved.items()})
    nets[1].load_state_dict({**nets[0].state_dict(), **states[1]})
    batches = [torch.randn(40, 24) for _ in range(4)]
    sums = accumulator_bytes(width, 2, False)
    monkeypatch.setattr(stats_files, "resident_bytes", lambda: 0)
    path = tmp_path / "stats"
    assert calibrate_to_file(nets, batches, spec, path, MARGIN + int(0.7 * sums), "cross") == (1, 3)
    with pytest.raises(ValueError, match="max_memory: the statistics of space 'hidden'"):
        calibrate_to_file(nets, batches, spec, path, MARGIN + int(0.7 * sums), "full")
    expected = mf.match(states, spec, mf.calibrate(nets, batches, spec, scope="cross"))
    limit = resident_bytes() + MARGIN + int(1.3 * sums)
    layout = {name: TensorShape(tuple(x.shape), x.dtype) for name, x in states[0].items()}
    assert plan_work(spec, layout, 2, max_memory=limit, balance=0.5, merging=False).steps[0].way == "rows"
    whole = rematch.assign_tiled
    calls: list[int] = []

    def stopping(source: Any, tile_bytes: int) -> mf.Assignment:
        calls.append(tile_bytes)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(source, tile_bytes=tile_bytes)

    monkeypatch.setattr(rematch, "assign_tiled", stopping)
    options = {"max_memory": limit, "journal": tmp_path / "journal"}
    with pytest.raises(KeyboardInterrupt):
        mf.match(states, spec, StatsFile(path), **options)
    found = mf.match(states, spec, StatsFile(path), **options)
    assert torch.equal(found.labels["hidden"], expected.labels["hidden"])
    assert found.values["hidden"] == pytest.approx(expected.values["hidden"], abs=1e-6)
    assert len(calls) >= 3  # the visit that was finished is not made again


def test_passes_see_the_samples_in_any_order_but_the_same_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows overlap those before, which another first batch puts about another shift."""
    width, nets = 100, []
    torch.manual_seed(0)
    for _ in range(2):
        nets.append(Sequential(Linear(24, width), ReLU(), Linear(width, 8)))
    axes = (mf.Axis("0.weight", 0, "out"), mf.Axis("0.bias", 0, "out"), mf.Axis("2.weight", 1, "in"))
    spec = mf.PermutationSpec((mf.Space("hidden", width, axes, (mf.Tap("2", "input", 1),)),))
    batches = [torch.randn(40, 24) + 3 * k for k in range(5)]

    class Loader:
        def __init__(self, *passes: list[int]) -> None:
            self.passes = iter(passes)

        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter([batches[k] for k in next(self.passes)])

    monkeypatch.setattr(stats_files, "rows_that_fit", lambda *_: 40)
    shuffled = Loader([0, 1, 2, 3, 4], [1, 3, 0, 4, 2], [4, 2, 1, 0, 3])
    assert calibrate_to_file(nets, shuffled, spec, tmp_path / "stats", 100 * GB, "cross") == (1, 3)
    expected = mf.calibrate(nets, batches, spec, scope="cross")["hidden"].correlation()
    torch.testing.assert_close(StatsFile(tmp_path / "stats")["hidden"].correlation(), expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="batches: expected the same samples in every pass, got 200"):
        calibrate_to_file(nets, Loader([0, 1, 2, 3, 4], [0, 1, 2, 3]), spec, tmp_path / "few", 100 * GB, "cross")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        calibrate_to_file(nets, batches, spec, tmp_path / "folder", 100 * GB, "cross")
    with pytest.raises(OSError):
        stats_files.join_stats([tmp_path / "stats"], tmp_path / "folder", ["hidden"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "stats"]


def test_a_small_limit_takes_the_rows_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    width = 6144
    spec, shapes = mlp(width)
    states = related(spec, shapes)
    sources: list[tuple[int, int]] = []
    whole = rematch.assign_tiled
    monkeypatch.setattr(
        rematch,
        "assign_tiled",
        lambda s, tile_bytes: sources.append((s.width, tile_bytes)) or whole(s, tile_bytes=tile_bytes),
    )
    found = mf.match(states, spec, max_memory=resident_bytes() + MARGIN + 120 * 10**6)
    assert sources
    assert all(size == width and tile <= 4 * width * width for size, tile in sources)
    dense = mf.match(states, spec)
    assert torch.equal(found.labels["hidden"], dense.labels["hidden"])
    assert found.values["hidden"] == pytest.approx(dense.values["hidden"], abs=1e-6)


def test_the_plan_of_a_space_that_no_similarity_fits() -> None:
    spec, shapes = mlp(57344, 8192, 8192)
    layout = {name: TensorShape(shape, torch.bfloat16) for name, shape in shapes.items()}
    work = plan_work(spec, layout, 2, max_memory=8 * GB, base=GB // 2, matching=True, merging=False)
    step = work.step_of("hidden")
    assert step.way == "rows"
    assert work.peak <= 8 * GB < 4 * 57344**2
    both = plan_work(spec, layout, 2, max_memory=8 * GB, base=GB // 2, balance=0.5, merging=False)
    assert both.step_of("hidden").way == "rows"
    assert step.memory <= both.step_of("hidden").memory <= 8 * GB
    assert both.step_of("hidden").read - step.read == 2 * accumulator_bytes(57344, 2, False)
    seen = plan_work(spec, {}, 2, max_memory=4 * GB, base=GB // 2, balance=0, merging=False)
    assert seen.step_of("hidden").way == "rows"
    assert seen.peak <= 4 * GB
    with pytest.raises(ValueError, match="at least") as refused:
        plan_work(spec, layout, 2, max_memory=4 * GB, base=GB // 2, merging=False)
    least = int(str(refused.value).split("at least ")[1].split()[0])
    assert plan_work(spec, layout, 2, max_memory=least, base=GB // 2, merging=False).peak <= least
    with pytest.raises(ValueError, match="at least"):
        plan_work(spec, layout, 2, max_memory=least - 1, base=GB // 2, merging=False)


def test_a_dry_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec, shapes = mlp(57344, 8, 4)
    (tmp_path / "spec.json").write_text(spec.to_json())
    for name in "ab":
        state = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
        save_checkpoint(tmp_path / f"{name}.safetensors", state)
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    command = ["merge", *files, "-o", str(tmp_path / "out.safetensors"), "--spec", str(tmp_path / "spec.json")]
    assert main([*command, "--max-memory", "8GB", "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "rows of the similarity" in out
    assert main([*command, "--dry-run"]) == 0
    assert "rows of the similarity" not in " ".join(capsys.readouterr().out.split())


def test_a_gap_that_is_left_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shapes = mlp(40)
    states = related(spec, shapes)
    layout = {name: TensorShape(shape, torch.float32) for name, shape in shapes.items()}
    work = by_rows(plan_work(spec, layout, 2), 64)
    monkeypatch.setattr("mudsc_fast.matching.plan_work", lambda *a, **k: work)
    whole = rematch.assign_tiled

    def unproven(*arguments: Any, **options: Any) -> mf.Assignment:
        return replace(whole(*arguments, **options), gap=torch.tensor(4.0, dtype=torch.float64))

    monkeypatch.setattr(rematch, "assign_tiled", unproven)
    with pytest.warns(UserWarning, match=r"space 'hidden': .* not proven .* at most 0\.1 below"):
        mf.match(states, spec, max_memory=GB, max_sweeps=1)


def test_the_document_shows_the_committed_results() -> None:
    from benchmarks import wide_assignment

    root = Path(__file__).resolve().parent.parent
    result = json.loads((root / "benchmarks" / "results" / "wide-assignment.json").read_text())
    text = (root / "docs" / "scale.md").read_text()
    for line in wide_assignment.tables(result):
        assert line in text
    wide = result["wide"]
    assert wide["width"] == 57344
    assert wide["way"] == "rows"
    assert wide["peak_rss_mib"] < wide["limit_mib"] < 8192
    assert wide["gaps"]
    for row in result["rows"]:
        assert row["width"] == 8192
        assert row["differs_from_dense"] <= 1e-6


def test_the_benchmark_at_a_small_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import wide_assignment

    monkeypatch.setattr(
        "sys.argv", ["wide", "--json", str(tmp_path / "wide.json"), "--width", "6144", "--dense-width", "96"]
    )
    monkeypatch.setattr("sys.argv", [*sys.argv, "--limit", str(resident_bytes() + MARGIN + 120 * 10**6)])
    wide_assignment.main()  # the process that runs the tests has had more than the limit
    result = json.loads((tmp_path / "wide.json").read_text())
    assert result["wide"]["planted_found"] == 1.0
    assert result["wide"]["way"] == "rows"
    assert [row["kind"] for row in result["rows"]] == list(wide_assignment.KINDS)
    assert max(row["differs_from_dense"] for row in result["rows"]) <= 1e-6
