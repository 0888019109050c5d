"""ZipIt's matching function: (merge transposed, unmerge) from {"covariance": (N * n, N * n)}."""

from __future__ import annotations

from typing import Any

import tool_algorithms as restated
import torch
from torch import Tensor


def match_tensors_zipit(
    metric: dict[str, Tensor], r: float = 0.5, a: float = 0.3, b: float = 0.125, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    similarity = restated.correlation(metric["covariance"].double().numpy())
    models = int(1 / (1 - r) + 0.5)
    width = int(len(similarity) * (1 - r) + 1e-4)
    unmerge = torch.from_numpy(restated.zip_greedily(similarity, models, width, a, b)).float()
    return (unmerge / (unmerge.sum(0, keepdim=True) + 1e-5)).T, unmerge
