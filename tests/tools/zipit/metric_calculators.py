"""ZipIt's streaming metric: features as (channels, samples), one tensor a model."""

from __future__ import annotations

import tool_algorithms as restated
import torch
from torch import Tensor


class CovarianceMetric:
    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, ...]] = []

    def update(self, batch_size: int, *feats: Tensor) -> None:
        self.batches.append(feats)

    def finalize(self, numel: int, eps: float = 1e-4) -> Tensor:
        return torch.from_numpy(restated.covariance(self.batches)).float()
