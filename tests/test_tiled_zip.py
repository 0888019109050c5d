"""A zip on lists gives the zip of the whole matrix, or refuses; it never gives another one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mudsc_fast import zip_units
from mudsc_fast.tiled_zip import zip_tiled


class Matrix:
    """The rows of a matrix, and how many were asked for."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.width, self.made = matrix, len(matrix), 0

    def tile(self, rows: Tensor) -> Tensor:
        self.made += len(rows)
        return self.matrix[rows]


def alike(d: int, models: int, noise: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Correlations of units of which each model has noisy copies in another order."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(d, 60, generator=generator, dtype=torch.float64)
    rows = [
        base[torch.randperm(d, generator=generator)]
        + noise * torch.randn(d, 60, generator=generator, dtype=torch.float64)
        for _ in range(models)
    ]
    similarity = torch.corrcoef(torch.cat(rows))
    return ((similarity + similarity.T) / 2).to(dtype)


CASES = [
    {},
    {"attenuation": 0.7},
    {"attenuation": 1.0},
    {"attenuation": 0.0},
    {"budget": 0.0},
    {"budget": 0.3},
    {"width": 70},
    {"width": 60, "attenuation": 0.9},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_lists_give_the_zip_of_the_matrix(options: dict[str, float], models: int, dtype: torch.dtype) -> None:
    for seed in range(2):
        # All above 0, so that the lists are complete and every merge can be proven.
        similarity = (1 + alike(48, models, 0.5, seed, dtype)) / 2
        given = {**options, "width": options.get("width", 48) * models // 2}
        expected = zip_units(similarity, models, **given)
        source = Matrix(similarity)
        found, proof = zip_tiled(source, models, **given, tile_rows=7)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.sizes, expected.sizes)
        assert float(found.value) == pytest.approx(float(expected.value), rel=1e-12)
        assert source.made == similarity.shape[0]
        assert proof.threshold == 0.0
        assert proof.least > 0


def test_few_pairs_are_enough_where_units_have_matches() -> None:
    similarity = alike(96, 2, 0.2, 1)
    expected = zip_units(similarity, 2)
    found, proof = zip_tiled(Matrix(similarity), 2, max_pairs=300)
    assert torch.equal(found.labels, expected.labels)
    assert proof.pairs <= 300 < (similarity > 0).sum() // 2
    assert 0 < proof.threshold < proof.least


def test_equal_entries_are_taken_in_the_order_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        similarity = torch.randint(1, 5, (24, 24), generator=generator).float() / 8
        similarity = torch.maximum(similarity, similarity.T)
        for attenuation in (0.5, 1.0):
            expected = zip_units(similarity, 2, attenuation=attenuation, width=14)
            found, _ = zip_tiled(Matrix(similarity), 2, width=14, attenuation=attenuation, tile_rows=5)
            assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attenuation", [1e-50, 1e-42])
def test_a_third_unit_joins_by_an_attenuation_that_float32_does_not_have(
    attenuation: float, dtype: torch.dtype
) -> None:
    # 1e-50 is 0 in float32. Each unit is like one unit of every other model, and no more.
    similarity = (1 + alike(9, 3, 0.5, 2, dtype)) / 2
    unit = torch.arange(27) % 9
    similarity[unit[:, None] != unit] = 0
    expected = zip_units(similarity, 3, attenuation=attenuation)
    found, proof = zip_tiled(Matrix(similarity), 3, attenuation=attenuation)
    assert torch.equal(found.labels, expected.labels)
    assert found.sizes.tolist() == [3] * 9
    assert 0 < proof.least < 1e-30


def test_what_the_lists_cannot_prove_is_refused() -> None:
    similarity = alike(48, 2, 0.5, 0)
    with pytest.raises(ValueError, match=r"\d+ of 48 merges are proven; the rest is among pairs at most 0\.\d"):
        zip_tiled(Matrix(similarity), 2, max_pairs=20)
    with pytest.raises(ValueError, match="below 0 lists prove nothing"):
        zip_tiled(Matrix(similarity), 2, width=1)
    with pytest.raises(ValueError, match="no allowed pair above 0 is left"):
        zip_tiled(Matrix(torch.eye(8)), 2, budget=0.0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"models": 3}, "models: expected a divisor of 8 units"),
        ({"width": 0}, "width: expected 1..8"),
        ({"attenuation": 2.0}, "attenuation"),
        ({"budget": -1.0}, "budget"),
        ({"max_pairs": 0}, "max_pairs, tile_rows: expected at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        zip_tiled(Matrix(torch.eye(8)), **arguments)


def test_bad_tiles() -> None:
    with pytest.raises(ValueError, match="similarity: expected finite entries"):
        zip_tiled(Matrix(torch.full((4, 4), float("nan"))), 2)
    narrow = Matrix(torch.eye(4))
    narrow.matrix = narrow.matrix[:, :3]
    with pytest.raises(ValueError, match="source: expected a floating tile"):
        zip_tiled(narrow, 2)
