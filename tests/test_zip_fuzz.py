"""20,000 small zips against the reference: ties, budgets, blocks, one to four models, infeasible widths."""

from __future__ import annotations

import random

import pytest
import torch

import mudsc_fast as mf

PROBLEMS, PARTS = 20_000, 4
# (models, blocks, units a block): up to 12 units, so that the reference takes well under a millisecond.
SHAPES = [(m, b, n) for m in (1, 2, 3, 4) for b in (1, 2, 3) for n in (1, 2, 3, 4, 5) if m * b * n <= 12]


@pytest.mark.parametrize("part", range(PARTS))
def test_small_problems_agree_with_the_reference(part: int) -> None:
    draw, generator = random.Random(part), torch.Generator().manual_seed(part)
    count = PROBLEMS // PARTS
    entries = torch.rand(count, 12, 12, generator=generator, dtype=torch.float64) * 2 - 1
    entries = (entries + entries.transpose(1, 2)) / 2
    tied = (entries[::2] * 3).round() / 3  # half of them: few values, so that the order of ties decides
    entries[::2] = tied
    feasible = 0
    for matrix in entries:
        models, blocks, n = draw.choice(SHAPES)
        total = models * blocks * n
        options = {
            "models": models,
            "width": blocks * draw.randint(1, max(1, models * n)),
            "attenuation": draw.choice((0.5, 0.5, 1.0, 0.25, 0.0)),
            "budget": draw.choice((1.0, 1.0, 0.0, 0.3, 0.5)),
            "blocks": blocks,
        }
        if blocks > 1:  # given: equal entries leave more than one best pairing, and any of them is right
            order = [list(range(blocks))] + [draw.sample(range(blocks), blocks) for _ in range(models - 1)]
            options["block_indices"] = torch.tensor(order)
        similarity = matrix[:total, :total]
        try:
            want = mf.reference.zip_units(similarity, **options)
        except ValueError:
            with pytest.raises(ValueError, match="budget"):
                mf.zip_units(similarity, **options)
            continue
        got = mf.zip_units(similarity, **options)
        assert torch.equal(got.labels, want.labels), (options, similarity)
        assert abs(float(got.value) - float(want.value)) < 1e-12, (options, similarity)
        feasible += 1
    assert feasible > count // 2
