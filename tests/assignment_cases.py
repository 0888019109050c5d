"""Kinds of assignment problems, and the check that every solved one has to pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import mudsc_fast as mf

# Relative to n times the largest magnitude: prices are float64 whatever the matrix holds, so only the sum rounds.
OPTIMUM = 1e-12
# u_i + v_j - s_ij, relative to the largest magnitude among s and v: two float64 roundings.
FEASIBLE = 1e-15


def check(similarity: Tensor, result: mf.Assignment, optimal: bool = True) -> None:
    """One (n, n) problem: a permutation, the value it claims, feasible duals, a gap that proves it, scipy's optimum."""
    s = similarity.double().numpy()
    n = len(s)
    indices = result.indices.numpy()
    assert result.indices.dtype == torch.int64
    assert np.array_equal(np.sort(indices), np.arange(n))
    assert result.value.dtype == result.gap.dtype == torch.float64
    assert result.value.shape == result.gap.shape == ()
    size = np.abs(s).max(initial=0)
    taken = s[np.arange(n), indices]
    if n == 0:
        assert float(result.value) == float(result.gap) == 0
        return
    assert float(result.value) == pytest.approx(taken.mean(), rel=1e-12, abs=OPTIMUM * size)
    u, v = (d.numpy() for d in result.duals)
    largest = max(size, np.abs(v).max())
    assert (u[:, None] + v[None, :] - s).min() >= -4 * FEASIBLE * largest
    gap = float(np.sum(u + v[indices] - taken))
    assert float(result.gap) == pytest.approx(gap, abs=OPTIMUM * n * largest)
    assert gap <= OPTIMUM * n * largest
    if optimal:
        rows, columns = linear_sum_assignment(s, maximize=True)
        assert s[rows, columns].sum() - taken.sum() <= OPTIMUM * n * size


Maker = Callable[[np.random.Generator, int], np.ndarray]
KINDS: dict[str, Maker] = {
    "uniform": lambda r, n: r.random((n, n)),
    "normal": lambda r, n: r.standard_normal((n, n)),
    "few values": lambda r, n: r.integers(0, 4, (n, n)).astype(float),
    "constant": lambda r, n: np.full((n, n), float(r.standard_normal())),
    "zero": lambda r, n: np.zeros((n, n)),
    "product": lambda r, n: np.outer(np.arange(n), np.arange(n)).astype(float),
    "minus product": lambda r, n: -np.outer(np.arange(n), np.arange(n)[::-1]).astype(float),
    "low rank": lambda r, n: r.standard_normal((n, 2)) @ r.standard_normal((2, n)),
    "dead rows": lambda r, n: r.random((n, n)) * (r.random(n) < 0.6)[:, None],
    "dead rows and columns": lambda r, n: r.random((n, n)) * np.outer(r.random(n) < 0.6, r.random(n) < 0.6),
    "columns of their own": lambda r, n: r.random((n, n)) + 10 * r.random(n),
    "columns to scale": lambda r, n: r.random((n, n)) * np.exp(2 * r.standard_normal(n)),
    "sparse": lambda r, n: (r.random((n, n)) < 3 / max(n, 1)).astype(float),
    "line": lambda r, n: -np.abs(r.random(n)[:, None] - r.random(n)),
    "equal rows": lambda r, n: np.tile(r.random(n), (n, 1)),
    "scaled": lambda r, n: r.standard_normal((n, n)) * 10.0 ** r.integers(-30, 31),
    "scaled rows": lambda r, n: r.standard_normal((n, n)) * 10.0 ** r.integers(-30, 31, (n, 1)),
    "offset": lambda r, n: 1000 + 1e-3 * r.random((n, n)),
    "one large": lambda r, n: np.where(np.eye(n) > 0, 1e20, r.random((n, n))),
    "permutation": lambda r, n: np.eye(n)[r.permutation(n)],
    "wars": lambda r, n: 100.0 * (np.arange(n) < n // 2) + 1e-6 * r.random((n, n)),
}


def make(kind: str, n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(KINDS[kind](np.random.default_rng(seed), n)).to(dtype)
