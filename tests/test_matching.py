"""`match` against the reference's plain sweeps, planted permutations, recorded outputs and bad input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import MLP_SPACES, load, mlp_batches, mlp_cases, mlp_state_dicts
from networks import MLP
from pipeline_cases import ARCHITECTURES, without_taps
from torch import Tensor

import mudsc_fast as mf
from mudsc_fast import specs

# float32 similarities against float64 ones: values are means of entries that are right to 1e-6; merged tensors are sums
# of a few float32 weights. The recorded outputs carry the official 1e-5 in each axis's scale.
VALUE = 5e-6
TENSOR = 1e-5
RECORDED_L = 5e-5


def reference_stats(
    models: list[torch.nn.Module], batches: list[Tensor], spec: mf.PermutationSpec
) -> Mapping[str, Any]:
    return mf.reference.calibrate(models, batches, spec)


def assert_same_plan(got: mf.MergePlan, want: Any) -> None:
    for name, labels in want.labels.items():
        assert torch.equal(got.labels[name], labels), name
    assert got.values == pytest.approx(want.values, abs=VALUE)
    assert 0 <= len(got.history) <= len(want.history)
    assert got.history == pytest.approx(want.history[: len(got.history)], abs=VALUE)
    # Sweeps that were not run would have repeated the last one.
    assert all(value == pytest.approx(got.history[-1], abs=VALUE) for value in want.history[len(got.history) :])


@pytest.mark.parametrize("balance", [0, 0.5, 1])
@pytest.mark.parametrize("method", ["align", "zip"])
@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_match_and_merge_equal_the_reference(name: str, models: int, method: str, balance: float) -> None:
    case = ARCHITECTURES[name]
    nets, batches = case.models(models), case.batches()
    state_dicts = [net.state_dict() for net in nets]
    stats = mf.calibrate(nets, batches, case.spec) if balance < 1 else None
    plan = mf.match(state_dicts, case.spec, stats, method, balance=balance)
    exact = reference_stats(nets, batches, case.spec) if balance < 1 else None
    want = mf.reference.match(state_dicts, case.spec, exact, method, balance=balance)
    assert_same_plan(plan, want)
    merged, expected = plan.merge(state_dicts), want.merge(state_dicts)
    assert list(merged) == list(state_dicts[0])
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], atol=TENSOR, rtol=TENSOR)


@pytest.mark.parametrize("width", [7, 0.5, 1.5, {"fc1": 4, "fc2": 1.0}])
def test_widths(width: Any) -> None:
    case = ARCHITECTURES["mlp"]
    nets = case.models(2)
    state_dicts = [net.state_dict() for net in nets]
    plan = mf.match(state_dicts, case.spec, None, "zip", width=width, budget=0.8, attenuation=0.4)
    want = mf.reference.match(state_dicts, case.spec, None, "zip", width=width, budget=0.8, attenuation=0.4)
    assert_same_plan(plan, want)
    merged, expected = plan.merge(state_dicts), want.merge(state_dicts)
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], atol=TENSOR, rtol=TENSOR)
    assert merged["fc1.weight"].shape == (plan.widths["fc1"], 7)


def test_a_width_of_blocks() -> None:
    case = ARCHITECTURES["groupnorm"]
    nets = case.models(2)
    state_dicts = [net.state_dict() for net in nets]
    plan = mf.match(state_dicts, case.spec, None, "zip", width=0.6)
    # 2 units a block, a share of 0.6 of them is 1.
    assert set(plan.widths.values()) == {3}
    assert_same_plan(plan, mf.reference.match(state_dicts, case.spec, None, "zip", width=0.6))


# At balance 0 the query heads, which have no tap, stay where they are.
PLANTED = [(n, b) for n in ARCHITECTURES for b in (0, 0.5, 1) if b > 0 or n not in ("attention", "rope")]


@pytest.mark.parametrize(("name", "balance"), PLANTED)
@pytest.mark.parametrize("models", [2, 3])
def test_align_finds_a_hidden_permutation(name: str, models: int, balance: float) -> None:
    case = ARCHITECTURES[name]
    net = case.models(1)[0]
    nets, original = [net, *(case.permuted(net, seed) for seed in range(1, models))], net.state_dict()
    state_dicts = [n.state_dict() for n in nets]
    stats = mf.calibrate(nets, case.batches(), case.spec, "cross")
    plan = mf.match(state_dicts, case.spec, stats, "align", balance=balance)
    for m in range(1, models):
        aligned = plan.align(state_dicts[m], m)
        assert all(torch.equal(aligned[key], tensor) for key, tensor in original.items())
    merged = plan.merge(state_dicts, weights=[0.2, 0.5, 0.3][:models])
    assert all(torch.equal(merged[key], tensor) for key, tensor in original.items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zip_gives_a_model_and_its_permuted_copy_back(name: str) -> None:
    case = ARCHITECTURES[name]
    net = case.models(1)[0]
    nets = [net, case.permuted(net, 4)]
    state_dicts = [n.state_dict() for n in nets]
    stats = mf.calibrate(nets, case.batches(), case.spec)
    merged = mf.match(state_dicts, case.spec, stats, "zip").merge(state_dicts)
    assert all(torch.equal(merged[key], tensor) for key, tensor in state_dicts[0].items())


def test_a_tie_moves_its_blocks_together() -> None:
    case = ARCHITECTURES["attention"]
    nets = case.models(8)
    plan = mf.match([n.state_dict() for n in nets], case.spec, None, "align")
    moved = [labels.reshape(8, 2, -1)[:, :, 0] // (labels.shape[1] // 2) for labels in plan.labels.values()]
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], moved[2])
    assert len(moved[0].unique(dim=0)) == 2


def test_fixed_spaces_keep_their_units_in_place() -> None:
    case = ARCHITECTURES["rope"]
    nets = case.models(2)
    for method in ("align", "zip"):
        plan = mf.match([n.state_dict() for n in nets], case.spec, None, method)
        inner = plan.labels["qk"].reshape(2, 2, 3) % 3
        assert torch.equal(inner, torch.arange(3).expand(2, 2, 3))
        assert plan.widths["qk"] == 6


# Recorded outputs of the official code --------------------------------------------------------------------------


def golden_stats() -> mf.ActivationStats:
    models = []
    for state_dict in mlp_state_dicts():
        model = MLP()
        model.load_state_dict(state_dict)
        models.append(model)
    return mf.calibrate(models, mlp_batches(), specs.mlp((48, 48, 48)))


GOLDEN = {name: (inputs, expected) for name, inputs, expected in mlp_cases()}


@pytest.mark.parametrize("name", ["zip", "zip_act", "zip_w", "align_w"])
def test_recorded_networks(name: str, isa: str) -> None:
    inputs, expected = GOLDEN[name]
    state_dicts, stats = mlp_state_dicts(), golden_stats() if inputs["activations"] else None
    plan = mf.match(state_dicts, specs.mlp((48, 48, 48)), stats, inputs["method"], balance=inputs["balance"])
    for space in MLP_SPACES:
        assert torch.equal(plan.labels[space], expected["labels"][space]), space
    history = expected["history"] if inputs["balance"] else []
    assert plan.history == pytest.approx(history[: len(plan.history)], abs=RECORDED_L)
    assert all(value == pytest.approx(plan.history[-1], abs=RECORDED_L) for value in history[len(plan.history) :])
    for key, tensor in plan.merge(state_dicts).items():
        # The official +1e-5 in every column sum, on up to two axes.
        torch.testing.assert_close(tensor, expected["tensors"][key], atol=3e-5, rtol=3e-5)


def test_recorded_alignment_by_activations_up_to_dead_units() -> None:
    _, expected = GOLDEN["align_act"]
    stats = golden_stats()
    plan = mf.match(None, specs.mlp((48, 48, 48)), stats, "align", balance=0)
    for space in MLP_SPACES:
        similarity = stats[space].correlation()[:48, 48:].double()
        ours, theirs = plan.labels[space][1], expected["labels"][space][1]
        # Labels of model 1: unit i goes with unit labels[i] of model 0. Where both are 0, any order is an optimum.
        taken, recorded = similarity[ours, torch.arange(48)], similarity[theirs, torch.arange(48)]
        free = (taken == 0) & (recorded == 0)
        assert torch.equal(ours[~free], theirs[~free])
        assert float(taken.mean()) == pytest.approx(float(recorded.mean()), abs=1e-6)


def test_recorded_alignment_in_both_spaces_from_the_recorded_start() -> None:
    _, expected = GOLDEN["align"]
    spec, stats, state_dicts = specs.mlp((48, 48, 48)), golden_stats(), mlp_state_dicts()
    start = mf.MergePlan(spec, expected["start"], "align")
    plan = mf.match(state_dicts, spec, stats, "align", start=start)
    for space in MLP_SPACES:
        assert torch.equal(plan.labels[space], expected["labels"][space]), space
    assert plan.history == pytest.approx(expected["history"][: len(plan.history)], abs=RECORDED_L)
    free = mf.match(state_dicts, spec, stats, "align")
    assert max(free.history) == pytest.approx(max(expected["history"]), abs=5e-3)


def test_recorded_accuracy_of_the_zip() -> None:
    _, expected = GOLDEN["zip"]
    state_dicts, data = mlp_state_dicts(), load("vi_mlp")
    plan = mf.match(state_dicts, specs.mlp((48, 48, 48)), golden_stats(), "zip")
    model = MLP()
    model.load_state_dict(plan.merge(state_dicts))
    right = model(torch.from_numpy(data["test_x"])).argmax(1) == torch.from_numpy(data["test_y"])
    assert float(right.double().mean()) == pytest.approx(float(data["zip_acc"]), abs=2e-3)
    assert expected["history"]


# What is read, and how ------------------------------------------------------------------------------------------


class Lazy(Mapping[str, Tensor]):
    """Counts readings; membership tests would read, as in the Mapping default."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self.reads = dict(tensors), list[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.reads.append(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_lazy_mappings_are_read_when_needed_only() -> None:
    case = ARCHITECTURES["mlp"]
    nets = case.models(2)
    stats = mf.calibrate(nets, case.batches(), case.spec)
    lazy = [Lazy(net.state_dict()) for net in nets]
    mf.match(lazy, case.spec, stats, balance=0)
    assert not lazy[0].reads
    plan = mf.match(lazy, case.spec, stats)
    assert "head.bias" not in lazy[0].reads  # in no space
    lazy[1].reads.clear()
    stream = plan.merge_tensors(lazy)
    next(stream)
    assert set(lazy[1].reads) == {"fc1.weight"}


