"""Spaces compared tensor by tensor: the same similarity as all at once, within a limit that is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pipeline_cases import ARCHITECTURES, Architecture
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import rematch
from mudsc_fast.averaging import Piece
from mudsc_fast.checkpoints import open_checkpoint, save_checkpoint
from mudsc_fast.rematch import Match, Matcher
from mudsc_fast.weights import Weights
from mudsc_fast.workplan import TensorShape, WorkPlan, in_slabs, plan_work, resident_bytes

GB = 10**9


def states_of(architecture: Architecture, count: int) -> list[dict[str, Tensor]]:
    return [model.state_dict() for model in architecture.models(count)]


def all_streamed(spec: mf.PermutationSpec, state: dict[str, Tensor], piece: int) -> WorkPlan:
    layout = {name: TensorShape(tuple(x.shape), x.dtype) for name, x in state.items()}
    work = plan_work(spec, layout, 3)
    steps = [
        type(step)(step.spaces, step.width, "streamed", piece, step.memory, step.flops, step.read)
        for step in work.steps
    ]
    return WorkPlan(tuple(steps), work.base, None, work.merge_memory, work.read, work.output)


@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_streamed_is_joint_up_to_rounding(kind: str, method: str) -> None:
    architecture = ARCHITECTURES[kind]
    spec, states = architecture.spec, states_of(architecture, 3)
    stats = mf.calibrate(architecture.models(3), architecture.batches(), spec)
    labels = {
        space.name: Match(torch.stack([torch.arange(space.width), *_orders(space, seed)]), 0.0)
        for seed, space in enumerate(spec.spaces)
        if space.tie is None and space.blocks == 1
    }
    for piece in (1, 10**6):
        for share in (1.0, 0.3):
            plain = _matcher(architecture, states, stats, method, share, None)
            streaming = _matcher(architecture, states, stats, method, share, all_streamed(spec, states[0], piece))
            for space in spec.spaces:
                for known in ({}, labels):
                    expected = plain.similarity(space, known, share)
                    found = streaming.similarity(space, known, share)
                    assert found.shape == expected.shape
                    assert found.dtype == expected.dtype
                    # Both multiply in the tensors' precision, about other shifts.
                    assert (found - expected).abs().max() <= (1e-12 if expected.dtype == torch.float64 else 3e-6)


def _orders(space: mf.Space, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(space.width, generator=generator) for _ in range(2)]


def _matcher(
    architecture: Architecture,
    states: list[dict[str, Tensor]],
    stats: mf.ActivationStats,
    method: str,
    balance: float,
    work: WorkPlan | None,
) -> Matcher:
    spec = architecture.spec
    widths = {space.name: space.width for space in spec.spaces}
    return Matcher(spec, 3, method, Weights(states, spec), stats, balance, widths, 0.5, 1.0, None, work)


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_a_planted_order_is_found_again_by_streaming(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES[kind]
    model = architecture.models(1)[0]
    states = [model.state_dict(), architecture.permuted(model, 3).state_dict()]
    used: list[str] = []
    true = rematch.streamed_similarity
    monkeypatch.setattr(rematch, "streamed_similarity", lambda *a: used.append(a[1].name) or true(*a))
    monkeypatch.setattr("mudsc_fast.matching.plan_work", lambda spec, *a, **k: all_streamed(spec, states[0], 64))
    stats = mf.calibrate([model, architecture.permuted(model, 3)], architecture.batches(), architecture.spec)
    plan = mf.match(states, architecture.spec, stats, max_memory=GB)
    assert set(used) == {space.name for space in architecture.spec.spaces}
    aligned = plan.align(states[1])
    assert all(torch.allclose(aligned[name], states[0][name]) for name in states[0])


def test_rows_of_a_checkpoint(tmp_path: Path) -> None:
    x = torch.randn(7, 3, 2)
    save_checkpoint(tmp_path / "x.safetensors", {"x": x, "y": torch.zeros(2, dtype=torch.bfloat16)})
    found = open_checkpoint(tmp_path / "x.safetensors")
    assert torch.equal(found.rows("x", slice(2, 5)), x[2:5])
    assert torch.equal(found.rows("x", slice(5, 99)), x[5:])
    assert found.rows("x", slice(3, 3)).shape == (0, 3, 2)
    order = torch.tensor([6, 0, 1, 2, 4, 3])
    assert torch.equal(found.rows("x", order), x[order])
    assert found.rows("x", order[:0]).shape == (0, 3, 2)
    with pytest.raises(KeyError, match="no tensor 'z'"):
        found.rows("z", slice(0, 1))
    with pytest.raises(IndexError, match=r"rows of 0\.\.6, got 0\.\.7"):
        found.rows("x", torch.tensor([0, 7]))
    with pytest.raises(IndexError, match="without a step"):
        found.rows("x", slice(0, 4, 2))


# --- slabs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_slabs_are_the_whole_tensors_bit_by_bit(kind: str, method: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[kind]
    states = states_of(architecture, 3)
    for m, state in enumerate(states):
        state["counter"] = torch.arange(40).reshape(20, 2)
        state["outside"] = torch.randn(33, 5) + m
        state["equal"] = torch.ones(33, 5)
        save_checkpoint(tmp_path / f"{m}.safetensors", state)
    width = None if method == "align" or kind not in ("mlp", "resnet") else 1.5
    plan = mf.match(states, architecture.spec, balance=1.0, method=method, width=width, max_sweeps=2)
    opened = [open_checkpoint(tmp_path / f"{m}.safetensors") for m in range(3)]
    expected = plan.merge(states, [1.0, 0.0, 2.0])
    for limit in (1, 100, 10**9):
        assert_pieces(plan.merge_pieces(opened, [1.0, 0.0, 2.0], limit), expected, limit)
        if method == "align":
            assert_pieces(plan.align_pieces(opened[2], 2, limit), plan.align(states[2], 2), limit)
    some = {"outside", next(iter(states[0]))}
    assert {piece.name for piece in plan.merge_pieces(opened, limit=100, only=some)} == some


def assert_pieces(pieces: Iterator[Piece], expected: dict[str, Tensor], limit: int) -> None:
    found: dict[str, list[Tensor]] = {}
    for name, start, tensor, whole in pieces:
        assert start == sum(len(x) for x in found.get(name, []))
        assert whole == (tensor.shape == expected[name].shape)
        found.setdefault(name, []).append(tensor)
    assert set(found) == set(expected)
    for name, parts in found.items():
        assert torch.equal(parts[0] if len(parts) == 1 else torch.cat(parts), expected[name]), name
    assert limit > 10 or len(found["outside"]) == 33


def test_nan_in_a_slab_is_named(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["mlp"]
    states = states_of(architecture, 2)
    plan = mf.match(states, architecture.spec, balance=1.0)
    name = next(n for n, x in states[1].items() if x.dim() == 2)
    states[1][name][3, 0] = float("nan")
    save_checkpoint(tmp_path / "b.safetensors", states[1])
    opened = [states[0], open_checkpoint(tmp_path / "b.safetensors")]
    with pytest.raises(ValueError, match=f"'{name}' of model 1 holds NaN"):
        list(plan.merge_pieces(opened, limit=8))


# --- the plan of work ------------------------------------------------------------------------------------------------


def llama_like(
    layers: int, width: int = 4096, hidden: int = 14336
) -> tuple[mf.PermutationSpec, dict[str, TensorShape]]:
    layout = {"embed": TensorShape((32000, width), torch.bfloat16)}
    residual = [mf.Axis("embed", 1, "out")]
    spaces = []
    for k in range(layers):
        layout[f"{k}.up"] = TensorShape((hidden, width), torch.bfloat16)
        layout[f"{k}.down"] = TensorShape((width, hidden), torch.bfloat16)
        residual += [mf.Axis(f"{k}.up", 1, "in"), mf.Axis(f"{k}.down", 0, "out")]
        spaces.append(mf.Space(f"mlp{k}", hidden, (mf.Axis(f"{k}.up", 0, "out"), mf.Axis(f"{k}.down", 1, "in"))))
    return mf.PermutationSpec((mf.Space("residual", width, tuple(residual)), *spaces)), layout


def test_the_plan_fits_its_limit_and_knows_its_minimum() -> None:
    spec, layout = llama_like(40)
    free = plan_work(spec, layout, 2, base=GB // 2)
    assert {step.way for step in free.steps} == {"joint"}
    assert free.peak > 20 * GB
    tight = plan_work(spec, layout, 2, max_memory=4 * GB, base=GB // 2)
    assert tight.peak <= 4 * GB
    assert tight.step_of("residual").way == "streamed"
    assert tight.step_of("residual").read == free.step_of("residual").read == (40 * 4 * 14336 + 2 * 32000) * 4096 * 2
    with pytest.raises(
        ValueError, match=r"at least \d+ bytes .*which matching space 'mlp0' \(14336 units\) needs"
    ) as e:
        plan_work(spec, layout, 2, max_memory=GB, base=GB // 2)
    least = int(str(e.value).split("at least ")[1].split()[0])
    assert plan_work(spec, layout, 2, max_memory=least, base=GB // 2).peak <= least
    with pytest.raises(ValueError, match="at least"):
        plan_work(spec, layout, 2, max_memory=least - 1, base=GB // 2)


def test_a_zip_needs_the_square_of_all_units() -> None:
    spec, layout = llama_like(1)
    with pytest.raises(ValueError, match="'mlp0'"):
        plan_work(spec, layout, 2, method="zip", max_memory=GB, base=0)
    assert plan_work(spec, layout, 2, method="zip", base=0).peak > 2 * 4 * (2 * 14336) ** 2


def test_slabs_where_rows_can_be_merged_apart() -> None:
    spec, _ = llama_like(1)
    assert in_slabs(spec, "embed", (32000, 4096))
    assert in_slabs(spec, "0.up", (14336, 4096))
    assert not in_slabs(spec, "embed", ())
    flat = mf.PermutationSpec((mf.Space("s", 6, (mf.Axis("x", (0, 1), "out", view=(2, 3), at=(0, 1)),)),))
    assert not in_slabs(flat, "x", (2, 3, 4))


def test_a_match_beyond_its_limit_is_refused_before_it_starts() -> None:
    architecture = ARCHITECTURES["mlp"]
    with pytest.raises(ValueError, match="max_memory: expected at least"):
        mf.match(states_of(architecture, 2), architecture.spec, max_memory=1000)
    assert resident_bytes() > 50 * 10**6


# --- the journal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_an_interrupted_match_ends_as_an_unbroken_one(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = ARCHITECTURES[kind]
    states = states_of(architecture, 2)
    stats = mf.calibrate(architecture.models(2), architecture.batches(), architecture.spec)
    expected = mf.match(states, architecture.spec, stats, method=method)
    true, calls = Matcher.rematch, [0]

    def fails_at(stop: int) -> None:
        def interrupted(self: Matcher, *args: object, **kwargs: object) -> list[Match]:
            if calls[0] == stop:
                raise KeyboardInterrupt
            calls[0] += 1
            return true(self, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(Matcher, "rematch", interrupted)

    for stop in (0, 1, 4, 6):
        fails_at(stop)
        with pytest.raises(KeyboardInterrupt):
            mf.match(states, architecture.spec, stats, method=method, journal=tmp_path / "j")
        assert len(list((tmp_path / "j").glob("0*.safetensors"))) == stop == calls[0]
    fails_at(-1)
    plan = mf.match(states, architecture.spec, stats, method=method, journal=tmp_path / "j")
    assert plan.history == expected.history
    assert plan.values == expected.values
    assert all(torch.equal(plan.labels[name], expected.labels[name]) for name in expected.labels)
    total = calls[0]
    mf.match(states, architecture.spec, stats, method=method, journal=tmp_path / "j")
    assert calls[0] == total
    with pytest.raises(ValueError, match=r"journal: balance is 0\.25 now and was 0\.5 in the run"):
        mf.match(states, architecture.spec, stats, method=method, balance=0.25, journal=tmp_path / "j")
    (tmp_path / "j" / "match.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        mf.match(states, architecture.spec, stats, method=method, journal=tmp_path / "j")


def test_a_visit_of_other_spaces_is_refused(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["mlp"]
    states = states_of(architecture, 2)
    mf.match(states, architecture.spec, balance=1.0, journal=tmp_path)
    (tmp_path / "000000.safetensors").write_bytes((tmp_path / "000001.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds a visit of"):
        mf.match(states, architecture.spec, balance=1.0, journal=tmp_path)


# --- zips on lists ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_a_zip_on_lists_is_the_zip(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = ARCHITECTURES[kind]
    model = architecture.models(1)[0]
    states = [model.state_dict(), architecture.permuted(model, 3).state_dict()]
    for state in states:
        for name, x in state.items():
            if x.dim() > 1:
                x.add_(0.05 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(len(name))))
    expected = mf.match(states, architecture.spec, method="zip", balance=1.0)
    tiled = all_streamed(architecture.spec, states[0], 10**6)
    steps = tuple(type(s)(s.spaces, s.width, "tiled", s.piece, s.memory, s.flops, s.read) for s in tiled.steps)
    work = WorkPlan(steps, tiled.base, None, tiled.merge_memory, tiled.read, tiled.output)
    monkeypatch.setattr("mudsc_fast.matching.plan_work", lambda *a, **k: work)
    found = mf.match(states, architecture.spec, method="zip", balance=1.0, max_memory=GB)
    assert all(torch.equal(found.labels[name], expected.labels[name]) for name in expected.labels)
    assert all(abs(found.values[name] - expected.values[name]) < 1e-5 for name in expected.values)
    few = tuple(type(s)(s.spaces, s.width, "tiled", 320, s.memory, s.flops, s.read) for s in tiled.steps)
    work = WorkPlan(few, tiled.base, None, tiled.merge_memory, tiled.read, tiled.output)
    with pytest.raises(ValueError, match=r"space '.*' \(width .*\): zip_tiled: \d+ of \d+ merges are proven; the rest"):
        mf.match(states, architecture.spec, method="zip", balance=1.0, max_memory=GB)


def test_a_wide_zip_is_planned_on_lists() -> None:
    spec, layout = llama_like(1)
    work = plan_work(spec, layout, 2, method="zip", max_memory=6 * GB, base=GB // 2)
    assert work.peak <= 6 * GB
    assert work.step_of("mlp0").way == "tiled"
    with pytest.raises(ValueError, match=r"matching space 'mlp0'.*a zip holds"):
        plan_work(spec, layout, 2, method="zip", max_memory=6 * GB, base=GB // 2, balance=0.5)
