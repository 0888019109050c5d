"""The float64 reference of every op against the recorded outputs of the official code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import Case, assign_cases, covariance_cases, regroup_cases, weight_cases, zip_cases

from mudsc_fast import reference as ref

# Recorded in float32; `correlation` is float64 from float32 inputs.
TOLERANCE = {
    "correlation": 1e-9,
    "weights": 1e-6,
    "value": 1e-6,
    # the official scale is N / (members + 1e-5), on values of size 4
    "regroup": 1e-4,
}


def cases(found: Any) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c[0]) for c in found])


def test_every_case_is_found() -> None:
    counts = [len(list(f())) for f in (covariance_cases, weight_cases, regroup_cases, zip_cases, assign_cases)]
    assert counts == [5, 2, 5, 34, 9]


@cases(covariance_cases())
def test_covariance(case: Case) -> None:
    _, inputs, expected = case
    covariance = ref.Covariance(inputs["width"], 2)
    for batch in inputs["batches"]:
        covariance.update(batch, dim=inputs["dim"])
    torch.testing.assert_close(covariance.correlation(), expected["correlation"], rtol=0, atol=TOLERANCE["correlation"])


@cases(weight_cases())
def test_weight_similarity(case: Case) -> None:
    _, inputs, expected = case
    found = ref.weight_similarity([inputs["matrices"]], scope="full")
    torch.testing.assert_close(found.float(), expected["similarity"], rtol=0, atol=TOLERANCE["weights"])


@cases(regroup_cases())
def test_regroup(case: Case) -> None:
    _, inputs, expected = case
    torch.testing.assert_close(ref.regroup(**inputs).float(), expected["tensor"], rtol=1e-5, atol=TOLERANCE["regroup"])


@cases(zip_cases())
def test_zip(case: Case) -> None:
    _, inputs, expected = case
    if expected["labels"] is None:
        with pytest.raises(ValueError, match="no feasible pair"):
            ref.zip_units(**inputs)
        return
    found = ref.zip_units(**inputs)
    assert torch.equal(found.labels, expected["labels"])
    assert float(found.value) == pytest.approx(expected["value"], abs=TOLERANCE["value"])
    assert torch.equal(found.sizes, torch.bincount(found.labels.flatten()))


@cases(assign_cases())
def test_assign(case: Case) -> None:
    _, inputs, expected = case
    if inputs["blocks"] == 1:
        found = ref.assign(inputs["similarity"])
    else:
        found = ref.assign_blocks(inputs["similarity"], inputs["blocks"])
    assert torch.equal(found.indices, expected["indices"])
    assert float(found.value.mean()) == pytest.approx(expected["value"], abs=TOLERANCE["value"])
    assert float(found.gap.abs().max()) <= 1e-12
