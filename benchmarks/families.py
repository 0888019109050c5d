"""Families of square similarity matrices on which assignment solvers behave differently."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _features(samples: int, n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(samples, n, generator=generator)


def _correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(0)
    y = y - y.mean(0)
    x = x / x.norm(dim=0).clamp_min(1e-30)
    y = y / y.norm(dim=0).clamp_min(1e-30)
    return x.T @ y


def uniform(n: int, generator: torch.Generator) -> torch.Tensor:
    """Independent uniform entries: the classic test of assignment codes."""
    return torch.rand(n, n, generator=generator)


def unrelated(n: int, generator: torch.Generator) -> torch.Tensor:
    """Correlation of independent features: what two unrelated networks give."""
    samples = min(2048, 4 * n)
    return _correlation(_features(samples, n, generator), _features(samples, n, generator))


def related(n: int, generator: torch.Generator) -> torch.Tensor:
    """Correlation of features with noisy, permuted copies of themselves."""
    x = _features(min(2048, 4 * n), n, generator)
    y = x[:, torch.randperm(n, generator=generator)]
    return _correlation(x, y + torch.randn(y.shape, generator=generator))


def low_rank(n: int, generator: torch.Generator) -> torch.Tensor:
    """Correlation of features that span 32 dimensions: rows compete for the same columns."""
    samples = min(2048, 4 * n)
    base = torch.randn(samples, 32, generator=generator)
    x = base @ torch.randn(32, n, generator=generator)
    y = base @ torch.randn(32, n, generator=generator)
    return _correlation(x, y)


def planted(n: int, generator: torch.Generator) -> torch.Tensor:
    """A permutation under Gaussian noise, close to the point where it can no longer be recovered."""
    s = torch.randn(n, n, generator=generator)
    s[torch.arange(n), torch.randperm(n, generator=generator)] += 3.5
    return s


def equal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Integers from 0 to 9: nearly every choice is a tie."""
    return torch.randint(0, 10, (n, n), generator=generator).float()


def dead(n: int, generator: torch.Generator) -> torch.Tensor:
    """Correlation of unrelated features of which a third of either side is dead: all-zero rows and columns."""
    s = unrelated(n, generator)
    s[torch.randperm(n, generator=generator)[: n // 3]] = 0
    s[:, torch.randperm(n, generator=generator)[: n // 3]] = 0
    return s


def product(n: int, generator: torch.Generator) -> torch.Tensor:
    """i * j: every shortest path is long, the classic bad case of path-based solvers."""
    i = torch.arange(1, n + 1, dtype=torch.float32)
    return i[:, None] * i[None, :]


FAMILIES: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    "uniform": uniform,
    "unrelated": unrelated,
    "related": related,
    "low_rank": low_rank,
    "planted": planted,
    "equal": equal,
    "dead": dead,
    "product": product,
}


def make(name: str, n: int, seed: int = 0) -> torch.Tensor:
    """Return the (n, n) float32 similarity of one family."""
    return FAMILIES[name](n, torch.Generator().manual_seed(seed))