def test_bare_matches_need_no_weights_or_no_activations() -> None:
    case = ARCHITECTURES["mlp"]
    nets = case.models(2)
    state_dicts = [net.state_dict() for net in nets]
    stats = mf.calibrate(nets, case.batches(), case.spec)
    by_activations = [mf.match(given, case.spec, stats, balance=0).labels for given in (None, [], state_dicts)]
    started = mf.match(None, case.spec, stats, balance=0, start=mf.match(state_dicts, case.spec))
    assert all(torch.equal(started.labels[name], by_activations[0][name]) for name in started.labels)
    again = mf.match((sd for sd in state_dicts), case.spec, stats)
    assert again.history == mf.match(state_dicts, case.spec, stats).history
    for labels in by_activations[1:]:
        assert all(torch.equal(labels[name], by_activations[0][name]) for name in labels)
    raw = mf.match(state_dicts, case.spec, None, balance=1)
    assert len(raw.history) >= 1
    # Without activations the balance does not count; with them, balance 1 starts from their match.
    half = mf.match(state_dicts, case.spec, None, balance=0.5)
    assert raw.history == half.history
    want = mf.reference.match(state_dicts, case.spec, reference_stats(nets, case.batches(), case.spec), balance=1)
    assert_same_plan(mf.match(state_dicts, case.spec, stats, balance=1), want)


