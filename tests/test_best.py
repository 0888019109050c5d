"""Choosing a balance, merging by the best recipe, and merging in part."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import MLP, ResNet, ViT, randomise_norms
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast.agreeing import outputs


def _models(count: int, seed: int = 0) -> list[nn.Module]:
    made = []
    for k in range(count):
        torch.manual_seed(seed + k)
        made.append(MLP(12, (16, 14), 8).eval())
    return made


def _batches(count: int = 4, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(60, 12, generator=generator) for _ in range(count)]


def _stats(models: list[nn.Module]) -> tuple[mf.PermutationSpec, mf.ActivationStats, list[dict[str, Tensor]]]:
    spec = mf.spec_for(models[0])
    return spec, mf.calibrate(models, _batches(), spec), [m.state_dict() for m in models]


@pytest.mark.parametrize("method", ["zip", "align"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_search_keeps_the_best_balance(count: int, method: str) -> None:
    spec, stats, states = _stats(_models(count))
    seen: list[dict[str, Tensor]] = []
    wanted = {0.0: 1.0, 0.3: 4.0, 0.6: 3.0}
    values = iter([{"a": v, "b": v + 2} for v in wanted.values()])

    def evaluate(merged: dict[str, Tensor]) -> dict[str, float]:
        seen.append(merged)
        return next(values)

    found = mf.search_balance(states, spec, stats, evaluate, [0.6, 0.0, 0.3], method=method, progress=False)
    assert (found.balance, found.score) == (0.3, 5.0)
    assert found.scores == {b: v + 1 for b, v in wanted.items()}
    assert found.plan.method == method
    assert found.plan.models == count
    for name, tensor in found.plan.merge(states).items():
        torch.testing.assert_close(tensor, seen[1][name])
    # The first match is the one by activations alone.
    first = mf.match(states, spec, stats, method, balance=0.0, progress=False).merge(states)
    torch.testing.assert_close(seen[0]["fc1.weight"], first["fc1.weight"])
    assert found.matching > 0


def test_objectives() -> None:
    spec, stats, states = _stats(_models(2))
    values = [[1.0, 9.0], [4.0, 5.0]]

    def run(objective: Any) -> float:
        left = iter(values)
        return mf.search_balance(
            states, spec, stats, lambda merged: next(left), [0.0, 1.0], objective, progress=False
        ).balance

    assert run("mean") == 0.0
    assert run("min") == 1.0
    assert run(lambda scores: scores[1] - scores[0]) == 0.0


def test_scores_that_are_not_numbers() -> None:
    spec, stats, states = _stats(_models(2))

    def search(evaluate: Any, **options: Any) -> mf.BalanceSearch:
        return mf.search_balance(states, spec, stats, evaluate, [0.0, 1.0], progress=False, **options)

    values = iter([math.nan, 2.0])
    found = search(lambda merged: next(values))
    assert found.balance == 1.0
    assert math.isnan(found.scores[0.0])
    with pytest.raises(ValueError, match="NaN at every balance"):
        search(lambda merged: math.nan)
    with pytest.raises(ValueError, match="failed at balance 0: ZeroDivisionError"):
        search(lambda merged: 1 / 0)
    with pytest.raises(TypeError, match="expected a number"):
        search(lambda merged: "good")
    with pytest.raises(TypeError, match="evaluate: expected a function"):
        search(3)
    with pytest.raises(ValueError, match="objective"):
        search(lambda merged: 1.0, objective="median")
    with pytest.raises(ValueError, match="balances: expected at least one"):
        mf.search_balance(states, spec, stats, lambda merged: 1.0, [], progress=False)
    with pytest.raises(ValueError, match="balances"):
        mf.search_balance(states, spec, stats, lambda merged: 1.0, [1.5], progress=False)
    with pytest.raises(ValueError, match="balance 0"):
        mf.search_balance(states, spec, None, lambda merged: 1.0, [0.0], progress=False)


def test_agreement_is_full_with_oneself_and_less_with_others() -> None:
    models, batches = _models(2), _batches()
    heads = [torch.randn(4, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    for known in (None, heads):
        judge = mf.agreement(models, batches, known)
        with_first = judge(models[0].state_dict())
        assert with_first[0] == pytest.approx(1.0, abs=1e-5)
        assert with_first[1] < 0.9
        assert judge(models[1])[1] == pytest.approx(1.0, abs=1e-5)
    for bad, words in (
        (heads[:1], "one .* for each of 2"),
        ([heads[0], None], "model 1, got NoneType"),
        ([heads[0], torch.ones(4, 7)], "model 1 gives 8 features"),
        ([torch.full((4, 8), torch.nan), heads[1]], "NaN or inf in the matrix of model 0"),
    ):
        with pytest.raises(ValueError, match=words):
            mf.agreement(models, batches, bad)
    with pytest.raises(ValueError, match="at least one batch"):
        mf.agreement(models, [])


def _error(models: list[nn.Module], state: dict[str, Tensor], batches: list[Tensor]) -> float:
    wanted = torch.stack([outputs(m, batches) for m in models]).mean(0)
    return float((outputs(mf.installed(models[0], state), batches) - wanted).square().mean())


@pytest.mark.parametrize("count", [2, 3, 5])
def test_best_comes_nearer_to_the_parents_than_a_zip(count: int) -> None:
    models, batches = _models(count), _batches()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    best = mf.merge_models(models, batches, method="best", progress=False)
    plain = mf.merge_models(models, batches, method="zip", progress=False)
    fresh = _batches(2, seed=11)
    assert {k: v.shape for k, v in best.items()} == {k: v.shape for k, v in before[0].items()}
    assert _error(models, best, fresh) < 0.7 * _error(models, plain, fresh)
    for model, old in zip(models, before, strict=True):
        assert not model.training
        assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["align", "zip", "select"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_equal_models_merge_to_themselves(count: int, method: str) -> None:
    models = _models(1) * count
    # Attenuation would keep a third copy of a unit from joining the first two.
    options = {"attenuation": 1.0} if method == "zip" else {}
    merged = mf.merge_models(models, _batches(), method=method, progress=False, **options)
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=1e-6)


def test_best_uses_the_heads() -> None:
    models, batches = _models(2), _batches()
    heads = [torch.randn(3, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    judge = mf.agreement(models, _batches(3, seed=8), heads)
    known = judge(mf.merge_models(models, batches, method="best", heads=heads, progress=False))
    unknown = judge(mf.merge_models(models, batches, method="best", progress=False))
    assert sum(known) > sum(unknown)
    found = mf.merge_best(models, batches, mf.spec_for(models[0]), heads, candidates=["select"], progress=False)
    assert found.balance is None
    assert list(found.agreement) == ["select"]


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"batches": None}, ValueError, "batches"),
        ({"batches": []}, ValueError, "batches"),
        ({"weights": [1.0, 2.0]}, ValueError, "weights"),
        ({"batches": [torch.empty(0, 12)]}, ValueError, "empty batch"),
        ({"batches": [torch.full((6, 12), torch.nan)]}, ValueError, "NaN"),
        ({"heads": [torch.ones(2, 8)]}, ValueError, "heads"),
        ({"heads": [torch.ones(2, 8), None]}, ValueError, "model 1, got NoneType"),
        ({"heads": [torch.ones(2, 7)] * 2}, (ValueError, RuntimeError), "heads|shapes"),
        ({"candidates": ["align"]}, ValueError, "candidates"),
        ({"candidates": []}, ValueError, "candidates"),
        ({"judged_on": 0}, ValueError, "judged_on"),
    ],
)
def test_bad_input_of_best(options: dict[str, Any], kind: Any, words: str) -> None:
    arguments = {"batches": _batches(), **options}
    with pytest.raises(kind, match=words):
        mf.merge_models(_models(2), method="best", progress=False, **arguments)


# ---- partial merges ----


class _Tasked(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.encoder = MLP(12, (16, 14), 10)
        self.head = nn.Linear(10, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.encoder(x)))


def _tasked() -> tuple[list[nn.Module], mf.PermutationSpec]:
    models: list[nn.Module] = []
    for k, size in enumerate((5, 3, 7)):
        torch.manual_seed(k)
        models.append(_Tasked(size).eval())
    return models, mf.PermutationSpec.trace(models[0], (torch.randn(4, 12),))


def test_models_with_heads_of_their_own(tmp_path: Path) -> None:
    models, spec = _tasked()
    states = [m.state_dict() for m in models]
    shared = mf.shared_spec(spec, states)
    assert [s.name for s in shared.spaces] == [s.name for s in spec.spaces]
    assert not any(axis.tensor == "head.weight" for s in shared.spaces for axis in s.axes)
    stats = mf.calibrate(models, _batches(), shared)
    encoders = [{k: v for k, v in s.items() if not k.startswith("head")} for s in states]
    plan = mf.match(encoders, shared, stats, "zip", progress=False)
    net = mf.merge_partially(models, plan, spec)
    x = _batches(1)[0]
    found = net(x)
    assert [y.shape[1] for y in found] == [5, 3, 7]
    assert len([n for n in net.state_dict() if n.startswith("trunk.encoder")]) == 6
    # By hand: the merged encoder, then each head on the merged features.
    merged = plan.merge(encoders)
    encoder = mf.installed(models[0].encoder, {k.removeprefix("encoder."): v for k, v in merged.items()})
    features = torch.relu(encoder(x))
    last = shared.spaces[-1].name
    for m, (model, y) in enumerate(zip(models, found, strict=True)):
        own = features[:, plan.labels[last][m]]
        torch.testing.assert_close(y, model.head(own), atol=1e-5, rtol=1e-5)
    torch.save(net, tmp_path / "net.pt")
    again = torch.load(tmp_path / "net.pt", weights_only=False)
    again.load_state_dict(net.state_dict())
    for a, b in zip(again(x), found, strict=True):
        torch.testing.assert_close(a, b)


NETWORKS = {
    "mlp": lambda: MLP(12, (16, 14), 8),
    "resnet": lambda: ResNet((1, 1), 4, channels=1, num_outputs=5),
    "vit": lambda: ViT(8, 4, 1, width=8, depth=1, num_heads=2, num_outputs=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_partial_merges_of_equal_models_give_every_model_back(name: str) -> None:
    torch.manual_seed(0)
    model = randomise_norms(NETWORKS[name]()).eval()
    x = torch.randn(6, 12) if name == "mlp" else torch.randn(6, 1, 8, 8)
    spec = mf.spec_for(model)
    plan = mf.match([model.state_dict()] * 2, spec, mf.calibrate([model] * 2, [x], spec), "zip", progress=False)
    tried = 0
    for k in range(len(spec) + 1):
        try:
            net = mf.merge_partially([model, model], plan, spaces=k)
        except ValueError as error:
            assert "can be merged for k in" in str(error)  # noqa: PT017 - some cuts go through a stream
            continue
        tried += 1
        for y in net(x):
            torch.testing.assert_close(y, model(x), atol=1e-5, rtol=1e-5)
        shared = sum(p.numel() for n, p in net.named_parameters() if n.startswith("trunk"))
        assert (shared > 0) == (k > 0)
    assert tried >= 2


def test_bad_partial_merges() -> None:
    models, spec = _tasked()
    shared = mf.shared_spec(spec, [m.state_dict() for m in models])
    plan = mf.match(None, shared, mf.calibrate(models, _batches(), shared), "zip", balance=0.0, progress=False)
    headless = nn.Sequential(models[2].encoder)
    with pytest.raises(ValueError, match=r"model 2 .* has no such module"):
        mf.calibrate([*models[:2], headless], _batches(), shared)
    with pytest.raises(ValueError, match="models: expected 3"):
        mf.merge_partially(models[:2], plan, spec)
    with pytest.raises(ValueError, match=r"spaces: expected 0\.\.3"):
        mf.merge_partially(models, plan, spec, 4)
    with pytest.raises(ValueError, match="no space 'x'"):
        mf.merge_partially(models, plan, spec, ["x"])
    with pytest.raises(ValueError, match="nothing that all models have"):
        mf.shared_spec(spec, [models[0].state_dict(), {}])
