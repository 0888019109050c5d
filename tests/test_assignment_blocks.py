"""assign_blocks against the float64 reference and the recorded block matches."""

from __future__ import annotations

import golden_cases
import pytest
import torch
from torch import Tensor

import mudsc_fast as mf

# Values are means of float32 entries in float64; scores of block pairs likewise.
TOLERANCE = 1e-12


def random(n: int, seed: int, *batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(got: mf.Assignment, expected: mf.reference.Assignment) -> None:
    """Random entries: the optimum is unique, so labels agree exactly."""
    assert torch.equal(got.indices, expected.indices)
    assert got.block_indices is not None
    assert expected.block_indices is not None
    assert torch.equal(got.block_indices, expected.block_indices)
    assert torch.allclose(got.value, expected.value, rtol=0, atol=TOLERANCE)
    assert got.gap.shape == expected.gap.shape
    assert float(got.gap.abs().max()) <= TOLERANCE
    assert got.duals[0].shape == expected.duals[0].shape


@pytest.mark.parametrize("within", ["free", "fixed"])
@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (6, 1), (6, 6), (12, 3), (35, 5), (130, 2)])
def test_reference(isa: str, within: str, n: int, blocks: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        similarity = random(n, n + blocks).to(dtype)
        same(mf.assign_blocks(similarity, blocks, within), mf.reference.assign_blocks(similarity, blocks, within))
        same(mf.assign_blocks(similarity.T, blocks, within), mf.reference.assign_blocks(similarity.T, blocks, within))


@pytest.mark.parametrize("within", ["free", "fixed"])
def test_batches(isa: str, within: str) -> None:
    similarity = random(12, 3, 4)
    same(mf.assign_blocks(similarity, 3, within), mf.reference.assign_blocks(similarity, 3, within))
    result = mf.assign_blocks(random(12, 3, 2, 2), 3, within)
    assert result.indices.shape == (2, 2, 12)


def test_tied_spaces_share_one_block_match(isa: str) -> None:
    similarity = [random(12, 1), random(20, 2), random(8, 3)]
    kinds = ["fixed", "free", "free"]
    got = mf.assign_blocks(similarity, 4, kinds)
    expected = mf.reference.assign_blocks(similarity, 4, kinds)
    for g, e in zip(got, expected, strict=True):
        same(g, e)
        assert torch.equal(g.block_indices, got[0].block_indices)


def test_units_stay_inside_matched_blocks() -> None:
    result = mf.assign_blocks(random(40, 9), 8)
    assert result.block_indices is not None
    assert torch.equal(result.indices.view(8, 5) // 5, result.block_indices[:, None].expand(8, 5))


def test_a_hidden_block_permutation_is_found() -> None:
    base = torch.eye(24, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(6, generator=generator)
    inner = torch.stack([torch.randperm(4, generator=generator) for _ in range(6)])
    hidden = (order[:, None] * 4 + inner).reshape(-1)
    result = mf.assign_blocks(base[:, hidden.argsort()], 6)
    assert torch.equal(base[:, hidden.argsort()][torch.arange(24), result.indices], torch.ones(24).double())
    assert float(result.value) == 1


def test_empty() -> None:
    for within in ("free", "fixed"):
        result = mf.assign_blocks(torch.zeros(0, 0), 2, within)
        assert result.indices.shape == (0,)
        assert float(result.value) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_goldens(isa: str, dtype: torch.dtype) -> None:
    compared = 0
    for name, inputs, expected in golden_cases.assign_cases():
        similarity = inputs["similarity"].to(dtype)
        blocks = inputs["blocks"]
        found = mf.assign(similarity) if blocks == 1 else mf.assign_blocks(similarity, blocks)
        assert torch.equal(found.indices, expected["indices"]), name
        assert float(found.value.mean()) == pytest.approx(expected["value"], abs=2e-6), name
        compared += 1
    assert compared > 5
