"""Zip: greedy agglomeration of units across and inside models (docs/method.md rules 5 and 7)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .assignment import assign_blocks
from .covariance import cross_blocks

Floats = npt.NDArray[np.float64]

# Keeps a product that should be whole, as 0.3 * 10, from being cut to the integer below.
WHOLE = 1e-4


@dataclass(frozen=True)
class Zip:
    """A many-to-one match.

    labels: (models, units a model), int64: unit i of model m belongs to merged unit labels[m, i].
    sizes: (width,), int64: members of each merged unit, in all models.
    value: 0-dim, float64: mean of the similarities taken, 0 where nothing was merged.
    """

    labels: Tensor
    sizes: Tensor
    value: Tensor


@dataclass
class _Greedy:
    """One run of the greedy rule over the units of one union of blocks."""

    similarity: Floats  # symmetric, diagonal -inf; changed by the run
    model: npt.NDArray[np.int64]  # of each unit
    attenuation: float
    model_budget: list[int]  # shared by all unions
    block_budget: list[int] | None  # of this union

    def bar_spent(self, m: int) -> None:
        """Bar every pair inside model m once one of its budgets is spent."""
        if self.model_budget[m] <= 0 or (self.block_budget is not None and self.block_budget[m] <= 0):
            own = self.model == m
            self.similarity[np.ix_(own, own)] = -np.inf

    def run(self, merges: int) -> tuple[npt.NDArray[np.int64], list[float]]:
        """Merge; return the surviving unit that each unit belongs to, and the similarities taken.

        Raises:
            LookupError: no pair is left to merge.
        """
        s, units = self.similarity, self.similarity.shape[0]
        owner = np.arange(units)
        taken: list[float] = []
        for m in range(len(self.model_budget)):
            self.bar_spent(m)
        for _ in range(merges):
            # argmax takes the first of equal entries in row-major order.
            first, second = divmod(int(np.argmax(s)), units)
            if s[first, second] == -np.inf:
                raise LookupError
            i, j = min(first, second), max(first, second)
            taken.append(float(s[i, j]))
            owner[owner == j] = i
            if self.attenuation > 0:
                joined = np.minimum(s[i], s[j]) * self.attenuation
            else:
                joined = np.full(units, -np.inf)
            s[i, :] = joined
            s[:, i] = joined
            s[i, i] = -np.inf
            s[j, :] = -np.inf
            s[:, j] = -np.inf
            if self.model[i] == self.model[j]:
                m = int(self.model[i])
                self.model_budget[m] -= 1
                if self.block_budget is not None:
                    self.block_budget[m] -= 1
                self.bar_spent(m)
        return owner, taken


def _check(similarity: Tensor, models: int, blocks: int, width: int | None) -> tuple[Floats, int, int]:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity: expected a square matrix, got shape {tuple(similarity.shape)}")
    if not similarity.is_floating_point():
        raise TypeError(f"similarity: expected a floating dtype, got {similarity.dtype}")
    total = similarity.shape[0]
    if models < 1 or total % models:
        raise ValueError(f"models: expected a divisor of {total} units, got {models}")
    units = total // models
    width = units if width is None else width
    if not 0 < width <= total and total:
        raise ValueError(f"width: expected 1..{total}, got {width}")
    if blocks < 1 or units % blocks:
        raise ValueError(f"blocks: expected a divisor of {units} units, got {blocks}")
    if width % blocks:
        raise ValueError(f"width: expected a multiple of {blocks} blocks, got {width}")
    array: Floats = similarity.detach().to("cpu", torch.float64, copy=True).numpy()
    np.fill_diagonal(array, -np.inf)
    if np.isnan(array).any() or np.isinf(array).sum() > total:
        raise ValueError("similarity: expected finite entries off the diagonal, got NaN or inf")
    return array, units, width


def _pairing(array: Floats, models: int, blocks: int, block_indices: Tensor | None) -> npt.NDArray[np.int64]:
    """Return (models, blocks): the block of each model in the union of every block of model 0."""
    if block_indices is None:
        found = np.tile(np.arange(blocks), (models, 1))
        if models > 1 and blocks > 1:
            match = assign_blocks(cross_blocks(torch.from_numpy(array), models), blocks)
            if match.block_indices is not None:
                found[1:] = match.block_indices.numpy()
        return found
    given: npt.NDArray[np.int64] = block_indices.detach().to("cpu", torch.int64).numpy()
    if given.shape != (models, blocks) or not (np.sort(given, axis=1) == np.arange(blocks)).all():
        raise ValueError(f"block_indices: expected {models} permutations of {blocks} blocks, got {given.tolist()}")
    return given[:, np.argsort(given[0])]  # unions in the order of model 0's blocks


def zip_units(
    similarity: Tensor,
    models: int = 2,
    width: int | None = None,
    attenuation: float = 0.5,
    budget: float = 1.0,
    blocks: int = 1,
    block_indices: Tensor | None = None,
) -> Zip:
    """Merge the most similar units, one pair at a time, until `width` are left.

    Args:
        similarity: (models*d, models*d), floating, symmetric, finite, rows model-major; the diagonal is not read.
        models: number of models N.
        width: merged units; None is d.
        attenuation: factor of a merged unit's similarities; at 0 or below a merged unit is not merged again.
        budget: share of the merges a model may spend inside itself: int(((N*d - width) // N) * budget + 1e-4).
        blocks: blocks of d / blocks units that are paired first; units merge inside paired blocks only.
        block_indices: (models, blocks), int64: a pairing from outside; block_indices[m, b] is the block of model m
            that joins block b of model 0.

    Returns:
        Zip, on similarity's device. Merged units are numbered by model 0's block, then by lowest surviving unit.

    Raises:
        ValueError: bad shapes, NaN or inf off the diagonal, a width that the blocks cannot share evenly, or no
            feasible pair left.
        TypeError: not floating.

    Source: docs/method.md rules 5 and 7.
    """
    array, d, width = _check(similarity, models, blocks, width)
    if not budget >= 0:
        raise ValueError(f"budget: expected a number >= 0, got {budget}")
    if not np.isfinite(attenuation):
        raise ValueError(f"attenuation: expected a finite number, got {attenuation}")
    pairing = _pairing(similarity.detach().to("cpu", torch.float64).numpy(), models, blocks, block_indices)
    to_remove = models * d - width
    model_budget = [int((to_remove // models) * budget + WHOLE)] * models
    n, merged = d // blocks, width // blocks
    labels = np.zeros(models * d, dtype=np.int64)
    taken: list[float] = []
    for b in range(blocks):
        members = np.concatenate([m * d + pairing[m, b] * n + np.arange(n) for m in range(models)])
        block_budget = [int(to_remove // (models * blocks) + WHOLE)] * models if blocks > 1 else None
        greedy = _Greedy(array[np.ix_(members, members)], members // d, attenuation, model_budget, block_budget)
        try:
            owner, values = greedy.run(n * models - merged)
        except LookupError:
            raise ValueError(
                f"width: expected one that the budget can reach; no feasible pair is left on the way from "
                f"{models * d} units to width {width} with budget {budget} in {blocks} block(s)"
            ) from None
        survivors = np.unique(owner)
        labels[members] = b * merged + np.searchsorted(survivors, owner)
        taken += values
    result = torch.from_numpy(labels).to(similarity.device)
    return Zip(
        labels=result.reshape(models, d),
        sizes=torch.bincount(result, minlength=width),
        value=torch.tensor(float(np.mean(taken)) if taken else 0.0, dtype=torch.float64, device=similarity.device),
    )
