"""Random assignment problems against scipy, tens of thousands of them: ties, extreme scales, infinities refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import mudsc_fast as mf
from mudsc_fast import _core

EXAMPLES, PROBLEMS = 60, 100  # an instruction set; four of them are 24,000
# Relative to n times the largest magnitude, as in assignment_cases: only the sum rounds.
OPTIMUM = 1e-12


@st.composite
def batches(draw: st.DrawFn) -> torch.Tensor:
    """(PROBLEMS, n, n), or a few that are too large for whole rows; ties, dead rows, rows and columns to scale."""
    large = draw(st.integers(0, 9)) == 0
    n = draw(st.integers(257, 264)) if large else draw(st.integers(1, 14))
    count = 2 if large else PROBLEMS
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([0, 1, 2, 3, 10]))  # 0: continuous
    problems = rng.standard_normal((count, n, n)) if levels == 0 else rng.integers(0, levels, (count, n, n)) * 1.0
    if draw(st.booleans()):
        problems *= rng.random((count, n, 1)) < 0.7
    if draw(st.booleans()):
        problems *= rng.random((count, 1, n)) < 0.7
    spread = draw(st.sampled_from([0, 2, 30]))  # decades between rows or columns
    axis = draw(st.sampled_from([(count, n, 1), (count, 1, n), (count, 1, 1)]))
    problems *= 10.0 ** rng.integers(-spread, spread + 1, axis)
    if spread < 30:
        problems *= 10.0 ** draw(st.integers(-28, 28))
    return torch.from_numpy(problems).to(draw(st.sampled_from([torch.float32, torch.float64])))


def test_random_batches_have_scipys_value(isa: str) -> None:
    seen = 0

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(batches())
    def solve(problems: torch.Tensor) -> None:
        nonlocal seen
        found = mf.assign(problems)
        alone = mf.assign(problems[0])
        assert torch.equal(alone.indices, found.indices[0])
        matrices, n = problems.double().numpy(), problems.shape[-1]
        indices, gaps = found.indices.numpy(), found.gap.numpy()
        assert np.array_equal(np.sort(indices, axis=1), np.broadcast_to(np.arange(n), indices.shape))
        for s, columns, gap in zip(matrices, indices, gaps, strict=True):
            taken = s[np.arange(n), columns].sum()
            best = s[linear_sum_assignment(s, maximize=True)].sum()
            size = n * np.abs(s).max()
            assert best - taken <= OPTIMUM * size
            assert best - taken <= gap + OPTIMUM * size
        seen += len(matrices)

    solve()
    assert seen >= EXAMPLES * PROBLEMS // 2


@pytest.mark.parametrize("n", [1, 5, 64, 300])
def test_one_infinity_anywhere_is_refused(n: int) -> None:
    rng = np.random.default_rng(n)
    for isa in _core.build_info()["isas_usable"]:
        _core.use_isa(isa)
        for _ in range(25):
            problem = torch.from_numpy(rng.standard_normal((n, n))).to((torch.float32, torch.float64)[rng.integers(2)])
            problem[int(rng.integers(n)), int(rng.integers(n))] = (np.inf, -np.inf, np.nan)[rng.integers(3)]
            with pytest.raises(ValueError, match="similarity: expected finite"):
                mf.assign(problem)
    _core.use_isa(None)
