"""The whole reference pipeline against the recorded merges of two trained MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from golden_cases import (
    MLP_SPACES,
    Case,
    mlp_activation_correlation,
    mlp_batches,
    mlp_cases,
    mlp_state_dicts,
)
from torch import Tensor, nn

from mudsc_fast import reference as ref
from mudsc_fast.spec import PermutationSpec
from mudsc_fast.specs.mlp import mlp

# Recorded in float32, on weights of size 1; the match values are means of 48 float32 similarities.
TOLERANCE = {"tensors": 1e-5, "history": 1e-5, "correlation": 1e-4}

# Dead ReLU units tie at exactly 0 there (tests/data/goldens/README.md), so any order among them is right, and the
# sweeps that follow may differ.
TIED = ("align", "align_act")


def mlp_spec() -> PermutationSpec:
    return mlp([48, 48, 48])


class MLP(nn.Module):
    def __init__(self, state_dict: dict[str, Tensor]) -> None:
        super().__init__()
        for name in (*MLP_SPACES, "head"):
            out_width, in_width = state_dict[f"{name}.weight"].shape
            setattr(self, name, nn.Linear(in_width, out_width))
        self.load_state_dict(state_dict)

    def forward(self, x: Tensor) -> Tensor:
        for name in MLP_SPACES:
            x = torch.relu(getattr(self, name)(x))
        return self.head(x)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # Thousands of tiny operations: more threads only wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stats() -> Any:
    return ref.calibrate([MLP(s) for s in mlp_state_dicts()], mlp_batches(), mlp_spec())


def matched(stats: Any, inputs: dict[str, Any], **options: Any) -> ref.MergePlan:
    activations = stats if inputs["activations"] else None
    return ref.match(mlp_state_dicts(), mlp_spec(), activations, inputs["method"], inputs["balance"], seed=0, **options)


def test_activation_correlation(stats: Any) -> None:
    for space, expected in mlp_activation_correlation().items():
        found = stats[space].correlation()
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=TOLERANCE["correlation"])


STARTED = [pytest.param(c, id=c[0]) for c in mlp_cases() if c[2]["start"] is not None]
UNTIED = [pytest.param(c, id=c[0]) for c in mlp_cases() if c[0] not in TIED]


def alive(stats: Any, labels: dict[str, Tensor]) -> dict[str, set[tuple[int, int]]]:
    """The aligned pairs in which both units are alive."""
    pairs = {}
    for space, found in labels.items():
        variance = stats[space].variance
        order = torch.argsort(found[1])
        pairs[space] = {
            (i, int(j)) for i, j in enumerate(order) if float(variance[0, i]) > 0 and float(variance[1, j]) > 0
        }
    return pairs


@pytest.mark.parametrize("case", UNTIED)
def test_labels_history_and_tensors(stats: Any, case: Case) -> None:
    _, inputs, expected = case
    plan = matched(stats, inputs)
    for space in MLP_SPACES:
        assert torch.equal(plan.labels[space], expected["labels"][space]), space
    assert plan.history == pytest.approx(expected["history"], abs=TOLERANCE["history"])
    merged = plan.merge(mlp_state_dicts())
    assert set(merged) == set(expected["tensors"])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected["tensors"][name], rtol=0, atol=TOLERANCE["tensors"])


def test_activation_start(stats: Any) -> None:
    for name, inputs, expected in mlp_cases():
        if expected["start"] is None:
            continue
        start = matched(stats, {**inputs, "balance": 0.0})
        assert start.history == []
        if inputs["method"] == "zip":
            assert all(torch.equal(start.labels[space], expected["start"][space]) for space in MLP_SPACES), name
        else:
            assert alive(stats, start.labels) == alive(stats, expected["start"]), name


@pytest.mark.parametrize("case", STARTED)
def test_from_the_recorded_start_labels_are_exact(stats: Any, case: Case) -> None:
    _, inputs, expected = case
    start = ref.MergePlan(mlp_spec(), expected["start"], inputs["method"])
    plan = matched(stats, inputs, start=start)
    assert plan.history == pytest.approx(expected["history"], abs=TOLERANCE["history"])
    for space in MLP_SPACES:
        assert torch.equal(plan.labels[space], expected["labels"][space]), space
    for key, tensor in plan.merge(mlp_state_dicts()).items():
        torch.testing.assert_close(tensor, expected["tensors"][key], rtol=0, atol=TOLERANCE["tensors"])


def test_tied_cases_agree_on_units_that_live(stats: Any) -> None:
    by_name = {name: (inputs, expected) for name, inputs, expected in mlp_cases()}
    inputs, expected = by_name["align_act"]
    plan = matched(stats, inputs)
    assert plan.history == expected["history"] == []
    assert alive(stats, plan.labels) == alive(stats, expected["labels"])
    inputs, expected = by_name["align"]
    plan = matched(stats, inputs)
    assert max(plan.history) == pytest.approx(max(expected["history"]), abs=5e-3)