def test_spaces_without_taps_keep_their_order_at_balance_0() -> None:
    case = ARCHITECTURES["attention"]
    bare = without_taps(case.spec, ["v"])
    nets = case.models(2)
    stats = mf.calibrate(nets, case.batches(), bare)
    for method in ("align", "zip"):
        plan = mf.match(None, bare, stats, method, balance=0)
        want = mf.reference.match(None, bare, reference_stats(nets, case.batches(), bare), method, balance=0)
        assert_same_plan(plan, want)
        assert set(plan.values) == {"qk"}
        assert torch.equal(plan.labels["v"][0], torch.arange(6))
        merged = plan.merge([net.state_dict() for net in nets])  # tied spaces agree on their blocks
        assert set(merged) == set(nets[0].state_dict())
    with pytest.raises(ValueError, match=r"space 'v' has nothing to compare"):
        mf.match(None, bare, stats, "zip", balance=0, width={"v": 4})


def test_tensors_that_require_grad_and_strided_and_half_tensors() -> None:
    case = ARCHITECTURES["mlp"]
    nets = case.models(2)
    state_dicts = [net.state_dict() for net in nets]
    plain = mf.match(state_dicts, case.spec)
    grad = [dict(net.named_parameters()) for net in nets]
    strided = [{k: v.repeat_interleave(2, dim=-1)[..., ::2] for k, v in sd.items()} for sd in state_dicts]
    for given in (grad, strided):
        plan = mf.match(given, case.spec)
        assert plan.history == plain.history
        merged = plan.merge(given)
        assert not any(tensor.requires_grad for tensor in merged.values())
    rounded = [{k: v.bfloat16() for k, v in sd.items()} for sd in state_dicts]
    exact = [{k: v.double() for k, v in sd.items()} for sd in rounded]
    half, want = mf.match(rounded, case.spec), mf.reference.match(exact, case.spec)
    assert_same_plan(half, want)
    for key, tensor in half.merge(rounded).items():
        assert tensor.dtype == torch.bfloat16
        # Sums are taken in float32 and rounded once: one bf16 step of 2^-8 at most.
        torch.testing.assert_close(tensor.double(), want.merge(exact)[key], atol=1e-3, rtol=2**-8)


