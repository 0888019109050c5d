"""Elastic widths: what was promised is what is merged, identical models stay, and errors say what to do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from networks import MLP
from small_networks import small_batches, small_network
from torch import Tensor, nn

import mudsc_fast as mf
from mudsc_fast import elastic
from mudsc_fast.agreeing import outputs
from mudsc_fast.moments import joint_covariance

NAMES = ("mlp", "vgg", "resnet", "resnet, groups", "vit", "vit, not fused")


class Case:
    """Random models of one architecture with their spec, batches and statistics."""

    def __init__(self, name: str, same: bool = False) -> None:
        self.models = [small_network(name, seed) for seed in ((0, 0) if same else (0, 1))]
        self.batches: list[Any] = list(small_batches(name, 60))
        self.spec = mf.spec_for(self.models[0])
        self.states = [model.state_dict() for model in self.models]
        self.stats = mf.calibrate(self.models, self.batches, self.spec)
        self.size = sum(x.numel() for x in self.states[0].values())

    def widths(self, budget: float, method: str = "select", spaces: Any = None) -> dict[str, int]:
        return mf.elastic_widths(self.states, self.spec, self.stats, budget, method, spaces, progress=False)

    def merged(self, widths: dict[str, int], method: str = "select") -> dict[str, Tensor]:
        plan = mf.match(self.states, self.spec, self.stats, method, 0.0, widths, progress=False)
        assert plan.widths == widths
        return plan.merge(self.states)


@pytest.mark.parametrize("method", ["select", "zip"])
@pytest.mark.parametrize("name", NAMES)
def test_the_merged_network_holds_what_was_promised_and_runs(name: str, method: str) -> None:
    case = Case(name)
    able = mf.resizable_spaces(case.models[0], case.spec, case.batches[0])
    before = 0
    for budget in (0.6, 1.0, 1.7):
        widths = case.widths(budget, method, able)
        assert {n for n, w in widths.items() if w != case.spec[n].width} <= set(able)
        assert all(widths[s.name] % s.blocks == 0 for s in case.spec)
        merged = case.merged(widths, method)
        numbers = sum(x.numel() for x in merged.values())
        assert numbers == mf.merged_parameters(case.states[0], case.spec, widths) <= budget * case.size
        assert numbers > before
        before = numbers
        given = outputs(mf.installed(case.models[0], merged), case.batches)
        assert bool(torch.isfinite(given).all())


# Without zips of the two networks that have units without variance: these are not zipped with their copies, others are.
@pytest.mark.parametrize(
    ("name", "method"),
    [*((n, "select") for n in ("mlp", "resnet", "resnet, groups", "vit")), ("resnet, groups", "zip"), ("vit", "zip")],
)
def test_two_identical_models_keep_their_widths_and_function(name: str, method: str) -> None:
    case = Case(name, same=True)
    widths = case.widths(1.0, method)
    assert widths == {space.name: space.width for space in case.spec}
    assert case.widths(3.0, method) == widths, "more than enough is not spent"
    if name == "vit" and method == "select":
        return  # behind a layer norm one unit follows from the others, and its copy may be taken for it
    plan = mf.match(case.states, case.spec, case.stats, method, 0.0, widths, progress=False)
    readers = mf.calibrate_readers(case.models, case.batches, case.spec)
    net = mf.installed(case.models[0], mf.decode(plan, case.states, readers, ridge=1e-6))
    torch.testing.assert_close(outputs(net, case.batches), outputs(case.models[0], case.batches), atol=1e-4, rtol=1e-3)


def _unexplained(case: Case, widths: dict[str, int]) -> float:
    """The loss by its definition: least squares of what is read of all units on the chosen ones."""
    plan = mf.match(case.states, case.spec, case.stats, "select", 0.0, widths, progress=False)
    total = 0.0
    for space in case.spec:
        if space.name not in case.stats or space.tie is not None:
            continue
        covariance = joint_covariance(case.stats[space.name])[1]
        reads = torch.zeros(2, space.width, dtype=torch.float64)
        readers = [axis for axis in space.axes if axis.role == "in"]
        for axis in readers:
            for m, state in enumerate(case.states):
                w = state[axis.tensor].double().movedim(1, 0).reshape(space.width, -1)
                reads[m] += w.square().sum(1)
        weighted = covariance * torch.outer(reads.reshape(-1).sqrt(), reads.reshape(-1).sqrt())
        kept = plan.leaders[space.name]
        told = weighted[:, kept] @ torch.linalg.pinv(weighted[kept][:, kept], hermitian=True) @ weighted[kept]
        total += len(readers) * float((weighted - told).diagonal().sum() / weighted.diagonal().sum())
    return total


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_more_budget_loses_less_and_no_uniform_width_loses_as_little(name: str) -> None:
    case = Case(name)
    before = float("inf")
    for budget in (0.4, 0.7, 1.0, 1.5, 2.5):
        loss = _unexplained(case, case.widths(budget))
        assert loss < before
        before = loss
        share = max(
            s
            for s in torch.linspace(0.1, 2, 96).tolist()
            if mf.merged_parameters(case.states[0], case.spec, _uniform(case, s)) <= budget * case.size
        )
        assert loss <= _unexplained(case, _uniform(case, share)) + 1e-9


def _uniform(case: Case, share: float) -> dict[str, int]:
    return {space.name: max(1, int(space.width * share)) for space in case.spec}


def test_the_search_finds_the_best_widths_of_a_small_network() -> None:
    torch.manual_seed(0)
    models = [MLP(5, (4, 3), 2).eval() for _ in range(2)]
    spec = mf.spec_for(models[0])
    batches = [torch.randn(50, 5)]
    states = [model.state_dict() for model in models]
    stats = mf.calibrate(models, batches, spec)
    case = Case.__new__(Case)
    case.states, case.spec, case.stats = states, spec, stats
    size = sum(x.numel() for x in states[0].values())
    for budget in (0.5, 1.0, 1.4):
        fits = [
            widths
            for a in range(1, 9)
            for b in range(1, 7)
            if mf.merged_parameters(states[0], spec, widths := {"fc1": a, "fc2": b}) <= budget * size
        ]
        best = min(_unexplained(case, widths) for widths in fits)
        found = _unexplained(case, mf.elastic_widths(states, spec, stats, budget, progress=False))
        assert found <= best + 0.02


def test_a_curve_is_convex_and_lies_on_or_below_its_points() -> None:
    points = {0: 1.0, 2: 0.9, 4: 0.3, 6: 0.25, 8: 0.0}
    curve = elastic._Curve(points)
    values = [curve.hope(w) for w in range(9)]
    steps = [b - a for a, b in pairwise(values)]
    assert all(b >= a - 1e-12 for a, b in pairwise(steps))
    assert all(curve.hope(w) <= loss + 1e-12 == curve.at(w) + 1e-12 for w, loss in points.items())
    assert [curve.at(3), curve.hope(4), curve.at(8), curve.at(9)] == [pytest.approx(0.6), 0.3, 0.0, 0.0]
    assert (curve.after(2), curve.after(3), curve.after(8), curve.before(8), curve.before(0)) == (4, 4, 8, 6, 0)


def test_what_a_zip_does_not_tell_is_least_squares_on_its_means() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(500, 12, generator=generator, dtype=torch.float64)
        @ torch.randn(12, 12, generator=generator).double()
    )
    x = x - x.mean(0)
    reads = torch.rand(12, generator=generator, dtype=torch.float64) + 0.1
    labels = torch.arange(12) % 5
    means = torch.zeros(500, 5, dtype=torch.float64).index_add_(1, labels, x) / labels.bincount()
    covariance = x.T @ x / 500 * torch.outer(reads, reads)
    read = x * reads
    level = float(elastic._RIDGE * means.square().mean()) * 500
    fit = means @ torch.linalg.solve(means.T @ means + level * torch.eye(5).double(), means.T @ read)
    wanted = (read.square().sum() - (fit * read).sum()) / 500
    assert elastic._untold(covariance, labels, 5, reads) == pytest.approx(float(wanted), rel=1e-6)


def test_a_module_says_which_spaces_it_can_have_in_other_widths() -> None:
    def able(name: str) -> list[str]:
        case = Case(name)
        return mf.resizable_spaces(case.models[0], case.spec, case.batches[0])

    assert able("mlp") == ["fc1", "fc2"]
    assert able("vit") == ["residual", "blocks.0.mlp", "blocks.1.mlp"], "heads of one fused layer have one size"
    # The values of a head may be more; queries and keys enter the scale of attention.
    assert able("vit, not fused") == ["residual", "blocks.0.v", "blocks.0.mlp"]


class _Stubborn(nn.Module):
    """An MLP that knows the width of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP(30, (24, 20), 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.net.fc1(x).shape[-1] != 24:
            raise RuntimeError("expected 24 units")
        return self.net(x)


def test_a_module_that_does_not_run_in_another_width_is_left_alone() -> None:
    net = _Stubborn().eval()
    spec = mf.specs.mlp((24, 20), layers=["net.fc1", "net.fc2", "net.head"])
    assert mf.resizable_spaces(net, spec, torch.randn(3, 30)) == ["net.fc2"]
    with pytest.raises(TypeError, match="model: expected a torch module"):
        mf.resizable_spaces({}, spec, torch.randn(3, 30))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["select", "zip", "best"])
