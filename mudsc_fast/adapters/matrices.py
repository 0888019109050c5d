"""Matches as the dense matrices that other tools multiply: merge and unmerge, with or without the bias row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_and_unmerge(
    labels: Tensor, width: int, device: torch.device | str, eps: float = 0.0, bias: bool = False
) -> tuple[Tensor, Tensor]:
    """(merge, unmerge), both (models * d, width) float32: U with U[k, j] = 1 where unit k belongs to merged unit j, and
    U over its column sums (plus eps, which the published codes add).

    labels: (models, d) int64. bias: the unmerge matrices of the models each get one more row and column, for a bias.
    """
    unmerge = torch.zeros(labels.numel(), width, device=device)
    unmerge[torch.arange(labels.numel(), device=device), labels.reshape(-1).to(device)] = 1
    merge = unmerge / (unmerge.sum(dim=0, keepdim=True) + eps)
    return merge, _with_bias(unmerge.chunk(labels.shape[0])) if bias else unmerge


def _with_bias(matrices: Sequence[Tensor]) -> Tensor:
    padded = []
    for matrix in matrices:
        wider = matrix.new_zeros(matrix.shape[0] + 1, matrix.shape[1] + 1)
        wider[:-1, :-1] = matrix
        wider[-1, -1] = 1
        padded.append(wider)
    return torch.cat(padded)


def correlation_of(covariance: Tensor) -> Tensor:
    """The correlation of a covariance matrix; units without variance correlate with nothing but themselves."""
    scale = inverse_deviation(covariance)
    correlation = covariance * torch.outer(scale, scale)
    correlation.diagonal().fill_(1)
    return correlation


def inverse_deviation(covariance: Tensor) -> Tensor:
    """One over each unit's standard deviation, 0 for a unit without variance."""
    deviation = covariance.diagonal().to(torch.float64).clamp(min=0).sqrt()
    dead = deviation == 0
    return torch.where(dead, torch.zeros_like(deviation), 1 / deviation.masked_fill(dead, 1)).to(covariance.dtype)


def require_square(name: str, matrix: object, models: int) -> Tensor:
    """The matrix, if it is a square tensor whose rows divide among the models; ValueError or TypeError otherwise."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(matrix).__name__}")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] % models:
        raise ValueError(f"{name}: expected a square matrix of {models} models, got shape {tuple(matrix.shape)}")
    return matrix