def test_max_sweeps_patience_and_start() -> None:
    case = ARCHITECTURES["mlp"]
    nets = case.models(2)
    state_dicts = [net.state_dict() for net in nets]
    full = mf.match(state_dicts, case.spec, None, "zip")
    short = mf.match(state_dicts, case.spec, None, "zip", max_sweeps=1)
    assert short.history == full.history[:1]
    again = mf.match(state_dicts, case.spec, None, "zip", start=full)
    want = mf.reference.match(state_dicts, case.spec, None, "zip", start=full)
    assert_same_plan(again, want)
    eager = mf.match(state_dicts, case.spec, None, "zip", patience=1)
    assert_same_plan(eager, mf.reference.match(state_dicts, case.spec, None, "zip", patience=1))
    none = mf.match(state_dicts, case.spec, None, "zip", max_sweeps=0)
    assert none.history == []
    assert torch.equal(none.labels["fc1"], torch.arange(10).repeat(2, 1))


def test_deterministic_for_a_seed(threads: int) -> None:
    case = ARCHITECTURES["resnet"]
    nets = case.models(2)
    state_dicts = [net.state_dict() for net in nets]
    stats = mf.calibrate(nets, case.batches(), case.spec)
    runs = [mf.match(state_dicts, case.spec, stats, seed=3) for _ in range(2)]
    assert runs[0].history == runs[1].history
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = mf.match(state_dicts, case.spec, mf.calibrate(nets, case.batches(), case.spec), seed=3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(single.labels[name], labels) for name, labels in runs[0].labels.items())


def test_progress_draws_only_where_asked(capfd) -> None:
    case = ARCHITECTURES["mlp"]
    state_dicts = [net.state_dict() for net in case.models(2)]
    mf.match(state_dicts, case.spec, progress=True)
    assert capfd.readouterr().err == ""
    mf.match(state_dicts, case.spec, progress="always")
    assert "sweep" in capfd.readouterr().err


# Bad input ------------------------------------------------------------------------------------------------------

CASE = ARCHITECTURES["mlp"]
NETS = CASE.models(3)
STATES = [{key: tensor.clone() for key, tensor in net.state_dict().items()} for net in NETS[:2]]
STATS = {}


def stats(scope: str = "full", models: int = 2) -> mf.ActivationStats:
    if (scope, models) not in STATS:
        STATS[scope, models] = mf.calibrate(NETS[:models], CASE.batches(), CASE.spec, scope)
    return STATS[scope, models]


def changed(model: int, name: str, tensor: object) -> list[dict[str, Any]]:
    return [{**sd, name: tensor} if m == model else sd for m, sd in enumerate(STATES)]