def test_one_call_merges_to_a_budget(method: str) -> None:
    case = Case("resnet")
    merged = mf.merge_models(case.models, case.batches, case.spec, method, width_budget=0.8, progress=False)
    numbers = sum(x.numel() for x in merged.values())
    assert 0.7 * case.size < numbers <= 0.8 * case.size
    assert bool(torch.isfinite(outputs(mf.installed(case.models[0], merged), case.batches)).all())


def test_the_least_budget_that_an_error_names_is_enough_and_there_is_no_largest() -> None:
    case = Case("mlp")
    with pytest.raises(ValueError, match="at least") as caught:
        case.widths(0.0)
    least = float(str(caught.value).split("at least ")[1].split(",")[0])
    assert case.widths(least) == {"fc1": 1, "fc2": 1}
    assert case.widths(1e308) == case.widths(4.0)


def test_errors_name_the_argument() -> None:
    case = Case("vit")
    for message, error, arguments in (
        ("budget: expected at least 0.", ValueError, {"budget": 0.001}),
        ("budget: expected a number", ValueError, {"budget": -1}),
        ("budget: expected a number", TypeError, {"budget": "1"}),
        ("method: expected one of select, zip", ValueError, {"method": "align"}),
        ("attenuation: expected a factor > 0", ValueError, {"method": "zip", "attenuation": 0.0}),
        ("spaces: the spec has no space 'nowhere'", ValueError, {"spaces": ["nowhere"]}),
        ("spaces: expected a collection of names", TypeError, {"spaces": "residual"}),
        ("activations: widths are chosen by activations", ValueError, {"activations": None}),
    ):
        with pytest.raises(error, match=message):
            mf.elastic_widths(case.states, case.spec, **{"activations": case.stats, "progress": False, **arguments})
    cross = mf.calibrate(case.models, case.batches, case.spec, "cross")
    with pytest.raises(ValueError, match="scope"):
        mf.elastic_widths(case.states, case.spec, cross)
    fixed = mf.PermutationSpec(
        (mf.Space("fixed", 4, (mf.Axis("w", 0, "out"),), (mf.Tap("w", "output", -1),), blocks=2, within="fixed"),)
    )
    stats = {"fixed": mf.Covariance(4)}
    stats["fixed"].update([torch.randn(9, 4)] * 2)
    with pytest.raises(ValueError, match="space 'fixed' has to keep its width"):
        mf.elastic_widths([{"w": torch.ones(4, 3)}] * 2, fixed, stats, spaces=["fixed"])
    with pytest.raises(ValueError, match="widths: the spec has no space 'nowhere'"):
        mf.merged_parameters(case.states[0], case.spec, {"nowhere": 4})
    with pytest.raises(ValueError, match="widths: expected units in 4 blocks"):
        mf.merged_parameters(case.states[0], case.spec, {"blocks.0.v": 6})
    with pytest.raises(TypeError, match="widths: expected a mapping"):
        mf.merged_parameters(case.states[0], case.spec, 6)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="spec: expected a PermutationSpec"):
        mf.merged_parameters(case.states[0], {}, {})  # type: ignore[arg-type]
    for options in ({"method": "align"}, {"width": 0.5}, {"batches": None}):
        with pytest.raises(ValueError, match="width_budget: expected batches"):
            mf.merge_models(**{"models": case.models, "batches": case.batches, "width_budget": 1.0, **options})
