"""Activation statistics: one float64 covariance over the stacked units of all models (docs/method.md rule 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A unit is dead when its deviation is at most this share of its root mean square: a guard relative to the
# unit's own size, so that small but varying features are kept.
DEAD = 1e-7


def correlation_from_moments(second: Tensor, mean: Tensor) -> Tensor:
    """Return the correlation of units from their centred second moments.

    Args:
        second: (n, n), float64: mean over samples of (x_i - mean_i)(x_j - mean_j).
        mean: (n,), float64.

    Returns:
        (n, n), float64: a dead unit has 0 with all others; the diagonal is 1.
    """
    variance = second.diagonal().clamp(min=0.0)
    sigma = variance.sqrt()
    dead = sigma <= DEAD * (variance + mean * mean).sqrt()
    safe = torch.where(dead, torch.ones_like(sigma), sigma)
    # A matrix product is symmetric only up to rounding; zip relies on exact symmetry.
    correlation = (second + second.T) / 2 / (safe[:, None] * safe[None, :])
    correlation[dead, :] = 0.0
    correlation[:, dead] = 0.0
    correlation.fill_diagonal_(1.0)
    return correlation


def cross_blocks(full: Tensor, models: int) -> Tensor:
    """Cut the (model 0, model m) blocks out of a full similarity.

    Args:
        full: (models*width, models*width), rows model-major.

    Returns:
        (models-1, width, width); entry [m-1, i, j] belongs to unit i of model 0 and unit j of model m.
    """
    width = full.shape[0] // models
    return full.reshape(models, width, models, width)[0, :, 1:, :].permute(1, 0, 2).contiguous()


class Covariance:
    """Streaming population covariance of the units of several models over the same samples.

    Args:
        width: units a model.
        models: number of models.
        scope: "full" for every pair of models, "cross" for model 0 against each other model.
        device: where the sums live.
        backend: accepted for the signature only.

    Source: docs/method.md rule 1.
    """

    def __init__(
        self,
        width: int,
        models: int = 2,
        scope: str = "full",
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        if scope not in ("full", "cross"):
            raise ValueError(f'scope: expected "full" or "cross", got {scope!r}')
        if width < 1 or models < 2:
            raise ValueError(f"expected width >= 1 and models >= 2, got width {width} and models {models}")
        self.width, self.models, self.scope, self.backend = width, models, scope, backend
        units = models * width
        self._count = 0
        self._mean = torch.zeros(units, dtype=torch.float64, device=device)
        # Sum over samples of the outer product of centred features.
        self._scatter = torch.zeros(units, units, dtype=torch.float64, device=device)

    def update(self, features: Sequence[Tensor], dim: int = -1) -> None:
        """Add one batch.

        Args:
            features: one floating tensor a model, any shape, with `width` entries along dim; all else are samples,
                the same number for every model, paired by position. Non-finite entries count as 0.
            dim: the unit axis.

        Raises:
            ValueError: another number of models, a wrong width, no samples, or sample counts that disagree.
            TypeError: a tensor that is not floating.
        """
        if len(features) != self.models:
            raise ValueError(f"features: expected one tensor a model ({self.models}), got {len(features)}")
        columns = []
        for m, x in enumerate(features):
            if not x.is_floating_point():
                raise TypeError(f"features[{m}]: expected a floating tensor, got {x.dtype}")
            if x.shape[dim] != self.width:
                raise ValueError(f"features[{m}]: expected {self.width} units along dim {dim}, got {tuple(x.shape)}")
            if x.numel() == 0:
                raise ValueError(f"features[{m}]: expected at least one sample, got shape {tuple(x.shape)}")
            samples = x.detach().to(self._mean).movedim(dim, -1).reshape(-1, self.width)
            columns.append(torch.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0))
        counts = [c.shape[0] for c in columns]
        if len(set(counts)) != 1:
            raise ValueError(f"features: expected as many samples from every model, got {counts}")
        stacked = torch.cat(columns, dim=1)
        mean = stacked.mean(dim=0)
        centred = stacked - mean
        self._add(counts[0], mean, centred.T @ centred)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Pool two sets of samples: scatters add, and the shift between their means adds one rank-one term."""
        total = self._count + count
        if total == 0:
            return
        shift = mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self._count * count / total)
        self._mean += shift * (count / total)
        self._count = total

    def merge(self, other: Covariance) -> None:
        """Add the samples that another Covariance of the same kind has seen.

        Raises:
            ValueError: width, models or scope differ.
        """
        mine, theirs = (self.width, self.models, self.scope), (other.width, other.models, other.scope)
        if mine != theirs:
            raise ValueError(f"other: expected (width, models, scope) {mine}, got {theirs}")
        self._add(other._count, other._mean.to(self._mean), other._scatter.to(self._mean))

    def all_reduce(self, group: Any = None) -> None:
        """Pool the samples of all processes of a torch.distributed group, in rank order."""
        import torch.distributed as dist

        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, self.state_dict(), group=group)
        self._count = 0
        self._mean.zero_()
        self._scatter.zero_()
        for state in gathered:
            self.merge(Covariance.from_state_dict(state))

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return self._count

    @property
    def mean(self) -> Tensor:
        """Means, (models, width), float64."""
        return self._mean.reshape(self.models, self.width).clone()

    @property
    def variance(self) -> Tensor:
        """Population variances, (models, width), float64."""
        return (self._scatter.diagonal() / max(self._count, 1)).reshape(self.models, self.width)

    def correlation(self) -> Tensor:
        """Return the correlation of units, float64.

        Returns:
            "full": (models*width, models*width); "cross": (models-1, width, width), [m-1, i, j] being unit i of
            model 0 and unit j of model m. A dead unit has 0 with all others and 1 with itself.

        Raises:
            ValueError: no samples were seen.
        """
        if self._count == 0:
            raise ValueError("correlation: expected at least one sample, got none")
        full = correlation_from_moments(self._scatter / self._count, self._mean)
        return full if self.scope == "full" else cross_blocks(full, self.models)

    def state_dict(self) -> dict[str, Any]:
        """Return all that from_state_dict needs; the tensors are copies."""
        return {
            "width": self.width,
            "models": self.models,
            "scope": self.scope,
            "count": self._count,
            "mean": self._mean.clone(),
            "scatter": self._scatter.clone(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Covariance:
        """Build the Covariance that state_dict described."""
        result = cls(state["width"], state["models"], state["scope"], device=state["mean"].device)
        result._add(state["count"], state["mean"], state["scatter"])
        return result