def poisoned(value: float) -> Tensor:
    weight = STATES[1]["fc2.weight"].clone()
    weight[3, 4] = value
    return weight


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no state dicts": ({"state_dicts": []}, ValueError, "state_dicts: expected two or more, got 0"),
    "none": ({"state_dicts": None}, ValueError, "state_dicts: expected two or more, got 0"),
    "one": ({"state_dicts": STATES[:1]}, ValueError, "state_dicts: expected two or more, got 1"),
    "one mapping": ({"state_dicts": STATES[0]}, TypeError, "state_dicts: expected a sequence of mappings"),
    "no mappings": ({"state_dicts": [1, 2]}, TypeError, "expected mappings of tensors, got int for model 0"),
    "missing tensor": (
        {"state_dicts": [STATES[0], {k: v for k, v in STATES[1].items() if k != "fc2.weight"}]},
        ValueError,
        "model 1 has no tensor 'fc2.weight'",
    ),
    "other architecture": (
        {"state_dicts": [STATES[0], ARCHITECTURES["resnet"].models(1)[0].state_dict()]},
        ValueError,
        "model 1 has no tensor 'fc1.bias'",
    ),
    "shapes that disagree": (
        {"state_dicts": changed(1, "fc2.weight", torch.zeros(9, 11))},
        ValueError,
        r"'fc2.weight' has shape \(9, 11\) in model 1, but \(9, 10\)",
    ),
    "shape unlike the spec": (
        {"state_dicts": [{**sd, "fc1.bias": torch.zeros(11)} for sd in STATES]},
        ValueError,
        "fc1.bias",
    ),
    "nan": ({"state_dicts": changed(1, "fc2.weight", poisoned(float("nan")))}, ValueError, "'fc2.weight' of model 1"),
    "inf": ({"state_dicts": changed(1, "fc2.weight", poisoned(float("inf")))}, ValueError, "'fc2.weight' of model 1"),
    "integers": (
        {"state_dicts": changed(0, "fc1.weight", torch.zeros(10, 7, dtype=torch.int64))},
        TypeError,
        "'fc1.weight' of model 0 must be floating to be merged, got torch.int64",
    ),
    "complex": (
        {"state_dicts": changed(0, "fc1.weight", torch.zeros(10, 7, dtype=torch.complex64))},
        TypeError,
        "'fc1.weight' of model 0 must be floating",
    ),
    "no tensor": ({"state_dicts": changed(0, "fc1.weight", [1.0])}, TypeError, "'fc1.weight' of model 0 is no tensor"),
    "unknown method": ({"method": "best"}, ValueError, "method: expected one of align, zip, select, got 'best'"),
    "balance above 1": ({"balance": 1.5}, ValueError, r"balance: expected a number in 0..1, got 1.5"),
    "balance below 0": ({"balance": -0.1}, ValueError, r"balance: expected a number in 0..1"),
    "balance nan": ({"balance": float("nan")}, ValueError, r"balance: expected a number in 0..1"),
    "balance text": ({"balance": "half"}, TypeError, r"balance: expected a number"),
    "balance 0 alone": ({"balance": 0, "activations": None}, ValueError, "activations: balance 0 compares"),
    "budget below 0": ({"budget": -1}, ValueError, "budget: expected a number >= 0"),
    "budget inf": ({"budget": float("inf")}, ValueError, "budget: expected a number >= 0"),
    "attenuation nan": ({"method": "zip", "attenuation": float("nan")}, ValueError, "attenuation: expected a finite"),
    "attenuation above 1": ({"method": "zip", "attenuation": 2}, ValueError, "attenuation: expected a finite"),
    "attenuation text": ({"method": "zip", "attenuation": "half"}, TypeError, "attenuation: expected a number"),
    "seed text": ({"seed": "1"}, TypeError, "seed: expected an integer, got '1'"),
    "seed of 71 bits": ({"seed": 1 << 70}, ValueError, "seed: expected an integer of 64 bits"),
    "max_sweeps": ({"max_sweeps": -1}, ValueError, "max_sweeps: expected an integer >= 0"),
    "patience": ({"patience": 0}, ValueError, "patience: expected an integer >= 1"),
    "progress": ({"progress": "maybe"}, ValueError, "progress: expected"),
    "no spaces": ({"spec": mf.PermutationSpec(())}, ValueError, "spec: expected at least one space"),
    "unknown tensors in the spec": ({"spec": specs.mlp((10, 9), ["a", "b", "c"])}, ValueError, "no tensor 'a.bias'"),
    "width of an alignment": ({"width": 5}, ValueError, "width: only zip and select change widths"),
    "width 0": ({"method": "zip", "width": 0}, ValueError, r"width: expected 1..20 for space 'fc1', got 0"),
    "width too large": ({"method": "zip", "width": 19}, ValueError, r"width: expected 1..18 for space 'fc2', got 19"),
    "width share": ({"method": "zip", "width": 2.5}, ValueError, r"width: expected a share in 0..2 for space 'fc1'"),
    "width text": ({"method": "zip", "width": "5"}, TypeError, "width: expected an int, a float share"),
    "width of no space": ({"method": "zip", "width": {"fc9": 5}}, ValueError, "width: the spec has no space 'fc9'"),
    "budget and width": (
        {"method": "zip", "width": 2, "budget": 0.1},
        ValueError,
        r"space 'fc\d' \(width 2, budget 0.1\)",
    ),
    "no spec": ({"spec": None}, TypeError, "spec: expected a PermutationSpec, got NoneType"),
    "activations of other items": (
        {"activations": {"fc1": 3}},
        TypeError,
        "activations: expected a Covariance, got int for space 'fc1'",
    ),
    "activations of other type": ({"activations": [1]}, TypeError, "activations: expected a mapping"),
    "cross for a zip": (
        {"method": "zip", "activations": stats("cross")},
        ValueError,
        "a zip needs statistics of scope 'full', space 'fc1' has 'cross'",
    ),
    "statistics of three models": ({"activations": stats(models=3)}, ValueError, "expected 2 models, got 3"),
    "statistics of no space": ({"activations": {"x": stats()["fc1"]}}, ValueError, "the spec has no space 'x'"),
    "statistics of other width": (
        {"activations": {"fc1": stats()["fc2"], "fc2": stats()["fc1"]}},
        ValueError,
        "space 'fc1' has width 10, its statistics have 9",
    ),
    "statistics that lack a space": (
        {"activations": {"fc1": stats()["fc1"]}},
        ValueError,
        "no statistics of space 'fc2'",
    ),
    "empty statistics": (
        {"activations": {s: mf.Covariance(w) for s, w in (("fc1", 10), ("fc2", 9))}},
        ValueError,
        "sample|update",
    ),
    "start of another kind": ({"start": 3}, TypeError, "start: expected a MergePlan, got int"),
    "start of other spec": (
        {"start": mf.MergePlan(specs.mlp((3,)), {"fc1": torch.arange(3).repeat(2, 1)}, "align")},
        ValueError,
        "start: its space 'fc1' is not that of the spec",
    ),
    "start of other method": (
        {
            "method": "zip",
            "start": mf.MergePlan(
                CASE.spec, {s: torch.arange(w).repeat(2, 1) for s, w in (("fc1", 10), ("fc2", 9))}, "align"
            ),
        },
        ValueError,
        "start: expected a plan of method 'zip' for 2 models, got 'align' for 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    change, error, message = BAD[name]
    arguments = {"state_dicts": STATES, "spec": CASE.spec, "activations": stats(), **change}
    with pytest.raises(error, match=message):
        mf.match(**arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    wanted = mf.match(STATES, CASE.spec, stats(), "zip", balance=0.5, width=8, attenuation=0.25, budget=0.75, seed=3)
    found = mf.match(
        STATES,
        CASE.spec,
        stats(),
        "zip",
        balance=np.float32(0.5),
        width=np.int64(8),
        attenuation=np.float32(0.25),
        budget=np.float32(0.75),
        seed=np.int64(3),
        max_sweeps=np.int32(100),
    )
    assert all(torch.equal(found.labels[name], wanted.labels[name]) for name in wanted.labels)
    assert mf.Covariance(np.int64(3), np.int64(2)).width == 3
    similarity = torch.eye(6) + 0.5
    plain = mf.zip_units(similarity, 2, 4)
    assert torch.equal(mf.zip_units(similarity, np.int64(2), np.int64(4), blocks=np.int64(1)).labels, plain.labels)
    assert (
        mf.regroup(torch.ones(2, 3), torch.zeros(3, dtype=torch.int64), np.int64(1), np.int64(1)).tolist()
        == [[3.0]] * 2
    )
    assert mf.assign_blocks(similarity, np.int64(2)).indices.tolist() == list(range(6))


def test_blocks_that_cannot_share_a_width() -> None:
    case = ARCHITECTURES["groupnorm"]
    state_dicts = [net.state_dict() for net in case.models(2)]
    with pytest.raises(ValueError, match=r"width: expected a multiple of 3 blocks for space '.*', got 4"):
        mf.match(state_dicts, case.spec, None, "zip", width=4)
    rope = ARCHITECTURES["rope"]
    state_dicts = [net.state_dict() for net in rope.models(2)]
    with pytest.raises(ValueError, match=r"space 'qk' is aligned \(within='fixed'\) and keeps 6"):
        mf.match(state_dicts, rope.spec, None, "zip", width={"qk": 4})
