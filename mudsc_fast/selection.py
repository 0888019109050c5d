"""Units chosen instead of averaged: those from which all others are reconstructed best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mudsc_fast.zipping import unions_of


class Selection(NamedTuple):
    """leaders: (width,) int64, the unit m * d + i that each merged unit is. labels: (models, d) int64, every other unit
    with the leader it correlates with most. value: 0-dim float64, the share of the variance that the leaders
    explain."""

    leaders: Tensor
    labels: Tensor
    value: Tensor


def select_units(
    covariance: Tensor,
    models: int = 2,
    width: int | None = None,
    reads: Tensor | None = None,
    blocks: int = 1,
    block_indices: Tensor | None = None,
) -> Selection:
    """Choose the units of all models that best reconstruct, linearly, what is read of all of them.

    Greedy: the unit taken next is the one with the largest part that those taken before do not explain (a pivoted
    Cholesky factorisation). O(width * units) a unit taken.

    Args:
        covariance: (models * d, models * d), symmetric, floating; row m * d + i is unit i of model m.
        models: number of models. width: units to keep; None keeps d.
        reads: (models * d,), how strongly each unit is read, the norm of the weights that consume it; None: all alike.
        blocks: as for `zip_units`, with block_indices: the units of one union of blocks are chosen among themselves.

    Returns:
        A Selection. Merged units are numbered by their leader, with blocks in the order of model 0's blocks.

    Raises:
        TypeError, ValueError: as `zip_units`.

    Source: docs/quality.md.
    """
    if not isinstance(covariance, Tensor) or not covariance.is_floating_point():
        raise TypeError(f"covariance: expected a floating tensor, got {getattr(covariance, 'dtype', type(covariance))}")
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1] or not covariance.shape[0]:
        raise ValueError(f"covariance: expected a square matrix, got shape {tuple(covariance.shape)}")
    if models < 1 or covariance.shape[0] % models:
        raise ValueError(f"models: expected a divisor of the {covariance.shape[0]} units, got {models!r}")
    if not bool(torch.isfinite(covariance).all()):
        raise ValueError("covariance: NaN or inf in it")
    units = covariance.shape[0]
    d = units // models
    width = d if width is None else width
    if not 1 <= width <= units or d % blocks or width % blocks:
        raise ValueError(f"width: expected 1..{units} units in {blocks} blocks, got {width!r}")
    matrix = covariance.detach().double().cpu()
    deviation = matrix.diagonal().clamp(min=0).sqrt()
    if reads is not None:
        if reads.shape != (units,):
            raise ValueError(f"reads: expected shape ({units},), got {tuple(reads.shape)}")
        strength = reads.detach().double().cpu()
        weighted = matrix * torch.outer(strength, strength)
    else:
        weighted = matrix
    alike = matrix / torch.outer(deviation, deviation).clamp(min=1e-300)
    leaders = torch.empty(width, dtype=torch.int64)
    labels = torch.empty(units, dtype=torch.int64)
    left, each = 0.0, width // blocks
    for k, own in enumerate(unions_of(alike, d, models, blocks, block_indices)):
        chosen, rest = _pivots(weighted[own][:, own], each)
        left += rest
        mine = own[chosen]
        leaders[k * each : (k + 1) * each] = mine
        nearest = alike[own][:, mine].argmax(1)
        nearest[chosen] = torch.arange(each)
        labels[own] = nearest + k * each
    total = float(weighted.diagonal().sum())
    value = torch.tensor(1 - left / total if total > 0 else 1.0, dtype=torch.float64)
    return Selection(leaders, labels.reshape(models, d), value)


def select_blocks(covariances: Sequence[Tensor], models: int, unions: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
    """Of every union of blocks the model whose block best reconstructs what the blocks chosen before it leave.

    Heads and groups of a norm are more than their units: what is normalised or attended together stays what it was only
    if it is taken from one model. The unions with the most variance are decided first.

    covariances: one (models * d, models * d) float64 matrix a space, weighted by what is read; each counts by the share
        of its own total. unions: one (blocks, models * size) matrix a space, model by model: the units of every union.

    Returns (blocks,) int64, and for every space the share of the variance that the chosen blocks explain.
    """
    left = [matrix / matrix.diagonal().sum().clamp(min=1e-300) for matrix in covariances]
    weight = torch.stack([m.diagonal()[u].sum(1) for m, u in zip(left, unions, strict=True)]).sum(0)
    floors = [1e-12 * float(matrix.diagonal().max()) + 1e-300 for matrix in left]
    chosen = torch.zeros(len(weight), dtype=torch.int64)
    for k in weight.argsort(descending=True, stable=True).tolist():
        gains, made = [], []
        for m in range(models):
            parts = []
            for matrix, union, floor in zip(left, unions, floors, strict=True):
                own = union[k].reshape(models, -1)[m]
                # Of units that the blocks before explain, rounding is left, which may be negative.
                values, vectors = torch.linalg.eigh(matrix[own][:, own])
                ridge = (1e-9 * matrix.diagonal()[own].mean()).clamp(min=floor)
                parts.append((vectors / (values.clamp(min=0) + ridge).sqrt()).T @ matrix[own])
            gains.append(sum(float(part.square().sum()) for part in parts))
            made.append(parts)
        best = max(range(models), key=gains.__getitem__)
        chosen[k] = best
        left = [matrix - part.T @ part for matrix, part in zip(left, made[best], strict=True)]
    return chosen, [1 - float(matrix.diagonal().clamp(min=0).sum()) for matrix in left]


def unexplained(
    covariance: Tensor, models: int, similarity: Tensor, blocks: int = 1, block_indices: Tensor | None = None
) -> Tensor:
    """(models * d / blocks + 1,) float64: the share of the variance that 0, 1, ... chosen units of each block leave.

    covariance: as for `select_units`, float64 and weighted by what is read. similarity: (models * d, models * d), by
    which blocks are paired where block_indices are not given.
    """
    each = len(covariance) // blocks
    left = torch.zeros(each + 1, dtype=torch.float64)
    for own in unions_of(similarity, len(covariance) // models, models, blocks, block_indices):
        left += _path(covariance[own][:, own], each)[1]
    return left / left[0] if float(left[0]) > 0 else torch.zeros_like(left)


def _pivots(matrix: Tensor, count: int) -> tuple[Tensor, float]:
    """The first `count` pivots, rising, and the trace that they leave unexplained."""
    order, left = _path(matrix, count)
    return order.sort().values, float(left[-1])


def _path(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` pivots in the order in which they are taken, and the trace left before and after each."""
    rest = matrix.diagonal().clone()
    columns = matrix.new_zeros(count, len(matrix))
    taken = torch.zeros(len(matrix), dtype=torch.bool)
    order = torch.empty(count, dtype=torch.int64)
    left = torch.empty(count + 1, dtype=torch.float64)
    left[0] = rest.clamp(min=0).sum()
    floor = 1e-12 * float(rest.max().clamp(min=0))
    for k in range(count):
        pivot = int(torch.where(taken, -torch.inf, rest).argmax())
        taken[pivot], order[k] = True, pivot
        if float(rest[pivot]) > floor:
            column = matrix[pivot] - columns[:k].T @ columns[:k, pivot]
            columns[k] = column / rest[pivot].sqrt()
            rest = (rest - columns[k].square()).clamp(min=0)
        left[k + 1] = torch.where(taken, 0.0, rest).sum()
    return order, left
