"""Work that is left out changes nothing: labels, values and L are those of the plain sweeps (METHOD 'Free speed')."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pipeline_cases import ARCHITECTURES

import mudsc_fast as mf
from mudsc_fast import matching, network, rematch


class Count:
    """Counts how often the spaces are rematched, and how assignments start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.visits, self.scopes, self.warm = 0, set[str](), list[bool]()
        plain_rematch, plain_similarity = rematch.Matcher.rematch, rematch.dual_similarity
        plain_assign = rematch.assign

        def counted(matcher: rematch.Matcher, *arguments: Any, **options: Any) -> list[rematch.Match]:
            self.visits += 1
            return plain_rematch(matcher, *arguments, **options)

        def similarity(terms: Sequence[Any], activation: Any, balance: float, scope: str) -> torch.Tensor:
            self.scopes.add(scope)
            return plain_similarity(terms, activation, balance, scope)

        def assign(similarity: torch.Tensor, duals: Any = None) -> mf.Assignment:
            self.warm.append(duals is not None)
            return plain_assign(similarity, duals=duals)

        monkeypatch.setattr(rematch.Matcher, "rematch", counted)
        monkeypatch.setattr(rematch, "dual_similarity", similarity)
        monkeypatch.setattr(rematch, "assign", assign)


@contextmanager
def op_by_op() -> Iterator[pytest.MonkeyPatch]:
    """Every visit the plain way, one op after another, none as a single call (mudsc_fast.network)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "network_of", lambda *_: None)
        yield patch


def plain_match(state_dicts: Any, spec: mf.PermutationSpec, *arguments: Any, **options: Any) -> mf.MergePlan:
    """The same sweeps on the same ops, with nothing remembered, nothing stopped early and cold assignments."""

    class Forgetful(matching._Descent):
        def _visit(self, tie: Any) -> list[rematch.Match]:
            self.matcher.duals.clear()
            return self.matcher.rematch(tie, self.current)

        def _sweep(self, order: Any, steps: Any) -> bool:
            super()._sweep(order, steps)
            return True

    with op_by_op() as patch:
        patch.setattr(matching, "_Descent", Forgetful)
        return mf.match(state_dicts, spec, *arguments, **options)


@pytest.mark.parametrize(("models", "activations"), [(2, True), (3, False)])
@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_result_is_that_of_the_plain_sweeps(name: str, models: int, method: str, activations: bool) -> None:
    case, seed = ARCHITECTURES[name], models
    nets = case.models(models, seed)
    state_dicts = [net.state_dict() for net in nets]
    stats = mf.calibrate(nets, case.batches(), case.spec) if activations else None
    plain = plain_match(state_dicts, case.spec, stats, method, seed=seed)
    with op_by_op() as patch:
        count = Count(patch)
        quick = mf.match(state_dicts, case.spec, stats, method, seed=seed)
    for space, labels in plain.labels.items():
        assert torch.equal(quick.labels[space], labels), space
    # The same ops on the same labels: equal to the last bit.
    assert quick.values == plain.values
    assert quick.history == plain.history[: len(quick.history)]
    assert all(value == quick.history[-1] for value in plain.history[len(quick.history) :])
    everything = len(plain.history) * len(case.spec.spaces) + (len(case.spec.spaces) if activations else 0)
    assert count.visits < everything
    fixed = any(space.within == "fixed" for space in case.spec.spaces)
    assert count.scopes == ({"cross"} if method == "align" else {"cross", "full"} if fixed else {"full"})


@pytest.mark.parametrize("seed", range(6))
def test_a_tie_is_matched_again_when_a_neighbour_of_any_of_its_spaces_moved(seed: int) -> None:
    # The tie's first space has no neighbour, its second one has two; nothing alike in the models, so that matches move.
    generator = torch.Generator().manual_seed(seed)
    shapes = {"keys": (8, 3), "values": (8, 9), "back": (9, 8), "hidden": (9, 5), "next": (5, 9)}
    state_dicts = [{name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)]
    stream = (("values", 1, "in"), ("back", 0, "out"), ("hidden", 0, "out"), ("next", 1, "in"))
    spec = mf.PermutationSpec(
        (
            mf.Space("first", 8, (mf.Axis("keys", 0, "out"),), blocks=2, tie="heads"),
            mf.Space("second", 8, (mf.Axis("values", 0, "out"), mf.Axis("back", 1, "in")), blocks=2, tie="heads"),
            mf.Space("stream", 9, tuple(mf.Axis(n, d, r) for n, d, r in stream)),
            mf.Space("inner", 5, (mf.Axis("hidden", 1, "in"), mf.Axis("next", 0, "out"))),
        )
    )
    plain = plain_match(state_dicts, spec, seed=seed, max_sweeps=20, balance=1.0)
    quick = mf.match(state_dicts, spec, seed=seed, max_sweeps=20, balance=1.0)
    assert all(torch.equal(quick.labels[name], labels) for name, labels in plain.labels.items())
    assert quick.history == pytest.approx(plain.history[: len(quick.history)], rel=1e-12)


def test_a_settled_match_stops_at_once() -> None:
    case = ARCHITECTURES["mlp"]
    net = case.models(1)[0]
    state_dicts = [net.state_dict(), case.permuted(net, 3).state_dict()]
    stats = mf.calibrate([net, case.permuted(net, 3)], case.batches(), case.spec)
    plain = plain_match(state_dicts, case.spec, stats)
    quick = mf.match(state_dicts, case.spec, stats)
    # The activation start is already right: one sweep sees that nothing changes, the plain rule runs all its patience.
    assert len(quick.history) == 1
    assert len(plain.history) == 6
    assert plain.history == quick.history * 6


def test_duals_of_the_last_visit_start_the_next() -> None:
    case = ARCHITECTURES["mlp"]
    nets = case.models(2)
    with op_by_op() as patch:
        count = Count(patch)
        plan = mf.match([net.state_dict() for net in nets], case.spec, None, "align")
    assert len(plan.history) > 1
    assert count.warm[:2] == [False, False]
    assert all(count.warm[2:])
    assert len(count.warm) > 2


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> list[network.Network]:
    """The networks of the matches of a test: their visits are calls of the kernels' code."""
    made: list[network.Network] = []

    def noted(*arguments: Any) -> network.Network | None:
        found = network.network_of(*arguments)
        made.extend([found] if found is not None else [])
        return found

    monkeypatch.setattr(matching, "network_of", noted)
    return made


def test_independent_spaces_are_visited_once(networks: list[network.Network]) -> None:
    # Two layers that share no tensor: no visit can change another's similarity.
    spec = mf.PermutationSpec(
        tuple(mf.Space(name, 6, (mf.Axis(f"{name}.weight", 0, "out"),)) for name in ("a", "b", "c"))
    )
    torch.manual_seed(0)
    state_dicts = [{f"{name}.weight": torch.randn(6, 9) for name in "abc"} for _ in range(2)]
    for method in ("align", "zip"):
        with op_by_op() as patch:
            count = Count(patch)
            plain = mf.match(state_dicts, spec, None, method)
        assert count.visits == 3
        quick = mf.match(state_dicts, spec, None, method)
        assert networks[-1]._core.matched()[0] == 3
        for plan in (plain, quick):
            assert len(plan.history) == 2
            assert plan.history[0] == plan.history[1]


def test_as_much_is_remembered_in_calls_of_sweeps(networks: list[network.Network]) -> None:
    for name in ("mlp", "resnet", "vit"):
        case = ARCHITECTURES[name]
        state_dicts = [net.state_dict() for net in case.models(2)]
        for method in ("align", "zip"):
            with op_by_op() as patch:
                count = Count(patch)
                plain = mf.match(state_dicts, case.spec, None, method)
            quick = mf.match(state_dicts, case.spec, None, method)
            assert len(quick.history) == len(plain.history) > 1
            assert networks[-1]._core.matched()[0] == count.visits


def test_what_is_remembered_stays_bounded(networks: list[network.Network]) -> None:
    case = ARCHITECTURES["resnet"]
    state_dicts = [net.state_dict() for net in case.models(2)]
    seen: list[matching._Descent] = []

    class Watched(matching._Descent):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            seen.append(self)

    with op_by_op() as patch:
        patch.setattr(matching, "_Descent", Watched)
        mf.match(state_dicts, case.spec, None, "zip")
    plan = mf.match(state_dicts, case.spec, None, "zip")
    assert len(plan.history) > matching._REMEMBERED
    assert networks[-1]._core.matched()[1] <= matching._REMEMBERED
    kept = [len(states) for states in seen[0]._remembered.values()]
    assert max(kept) <= matching._REMEMBERED
